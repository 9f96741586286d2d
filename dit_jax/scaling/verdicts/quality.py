"""The quality of a table of runs, whatever the method: what is wrong with the runs or the grid, in words that say what to do.

Checks of single runs: duplicates, conflicts (one run, two losses), repeats (one size and data, two losses), diverged runs and outliers.
Checks of a grid of budgets: too few sizes or budgets, a minimum at the edge or none, and grids that lie off their minimum or drift along
it. Runs count as a grid unless they are `scattered`: those have the checks of single runs only, and training curves (rows of one name)
those of duplicates and conflicts.

Nothing is left out unless asked, and only what is in DROPPED can be.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from dit_jax.error import UsageError
from dit_jax.scaling.fits import parabola
from dit_jax.scaling.names import DROPPED
from dit_jax.scaling.runs import Run, budgets, scattered
from dit_jax.scaling.verdicts import outlier

MOST = 0.2  # of the runs that may be left out, duplicates not counted
OFF = 0.5  # of the half-width of the sizes: a vertex farther than this from their middle is off-centre, or has drifted
NAMED = 5  # runs named in one text


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: its kind, the runs and budgets it concerns by name, what was found and what to do about it, and the rows
    that a drop leaves out."""

    kind: str
    runs: tuple
    budgets: tuple
    what: str
    advice: str
    rows: tuple = ()

    @property
    def text(self) -> str:
        """What was found, and what to do."""
        return f"{self.what}: {self.advice}"


@dataclass(frozen=True)
class Kept:
    """The runs that are left, what was left out and why, and what that does to the budgets."""

    runs: list
    dropped: tuple  # (Finding, Run)
    notes: tuple


@dataclass(frozen=True)
class _Grid:
    """A budget's rows, the middle and half-width of its log sizes, and its parabola's vertex (nan = none inside)."""

    label: str
    rows: tuple
    flops: float
    sizes: tuple
    middle: float
    half: float
    curvature: float  # nan = fewer than 3 sizes
    place: float  # of the vertex in log N, wherever it lies

    @property
    def inside(self) -> bool:
        return self.curvature > 0 and abs(self.place - self.middle) < self.half


def findings(runs: Sequence[Run], tolerance: float = 0.05, curves: bool = False) -> tuple:
    """Everything that is wrong with `runs`; `tolerance` groups budgets as in `fit`; with `curves`, rows of one name are one training."""
    found = [*_duplicates(runs), *_conflicts(runs)]
    if curves:
        return tuple(found)
    grids = _grids(runs, tolerance)
    found += [*_repeats(runs), *_checkpoints(runs)]
    for check in (_few, _edges, _off_centre, _drifting):
        found += check(runs, grids)
    single = _distinct(runs)
    bad = _diverged(runs, single, tolerance)
    gone = {row for f in bad for row in f.rows}
    return tuple(found + bad + _outliers(runs, [i for i in single if i not in gone], tolerance))


def drop(runs: Sequence[Run], kinds: Sequence[str], tolerance: float = 0.05, curves: bool = False) -> Kept:
    """`runs` without those of these kinds. First the duplicates, then the diverged runs, then the outliers among the others, each judged
    without what is gone. Refuses to leave out more than a fifth of the runs."""
    left, dropped = list(range(len(runs))), []
    checks: dict[str, Callable] = {"duplicates": lambda rows: _duplicates([runs[i] for i in rows])}
    if not curves:
        checks["diverged"] = lambda rows: _diverged([runs[i] for i in rows], range(len(rows)), tolerance)
        checks["outliers"] = lambda rows: _outliers([runs[i] for i in rows], range(len(rows)), tolerance)
    for kind in DROPPED:
        if kind not in kinds or kind not in checks:
            continue
        found = [(f, left[row]) for f in checks[kind](left) for row in f.rows]
        dropped += [(f, runs[row]) for f, row in found]
        gone = {row for _, row in found}
        left = [i for i in left if i not in gone]
    kept = [runs[i] for i in left]
    many = [run for f, run in dropped if f.kind != "duplicates"]
    if len(many) > MOST * len(runs):
        raise UsageError(
            f"--drop: would leave out {len(many)} of {len(runs)} runs ({_names(many)}); so many are no accident. Look at their training, "
            "or take them out of the table"
        )
    return Kept(kept, tuple(dropped), tuple(_thinner(runs, kept, tolerance)))


