"""Saves while a run trains: the state as a checkpoint, and snapshots of its power EMAs."""

from collections.abc import Callable

from dit_jax import checkpoint
from dit_jax.checkpoint.place import SNAPSHOTS
from dit_jax.config import Config
from dit_jax.devices.processes import by_leader
from dit_jax.error import JobError
from dit_jax.training.guard import all_finite
from dit_jax.training.state import TrainState
from dit_jax.workdir.goodput import Ledger, write_entry


def save_state(
    saver: checkpoint.Saver, state: TrainState, position: dict, meta: dict, ledger: Ledger, workdir: str
) -> None:
    """Starts saving the state and writes the ledger's line once the checkpoint is complete. Raises JobError if it is not finite."""
    _check_finite(state)
    entry = ledger.entry()
    step, notes = int(state.step), meta | _updates(state)
    saver.save(step, state.items(), position, notes, after=lambda: write_entry(entry, workdir))


def make_snapshots(
    cfg: Config, workdir: str, saver: checkpoint.Saver, meta: dict, ledger: Ledger
) -> Callable[[int, TrainState], None]:
    """Returns snapshot(step, state), which starts saving the tracks if they are due and not there.

    Call it before the step's checkpoint is saved. The saver writes in this order, so a run that resumes lacks no snapshot; one that was
    taken after the checkpoint from which it resumes has the bits that it would have now.
    """
    if not cfg.optim.ema_tracks:
        return lambda step, state: None
    there = by_leader(lambda: checkpoint.steps(workdir, SNAPSHOTS))

    def snapshot(step: int, state: TrainState) -> None:
        if step % cfg.optim.snapshot_every == 0 and step not in there:
            with ledger.spend("save"):
                _check_finite(state)
                saver.snapshot(step, state.tracks, meta | _updates(state))

    return snapshot


def _check_finite(state: TrainState) -> None:
    if not all_finite(state):
        raise JobError(
            f"step {int(state.step)}: the state holds numbers that are not finite, though no step was accepted that made "
            "them: a device or its memory is at fault. Nothing was saved; run the same command on other devices"
        )


def _updates(state: TrainState) -> dict:
    """The number of updates that the tracks average over, if there are any."""
    return {"updates": int(state.step) - int(state.guard.skipped)} if state.tracks else {}
