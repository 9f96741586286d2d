"""What each method takes for granted, put to the test on the runs at hand.

Statistical tests fail at p < 0.01: parabolas against quartics (F), one exponent for both terms (F), the form of the surface (F of
squares and products of log N and log D, after Ramsey 1969), one run far off (Bonferroni on studentised residuals, Cook & Weisberg 1982,
section 2.2), a lopsided scatter (D'Agostino 1970). Methods that rest on each budget's optimum are tested by simulation: losses are drawn
from a fitted surface at the very (N, D) of the runs, and what the method's intervals lie about is compared with what was planted
(encompassing, Mizon & Richard 1986). The bias of an estimate that its intervals do not have, as of akima's and power's lowest losses,
sets no two intervals apart and counts for nothing here.
"""

import dataclasses
import math

import numpy as np
from scipy import stats

from dit_jax.error import UsageError
from dit_jax.scaling import fit as fits_of
from dit_jax.scaling import inference, newton
from dit_jax.scaling.reasons import QUANTITIES, Check, middles, values
from dit_jax.scaling.study import SurfaceFit
from dit_jax.scaling.surface import fit_gadre, fit_varpro

CHANCE = 0.01
STUDIES = 24  # simulated, of each method
RESAMPLES = 40  # of each, whose median says what its intervals lie about
NARROWER = 0.5  # of the half-width of a budget's sizes in log N, kept by the check of near sizes
MATERIAL = 0.5  # of an interval's half-width, from which a bias counts
EARLY = 0.5  # of a curve in log compute: the checkpoints that may be a warm-up
VISIBLE = 0.005  # of the loss: what checkpoints may be off without mattering


def examine(fits: dict, runs, curves, flops: float | int, seed: int = 0) -> list[Check]:
    """Every test that these fits and runs allow. `curves` are rows of training curves or None, `flops` where L_opt is compared."""
    truth = next((fits[m] for m in ("varpro", "surface") if m in fits and _sound(fits[m])), None)
    found: list = []
    if "isoflop" in fits:
        found += [_parabolas(fits["isoflop"]), _window(fits["isoflop"], runs)]
    for method in ("isoflop", "akima", "power", "envelope"):
        rows = _rows_of(method, fits, runs, curves)
        if method in fits and truth is not None and rows:
            found.append(_simulated(method, fits[method], truth, rows, flops, seed))
    for method in fits:
        found.append(_pure(method, fits, truth))
    if "envelope" in fits and curves:
        found += [_checkpoints(curves, "first"), _checkpoints(curves, "last")]
    for fit in fits.values():
        if isinstance(fit, SurfaceFit) and fit.freedom > 3:
            found += _of_surface(fit, fits, runs)
    return [test for test in found if test is not None]


def _rows_of(method: str, fits: dict, runs, curves):
    """The rows that a method fitted: isoflop may have left out sizes far from the best."""
    if method == "isoflop" and method in fits:
        return [r for b in fits[method].used for r in b.runs]
    return curves if method == "envelope" else runs


def _of_surface(fit: SurfaceFit, fits: dict, runs) -> list:
    """The tests of a surface: its form, and where that holds its scatter. Where two exponents fit, their one is all there is to say."""
    found: list = [_form(fit)]
    if fit.method == "gadre":
        more = _form(fits["varpro"]) if "varpro" in fits else None
        found = [_equal(runs), *([] if more and not more.fails else found)]
    return found if any(t and t.fails for t in found) else [*found, _outlier(fit), _skew(fit)]


def _sound(fit: SurfaceFit) -> bool:
    """Whether a surface may stand for the truth in simulations: identified, and its form not refuted."""
    form = _form(fit) if fit.freedom > 3 else None
    return fit.identifiable and not (form and form.fails)


def _parabolas(fit) -> Check | None:
    if not any(len({r.params for r in b.runs}) > 5 for b in fit.used):
        return None
    p = fits_of._no_parabola(fit)
    width = float(np.median([b.runs and _ratio(b) for b in fit.used]))
    off = float(np.median([math.exp(abs(b.curve.centre - math.log(b.n_opt))) for b in fit.used]))
    text = (
        f"F test against quartics, p = {p:.2g}; sizes span {width:.3g}x, their middle lies {off:.2g}x from the minimum"
    )
    return Check(
        "isoflop",
        "the curves of loss against log N are parabolas",
        "its curves are no parabolas",
        text,
        p < CHANCE,
        p=p,
    )