def _thinner(runs, kept, tolerance: float) -> list[str]:
    """Budgets that a drop has left with too few sizes."""
    before = {label: len({r.params for r in members}) for label, members in budgets(runs, tolerance)}
    after = [(members[0].flops, members) for _, members in budgets(kept, tolerance)]
    notes = []
    for label, members in budgets(runs, tolerance):
        ids = {id(r) for r in members}
        now = len({r.params for _, group in after for r in group if id(r) in ids})
        if before[label] >= 3 > now:
            notes.append(f"budget {label} is left with {now} size(s), so no parabola can be fitted to it")
    return notes


def _distinct(runs) -> list[int]:
    """Rows without the copies of others."""
    copies = {row for f in _duplicates(runs) for row in f.rows}
    return [i for i in range(len(runs)) if i not in copies]


def _grids(runs, tolerance: float, rows: Sequence[int] | None = None) -> list[_Grid]:
    """The budgets of a grid, by compute; none where the runs are scattered."""
    rows = range(len(runs)) if rows is None else rows
    place = {id(runs[i]): i for i in rows}
    groups = budgets([runs[i] for i in rows], tolerance)
    if not groups or scattered(groups, tolerance):
        return []
    found = [_grid(label, members, tuple(place[id(r)] for r in members)) for label, members in groups]
    return sorted(found, key=lambda g: g.flops)


def _grid(label: str, members, rows: tuple) -> _Grid:
    log_n = np.log([r.params for r in members])
    flops = math.exp(np.mean(np.log([r.flops for r in members])))
    sizes = tuple(sorted({r.params for r in members}))
    middle, half = float(log_n.max() + log_n.min()) / 2, float(np.ptp(log_n)) / 2
    if len(sizes) < 3:
        return _Grid(label, rows, flops, sizes, middle, half, math.nan, math.nan)
    curve = parabola.curve(np.exp(log_n), np.array([r.tokens for r in members]))
    vertex = parabola.vertex(curve, np.array([[r.loss for r in members]]))
    return _Grid(label, rows, flops, sizes, middle, half, float(vertex.curvature[0]), float(vertex.log_n[0]))


def _named(run: Run) -> str:
    name = run.name or "a run"
    return f"{name} ({run.source})" if run.source else name


def _names(runs: Sequence[Run]) -> str:
    more = f" and {len(runs) - NAMED} more" if len(runs) > NAMED else ""
    return ", ".join(_named(r) for r in runs[:NAMED]) + more


def _finding(
    kind: str, what: str, advice: str, runs: Sequence[Run] = (), labels: Sequence[str] = (), rows=()
) -> Finding:
    return Finding(kind, tuple(r.name for r in runs), tuple(labels), what, advice, tuple(rows))


def _duplicates(runs) -> list[Finding]:
    groups: dict = {}
    for i, r in enumerate(runs):
        groups.setdefault((r.params, r.tokens, r.flops, r.loss), []).append(i)
    found = []
    for rows in groups.values():
        if len(rows) > 1:
            first, *rest = (runs[i] for i in rows)
            what = f"{_names(rest)} repeats {_named(first)} in params, tokens, FLOPs and loss, so one run counts {len(rows)} times"
            found.append(
                _finding(
                    "duplicates", what, "remove the copies, or use --drop=duplicates", [first, *rest], rows=rows[1:]
                )
            )
    return found


