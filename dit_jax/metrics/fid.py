"""FID and sFID: Fréchet distance of samples to a reference, with its interval and its limit for infinitely many samples."""

import numpy as np

from dit_jax.metrics import extrapolate, frechet
from dit_jax.metrics.features import keep
from dit_jax.metrics.metric import Metric

POINTS = 8  # sample counts for the limit, evenly spaced in 1 / N, from a quarter of the samples, but not below
LEAST = 2.5  # samples per feature; with fewer the distance is not linear in 1 / N
FEW = 5  # samples per feature below which there is a warning and no limit: about 10,000 for Inception


def _update(state, batch: dict, total: int):
    """State: (statistics of the pooled features, the features)."""
    stats, kept = state or (frechet.empty(batch["pool"].shape[1]), None)
    return frechet.update(stats, batch["pool"]), keep(kept, batch, total)


def _finish(state, reference: dict, settings) -> dict[str, float]:
    """Distance; its 95 % bootstrap interval at this number of samples (`_low`, `_high`); given enough samples, its values at
    smaller numbers (`_n1000`) and their limit (`_inf`)."""
    features, gaussian = np.concatenate(state[1]), reference["gaussian"]
    count, width = features.shape
    found = {"": frechet.frechet_distance(*frechet.mean_cov(state[0]), *gaussian)}
    if settings.bootstrap:
        interval = extrapolate.bootstrap(features, *gaussian, settings.bootstrap, seed=settings.seed)
        found |= {"_low": interval.low, "_high": interval.high}
    if count >= FEW * width:
        most = min(4.0, count / (LEAST * width))
        counts = [round(count / x) for x in np.linspace(most, 1, POINTS)]
        line = extrapolate.infinite(features, *gaussian, counts, settings.seed)
        found |= {f"_n{n}": value for n, value in zip(counts, line.values, strict=True)}
        found |= {"_inf": line.limit, "_inf_se": line.limit_se}
    return found


def _update_spatial(state, batch: dict, total: int) -> frechet.Statistics:
    return frechet.update(state or frechet.empty(batch["spatial"].shape[1]), batch["spatial"])


def _finish_spatial(state, reference: dict, settings) -> dict[str, float]:
    return {"": frechet.frechet_distance(*frechet.mean_cov(state), *reference["spatial_gaussian"])}


FID = Metric(
    "fid",
    needs=("pool", "gaussian"),
    update=_update,
    finish=_finish,
    higher_is_better=False,
    rules={"limit": f"{POINTS} numbers of samples, at least {LEAST:g} a feature"},
    plain="fd",
    few=(FEW, "is biased upwards, by how much depends on the model; compare the kernel distance"),
)
SFID = Metric(
    "sfid",
    needs=("spatial", "spatial_gaussian"),
    update=_update_spatial,
    finish=_finish_spatial,
    higher_is_better=False,
    rules={"spatial": "first 7 channels of mixed_6/conv"},
    plain="sfd",
)
