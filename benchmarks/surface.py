"""CPU time of fitting the five-parameter surface, ours against SciPy's L-BFGS-B: 240 runs, 4,500 starts, 4,000 bootstraps.

    nice -n 19 .venv/bin/python benchmarks/surface.py            # SciPy's times are scaled up from 150 starts and 150 bootstraps
    nice -n 19 .venv/bin/python benchmarks/surface.py --sample=0 # every start and every bootstrap with SciPy too

Both minimise the same sum of Huber losses (delta 1e-3) of log residuals on the same runs, drawn from Chinchilla's law with 1 % noise.
SciPy is used as in the customary notebook: unscaled logarithms, one search per start, gradients by differences (SciPy's default) or
exact, tolerances at their defaults or tight enough to reach a minimum. Ours is `fit_surface` on the same starts, after it projects
them to the best coefficients for their exponents; one row gives the cost of the same search without the projection. Times are CPU
seconds of the whole process, all threads, after a first call of each.
"""

import argparse
import itertools
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # because idle BLAS threads spin, which would count as SciPy's work

import numpy as np
from scipy.optimize import minimize
from scipy.special import huber, logsumexp

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent / "tests")]
from planted import scatter  # noqa: E402

from dit_jax.scaling.fits import newton  # noqa: E402
from dit_jax.scaling.fits.surface import DELTA, fit_surface, make_design  # noqa: E402

TIGHT = {"ftol": 1e-15, "gtol": 1e-9, "maxiter": 15_000, "maxfun": 15_000}


def make_starts() -> np.ndarray:
    """Starts (4500, 5): log E, log A, log B, alpha, beta."""
    half, five, exponents = np.arange(-2, 3) / 2, 5.0 * np.arange(6), np.arange(5) / 2
    return np.array(list(itertools.product(half, five, five, exponents, exponents)))


def objective(theta, log_n, log_d, log_loss, weight):
    """The sum of Huber losses, as notebooks write it."""
    e, a, b, alpha, beta = theta
    terms = np.stack([np.full_like(log_n, e), a - alpha * log_n, b - beta * log_d])
    return np.sum(weight * huber(DELTA, logsumexp(terms, axis=0) - log_loss))


def with_gradient(theta, log_n, log_d, log_loss, weight):
    """The same with its exact gradient, without SciPy's special functions, because they are slower."""
    e, a, b, alpha, beta = theta
    terms = np.stack([np.full_like(log_n, e), a - alpha * log_n, b - beta * log_d])
    top = terms.max(axis=0)
    parts = np.exp(terms - top)
    law = parts.sum(axis=0)
    r = np.log(law) + top - log_loss
    psi = np.clip(r, -DELTA, DELTA)
    pull = weight * psi * parts / law
    sums = pull.sum(axis=1)
    return np.sum(weight * psi * (r - psi / 2)), np.array([*sums, -(pull[1] @ log_n), -(pull[2] @ log_d)])


def scipy_row(name, exact: bool, options: dict, data, starts, weights, best) -> dict:
    """CPU seconds of the given starts and bootstraps with SciPy, and the objectives reached."""

    def search(start, weight):
        function = with_gradient if exact else objective
        return minimize(function, start, (*data, weight), "L-BFGS-B", jac=exact, options=options)

    one = np.ones_like(data[0])
    search(starts[0], one)
    begin = time.process_time()
    found = [search(start, one).fun for start in starts]
    middle = time.process_time()
    again = [search(best, weight).fun for weight in weights]
    end = time.process_time()
    seconds = {"starts": middle - begin, "resamples": end - middle}
    return {"name": name, **seconds, "found": np.array(found), "again": np.array(again)}


def theta_of(fit) -> np.ndarray:
    """log E, log A, log B, alpha and beta of a fit."""
    p = fit.parameters
    return np.array([*np.log([p["E"], p["A"], p["B"]]), p["alpha"], p["beta"]])