def _same(runs, key: Callable) -> list[list[Run]]:
    """Groups of runs of one key with different losses; a key of None is none."""
    groups: dict = {}
    for r in runs:
        if key(r) is not None:
            groups.setdefault(key(r), {}).setdefault(r.loss, r)
    return [list(by_loss.values()) for by_loss in groups.values() if len(by_loss) > 1]


def _conflicts(runs) -> list[Finding]:
    found = []
    for same in _same(runs, lambda r: (r.name, r.params, r.tokens) if r.name else None):
        losses = ", ".join(f"{r.loss:.5g}" for r in same[:NAMED])
        what = f"{_names(same)}: one run with {len(same)} losses ({losses})"
        found.append(
            _finding("conflicts", what, "keep the row that is right, or give repeats names of their own", same)
        )
    return found


def _checkpoints(runs) -> list[Finding]:
    """Rows of one name and size on several amounts of data are one training, which laws through points take for many."""
    data: dict = {}
    for r in runs:
        data.setdefault((r.name, r.params), set()).add(r.tokens)
    trainings = [key for key, tokens in data.items() if len(tokens) > 2]
    if not trainings:
        return []
    what = f"{len(runs)} rows are checkpoints of {len(data)} runs: akima and power take each for a run of its own: too narrow intervals"
    advice = "use another method, which knows that rows of one run share its noise, or keep the last row of each run"
    return [_finding("checkpoints", what, advice)]


def _repeats(runs) -> list[Finding]:
    same = [
        group
        for group in _same(runs, lambda r: (r.params, r.tokens))
        if len({r.name for r in group}) == len(group) or not all(r.name for r in group)
    ]
    if not same:
        return []
    spread = max(max(r.loss for r in g) / min(r.loss for r in g) - 1 for g in same)
    what = (
        f"{len(same)} pair(s) of params and tokens have more than one loss, up to {spread:.2%} apart, first {_names(same[0])}; each "
        "counts as a run of its own"
    )
    advice = "that is right for seeds; remove the old rows if they were trained again"
    return [_finding("repeats", what, advice, [r for g in same for r in g])]


def _few(runs, grids) -> list[Finding]:
    found = []
    for g in grids:
        if len(g.sizes) < 3:
            members = [runs[i] for i in g.rows]
            what = f"budget {g.label}: {len(g.sizes)} distinct size(s) ({_names(members)}), a parabola needs 3"
            found.append(_finding("sizes", what, "train more sizes there", members, [g.label]))
    bare = [g.label for g in grids if len(g.sizes) == 3 == len(g.rows)]
    if bare:
        what = f"budget(s) {', '.join(bare)}: 3 runs leave nothing to test a parabola by"
        found.append(_finding("untested", what, "train one more size there", labels=bare))
    usable = [g.label for g in grids if g.inside]
    if grids and len(usable) < 3:
        what = f"{len(usable)} budget(s) with a minimum inside: any two lie on a power law, so nothing tests it"
        found.append(_finding("budgets", what, "train a third", labels=usable))
    return found


def _edges(runs, grids) -> list[Finding]:
    found = []
    for g in grids:
        if g.curvature <= 0:
            what = f"budget {g.label}: its parabola bends down (curvature {g.curvature:.2g}), too narrow for its noise"
            found.append(_finding("curvature", what, "train sizes farther apart", labels=[g.label]))
        elif g.curvature > 0 and not g.inside:
            end, where = (g.sizes[0], "smaller") if g.place < g.middle else (g.sizes[-1], "larger")
            what = f"budget {g.label}: its minimum lies at or beyond {end:.3g} parameters, the edge of the sizes"
            found.append(_finding("edge", what, f"train {where} ones", labels=[g.label]))
    return found


