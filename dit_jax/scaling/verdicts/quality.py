"""The quality of a table of runs, whatever the method: what is wrong with the runs or the grid, in words that say what to do.

Checks of single runs: losses that are missing, duplicates, conflicts (one run, two losses), seeds (one size and data, several runs),
diverged runs and outliers. Checks of a grid of budgets: budgets that scatter, too few sizes, a minimum at the edge or none, and sizes that
lie off their minimum or drift along it. Runs that are `scattered` have the checks of single runs only; training curves (rows of one name)
those of duplicates and conflicts.

Nothing is left out unless asked, and only what is in DROPPED can be; runs with a `setting` are a sweep, of which the best is kept.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from scipy import special

from dit_jax.error import UsageError
from dit_jax.scaling.fits import parabola
from dit_jax.scaling.names import DROPPED
from dit_jax.scaling.runs import Run, budgets, scattered
from dit_jax.scaling.verdicts import outlier

MOST = 0.2  # of the runs that may be left out as diverged or outliers
OFF = 0.5  # of the half-width of the sizes: a vertex farther than this from their middle is off-centre, or has drifted
NAMED = 5  # runs named in one text
APART = 3  # tolerances between two budgets, at least, where C scatters
FULL = 0.8  # of the runs are in budgets of 3 sizes or more, if these are budgets


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: its kind, what was found and what to do about it, the runs and budgets it concerns by name, and the rows
    that a drop leaves out."""

    kind: str
    what: str
    advice: str
    runs: tuple = ()
    budgets: tuple = ()
    rows: tuple = ()
    worse: tuple = ()  # rows that are not the best of their cell: the verdict tells what it says without them

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


def findings(runs: Sequence[Run], tolerance: float = 0.05, curves: bool = False) -> tuple:
    """Everything that is wrong with `runs`; `tolerance` groups budgets as in `fit`; with `curves`, rows of one name are one training."""
    bad, _ = _in_turn(runs, ("duplicates",) if curves else DROPPED, tolerance)
    if curves:
        return (*bad, *_conflicts(runs))
    split = _split(runs, tolerance)
    grids = [] if split else _grids(runs, tolerance)
    of_grids = (*_single(runs, grids), *_off_centre(grids), *_drifting(grids))
    return (*split, *bad, *_conflicts(runs), *_seeds(runs), *_checkpoints(runs), *of_grids)


def kinds_of(text: str | None) -> tuple:
    """The kinds that `--drop` names, in DROPPED or "all"."""
    kinds = () if text is None else DROPPED if text == "all" else tuple(text.split(","))
    for kind in kinds:
        if kind not in DROPPED:
            raise UsageError(f"--drop: found {kind!r}, expected {', '.join(DROPPED)} or all")
    return kinds


def drop(runs: Sequence[Run], kinds: Sequence[str], tolerance: float = 0.05, curves: bool = False) -> Kept:
    """`runs` without those of these kinds, each judged without what is gone: first what is not the best of a sweep, then the missing, the
    duplicates, the diverged and the outliers. Refuses to leave out more than a fifth of the runs as diverged or outliers."""
    asked = [kind for kind in DROPPED if kind in kinds and not (curves and kind in ("diverged", "outliers"))]
    found, left = _in_turn(runs, ["best_of"] * any(r.setting for r in runs) + asked, tolerance)
    many = [runs[row] for f in found if f.kind in ("diverged", "outliers") for row in f.rows]
    if len(many) > MOST * len(runs):
        raise UsageError(
            f"--drop: would leave out {len(many)} of {len(runs)} runs ({_names(many)}); so many are no accident. Look at their training, "
            "or take them out of the table"
        )
    if not left:
        raise UsageError(f"--drop: would leave out all {len(runs)} runs: {found[-1].what}")
    if "missing" not in asked and (gone := _missing([runs[i] for i in left], tolerance)):
        raise UsageError(f"RUNS: {gone[0].text}")
    notes, ids = [], {id(runs[i]) for i in left}
    for label, members in budgets(runs, tolerance):
        now = len({r.params for r in members if id(r) in ids})
        if len({r.params for r in members}) >= 3 > now:
            notes.append(f"budget {label} is left with {now} size(s), so no parabola can be fitted to it")
    return Kept([runs[i] for i in left], tuple((f, runs[row]) for f in found for row in f.rows), tuple(notes))


def _in_turn(runs, kinds: Sequence[str], tolerance: float) -> tuple[list, list]:
    """(what checks of these kinds find, each without the rows of those before it; the rows that are left)."""
    left, found = list(range(len(runs))), []
    for kind in kinds:
        new = CHECKS[kind]([runs[i] for i in left], tolerance)
        found += [replace(f, rows=tuple(left[row] for row in f.rows)) for f in new]
        gone = {row for f in found for row in f.rows}
        left = [i for i in left if i not in gone]
    return found, left