def _ratio(budget) -> float:
    sizes = [r.params for r in budget.runs]
    return max(sizes) / min(sizes)


def _window(fit, runs) -> Check | None:
    """Whether nearby sizes alone tell another exponent than all sizes."""
    half = float(np.median([math.log(_ratio(b)) / 2 for b in fit.used]))
    window = math.exp(NARROWER * half)
    try:
        near = fits_of.fit_isoflop(runs, window=window, resamples=400, level=fit.level, unbias=fit.bias is not None)
    except UsageError:
        return None
    if (
        not near.draws
        or not fit.draws
        or len(near.used) < 3
        or sum(len(b.runs) for b in near.used) >= sum(len(b.runs) for b in fit.used)
    ):
        return None
    (wide, (low, high)), (a, (lower, higher)) = (values(f, 1.0)["a"] for f in (fit, near))
    fails = high < lower or higher < low
    text = (
        f"sizes within {window:.2g}x of each budget's best run alone give a = {a:.4f} ({lower:.4f} to {higher:.4f}), "
        f"all sizes {wide:.4f}"
    )
    return Check(
        "isoflop",
        "distant sizes tell what near ones do",
        "distant sizes move its exponent",
        text,
        fails,
        ("a",),
        bias={"a": wide - a},
    )


def _simulated(method: str, fit, truth: SurfaceFit, rows, flops: float | int, seed: int) -> Check | None:
    """The method on losses drawn from the surface at these runs: what its intervals lie about on average, since only that sets intervals
    apart. An estimate may be off by a bias that its intervals are cleared of; that is told, and is no reason."""
    found = _studies(method, fit, truth, rows, flops, seed)
    if len(found) < STUDIES / 2:
        return None
    planted = {name: pair[0] for name, pair in values(truth, flops).items()}
    bias, said, mended = {}, [], []
    for name, (_, (low, high)) in values(fit, flops).items():
        both = np.array([(middle[name], estimate[name][0]) for middle, estimate in found if name in middle])
        if name not in QUANTITIES or name not in planted or len(both) < STUDIES / 2:
            continue
        off = both.mean(0) - planted[name]
        error = both.std(0, ddof=1) / math.sqrt(len(both))
        material = (np.abs(off) > 3 * error) & (np.abs(off) > MATERIAL * (high - low) / 2)
        bias[name] = float(off[0])
        if material[0]:
            said.append(_far(name, off[0], planted[name]))
        elif material[1] and abs(off[0]) < MATERIAL * abs(off[1]):
            mended.append(_far(name, off[1], planted[name]))
    text = f"on {len(found)} sets of losses drawn from {truth.method}'s surface at these runs (scatter {_spread(truth, rows)[2]:.2%}) "
    text += f"its intervals lie about {', '.join(said)}" if said else "its intervals lie about what was planted"
    text += f"; its estimates are off, {', '.join(mended)}, which the intervals make good" if mended else ""
    premise = f"where {truth.method}'s surface holds, its intervals lie about that surface's optimum"
    return Check(method, premise, "it is biased at these runs", text, bool(said), tuple(bias), bias=bias)


def _far(name: str, off: float, planted: float) -> str:
    size = f"{abs(off) / planted:.0%}" if name == "N_opt" else f"{abs(off):.4f}"
    return f"{name} {size} too {'high' if off > 0 else 'low'}"


def _spread(truth: SurfaceFit, rows) -> tuple:
    """(the surface's losses (n,), the cluster of each row (n,), the scatter of log losses about the surface)."""
    law = np.asarray(truth(*(np.array([getattr(r, k) for r in rows]) for k in ("params", "tokens"))))
    off = np.log([r.loss for r in rows]) - np.log(law)
    return law, inference.clusters(rows), float(1.4826 * np.median(np.abs(off - np.median(off))))