def _off_centre(runs, grids) -> list[Finding]:
    found = []
    for sign, where in ((1, "larger"), (-1, "smaller")):
        off = [(g, (g.place - g.middle) / g.half) for g in grids if g.inside]
        off = [(g, share) for g, share in off if sign * share > OFF]
        if off:
            shares = ", ".join(f"{g.label} ({share:+.0%})" for g, share in off)
            what = (
                f"off-centre grid: the minimum lies off the middle of the sizes (log N, share of the half-width) at budget {shares}, "
                "which biases N_opt"
            )
            found.append(_finding("off-centre", what, f"train {where} sizes there", labels=[g.label for g, _ in off]))
    return found


def _drifting(runs, grids) -> list[Finding]:
    """Whether the middle of the sizes, relative to the minimum, follows log C by more than OFF of the half-width over the budgets."""
    used = [g for g in grids if g.inside]
    if len(used) < 3:
        return []
    log_c = np.log([g.flops for g in used])
    off = np.array([g.middle - g.place for g in used])
    line = stats.linregress(log_c, off)
    half = float(np.median([g.half for g in used]))
    if abs(line.slope) * np.ptp(log_c) <= OFF * half or line.pvalue > 0.05:
        return []
    low, high = (math.exp(line.intercept + line.slope * c) for c in (log_c[0], log_c[-1]))
    same = " (all budgets have the same sizes)" if len({g.sizes for g in used}) == 1 else ""
    what = (
        f"drifting grid{same}: the middle of the sizes goes from {low:.2g} to {high:.2g} times the minimum between budgets "
        f"{used[0].label} and {used[-1].label}, which biases the exponents"
    )
    advice = "centre the sizes on each budget's minimum, or see --unbias"
    return [_finding("drifting", what, advice, labels=[g.label for g in used])]


def _groups(runs, rows, tolerance: float) -> list[tuple]:
    """Rows of each budget of 3 sizes or more."""
    return [g.rows for g in _grids(runs, tolerance, rows) if len(g.sizes) >= 3]


def _diverged(runs, rows: Sequence[int], tolerance: float) -> list[Finding]:
    rows, found = list(rows), []
    some = [runs[i] for i in rows]
    for case in outlier.diverged(some, _groups(some, range(len(some)), tolerance)):
        run, than = some[case.row], some[case.than]
        if case.good:
            what = (
                f"{_named(run)}: its loss {run.loss:.4g} is below that of runs of up to {case.cheaper:.3g} times its compute with no "
                f"fewer parameters or tokens, as {_named(than)} ({than.loss:.4g})"
            )
            advice = "check its row and its evaluation, or use --drop=diverged"
        else:
            how = f"which has {case.cheaper:.3g} times less compute" if case.cheaper > 1 else "its neighbour in size"
            what = f"{_named(run)}: its loss {run.loss:.4g} is far above the {than.loss:.4g} of {_named(than)}, {how}"
            advice = "did it diverge? Look at its training, train it again, or use --drop=diverged"
        found.append(_finding("diverged", what, advice, [run], rows=[rows[case.row]]))
    return found


def _outliers(runs, rows: Sequence[int], tolerance: float) -> list[Finding]:
    rows = list(rows)
    some = [runs[i] for i in rows]
    groups = _groups(some, range(len(some)), tolerance)
    cases, many = outlier.outliers(some, groups)
    found = []
    for case in cases:
        run = some[case.row]
        others = "the other runs of its budget say" if groups else "a surface through the others says"
        what = (
            f"{_named(run)}: its loss {run.loss:.4g} is {run.loss / case.expected - 1:+.2%} off the {case.expected:.4g} that {others}, "
            f"t = {case.t:.1f} beyond the {case.threshold:.1f} that {len(some)} runs allow"
        )
        advice = "check it, train it again, or use --drop=outliers"
        found.append(_finding("outliers", what, advice, [run], rows=[rows[case.row]]))
    if many:
        what = f"more than {outlier.SHARE:.0%} of the runs are outliers: the noise has long tails, or the runs follow several laws"
        found.append(_finding("noise", what, "look at them"))
    return found
