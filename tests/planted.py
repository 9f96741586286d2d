"""Tables of runs that follow planted laws, and how often intervals hold them: the designs of docs/coverage.md.

`python tests/planted.py [STUDIES] [DESIGN ...] [--method=METHOD]` prints the coverage of each design, and how wide its intervals of the
exponent of N_opt are beside the least that an unbiased estimate of these runs could have; of one method alone without a verdict.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from dit_jax.scaling.fits.fit import predict
from dit_jax.scaling.fits.law import PowerLaw
from dit_jax.scaling.fits.surface import Surface
from dit_jax.scaling.runs import Run
from dit_jax.scaling.verdicts import quality, verdict
from dit_jax.scaling.verdicts.methods import fit_methods

LAW = Surface(1.8169, 482.01, 2085.43, 0.3478, 0.3658)  # Besiroglu et al. 2024, arXiv 2404.10102
CHINCHILLA = Surface(1.69, 406.4, 410.7, 0.34, 0.28)  # Hoffmann et al. 2022, as printed
SKEW = Surface(1.7, 900.0, 60.0, 0.42, 0.21)
EQUAL = Surface(1.6, 350.0, 1100.0, 0.33, 0.33)
N_LAW, L_LAW = PowerLaw(0.09, 0.52), PowerLaw(22.0, -0.22, 0.38)
BUDGETS = np.geomspace(4e9, 1.3e11, 5)


def study(
    noise=0.0, seed=0, budgets=BUDGETS, sizes=5, width=6.0, curvature=0.02, loss=L_LAW, se=0.0, scatter=0.0, bend=0.0
) -> list[Run]:
    """Runs whose isoFLOP curves are exactly quadratic in log N, off-centre by a random shift, plus noise. The minimum of each budget is
    moved by `scatter` (of log N) by chance; the exponent of N_opt changes by `bend` a decade of compute."""
    rng, runs = np.random.default_rng(seed), []
    middle = math.sqrt(budgets[0] * budgets[-1])
    for c in budgets:
        shift, decades = rng.uniform(-0.4, 0.4), math.log10(c / middle)
        moved = (scatter * rng.standard_normal() if scatter else 0.0) + bend / 2 * decades**2 * math.log(10)
        for i, u in enumerate(np.linspace(-1, 1, sizes) * math.log(width) + shift):
            value = loss(c) + curvature * u**2 + noise * rng.standard_normal()
            n = N_LAW(c) * math.exp(u + moved)
            d = c / (6 * n)
            runs.append(Run(f"{c:.2g}_{i}", float(n), float(d), float(c), float(value), se, images=float(d / 16)))
    return runs


def ladder(law=LAW, noise=0.0, seed=0, budgets=6, sizes=8, low=1e18, high=1e21, wide=4.0) -> list[Run]:
    """IsoFLOP runs: `budgets` from 1e18 to 1e21 FLOPs, sizes within a factor 4 of a somewhat drifting centre."""
    rng, runs, centres = np.random.default_rng(seed), [], getattr(law, "optimum", LAW.optimum)(6.0)["N_opt"]
    for c in np.geomspace(low, high, budgets):
        centre = float(centres(c)) * math.exp(rng.uniform(-0.3, 0.3))
        for i, u in enumerate(np.linspace(-1, 1, sizes) * math.log(wide)):
            n = centre * math.exp(u)
            d = float(c / (6 * n))
            loss = law(n, d) * math.exp(noise * rng.standard_normal())
            runs.append(Run(f"{c:.2g}_{i}", n, d, float(c), float(loss)))
    return runs


def grid(law, factor, points=15, offset=0.0, drift=0.0, budgets=None, noise=0.0, seed=0) -> list[Run]:
    """`points` sizes within `factor` of a centre that lies `offset` above the optimum (log N) and drifts by `drift` in all."""
    rng, runs = np.random.default_rng(seed), []
    budgets = np.geomspace(1e17, 1e21, 5) if budgets is None else budgets
    for j, c in enumerate(budgets.tolist()):
        centre = float(law.optimum(6.0)["N_opt"](c)) * math.exp(offset + drift * j / (len(budgets) - 1))
        for i, u in enumerate(np.linspace(-1, 1, points) * math.log(factor)):
            n = centre * math.exp(u)
            d = c / (6 * n)
            runs.append(Run(f"{j}_{i}", n, d, c, float(law(n, d)) * math.exp(noise * rng.standard_normal())))
    return runs


def curves(law=LAW, noise=0.0, ratio=2.0, sizes=8, points=40, seed=0) -> list[Run]:
    """Training curves whose every checkpoint follows the surface, as without a schedule."""
    rng, runs = np.random.default_rng(seed), []
    for i in range(sizes):
        n = 5e7 * ratio**i
        shift = noise * rng.standard_normal()
        for d in np.geomspace(1, 1000, points) * n:
            loss = float(law(n, d)) * math.exp(shift)
            runs.append(Run(f"n{i}", n, float(d), float(6 * n * d), loss))
    return runs


def sheet(path, runs) -> str:
    """A CSV of the runs."""
    rows = [f"{r.name},{r.params!r},{r.tokens!r},{r.loss!r}" for r in runs]
    path.write_text("\n".join(["run,params,tokens,loss", *rows]) + "\n")
    return str(path)


def ragged(noise=0.003, seed=0, budgets=5) -> list[Run]:
    """A ladder of 4 to 9 sizes a budget, a quarter of the cells missing, each C up to 3 % off."""
    rng, runs = np.random.default_rng(seed), []
    for c in np.geomspace(1e18, 1e21, budgets):
        count = int(rng.integers(4, 10))
        centre = float(LAW.optimum(6.0)["N_opt"](c)) * math.exp(rng.uniform(-0.3, 0.3))
        places = np.linspace(-1, 1, count) * math.log(4)
        kept = [u for u in places if rng.uniform() > 0.25]
        for i, u in enumerate(kept if len(kept) > 2 else places):
            n, at = centre * math.exp(u), c * math.exp(rng.uniform(-0.03, 0.03))
            loss = LAW(n, at / (6 * n)) * math.exp(noise * rng.standard_normal())
            runs.append(Run(f"{c:.2g}_{i}", float(n), float(at / (6 * n)), float(at), float(loss), group=f"{c:.2g}"))
    return runs


def interacting(n, d):
    """A surface with a term of N and D together, a third of the reducible loss at the optimum of 3e19 FLOPs."""
    at = {name: float(law(3e19)) for name, law in LAW.optimum(6.0).items()}
    share = (at["L_opt"] - LAW.E) / 3
    return LAW.E + 2 / 3 * (LAW(n, d) - LAW.E) + share * (n / at["N_opt"]) ** -0.1 * (d / at["D_opt"]) ** -0.22


def repeated(unique: float, most: float = 15.39):
    """Muennighoff et al. 2023 (arXiv 2305.16264), eq. 5: tokens beyond `unique` count less and less."""

    def law(n, d):
        again = np.maximum(d / unique - 1, 0.0)
        return LAW(n, np.minimum(d, unique) + unique * most * (1 - np.exp(-again / most)))

    return law


def of_surface(far: float) -> tuple:
    laws = LAW.optimum(6.0)
    return {"a": float(LAW.a), "N_opt": float(laws["N_opt"](far)), "L_opt": float(laws["L_opt"](far))}, far


def of_study(far: float) -> tuple:
    return {"a": 0.52, "N_opt": float(N_LAW(far)), "L_opt": float(L_LAW(far))}, far


def best_of(law, far: float) -> tuple:
    """The optimum of any law of (N, D) at `far`."""
    n = np.exp(np.linspace(math.log(1e7), math.log(1e12), 200001))
    loss = law(n, far / (6 * n))
    return {"N_opt": float(n[loss.argmin()]), "L_opt": float(loss.min())}, far


def scatter(law=LAW, noise=0.0, seed=0, count=40) -> list[Run]:
    """Runs of any size on any data: N from 4e7 to 1.6e10, D from 5e9 to 5e11."""
    rng = np.random.default_rng(seed)
    n = np.exp(rng.uniform(math.log(4e7), math.log(1.6e10), count))
    d = np.exp(rng.uniform(math.log(5e9), math.log(5e11), count))
    loss = law(n, d) * np.exp(noise * rng.standard_normal(count))
    rows = zip(n.tolist(), d.tolist(), loss.tolist(), strict=True)
    return [Run(f"r{i}", n, d, 6 * n * d, y) for i, (n, d, y) in enumerate(rows)]


def diverged(runs, seed: int, share: float = 0.03) -> list[Run]:
    """The runs, of which this share (at least one) ends with a loss 5 to 40 % too high."""
    rng = np.random.default_rng(seed + 7)
    chosen = set(rng.choice(len(runs), max(1, round(share * len(runs))), replace=False).tolist())
    return [replace(r, loss=r.loss * rng.uniform(1.05, 1.4)) if i in chosen else r for i, r in enumerate(runs)]


def dropped(runs) -> list[Run]:
    """What `--drop=diverged,outliers` leaves of the runs."""
    return quality.drop(runs, ("diverged", "outliers")).runs


def passing(noise=0.01, own=0.005, seed=0, budgets=6, sizes=5) -> list[Run]:
    """One run a size, which passes every budget: noise of its own at each, and a shift `own` that all its losses share."""
    rng, runs = np.random.default_rng(seed), []
    for i, n in enumerate(np.geomspace(5e8, 8e9, sizes).tolist()):
        shift = own * rng.standard_normal()
        for c in np.geomspace(3e19, 9e20, budgets).tolist():
            loss = LAW(n, c / (6 * n)) * math.exp(shift + noise * rng.standard_normal())
            runs.append(Run(f"n{i}", n, c / (6 * n), c, float(loss)))
    return runs


@dataclass(frozen=True)
class Design:
    """Planted studies: how to make one of a seed, what is true at which compute ({}: nothing is to be held), of which methods its
    intervals hold by form, and, where a bound of their width is told, the noise of its losses (a share of them with `relative`)."""

    make: Callable
    truth: dict
    far: float
    methods: tuple = ("isoflop", "varpro", "surface")
    noise: float = 0.0
    relative: bool = True


FAR = 10 * float(BUDGETS[-1])
UNIQUE = 2e9
BENT = np.geomspace(4e9, 4e11, 5)
ISO = ("isoflop",)
DESIGNS = {
    "parabolas 5 x 5, 4x": Design(lambda s: study(noise=0.003, seed=s), *of_study(0.4 * FAR), ISO, 0.003, False),
    "parabolas 5 x 7": Design(lambda s: study(noise=0.002, seed=s, sizes=7), *of_study(FAR), ISO, 0.002, False),
    "scattered by 20 %": Design(lambda s: study(noise=0.001, seed=s, sizes=7, scatter=0.2), *of_study(FAR), ISO),
    "ladder 6 x 8": Design(lambda s: ladder(noise=0.003, seed=s), *of_surface(1e22), noise=0.003),
    "ladder, noise 0.5 %": Design(lambda s: ladder(noise=0.005, seed=s), *of_surface(1e22), noise=0.005),
    "3 budgets x 5": Design(
        lambda s: study(noise=0.002, seed=s, budgets=BUDGETS[::2]), *of_study(FAR), ISO, 0.002, False
    ),
    "3 budgets x 8": Design(lambda s: ladder(noise=0.003, seed=s, budgets=3), *of_surface(1e22), noise=0.003),
    "N-D interaction": Design(lambda s: ladder(interacting, noise=0.003, seed=s), *best_of(interacting, 1e22), ISO),
    "ragged": Design(lambda s: ragged(seed=s), *of_surface(1e22), noise=0.003),
    "3 % diverged": Design(lambda s: dropped(diverged(ladder(noise=0.003, seed=s), s)), *of_surface(1e22)),
    "scattered runs": Design(lambda s: scatter(noise=0.005, seed=s), *of_surface(1e22), ("varpro", "surface"), 0.005),
    "5 curves x 6": Design(lambda s: passing(seed=s), *of_surface(6e21), ("varpro", "surface")),
    "unscaled rates": Design(lambda s: study(noise=0.001, seed=s, sizes=7, bend=-0.1, budgets=BENT), {}, 4e12),
    "repeated data": Design(
        lambda s: ladder(repeated(UNIQUE), noise=0.003, seed=s, budgets=5, low=1e18, high=1e20), {}, 1e21
    ),
}


def least_half(runs, design: Design, method: str) -> float:
    """The half-width of a 95 % interval of the exponent of N_opt by the bound of Cramer (1946) and Rao (1945), of known noise: for
    `isoflop` of parabolas with a level and a curvature of their own, whose minima follow a power law; else of the surface's five
    parameters."""
    n, d, c = (np.array([getattr(r, k) for r in runs]) for k in ("params", "tokens", "flops"))
    sigma = design.noise * (np.array([r.loss for r in runs]) if design.relative else np.ones(len(runs)))
    if method != "isoflop":
        step, at = 1e-6, np.array([LAW.E, math.log(LAW.A), math.log(LAW.B), LAW.alpha, LAW.beta])
        moved = [
            Surface(p[0], math.exp(p[1]), math.exp(p[2]), *p[3:]) for e in np.eye(5) * step for p in (at + e, at - e)
        ]
        slopes = np.stack(
            [(up(n, d) - down(n, d)) / (2 * step) for up, down in zip(moved[::2], moved[1::2], strict=True)]
        )
        told = np.array([(up.a - down.a) / (2 * step) for up, down in zip(moved[::2], moved[1::2], strict=True)])
    else:
        groups = np.unique([r.group or f"{r.flops:.6g}" for r in runs], return_inverse=True)[1]
        of = groups == np.arange(groups.max() + 1)[:, None]
        curves = [np.polyfit(np.log(n[o]), np.array([r.loss for r in runs])[o], 2) for o in of]
        curves = np.array(curves)[groups]
        u, x = np.log(n) + curves[:, 1] / (2 * curves[:, 0]), np.log(c) - np.log(c).mean()
        away = 2 * curves[:, 0] * u
        slopes = np.concatenate([[away * x, away], of, of * u**2])
        told = np.eye(len(slopes))[0]
    slopes = slopes / sigma
    return 1.96 * math.sqrt(told @ np.linalg.solve(slopes @ slopes.T, told))


def coverage(design: Design, studies: int, resamples: int = 400, names: tuple = verdict.ANSWER) -> dict:
    """method, or "verdict" -> shares of the studies: of each quantity held, of those that give an interval; "speaks": whose fit is
    identified beyond its data; "half": the median half-width of the exponent of N_opt; "of least": the same beside `least_half`; of the
    verdict also which method it chose, and how often that was the best or the second best."""
    rows = [_one(design, seed, resamples, names) for seed in range(studies)]
    out = {}
    for who in (*verdict.ANSWER, "verdict"):
        mine = [r[who] for r in rows if who in r]
        if mine:
            held = {q: [m[q] for m in mine if q in m] for q in ("a", *verdict.QUANTITIES)}
            out[who] = {q: float(np.mean(h)) for q, h in held.items() if h}
            out[who] |= {"speaks": float(np.mean([m["speaks"] for m in mine]))}
            if who != "verdict":
                out[who] |= {k: float(np.nanmedian([m[k] for m in mine])) for k in ("half", "of least") if k in mine[0]}
    if names != verdict.ANSWER:
        return out
    chosen = [r["verdict"]["chosen"] for r in rows]
    ranks = [r["verdict"]["rank"] for r in rows if "rank" in r["verdict"]]
    out["verdict"] |= {"chosen": {m: chosen.count(m) / studies for m in dict.fromkeys(chosen)}}
    if ranks:
        out["verdict"] |= {
            "best": float(np.mean(np.array(ranks) == 1)),
            "best two": float(np.mean(np.array(ranks) <= 2)),
        }
    return out


def _one(design: Design, seed: int, resamples: int, names: tuple) -> dict:
    """method, or "verdict" -> what it held in the study of this seed."""
    runs, options = design.make(seed), {"resamples": resamples, "seed": 10**6 + seed}
    found = fit_methods(runs, design.far, names, lambda method: options)
    fits = found.fits
    said, out = {m: predict(f, design.far) for m, f in fits.items()}, {}
    for method, fit in fits.items():
        low, high = fit.exponent("N_opt")[1]
        between = {"a": (low, high)} | {q: said[method][f"{q}_interval"] for q in verdict.QUANTITIES}
        held = _held(between, design.truth) if method in design.methods else {}
        out[method] = held | {"speaks": fit.identified, "half": (high - low) / 2}
        if design.noise and method in design.methods:
            out[method]["of least"] = (high - low) / 2 / least_half(runs, design, method)
    if names != verdict.ANSWER:
        return out
    made = verdict.judge(runs, fits, found.refits.__getitem__, design.far)
    out["verdict"] = _held(made.intervals, design.truth)
    out["verdict"] |= {"speaks": bool(made.passes), "chosen": made.method if made.passes else "none"}
    truth = design.truth.get("L_opt", math.nan)
    errors = sorted((abs(s["L_opt"] - truth), m) for m, s in said.items() if math.isfinite(s["L_opt"] - truth))
    rank = [i for i, (_, m) in enumerate(errors, 1) if m == made.method]
    return out if not rank else out | {"verdict": out["verdict"] | {"rank": rank[0]}}


def _held(between: dict, truth: dict) -> dict:
    return {
        q: low - 1e-12 <= truth[q] <= high + 1e-12
        for q, (low, high) in between.items()
        if q in truth and math.isfinite(low)
    }


def change(runs, **how):
    return [Run(**{**vars(r), **{k: f(r) for k, f in how.items()}}) for r in runs]


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--method=")]
    names = tuple(word.removeprefix("--method=") for word in sys.argv[1:] if word not in words) or verdict.ANSWER
    for name in words[1:] or DESIGNS:
        for who, found in coverage(DESIGNS[name], int(words[0]) if words else 100, names=names).items():
            print(
                f"{name:20} {who:8}",
                {k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()},
                flush=True,
            )