def _studies(method: str, fit, truth: SurfaceFit, rows, flops: float | int, seed: int) -> list[tuple]:
    """(middles, values) of the method on each set of losses drawn from the surface; sets that it refuses are left out."""
    law, groups, spread = _spread(truth, rows)
    rng, found = np.random.default_rng(seed), []
    options = {"unbias": fit.bias is not None} if method == "isoflop" else {}
    for i in range(STUDIES):
        noise = spread * rng.standard_normal(groups.max() + 1)[groups]
        drawn = [dataclasses.replace(r, loss=float(y)) for r, y in zip(rows, law * np.exp(noise), strict=True)]
        try:
            other = fits_of.METHODS[method](drawn, resamples=RESAMPLES, seed=seed + i, **options)
        except UsageError:
            continue
        if other.draws:
            found.append((middles(other, flops), values(other, flops)))
    return found


def _pure(method: str, fits: dict, truth) -> Check | None:
    """A power law without an irreducible term, where the surface's interval of E excludes nothing."""
    fit = fits[method]
    if isinstance(fit, SurfaceFit) or "L_opt_irreducible" in fit.laws or truth is None or truth.profile is None:
        return None
    low, high = truth.profile.interval
    fails = low > 1e-3 * high
    between = f"{truth.surface.E:.4f} ({low:.4f} to {high:.4f})"
    text = f"its loss law has no irreducible term, for want of budgets; {truth.method} finds {between}"
    return Check(
        method,
        "the loss falls to nothing, as a pure power law",
        "no irreducible term",
        text,
        fails,
        ("L_opt", "irreducible"),
    )


def _equal(runs) -> Check | None:
    """One exponent against two, in logarithms: an F test, its ratio reduced where several rows are one run."""
    try:
        one, two = (fit(runs, residual="log", loss="mse", resamples=0) for fit in (fit_gadre, fit_varpro))
    except UsageError:
        return None
    if two.freedom < 1:
        return None
    share = two.clusters / two.n_runs
    ratio = max(one.objective - two.objective, 0.0) / max(two.objective / two.freedom, 1e-30) * share
    p = float(stats.f.sf(ratio, 1, two.freedom)) if one.objective > 1e-20 else 1.0
    s = two.surface
    text = f"F test of one exponent against two, p = {p:.2g}; alpha = {s.alpha:.3f}, beta = {s.beta:.3f}"
    return Check("gadre", "N and D have the same exponent", "the exponents of N and D differ", text, p < CHANCE, p=p)


def _checkpoints(curves, which: str) -> Check | None:
    """Whether early (or last) checkpoints of each run leave the surface through the others: one number a run, a t test over runs."""
    parts: dict = {}
    for r in curves:
        parts.setdefault((r.name, r.params), []).append(r)
    pairs = [_apart(sorted(part, key=lambda r: r.flops), which) for part in parts.values() if len(part) > 4]
    pairs = [(a, b) for a, b in pairs if a and len(b) > 1]
    if len(pairs) < 4:
        return None
    try:
        law = fit_varpro([r for _, b in pairs for r in b], resamples=0)
    except UsageError:
        return None

    def off(rows) -> float:
        return float(np.mean([math.log(r.loss / float(law(r.params, r.tokens))) for r in rows]))

    lifts = np.array([off(a) - off(b) for a, b in pairs])
    lift, error = float(lifts.mean()), float(lifts.std(ddof=1)) / math.sqrt(len(lifts))
    p = float(2 * stats.t.sf(abs(lift) / max(error, 1e-12), len(lifts) - 1))
    words, why, visible = (
        ("early", "warm-up", lift) if which == "first" else ("last", "decay of the learning rate", -lift)
    )
    text = f"{words} checkpoints lie {lift:+.2%} from the surface through the others (t test over {len(lifts)} runs, p = {p:.2g})"
    return Check(
        "envelope", f"no {why}: {words} checkpoints count as any", why, text, p < CHANCE and visible > VISIBLE, p=p
    )


def _apart(part, which: str) -> tuple:
    """(the rows of a training curve that are tested, those they are tested against): its early ones, or the last against the late."""
    low, high = math.log(part[0].flops), math.log(part[-1].flops)
    late = [r for r in part if math.log(r.flops) >= low + EARLY * (high - low)]
    return (part[: len(part) - len(late)], late) if which == "first" else (late[-1:], late[:-1])


