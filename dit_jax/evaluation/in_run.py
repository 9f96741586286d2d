"""Evaluation while a run trains: of weights where they lie on its mesh, by the protocols of `evaluate` and into the same records."""

from collections.abc import Callable

import jax

from dit_jax.config import Config
from dit_jax.devices.processes import by_leader, is_common, leader
from dit_jax.error import Interrupted, UsageError
from dit_jax.evaluation.protocol import samplings
from dit_jax.evaluation.run import Weights, describe, record, tasks
from dit_jax.log import warn
from dit_jax.sampling.weights import weights_hash
from dit_jax.workdir.goodput import Ledger
from dit_jax.workdir.records import read_records


def check_in_run(cfg: Config) -> None:
    """Raises UsageError for widths of EMAs, which are made of snapshots on the disk."""
    if found := [sample.ema for sample in samplings(cfg) if sample.ema]:
        expected = (
            "expected none with train.evaluate_every: `evaluate` scores such widths once the run has kept its snapshots"
        )
        raise UsageError(f"sample.ema, eval.ema: found {found[0]:g}, {expected}")


def make_scores(
    cfg: Config, workdir: str, mesh, data: dict, stop: list, ledger: Ledger, quiet: bool = False
) -> Callable[..., dict[str, float]]:
    """Returns score(step, state, restored=False) -> scalars for the run's curves, {} if there is nothing new or `stop` is not empty.

    `state` has the weights `ema` and `params` on `mesh`; they are not copied. `data`: identity of the training data. What is
    recorded is not measured again, and then a `restored` state's scalars are written already. A protocol that the model fails, for
    instance by numbers that are not finite, is a warning. Of a grid of samplings the first gives the scalars. All processes call both
    functions. Raises UsageError for a protocol that is impossible.
    """
    check_in_run(cfg)
    wanted = tasks(cfg, workdir, mesh, stop, quiet=True)

    def found(step: int) -> dict[str, dict]:
        done = read_records(workdir)
        return {task.id: done[step, task.id]["metrics"] for task in wanted if (step, task.id) in done}

    def measure(step: int, task, weights: Weights) -> None:
        try:
            record(workdir, step, task, weights, ledger, quiet)
        except UsageError as error:
            if jax.process_count() > 1 and not is_common(error):
                raise
            if leader():
                warn(f"step {step}, {describe(task, {})}{error}; it is not recorded, and the training goes on")

    def score(step: int, state, restored: bool = False) -> dict[str, float]:
        jax.block_until_ready(
            state.ema
        )  # else the sums of a step under way meet what processes tell each other, on CPUs
        done = by_leader(lambda: found(step))
        missing = [task for task in wanted if task.id not in done]
        if restored and not missing:
            return {}
        try:
            for kind in dict.fromkeys(task.weights for task in missing):
                params = getattr(state, kind)
                weights = Weights(params, weights_hash(params), data)
                for task in [task for task in missing if task.weights == kind]:
                    measure(step, task, weights)
        except Interrupted:
            return {}
        scores = by_leader(lambda: found(step))
        values: dict[str, float] = {}
        for task in reversed([task for task in wanted if task.id in scores]):
            values |= {f"eval/{name}": value for name, value in scores[task.id].items() if value is not None}
        return values

    return score
