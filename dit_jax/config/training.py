"""Settings of a training: optimizer, length, mesh of devices; and of a sweep of trainings."""

from dataclasses import dataclass

from dit_jax.error import LARGEST, UsageError, at_least, choice, in_range, number, shown, typed

EMA_WIDTHS = (1e-3, 0.28)  # of power EMAs: with 0.289 all steps would count alike


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and the EMA of the weights."""

    learning_rate: float = 1e-4  # after the warm-up
    schedule: str = "constant"  # constant | cosine (to zero at train.steps), after the warm-up
    warmup_steps: int = 0  # steps over which the learning rate rises from 0
    weight_decay: float = 0.0  # decoupled, times the learning rate
    b1: float = 0.9  # decay of the mean gradient
    b2: float = 0.999  # decay of the mean squared gradient
    eps: float = 1e-8  # added to the root of the mean squared gradient
    clip: float = 0.0  # largest global norm of the gradient; 0 = no clipping
    accumulate: int = 1  # microbatches per step
    ema: str = "constant"  # constant: decay `ema_decay` | power: decay (1 - 1/t)^(gamma + 1)
    ema_decay: float = 0.9999  # constant: weight of the old average per step
    ema_width: float = 0.05  # power: standard deviation of the averaging profile, relative to the steps so far
    ema_tracks: tuple = ()  # rising widths of more power EMAs, of which snapshots give other widths afterwards; () = none
    snapshot_every: int = 1000  # steps between two snapshots of ema_tracks, in W/snapshots

    def __post_init__(self):
        choice("optim.schedule", self.schedule, ("constant", "cosine"))
        choice("optim.ema", self.ema, ("constant", "power"))
        at_least(0, self, "learning_rate", "warmup_steps", "weight_decay", "clip", "eps")
        for name in ("b1", "b2", "ema_decay"):
            in_range(f"optim.{name}", getattr(self, name), 0.0, 1.0)
        at_least(1, self, "accumulate", "snapshot_every")
        in_range("optim.ema_width", self.ema_width, *EMA_WIDTHS)
        low, high = EMA_WIDTHS
        widths = [width for width in self.ema_tracks if number(width) and low <= width <= high]
        if [*self.ema_tracks] != sorted(set(widths)) or len(widths) == 1:
            expected = f"two or more rising widths from {low:g} to {high:g}, such as (0.05, 0.1), or ()"
            raise UsageError(f"optim.ema_tracks: found {shown(self.ema_tracks)}, expected {expected}")


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch and random draws of a training run, its logging, checkpoints and safeguards."""

    steps: int = 400_000  # of the optimizer
    batch_size: int = 256  # images per step, over all devices and processes
    seed: int = 0  # of initial weights, data order, noise and dropout
    cond_dropout: float = 0.1  # share of conditions (labels, captions) replaced by the null one; once label_dropout
    log_every: int = 100  # steps
    checkpoint_every: int = 10_000  # steps
    keep: int = 3  # checkpoints kept, the newest ones
    keep_at: tuple = ()  # rising steps whose checkpoints are saved and never pruned
    keep_every: int = 0  # steps between two checkpoints that are saved and never pruned, beside keep_at; 0 = none
    spike: float = 20.0  # standard deviations above the mean loss or gradient norm that skip a step; 0 = off
    spike_window: int = 100  # steps of the rolling mean and deviation, and steps before the first skipped spike
    skips_in_a_row: int = 10  # consecutive skipped steps (not finite, or spikes) that stop the run
    replay_every: int = 0  # steps between two that are computed twice and compared bit for bit; 0 = never
    profile: tuple = ()  # (first, last): steps of which each process writes a trace for xprof into W/profile
    evaluate_every: int = 0  # steps between two evaluations in training, as by `evaluate`, one at the end; 0 = never
    grid_every: int = 0  # steps between two grids of samples in W/samples, of the EMA weights; 0 = never
    wandb: str = ""  # project of Weights & Biases that scalars and grids go to as well; "" = none

    def __post_init__(self):
        typed(self.steps, int, "train.steps")
        at_least(1, self, "steps", "batch_size", "log_every", "checkpoint_every", "keep")
        at_least(1, self, "spike_window", "skips_in_a_row")
        in_range("train.seed", self.seed, 0, LARGEST)
        at_least(0, self, "spike", "replay_every", "keep_every", "evaluate_every", "grid_every")
        in_range("train.cond_dropout", self.cond_dropout, 0.0, 1.0)
        if [*self.keep_at] != sorted({step for step in self.keep_at if type(step) is int and 0 < step <= self.steps}):
            expected = f"strictly rising whole numbers from 1 to train.steps = {self.steps}"
            raise UsageError(f"train.keep_at: found {shown(self.keep_at)}, expected {expected}")
        ends = self.profile
        if ends and not (len(ends) == 2 and all(type(step) is int for step in ends) and 0 < ends[0] <= ends[1]):
            raise UsageError(
                f"train.profile: found {shown(ends)}, expected a first and a last step, such as (100, 110)"
            )


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis (one axis may be -1, "the rest"), and timeouts of a job on several hosts."""

    data: int = -1  # copies of the weights, each with its share of the batch
    fsdp: int = 1  # devices that weights and batch are split over
    tensor: int = 1  # devices that the work on an image is split over
    heartbeat: int = 30  # seconds without a heartbeat after which a process counts as lost and the others stop
    initialization: int = 300  # seconds within which all processes must join

    def __post_init__(self):
        at_least(1, self, "heartbeat", "initialization")
        sizes = {name: getattr(self, name) for name in ("data", "fsdp", "tensor")}
        for name, size in sizes.items():
            if size != -1 and size < 1:
                raise UsageError(f"mesh.{name}: found {size}, expected a number of devices, or -1 for the rest")
        if list(sizes.values()).count(-1) > 1:
            raise UsageError(f"mesh: found {sizes}, expected at most one -1")


@dataclass(frozen=True)
class SweepConfig:
    """An isoFLOP ladder: each budget with the sizes in its window. A size is (width, depth, heads)."""

    budgets: tuple = ()  # training FLOPs per run
    sizes: tuple = ()  # all (width, depth, heads) of the ladder, smallest first
    windows: tuple = ()  # per budget, (first, last + 1) of its indices into `sizes`
    curves: bool = False  # one run per size, evaluated at each budget's step; for a constant rate and a power EMA
    samples: int = 0  # images drawn from each evaluated checkpoint and scored as by `evaluate`; 0 = none
    base_width: int = 64  # width for which optim.learning_rate is meant
    width_power: float = 1.0  # the learning rate scales as (base_width / width) ** width_power
    extrapolate: float = 0.0  # train the recommended model at this multiple of the largest budget; 0 = no
    processes: int = 1  # cells that run in parallel
    grid: int = 8  # samples per class in the report's grid
    grid_guidance: float = 2.0  # guidance scale of that grid

    def __post_init__(self):
        budgets, sizes, windows = len(self.budgets), len(self.sizes), len(self.windows)
        for budget in self.budgets:
            if not number(budget) or budget <= 0:
                raise UsageError(f"sweep.budgets: found {shown(budget)}, expected training FLOPs above 0")
        for name, count, form in (("sizes", 3, "(width, depth, heads)"), ("windows", 2, "(first, end)")):
            for row in getattr(self, name):
                whole = isinstance(row, tuple) and len(row) == count and all(type(n) is int and n < 2**63 for n in row)
                if not whole or (name == "sizes" and min(row) < 1):
                    raise UsageError(f"sweep.{name}: found {shown(row)}, expected {form} in whole numbers")
        for window in self.windows:
            if not 0 <= window[0] < window[1] <= sizes:
                raise UsageError(f"sweep.windows: found {shown(window)}, expected (first, end) within {sizes} sizes")
        if windows != budgets:
            raise UsageError(f"sweep.windows: found {windows}, expected one per budget, so {budgets}")
        at_least(1, self, "processes", "base_width", "grid")
        at_least(0, self, "extrapolate", "samples")
        in_range("sweep.grid_guidance", self.grid_guidance, 0.0, 1000.0)