def _residuals(fit: SurfaceFit) -> tuple:
    """(residuals (n,), derivatives (n, p)) of a surface at its estimate."""
    problem = fit.design.problem
    return newton.residuals(problem, fit.theta[None])[0], newton.jacobian(problem, fit.theta)


def _form(fit: SurfaceFit) -> Check | None:
    """Whether squares and products of log N and log D still explain residuals, what the parameters can fit projected out. One run that is
    far off is left out: it is no matter of form."""
    r, slope = _residuals(fit)
    worst, _, chance = _worst(fit)
    kept = np.arange(len(r)) != (worst if chance < CHANCE else -1)
    r, slope = r[kept], slope[kept]
    x, z = -fit.design.problem.terms[1, kept, 3], -fit.design.problem.terms[2, kept, -1]
    base, _ = np.linalg.qr(slope)
    more = np.stack([x**2, x * z, z**2], axis=1)
    left = r - base @ (base.T @ r)
    more -= base @ (base.T @ more)
    scale = np.sqrt((more**2).sum(0))
    keep = scale > 1e-9 * max(float(scale.max()), 1e-300)
    fitted = more[:, keep] @ np.linalg.lstsq(more[:, keep], left, rcond=1e-10)[0]
    freedom, total = fit.freedom - int(keep.sum()), float(left @ left)
    explained = float(fitted @ fitted)
    if freedom < 2 or not keep.any() or total < 1e-20:
        return None
    ratio = explained / int(keep.sum()) / max((total - explained) / freedom, 1e-300) * fit.clusters / fit.n_runs
    p = float(stats.f.sf(ratio, int(keep.sum()), freedom))
    text = f"F test of squares and product of log N and log D in its residuals, p = {p:.2g}"
    text += f", {explained / total:.0%} of their variance" * (p < CHANCE)
    return Check(
        fit.method,
        "the runs follow E + A / N^alpha + B / D^beta",
        "its surface does not fit the runs",
        text,
        p < CHANCE,
        p=p,
    )


def _worst(fit: SurfaceFit) -> tuple:
    """(index, studentised residual, Bonferroni's p) of the run that is farthest off; p = 1 where that cannot be told."""
    r, slope = _residuals(fit)
    base, _ = np.linalg.qr(slope)
    free = 1 - (base**2).sum(1)
    freedom = len(r) - fit.design.problem.width - 1
    if fit.loss != "mse" or fit.clusters < fit.n_runs or freedom < 3 or float(r @ r) < 1e-20:
        return 0, math.nan, 1.0
    with np.errstate(divide="ignore", invalid="ignore"):
        own = r**2 / free
        score = np.where(free > 0.01, np.sqrt(own * freedom / np.maximum(r @ r - own, 1e-300)), 0.0)
    worst = int(np.argmax(score))
    return worst, float(score[worst]), min(1.0, float(len(r) * 2 * stats.t.sf(score[worst], freedom)))


def _outlier(fit: SurfaceFit) -> Check | None:
    """Whether one run is too far off for the scatter of the others; squares follow such a run."""
    worst, score, p = _worst(fit)
    if math.isnan(score):
        return None
    terms, centre = fit.design.problem.terms, fit.design.centre
    n, d = math.exp(centre[0] - terms[1, worst, 3]), math.exp(centre[1] - terms[2, worst, -1])
    text = f"the farthest run (N = {n:.3g}, D = {d:.3g}) is {score:.1f} standard deviations off (p = {p:.2g})"
    text += "; squares follow it" * (p < CHANCE)
    return Check(fit.method, "no run is far off", "one run is far off", text, p < CHANCE, p=p)


def _skew(fit: SurfaceFit) -> Check | None:
    """Whether the scatter is lopsided: a fit of small Huber delta follows the median run, squares the mean."""
    r, _ = _residuals(fit)
    if fit.loss != "huber" or len(r) < 20 or fit.clusters < fit.n_runs:
        return None
    p = float(stats.skewtest(r).pvalue)
    text = f"skewness of the scatter {float(stats.skew(-r)):+.2f} (p = {p:.2g})"
    text += "; this fit follows the median run, squares follow the mean" * (p < CHANCE)
    return Check(fit.method, "the scatter of the runs is symmetric", "the scatter is lopsided", text, p < CHANCE, p=p)
