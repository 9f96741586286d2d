"""Settings of the training objective."""

from dataclasses import dataclass

from dit_jax.error import UsageError, at_least, choice, in_range

FEW_STEPS = ("consistency", "mean_flow", "progressive")  # objectives of models that are sampled in few steps


@dataclass(frozen=True)
class ObjectiveConfig:
    """Training objective: the loss of `diffusion.process`, or one for sampling in few steps (docs/few_steps.md)."""

    name: str = ""  # "" (the loss of diffusion.process) | consistency | mean_flow | progressive
    guidance: float = 1.0  # few steps: scale of the guided velocity to learn, then one forward an evaluation; 1 = none
    ratio: float = 0.25  # mean_flow: share of images whose target time r is below t; the rest has r = t
    adaptive: float = 1.0  # consistency, mean_flow: power of the weight 1 / (error + 1e-3); 0 = no weight
    steps: int = 4  # progressive: sampling steps of the student in the end
    rounds: int = 3  # progressive: halvings, the first from steps x 2^rounds; 0 = only guidance is distilled
    round_steps: int = 1000  # progressive: training steps of a round

    def __post_init__(self):
        choice("objective.name", self.name, ("", *FEW_STEPS))
        in_range("objective.guidance", self.guidance, 0.0, 1000.0)
        in_range("objective.ratio", self.ratio, 0.0, 1.0)
        in_range("objective.adaptive", self.adaptive, 0.0, 2.0)
        at_least(1, self, "steps", "round_steps")
        in_range("objective.rounds", self.rounds, 0, 12)
        if self.name == "progressive" and (self.rounds > 0) == (self.guidance != 1.0):
            expected = "expected 1 with objective.rounds above 0, or another scale with objective.rounds = 0"
            why = "guidance is distilled first, and halved from that run"
            raise UsageError(f"objective.guidance: found {self.guidance}, {expected}: {why}")

    @property
    def taught(self) -> bool:
        """Whether the weights that training begins with stay beside as a teacher."""
        return self.name == "progressive" or (self.name == "consistency" and self.guidance != 1.0)

    def steps_at(self, step: int) -> int:
        """Sampling steps of a student of `progressive` after `step` accepted training steps, the number of its round; 0 = any number."""
        if self.name != "progressive" or not self.rounds:
            return 0
        return self.steps * 2 ** (self.rounds - 1 - min(max(step - 1, 0) // self.round_steps, self.rounds - 1))