def _names(runs: Sequence[Run]) -> str:
    named = [" ".join(filter(None, (r.name, f"({r.source})" * bool(r.source)))) or "a run" for r in runs[:NAMED]]
    return ", ".join(named) + f" and {len(runs) - NAMED} more" * (len(runs) > NAMED)


def _rows(runs, key: Callable) -> list[list[int]]:
    """The rows of each key that several have; a key of None is none."""
    groups: dict = {}
    for i, r in enumerate(runs):
        groups.setdefault(key(r), []).append(i)
    return [rows for k, rows in groups.items() if k is not None and len(rows) > 1]


def _best_of(runs, tolerance: float) -> list[Finding]:
    """The rows of a sweep that are not of the setting with the lowest mean loss at their size, data and budget."""
    gone, best = [], Counter()
    for rows in _rows(runs, lambda r: (r.params, r.tokens, r.flops, r.group)):
        losses: dict = {}
        for i in rows:
            losses.setdefault(runs[i].setting, []).append(math.inf if math.isnan(runs[i].loss) else runs[i].loss)
        chosen = min(losses, key=lambda setting: float(np.mean(losses[setting])))
        best[chosen] += len(losses) > 1
        gone += [i for i in rows if runs[i].setting != chosen]
    if not gone:
        return []
    shares = ", ".join(f"{setting or 'blank'} in {count}" for setting, count in best.most_common(NAMED) if count)
    what = f"{len(gone)} of {len(runs)} rows are not the best of the sweep at their size, data and budget; the best is {shares}"
    return [Finding("best_of", what, "left out by --best_of", rows=tuple(gone))]


def _missing(runs, tolerance: float) -> list[Finding]:
    rows = tuple(i for i, r in enumerate(runs) if math.isnan(r.loss))
    what = f"{len(rows)} of {len(runs)} runs have no loss ({_names([runs[i] for i in rows])})"
    return [Finding("missing", what, "fill it in, or use --drop=missing", rows=rows)] if rows else []


def _duplicates(runs, tolerance: float) -> list[Finding]:
    found = []
    for rows in _rows(runs, lambda r: (r.params, r.tokens, r.flops, r.loss)):
        first, *rest = (runs[i] for i in rows)
        what = f"{_names(rest)} repeats {_names([first])} in params, tokens, FLOPs and loss, so one run counts {len(rows)} times"
        names = tuple(r.name for r in (first, *rest))
        found.append(
            Finding("duplicates", what, "remove the copies, or use --drop=duplicates", names, rows=tuple(rows[1:]))
        )
    return found


def _same(runs, key: Callable) -> list[list[Run]]:
    """Runs of one key, where their losses differ, one of each loss."""
    groups = [list({runs[i].loss: runs[i] for i in reversed(rows)}.values())[::-1] for rows in _rows(runs, key)]
    return [group for group in groups if len(group) > 1]


def _worse(runs, groups: Sequence[Sequence[Run]]) -> tuple:
    """The rows of these groups but the best of each."""
    worse = {id(r) for group in groups for r in sorted(group, key=lambda r: r.loss)[1:]}
    return tuple(i for i, r in enumerate(runs) if id(r) in worse)


def _conflicts(runs) -> list[Finding]:
    found = []
    for same in _same(runs, lambda r: (r.name, r.params, r.tokens) if r.name else None):
        what = f"{_names(same)}: one run with {len(same)} losses ({', '.join(f'{r.loss:.5g}' for r in same[:NAMED])})"
        advice = "keep the row that is right, or tell seeds apart by their names or a column `seed`"
        found.append(Finding("conflicts", what, advice, tuple(r.name for r in same), worse=_worse(runs, [same])))
    return found


def _seeds(runs) -> list[Finding]:
    groups = _same(runs, lambda r: (r.params, r.tokens))
    groups = [g for g in groups if len({r.name for r in g}) == len(g) or not all(r.name for r in g)]
    if not groups:
        return []
    logs = [np.log([r.loss for r in group]) for group in groups]
    noise = math.sqrt(sum(float(((log - log.mean()) ** 2).sum()) for log in logs) / sum(len(log) - 1 for log in logs))
    apart = f"{math.expm1(max(map(np.ptp, logs))):.2%} apart (standard deviation {noise:.2%})"
    what = (
        f"{len(groups)} cell(s) of params and tokens have several runs (seeds), up to {apart}, first {_names(groups[0])}; each counts "
        "as a run of its own"
    )
    advice = "that is right for seeds; remove the old rows if they were trained again, or take the best of a sweep with --best_of=COLUMN"
    return [Finding("seeds", what, advice, tuple(r.name for g in groups for r in g), worse=_worse(runs, groups))]