def ours_row(name, runs, project: bool, resamples: int, weights) -> dict:
    """The same with ours. The bootstraps' objectives are for SciPy's weights, not for the timed resamples."""
    fit_surface(runs[:20], resamples=20)
    begin = time.process_time()
    fit, design = fit_surface(runs, resamples=0), make_design(runs, "log", "huber")
    c = design.centre
    if project:
        found, reached = np.array([fit.objective]), 1.0
    else:
        begin = time.process_time()
        starts = make_starts()
        starts[:, 0] -= c[2]
        starts[:, 1] -= starts[:, 3] * c[0] + c[2]
        starts[:, 2] -= starts[:, 4] * c[1] + c[2]
        found = newton.minimize(design.problem, starts).loss
        reached = np.mean(found <= found.min() * (1 + 1e-6))
    middle = time.process_time()
    fit_surface(runs, resamples=resamples) if project else None
    end = time.process_time()
    e, a, b, alpha, beta = theta_of(fit)
    theta = np.array([e - c[2], a - alpha * c[0] - c[2], b - beta * c[1] - c[2], alpha, beta])
    again = newton.minimize(design.problem, np.tile(theta, (len(weights), 1)), weights).loss
    extra = middle - begin if project else 0.0  # the second fit searched the starts again
    seconds = {"starts": middle - begin, "resamples": end - middle - extra}
    return {"name": name, **seconds, "found": found, "again": again, "reached": reached, "fit": fit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in dict(runs=240, resamples=4000, sample=150, seed=0).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--noise", type=float, default=0.01)
    args = parser.parse_args()
    runs, rng = scatter(noise=args.noise, seed=args.seed, count=args.runs), np.random.default_rng(args.seed + 1)
    data = tuple(np.log([getattr(r, k) for r in runs]) for k in ("params", "tokens", "loss"))
    starts, sample = make_starts(), args.sample
    chosen = starts if sample == 0 else rng.permutation(starts)[:sample]
    count = args.resamples if sample == 0 else min(sample, args.resamples)
    weights = rng.multinomial(len(runs), np.full(len(runs), 1 / len(runs)), count).astype(float)
    ours = ours_row("ours", runs, True, args.resamples, weights)
    raw = ours_row("ours, starts as they are", runs, False, 0, weights)
    fit = ours["fit"]
    best = theta_of(fit)
    rows = [
        scipy_row(name, exact, options, data, chosen, weights, best)
        for name, exact, options in (
            ("SciPy, gradients by differences", False, {}),
            ("SciPy, exact gradients", True, {}),
            ("SciPy, exact gradients, tight", True, TIGHT),
        )
    ]
    machine = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    print(f"{len(runs)} runs, {len(starts)} starts, {args.resamples} bootstraps; {machine}")
    print(
        f"{'':34}{'starts':>9}{'bootstraps':>12}{'all (CPU s)':>13}{'times ours':>12}"
        f"{'lowest / ours - 1':>19}{'reached':>9}{'bootstraps no lower':>21}"
    )
    total = ours["starts"] + ours["resamples"]
    scale = len(starts) / len(chosen), args.resamples / len(weights)
    lowest = min(fit.objective, raw["found"].min())
    for row in (ours, raw, *rows):
        factors = (1, 1) if "fit" in row else scale
        a, b = row["starts"] * factors[0], row["resamples"] * factors[1]
        b = ours["resamples"] if row is raw else b
        reached = row.get("reached", np.mean(row["found"] <= lowest * (1 + 1e-6)))
        worse = np.mean(row["again"] >= ours["again"] * (1 - 1e-9))
        print(
            f"{row['name']:34}{a:9.2f}{b:12.2f}{a + b:13.2f}{(a + b) / total:12.1f}"
            f"{row['found'].min() / fit.objective - 1:19.1e}{reached:9.1%}{worse:21.1%}"
        )


if __name__ == "__main__":
    main()
