"""Tables of runs that follow a planted surface, and how often intervals hold it."""

import math

import numpy as np

from dit_jax.scaling.fits.law import PowerLaw
from dit_jax.scaling.fits.surface import Surface
from dit_jax.scaling.predict import interval, predict
from dit_jax.scaling.runs import Run

LAW = Surface(1.8169, 482.01, 2085.43, 0.3478, 0.3658)  # Besiroglu et al. 2024, arXiv 2404.10102
EQUAL = Surface(1.6, 350.0, 1100.0, 0.33, 0.33)
N_LAW, L_LAW = PowerLaw(0.09, 0.52), PowerLaw(22.0, -0.22, 0.38)
BUDGETS = np.geomspace(4e9, 1.3e11, 5)


def study(noise=0.0, seed=0, budgets=BUDGETS, sizes=5, width=6.0, curvature=0.02, loss=L_LAW, se=0.0) -> list[Run]:
    """Runs whose isoFLOP curves are exactly quadratic in log N, off-centre by a random shift, plus noise."""
    rng = np.random.default_rng(seed)
    runs = []
    for c in budgets:
        shift = rng.uniform(-0.4, 0.4)
        for i, u in enumerate(np.linspace(-1, 1, sizes) * math.log(width) + shift):
            value = loss(c) + curvature * u**2 + noise * rng.standard_normal()
            n = N_LAW(c) * math.exp(u)
            d = c / (6 * n)
            runs.append(Run(f"{c:.2g}_{i}", float(n), float(d), float(c), float(value), se, images=float(d / 16)))
    return runs


def ladder(law=LAW, noise=0.0, seed=0, budgets=6, sizes=8) -> list[Run]:
    """IsoFLOP runs: `budgets` from 1e18 to 1e21 FLOPs, sizes within a factor 4 of a somewhat drifting centre."""
    rng, runs = np.random.default_rng(seed), []
    for c in np.geomspace(1e18, 1e21, budgets):
        centre = float(law.optimum(6.0)["N_opt"](c)) * math.exp(rng.uniform(-0.3, 0.3))
        for i, u in enumerate(np.linspace(-1, 1, sizes) * math.log(4)):
            n = centre * math.exp(u)
            d = float(c / (6 * n))
            loss = law(n, d) * math.exp(noise * rng.standard_normal())
            runs.append(Run(f"{c:.2g}_{i}", n, d, float(c), float(loss)))
    return runs


def scatter(law=LAW, noise=0.0, seed=0, count=40) -> list[Run]:
    """Runs of any size on any data: N from 4e7 to 1.6e10, D from 5e9 to 5e11."""
    rng = np.random.default_rng(seed)
    n = np.exp(rng.uniform(math.log(4e7), math.log(1.6e10), count))
    d = np.exp(rng.uniform(math.log(5e9), math.log(5e11), count))
    loss = law(n, d) * np.exp(noise * rng.standard_normal(count))
    rows = zip(n.tolist(), d.tolist(), loss.tolist(), strict=True)
    return [Run(f"r{i}", n, d, 6 * n * d, y) for i, (n, d, y) in enumerate(rows)]


def coverage(fit, make, law, studies: int, resamples: int, far: float = 1e22) -> dict:
    """quantity -> share of studies whose (bootstrap, delta-method) interval holds the truth; E also by its profile."""
    truth = {name: getattr(law, name) for name in ("E", "A", "B", "alpha", "beta", "a")}
    optimum = {name: float(value(far)) for name, value in law.optimum(6.0).items()}
    optimum["D_over_N"] = optimum["D_opt"] / optimum["N_opt"]
    hits: dict = {name: [] for name in [*truth, *optimum, "E, profile"]}
    for seed in range(studies):
        found = fit(make(law=law, noise=0.005, seed=seed), resamples=resamples, seed=10**6 + seed)
        for name, value in truth.items():
            hits[name].append([_holds(i[name], value) for i in (found.intervals, found.delta_intervals)])
        said, delta = predict(found, far), study.delta_at(found, far)
        for name, value in optimum.items():
            hits[name].append([_holds(said[f"{name}_interval"], value), _holds(delta[name], value)])
        hits["E, profile"].append([_holds(found.profile.interval, law.E)] * 2)
    return {name: tuple(np.mean(h, axis=0).tolist()) for name, h in hits.items()}


def held(fit, make, truth: dict, far: float, studies: int, resamples: int) -> dict:
    """quantity of `truth` (a: exponent of N_opt; N_opt and L_opt at `far`) -> share of the studies make(seed) whose interval holds it."""
    hits: dict = {name: [] for name in truth}
    for seed in range(studies):
        draws = fit(make(seed), resamples=resamples, seed=10**6 + seed).draws
        for name, value in truth.items():
            drawn = draws["N_opt"].exponent if name == "a" else draws[name](far)
            hits[name].append(_holds(interval(drawn, 0.95), value))
    return {name: float(np.mean(h)) for name, h in hits.items()}


def _holds(between, value: float) -> bool:
    return between[0] - 1e-12 <= value <= between[1] + 1e-12