def _checkpoints(runs) -> list[Finding]:
    """Rows of one name and size on several amounts of data are one training, which laws through points take for many."""
    data: dict = {}
    for r in runs:
        data.setdefault((r.name, r.params), set()).add(r.tokens)
    if all(len(tokens) < 3 for tokens in data.values()):
        return _unnamed(runs)
    what = f"{len(runs)} rows are checkpoints of {len(data)} runs: akima and power take each for a run of its own: too narrow intervals"
    advice = "use another method, which knows that rows of one run share its noise, or keep the last row of each run"
    return [Finding("checkpoints", what, advice)]


def _unnamed(runs) -> list[Finding]:
    """Rows without names, of which each size comes on several amounts of data: perhaps points of one training."""
    again = Counter(params for params, _ in {(r.params, r.tokens) for r in runs})
    if not all(re.fullmatch(r"row\d+", r.name) for r in runs) or min(again.values()) < 3:
        return []
    what = f"each of the {len(again)} sizes comes on {min(again.values())} amounts of data, in rows without names: runs of their own"
    advice = "if those of a size are points of one training, name it in a column `run`: intervals are then wider"
    return [Finding("unnamed", what, advice)]


def _split(runs, tolerance: float) -> list[Finding]:
    """Budgets that `tolerance` takes apart: groups of C that are wider, but narrower than the gaps between them."""
    ordered = sorted(runs, key=lambda r: r.flops)
    steps = np.diff(np.log([r.flops for r in ordered]))
    cuts = [0, *(np.flatnonzero(steps > APART * tolerance) + 1).tolist(), len(ordered)]
    groups = [ordered[a:b] for a, b in pairwise(cuts)]
    widths = [math.log(group[-1].flops / group[0].flops) for group in groups if group]
    if len(groups) < 2 or all(r.group for r in runs) or max(widths) > min(steps[cut - 1] for cut in cuts[1:-1]):
        return []
    if sum(len(group) for group in groups if len({r.params for r in group}) > 2) < FULL * len(runs):
        return []
    parts = [len(budgets([replace(r, group="") for r in group], tolerance)) for group in groups]
    wide = [i for i, count in enumerate(parts) if count > 1 and len({r.params for r in groups[i]}) > 2]
    if not wide:
        return []
    labels = tuple(f"{math.exp(np.mean(np.log([r.flops for r in groups[i]]))):.3g}" for i in wide)
    what = (
        f"C scatters by up to {math.expm1(max(widths)):.0%} about {', '.join(labels)}, as read off a figure; budgets are told apart at "
        f"{tolerance:.0%}, which makes {sum(parts)} of {len(groups)}"
    )
    return [Finding("split", what, "give each row its budget in a column, and say --column group=NAME", budgets=labels)]


@dataclass(frozen=True)
class _Grid:
    """A budget's rows and sizes, the middle and half-width of its log sizes, and its parabola's curvature (nan = fewer than 3 sizes) and
    vertex in log N, wherever it lies."""

    label: str
    rows: tuple
    flops: float
    sizes: tuple
    middle: float
    half: float
    curvature: float
    place: float

    @property
    def inside(self) -> bool:
        return self.curvature > 0 and abs(self.place - self.middle) < self.half


def _grids(runs, tolerance: float) -> list[_Grid]:
    """The budgets of a grid, by compute; none where the runs are scattered."""
    row, groups = {id(r): i for i, r in enumerate(runs)}, budgets(runs, tolerance)
    if not groups or scattered(groups, tolerance):
        return []
    found = [_grid(label, members, tuple(row[id(r)] for r in members)) for label, members in groups]
    return sorted(found, key=lambda g: g.flops)


def _grid(label: str, members, rows: tuple) -> _Grid:
    n, d, c, loss = (np.array([getattr(r, name) for r in members]) for name in ("params", "tokens", "flops", "loss"))
    log_n, sizes, curvature, place = np.log(n), tuple(sorted({r.params for r in members})), math.nan, math.nan
    if len(sizes) > 2:
        vertex = parabola.vertex(parabola.curve(n, d), loss[None])
        curvature, place = float(vertex.curvature[0]), float(vertex.log_n[0])
    middle, half = float(log_n.max() + log_n.min()) / 2, float(np.ptp(log_n)) / 2
    return _Grid(label, rows, math.exp(np.mean(np.log(c))), sizes, middle, half, curvature, place)


