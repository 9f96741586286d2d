"""Averages of the weights over training by power functions, and averages of other widths, reconstructed from snapshots of them.

After t updates the average of exponent g weighs the weights of update u, 0 < u <= t, by p(u; t, g) = (g + 1) u^g / t^(g + 1). The
average of another exponent is the linear combination of the snapshots whose profile has the least square distance from its own, in
closed form (Karras et al. 2024, arXiv 2312.02696, sections 3.1 and 3.2). Here its coefficients have the sum 1, so that what training no
longer changes is exact.

`W/snapshots/<step>/` holds the items `tracks` and `meta`, with a manifest, as a checkpoint does. A checkpoint holds both too. Tracks are
float32: small widths have coefficients of both signs, whose absolute values sum to 20 and more, and roundings grow with them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from dit_jax import checkpoint
from dit_jax.checkpoint.arrays import few
from dit_jax.checkpoint.place import CHECKPOINTS, SNAPSHOTS, path_of, steps
from dit_jax.config import ModelConfig, OptimConfig
from dit_jax.config.training import EMA_WIDTHS
from dit_jax.devices.numerics import check_numerics
from dit_jax.devices.processes import by_leader
from dit_jax.error import JobError, UsageError
from dit_jax.workdir import manifest
from dit_jax.workdir.folder import read_config

LARGEST_ERROR = 0.03  # of a reconstructed profile, relative norm; weights then differ by about 1e-3 at most
ROUNDING = 1e-13  # below which a direction of the least squares is lost in rounding


def power_exponent(width: float) -> float:
    """Exponent gamma of the power-law EMA with relative standard deviation `width` (Karras et al. 2024, section 3.1).

    The largest root of width^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).
    """
    inverse = width**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(roots[np.isreal(roots)].real.max())


def track_names(cfg: OptimConfig) -> list[str]:
    """Names of the averages in `TrainState.tracks`: their widths."""
    return [str(width) for width in cfg.ema_tracks]


def products(times, exponents, other_times, other_exponents) -> np.ndarray:
    """Inner products (m, n) over u of the profiles of (m,) averages with (n,) others, each after `times` updates, with `exponents`."""
    t, g = np.asarray(times, np.float64)[:, None], np.asarray(exponents, np.float64)[:, None]
    s, h = np.asarray(other_times, np.float64)[None], np.asarray(other_exponents, np.float64)[None]
    least = np.minimum(t, s)
    return (g + 1) * (h + 1) / (g + h + 1) * (least / t) ** g * (least / s) ** h * least / (t * s)


def coefficients(times, widths, time: float, width: float) -> tuple[np.ndarray, float]:
    """Coefficients (n,), of sum 1, of averages of `widths` (n,) after `times` (n,) updates that give the average of `width` after `time`.

    Also returns the norm of the difference of its profile, relative to the profile's.
    """
    exponents, wanted = [power_exponent(w) for w in widths], [power_exponent(width)]
    gram, b = products(times, exponents, times, exponents), products(times, exponents, [time], wanted)[:, 0]
    scale = 1 / np.sqrt(np.diag(gram))
    with_sum = np.block([[gram * scale[:, None] * scale[None], scale[:, None]], [scale[None], np.zeros((1, 1))]])
    x = np.linalg.lstsq(with_sum, np.append(b * scale, 1.0), rcond=ROUNDING)[0][:-1] * scale
    norm = products([time], wanted, [time], wanted)[0, 0]
    return x, float(np.sqrt(max(norm - 2 * x @ b + x @ gram @ x, 0.0) / norm))


class WidthError(UsageError):
    """A width that the snapshots until a step do not hold, while those until a later step may."""


class Snapshots(NamedTuple):
    """Power EMAs that a run kept up to a step, the newest in its checkpoint: paths and updates (n,) of each, widths of the tracks."""

    step: int
    paths: tuple[str, ...]
    updates: tuple[int, ...]
    widths: tuple[float, ...]

    def coefficients(self, width: float) -> tuple[np.ndarray, float]:
        """Coefficients (n, tracks) that give `width`, and the error of their profile."""
        times, widths = np.repeat(self.updates, len(self.widths)), np.tile(self.widths, len(self.updates))
        x, error = coefficients(times, widths, self.updates[-1], width)
        return x.reshape(len(self.updates), len(self.widths)), error

    def held(self) -> tuple[float, float] | None:
        """The narrowest and the widest average that they give with a profile within LARGEST_ERROR; two digits."""
        grid = np.geomspace(*EMA_WIDTHS, 200)
        fine = [float(width) for width in grid if self.coefficients(width)[1] <= LARGEST_ERROR]
        return (float(f"{fine[0]:.2g}"), float(f"{fine[-1]:.2g}")) if fine else None

    def check(self, width: float, key: str) -> np.ndarray:
        """Return the coefficients (n, tracks) of `width`. Raises WidthError naming the widths that the snapshots give if it is none."""
        x, error = self.coefficients(width)
        if not error <= LARGEST_ERROR:
            held, tracks = self.held(), ", ".join(f"{width:g}" for width in self.widths)
            expected = f"a width from {held[0]:g} to {held[1]:g}" if held else f"one of the tracks {tracks}"
            raise WidthError(
                f"{key}: found {width:g}, expected {expected}, as the {len(self.updates)} snapshots of ({tracks}) until step "
                f"{self.step} hold; take a later step, or train with a smaller optim.snapshot_every"
            )
        return x


def find_snapshots(workdir: str, step: int, key: str = "sample.ema, eval.ema") -> Snapshots:
    """Find what the run kept until its checkpoint of `step`. Raises UsageError if that is nothing, JobError if some of it is damaged."""
    widths = read_config(workdir).optim.ema_tracks
    if not widths:
        expected = "expected 0: it kept no averages to make others of (optim.ema_tracks); train it again with --config.optim.ema_tracks="
        raise UsageError(f"{key}: found a width for the run {workdir}, {expected}'(0.05, 0.1)'")
    before = [path_of(workdir, s, SNAPSHOTS) for s in steps(workdir, SNAPSHOTS) if s < step]
    paths = [*before, path_of(workdir, step, CHECKPOINTS)]
    for path in paths:
        if wrong := manifest.problems(path, ("tracks/", "meta/")):
            advice = "restore it from a copy" + ", or remove it to go on without" * (path != paths[-1])
            raise JobError(f"{path}: damaged ({few(wrong)}); {advice}")
    updates = [checkpoint.meta_of(path)["updates"] for path in paths]
    return Snapshots(step, tuple(paths), tuple(updates), widths)


def load_average(
    workdir: str, step: int, width: float, model: ModelConfig, place: Callable, key: str = "sample.ema, eval.ema"
) -> tuple[dict, int]:
    """Reconstruct the average of `width` after `step` steps: (weights, number of snapshots). Arguments and errors as of `checkpoint.load`.

    Raises WidthError, which names `key`, for a width that the snapshots do not hold. One snapshot at a time is in memory.
    """
    check_numerics()
    found = Snapshots(*by_leader(lambda: find_snapshots(workdir, step, key)))
    x = found.check(width, key)
    checkpoint.check_model(found.paths[-1], model)
    shapes = checkpoint.abstract_weights(model)
    like, total = place({str(width): shapes for width in found.widths}), None
    for path, row in zip(found.paths, x.astype(np.float32), strict=True):
        tracks = checkpoint.read_item(path, "tracks", like)
        total = _add(total, [tracks[str(width)] for width in found.widths], row)
    return total, len(found.paths)


@partial(jax.jit, donate_argnums=0)
def _add(total: dict | None, trees: list, factors: Sequence) -> dict:
    """Sum of `total`, if there is one, and of factors x trees."""
    parts = [jax.tree.map(lambda leaf, x=x: x * leaf, tree) for tree, x in zip(trees, factors, strict=True)]
    return jax.tree.map(lambda *leaves: sum(leaves), *([total] if total else []), *parts)
