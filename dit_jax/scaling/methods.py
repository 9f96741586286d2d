"""Several methods on the same runs: which of them these allow, where they disagree, and which premise of theirs fails."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dit_jax.error import UsageError
from dit_jax.scaling.fit import METHODS
from dit_jax.scaling.predict import predict
from dit_jax.scaling.premises import examine
from dit_jax.scaling.reasons import disagreements
from dit_jax.scaling.runs import Run

LISTED = 4  # parts of a refusal that are said


@dataclass(frozen=True)
class Methods:
    """Fits by method, why others were refused, the tests of their premises, and where they disagree at `flops`."""

    fits: dict
    refused: dict
    flops: float
    tests: tuple
    disagreements: tuple

    @property
    def main(self):
        """The fit that a report opens with: the first that the runs identify, isoflop's before others."""
        return next((fit for fit in self.fits.values() if fit.identifiable), next(iter(self.fits.values())))


def fit_methods(
    runs: Sequence[Run],
    curves: Sequence[Run] | None = None,
    flops: float | int | None = None,
    names: Sequence[str] = tuple(METHODS),
    options: Callable[[str], dict] = lambda method: {},
) -> Methods:
    """Every method of `names` that these runs allow. `curves` are rows of training curves, for the envelope; `flops` is where best losses
    are compared (None = the largest run); `options(method)` are keyword arguments of its fit. Raises UsageError where no method fits.
    """
    fits, refused = {}, {}
    for method in names:
        try:
            rows = curves if method == "envelope" and curves is not None else runs
            fits[method] = METHODS[method](rows, **options(method))
        except UsageError as error:
            refused[method] = _short(str(error))
    if not fits:
        raise UsageError("; ".join(f"{method}: {why}" for method, why in refused.items()))
    at = float(max(r.flops for r in runs)) if flops is None else float(flops)
    tests = tuple(examine(fits, runs, curves, at))
    return Methods(fits, refused, at, tests, tuple(disagreements(fits, at, tests)))


def _short(text: str) -> str:
    """A refusal without the tail of its list."""
    parts = text.split("; ")
    return text if len(parts) <= LISTED else "; ".join([*parts[:LISTED], "and so on"])


def predictions(fit, flops: Sequence[float | int]) -> list[dict]:
    """What a fit says at each compute; nothing where it says nothing of N_opt."""
    return [predict(fit, c) for c in flops] if "N_opt" in fit.laws else []