def _single(runs, grids) -> list[Finding]:
    """Budgets of too few sizes, or without a minimum inside them."""
    found = []
    for g in grids:
        kind, what, advice = "edge", "", ""
        if len(g.sizes) < 3:
            what = f"{len(g.sizes)} distinct size(s) ({_names([runs[i] for i in g.rows])}), a parabola needs 3"
            kind, advice = "sizes", "train more sizes there"
        elif g.curvature <= 0:
            what = f"its parabola bends down (curvature {g.curvature:.2g}), too narrow for its noise"
            kind, advice = "curvature", "train sizes farther apart"
        elif not g.inside:
            end, where = (g.sizes[0], "smaller") if g.place < g.middle else (g.sizes[-1], "larger")
            what, advice = (
                f"its minimum lies at or beyond {end:.3g} parameters, the edge of the sizes",
                f"train {where} ones",
            )
        found += [Finding(kind, f"budget {g.label}: {what}", advice, budgets=(g.label,))] if what else []
    bare = tuple(g.label for g in grids if len(g.sizes) == 3 == len(g.rows))
    what = f"budget(s) {', '.join(bare)}: 3 runs leave nothing to test a parabola by"
    return found + [Finding("untested", what, "train one more size there", budgets=bare)] * bool(bare)


def _off_centre(grids) -> list[Finding]:
    found = []
    for sign, where in ((1, "larger"), (-1, "smaller")):
        off = {g.label: (g.place - g.middle) / g.half for g in grids if g.inside}
        off = {label: share for label, share in off.items() if sign * share > OFF}
        what = (
            "off-centre grid: the minimum lies off the middle of the sizes (log N, share of the half-width) at budget "
            f"{', '.join(f'{label} ({share:+.0%})' for label, share in off.items())}, which biases N_opt"
        )
        found += [Finding("off-centre", what, f"train {where} sizes there", budgets=tuple(off))] if off else []
    return found


def _drifting(grids) -> list[Finding]:
    """Whether the middle of the sizes, relative to the minimum, follows log C by more than OFF of the half-width over the budgets."""
    used = [g for g in grids if g.inside]
    if len(used) < 3:
        return []
    log_c = np.log([g.flops for g in used])
    (slope, at_1), covariance = np.polyfit(log_c, [g.middle - g.place for g in used], 1, cov=True)
    p = 2 * special.stdtr(len(used) - 2, -abs(slope) / max(math.sqrt(covariance[0, 0]), 1e-300))
    if abs(slope) * np.ptp(log_c) <= OFF * float(np.median([g.half for g in used])) or p > 0.05:
        return []
    low, high = (math.exp(at_1 + slope * c) for c in (log_c[0], log_c[-1]))
    same = " (all budgets have the same sizes)" * (len({g.sizes for g in used}) == 1)
    what = (
        f"drifting grid{same}: the middle of the sizes goes from {low:.2g} to {high:.2g} times the minimum between budgets "
        f"{used[0].label} and {used[-1].label}, which biases the exponents"
    )
    advice = "centre the sizes on each budget's minimum, or see --unbias"
    return [Finding("drifting", what, advice, budgets=tuple(g.label for g in used))]


def _groups(runs, tolerance: float) -> list[tuple]:
    """Rows of each budget of 3 sizes or more."""
    return [g.rows for g in _grids(runs, tolerance) if len(g.sizes) >= 3]


def _diverged(runs, tolerance: float) -> list[Finding]:
    found = []
    for case in outlier.diverged(runs, _groups(runs, tolerance)):
        run, than = runs[case.row], runs[case.than]
        what, advice = (
            f"{_names([run])}: its loss {run.loss:.4g} is ",
            "did it diverge? Train it again, or use --drop=diverged",
        )
        if case.good:
            what += f"below that of runs of up to {case.cheaper:.3g} times its compute with no fewer parameters or tokens, as "
            what += f"{_names([than])} ({than.loss:.4g})"
            advice = "check its row and its evaluation, or use --drop=diverged"
        else:
            how = f"which has {case.cheaper:.3g} times less compute" if case.cheaper > 1 else "its neighbour in size"
            what += f"far above the {than.loss:.4g} of {_names([than])}, {how}"
        found.append(Finding("diverged", what, advice, (run.name,), rows=(case.row,)))
    return found


def _outliers(runs, tolerance: float) -> list[Finding]:
    groups = _groups(runs, tolerance)
    cases, many = outlier.outliers(runs, groups)
    found = []
    for case in cases:
        run, others = (
            runs[case.row],
            "the other runs of its budget say" if groups else "a surface through the others says",
        )
        what = (
            f"{_names([run])}: its loss {run.loss:.4g} is {run.loss / case.expected - 1:+.2%} off the {case.expected:.4g} that {others}, "
            f"t = {case.t:.1f} beyond the {case.threshold:.1f} that {len(runs)} runs allow"
        )
        found.append(
            Finding("outliers", what, "check it, train it again, or use --drop=outliers", (run.name,), rows=(case.row,))
        )
    if many:
        what = f"more than {outlier.SHARE:.0%} of the runs are outliers: the noise has long tails, or the runs follow several laws"
        found.append(Finding("noise", what, "look at them"))
    return found


CHECKS = {
    "best_of": _best_of,
    "missing": _missing,
    "duplicates": _duplicates,
    "diverged": _diverged,
    "outliers": _outliers,
}
