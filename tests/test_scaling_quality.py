"""Facts about the quality of runs: planted faults are found and named, clean tables have none, and nothing is dropped unasked."""

import csv
import json
import math
import os
from dataclasses import replace

import numpy as np
import pytest
from planted import CHINCHILLA, LAW, SKEW, curves, grid, ladder, scatter, study

from dit_jax.error import UsageError
from dit_jax.scaling.__main__ import main
from dit_jax.scaling.fits import fit_isoflop
from dit_jax.scaling.runs import Run, budgets, scattered
from dit_jax.scaling.verdicts import outlier, quality
from dit_jax.scaling.verdicts.methods import fit_methods

DATA = os.path.join(os.path.dirname(__file__), "data")


def sourced(runs) -> list[Run]:
    return [replace(r, source=f"runs.csv:{i + 2}") for i, r in enumerate(runs)]


def changed(runs, row: int, factor: float) -> list[Run]:
    """The runs, the loss of one of them times `factor`."""
    return [replace(r, loss=r.loss * factor) if i == row else r for i, r in enumerate(sourced(runs))]


def kinds(runs, **options) -> list[str]:
    return [f.kind for f in quality.findings(runs, **options)]


def only(runs, kind: str) -> quality.Finding:
    (found,) = [f for f in quality.findings(runs) if f.kind == kind]
    return found


@pytest.mark.parametrize(
    "runs",
    [
        ladder(),
        ladder(noise=0.003),
        scatter(),
        scatter(noise=0.003),
        study(noise=0.003),
        grid(CHINCHILLA, 16.0),
        grid(SKEW, 16.0, noise=0.002),
        grid(CHINCHILLA, 1.5, 5, noise=1e-5),
    ],
    ids=["exact", "noisy", "scatter", "noisy scatter", "parabolas", "x16", "skew x16 noisy", "narrow"],
)
def test_clean_runs_have_no_finding(runs):
    assert not quality.findings(runs)


@pytest.mark.parametrize("seed", range(2))
def test_runs_scattered_so_densely_that_some_share_a_compute_are_no_grid(seed):
    """As in tables read off a figure: C is anything, and half of the runs have two others within 5 %."""
    runs = sourced(scatter(count=300, noise=0.003, seed=seed))
    groups = budgets(runs)
    full = sum(len(members) for _, members in groups if len(members) > 2)
    assert full > 0.4 * len(runs) and "runs share no compute budgets" in scattered(groups)
    bad = [replace(r, loss=1.1 * r.loss) if i in (7, 77, 177) else r for i, r in enumerate(runs)]
    found = [f for f in quality.findings(bad) if f.kind in ("outliers", "diverged")]
    assert {row for f in found for row in f.rows} == {7, 77, 177}
    fit = fit_isoflop(runs, resamples=20)
    assert not fit.identified and "the runs share no compute budgets" in fit.warnings[0]
    assert len([w for w in fit.warnings if "a parabola needs 3" in w]) == 1  # and not one for each of a hundred
    main = fit_methods(runs, names=("isoflop", "surface"), options=lambda method: {"resamples": 20}).main
    assert main.method == "surface"


@pytest.mark.parametrize("step", [1.25, 2.0, 10.0])
@pytest.mark.parametrize("off", [0.0, 0.02])
def test_budgets_are_found_where_they_are_meant_though_steps_are_rounded(step, off):
    rng = np.random.default_rng(0)
    for sizes, count in ((3, 5), (5, 4), (12, 10)):
        flops = [1e18 * step**i * math.exp(rng.uniform(-off, off)) for i in range(count) for _ in range(sizes)]
        runs = [Run("", 1e6 * (1 + i % sizes), 1e9, c, 3.0) for i, c in enumerate(flops)]
        assert not scattered(budgets(runs))


def test_checkpoints_that_count_as_runs_are_named():
    rows = curves(points=5, sizes=6)
    assert "30 rows are checkpoints of 6 runs" in only(rows, "checkpoints").text
    assert "checkpoints" not in kinds(rows, curves=True) and "checkpoints" not in kinds(ladder())


def test_few_clean_studies_have_an_outlier():
    """At most 5 %, by the threshold; the two conditions together make it fewer."""
    groups = [range(8 * i, 8 * i + 8) for i in range(6)]
    assert sum(bool(outlier.outliers(ladder(noise=0.004, seed=s), groups)[0]) for s in range(60)) <= 6


def test_identical_rows_are_duplicates_and_the_first_is_kept():
    runs = sourced(ladder(noise=0.003))
    copy = replace(runs[5], name="again", source="other.csv:9")
    found = only([*runs, copy], "duplicates")
    assert found.runs == (runs[5].name, "again") and found.rows == (48,)
    assert "again (other.csv:9) repeats" in found.text and "(runs.csv:7)" in found.text and "--drop" in found.text
    kept = quality.drop([*runs, copy], ["duplicates"])
    assert kept.runs == runs and [r.name for _, r in kept.dropped] == ["again"] and not kept.notes


def test_one_run_with_two_losses_is_a_conflict_and_two_runs_alike_are_seeds():
    runs = sourced(ladder(noise=0.003))
    rerun = replace(runs[5], loss=runs[5].loss * 1.002, source="other.csv:9")
    found = only([*runs, rerun], "conflicts")
    assert found.runs == (runs[5].name,) * 2 and "runs.csv:7" in found.text and "other.csv:9" in found.text
    assert "conflicts" not in kinds([*runs, replace(rerun, name="seed 2")])
    found = only([*runs, replace(rerun, name="seed 2")], "seeds")
    assert "0.20% apart (standard deviation 0.14%)" in found.text and not found.rows
    assert found.worse == (len(runs),)  # the rerun has the higher loss
    assert set(found.runs) == {runs[5].name, "seed 2"}
    assert "seeds" not in kinds([*runs, rerun])


def test_few_sizes_are_named():
    runs = sourced(ladder())
    few, bare = quality.findings(runs[:2] + runs[8:16:3] + runs[16:])
    assert few.kind == "sizes" and few.budgets == ("1e+18",) and "2 distinct size(s)" in few.text
    assert "runs.csv:3" in few.text and bare.kind == "untested" and bare.budgets == ("3.98e+18",)
    assert kinds(runs[:24]) == []


def test_edges_and_inverted_curves_are_named():
    runs = ladder()
    assert only(runs[:8][:4] + runs[8:], "edge").text.endswith("train larger ones")
    assert only(runs[:8][4:] + runs[8:], "edge").text.endswith("train smaller ones")
    bent = [replace(r, loss=9 - r.loss) for r in runs[:8]]
    assert only(bent + runs[8:], "curvature").budgets == ("1e+18",)


def test_grids_off_their_minimum_are_named_with_their_direction():
    small, large = (only(grid(LAW, 4.0, offset=o), "off-centre") for o in (-0.9, 0.9))
    assert "train larger sizes" in small.text and "train smaller sizes" in large.text and len(small.budgets) == 5
    assert kinds(grid(LAW, 4.0, offset=0.5)) == []


def test_drifting_grids_are_named_with_their_drift():
    found = only(grid(LAW, 4.0, offset=-0.4, drift=1.0), "drifting")
    low, high = math.exp(-0.4), math.exp(0.6)
    assert f"from {low:.2g} to {high:.2g} times the minimum" in found.text and "same sizes" not in found.text
    assert "drifting" not in kinds(grid(LAW, 4.0, offset=-0.2, drift=0.4))
    sizes = np.geomspace(1e7, 3e10, 9).tolist()
    fixed = [Run("", n, c / 6 / n, c, float(LAW(n, c / 6 / n))) for c in (1e18, 1e19, 1e20) for n in sizes]
    assert "all budgets have the same sizes" in only(fixed, "drifting").text


@pytest.mark.parametrize(
    ("runs", "row", "others", "factor"),
    [
        (ladder(noise=0.003), 11, "other runs of its budget", 1.05),
        (ladder(noise=0.003), 40, "other runs of its budget", 0.95),
        (scatter(noise=0.003), 11, "a surface through the others", 1.05),
        (grid(CHINCHILLA, 16.0, 9, noise=0.003), 22, "other runs of its budget", 0.95),
    ],
    ids=["middle", "end", "scatter", "x16"],
)
def test_an_outlier_is_named_with_what_the_others_expect(runs, row, others, factor):
    found = only(changed(runs, row, factor), "outliers")
    assert found.runs == (runs[row].name,) and found.rows == (row,)
    assert f"(runs.csv:{row + 2})" in found.text and others in found.text and "--drop=outliers" in found.text
    cases, many = outlier.outliers(changed(runs, row, factor), [])
    assert not many and cases[0].row == row and cases[0].expected == pytest.approx(runs[row].loss, rel=0.02)
    assert math.copysign(1, cases[0].t) == math.copysign(1, factor - 1)


def test_one_outlier_does_not_hide_another():
    runs = changed(changed(ladder(noise=0.002), 11, 1.08), 30, 1.03)
    assert {f.rows for f in quality.findings(runs) if f.kind == "outliers"} == {(11,), (30,)}


def test_the_studentised_deleted_residual_is_that_of_a_fit_without_the_run():
    """About a straight deletion: refit without the run, divide its prediction error by its standard error."""
    runs = ladder(noise=0.004, budgets=2)
    groups = [range(8), range(8, 16)]
    t, expected, _ = outlier._about_parabolas(runs, list(range(16)), groups)
    for row in (0, 5, 11):
        group = groups[row // 8]
        basis = {
            i: np.array([1, u, u * u]) for i, u in ((i, math.log(runs[i].params / runs[row].params)) for i in group)
        }
        left = [i for i in group if i != row]
        X, y = np.array([basis[i] for i in left]), np.log([runs[i].loss for i in left])
        theta, sse = np.linalg.lstsq(X, y, rcond=None)[:2]
        other = groups[1 - row // 8]
        u = np.log([runs[i].params for i in other])
        rest = np.polyfit(u - u.mean(), np.log([runs[i].loss for i in other]), 2, full=True)[1]
        variance = float(sse[0] + rest[0]) / (16 - 1 - 6)
        error = math.log(runs[row].loss) - basis[row] @ theta
        spread = math.sqrt((variance + outlier.LEAST**2) * (1 + basis[row] @ np.linalg.inv(X.T @ X) @ basis[row]))
        assert t[row] == pytest.approx(error / spread, rel=1e-3)
        assert expected[row] == pytest.approx(math.exp(basis[row] @ theta), rel=1e-9)


@pytest.mark.parametrize("row", [2, 20, 30, 47])
def test_a_diverged_run_is_named_and_is_no_outlier(row):
    found = [f for f in quality.findings(changed(ladder(noise=0.003), row, 2.5)) if f.rows]
    assert [(f.kind, f.rows) for f in found] == [("diverged", (row,))]
    assert f"(runs.csv:{row + 2})" in found[0].text and "did it diverge?" in found[0].text


def test_a_run_too_good_to_be_true_is_blamed_and_not_those_above_it():
    found = [f for f in quality.findings(changed(ladder(noise=0.003), 2, 0.6)) if f.rows]
    assert [(f.kind, f.rows) for f in found] == [("diverged", (2,))]
    assert "is below that of runs of up to" in found[0].text


def test_training_curves_are_checked_for_copies_alone():
    runs = curves(sizes=3, points=5)
    assert not quality.findings(runs, curves=True)
    assert kinds([*runs, runs[3]], curves=True) == ["duplicates"]


def test_dropping_takes_what_is_named_and_no_more():
    clean = sourced(ladder(noise=0.003))
    runs = changed(changed(clean, 11, 1.05), 30, 3.0)
    runs.append(runs[7])
    kept = quality.drop(runs, quality.DROPPED)
    assert {(f.kind, r.name) for f, r in kept.dropped} == {
        ("duplicates", runs[7].name),
        ("outliers", runs[11].name),
        ("diverged", runs[30].name),
    }
    assert kept.runs == [r for i, r in enumerate(runs[:-1]) if i not in (11, 30)]
    assert quality.drop(runs, []).runs == runs
    assert [f.kind for f, _ in quality.drop(runs, ["outliers"]).dropped] != []
    assert not quality.drop(clean, quality.DROPPED).dropped


def test_a_budget_left_with_too_few_sizes_is_said_and_many_drops_are_refused():
    runs = sourced(ladder(noise=0.003))
    thin = changed(runs[:3] + runs[8:], 1, 3.0)
    assert quality.drop(thin, ["diverged"]).notes == (
        "budget 1e+18 is left with 2 size(s), so no parabola can be fitted to it",
    )
    wild = [replace(r, loss=r.loss * (4.0 if i % 3 == 0 else 1.0)) for i, r in enumerate(runs)]
    with pytest.raises(UsageError, match=r"--drop: would leave out \d+ of 48 runs .* no accident"):
        quality.drop(wild, quality.DROPPED)


def test_too_many_outliers_are_another_kind_of_noise():
    off = {8 * i: 0.03 * 1.8**i for i in range(7)}
    runs = [replace(r, loss=r.loss * math.exp(off.get(i, 0.0))) for i, r in enumerate(scatter(noise=0.001, count=60))]
    *cases, last = quality._outliers(runs, 0.05)
    assert {f.rows for f in cases} == {(8 * i,) for i in range(1, 7)}  # as many as are looked for, the worst
    assert last.kind == "noise" and "long tails" in last.text


def test_published_runs_have_the_faults_one_can_see():
    with open(os.path.join(DATA, "porian_isoflop_points.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    names = ("file", "dataset", "hparams", "warmup", "decay", "param_count", "val")
    some = [r for r in rows if tuple(r[n] for n in names[1:]) == ("rw", "base", "short", "kaplan", "standard", "val")]
    runs = [Run("", *(float(p[c]) for c in ("n", "t", "flops", "loss"))) for p in some]
    assert {"off-centre", "drifting"} <= set(kinds(runs))


def sheet(path, runs) -> str:
    rows = [f"{r.name},{r.params},{r.tokens},{r.flops},{r.loss}" for r in runs]
    path.write_text("\n".join(["run,params,tokens,flops,loss", *rows]))
    return str(path)


def test_fit_warns_and_drops_only_when_asked(tmp_path, capsys):
    bad = changed(changed(ladder(noise=0.003), 11, 1.05), 30, 3.0)
    path, out = sheet(tmp_path / "runs.csv", [*bad, bad[7]]), tmp_path / "fit.json"
    assert main(["fit", path, "--resamples=50", f"--json={out}"]) == 0
    said, result = capsys.readouterr(), json.loads(out.read_text())
    assert result["n_runs"] == 49 and "dropped" not in result
    assert {"duplicates", "diverged", "outliers"} <= {f["kind"] for f in result["quality"]}
    for line in (9, 13, 32):
        assert f"runs.csv:{line})" in said.out
    kinds = [f["text"].split(":")[0] for f in result["verdict"]["findings"]]
    assert {"duplicates", "diverged", "outliers"} <= set(kinds)
    for command in ("fit", "predict"):
        assert main([command, path, "--resamples=0", "--drop=all", f"--json={out}", "--flops=1e22"]) == 0
        said, result = capsys.readouterr(), json.loads(out.read_text())
        assert result["n_runs"] == 46 and "3 of 49 runs dropped" in said.err
        assert {d["source"].rsplit(":", 1)[1] for d in result["dropped"]} == {"50", "13", "32"}
    assert main(["fit", path, "--resamples=0", "--drop=duplicates,diverged", "--method=varpro", f"--json={out}"]) == 0
    result = json.loads(out.read_text())
    assert result["n_runs"] == 47 and [f["kind"] for f in result["quality"]] == ["outliers"]


def test_many_findings_of_one_kind_are_one_finding_of_the_verdict(tmp_path, capsys):
    path = sheet(tmp_path / "runs.csv", ladder(noise=0.003) + ladder(noise=0.003)[:12])
    assert main(["fit", path, "--resamples=0"]) == 0
    said = capsys.readouterr().out
    assert said.count(" repeats ") == 1 and "(and 11 more: --verbose)" in said
    assert main(["fit", path, "--resamples=0", "--verbose"]) == 0
    assert capsys.readouterr().out.count("duplicates: ") == 13


def test_numbers_of_any_size_are_judged_without_an_error():
    rng = np.random.default_rng(0)
    for count, widest in ((1, 1), (4, 40), (8, 90), (20, 90), (20, 10)):
        rows = 10.0 ** rng.uniform(-widest, widest, (count, 4))
        runs = [Run("ab"[i % 2], *map(float, row)) for i, row in enumerate(rows)]
        names = {r.name for r in runs}
        assert all(set(f.runs) <= names for f in quality.findings(runs))


def digitised(off: float) -> list[Run]:
    """A ladder whose C is read off a figure: each up to this far off."""
    rng = np.random.default_rng(0)
    moved = [r.flops * math.exp(rng.uniform(-off, off)) for r in ladder(noise=0.003)]
    return [replace(r, flops=c) for r, c in zip(sourced(ladder(noise=0.003)), moved, strict=True)]


def test_budgets_that_the_rule_splits_are_said_and_a_group_is_the_way_out():
    runs = digitised(0.12)
    found = only(runs, "split")
    assert len(budgets(runs)) > 6 and "of 6" in found.text and "--column group=NAME" in found.text
    assert "split" not in kinds([replace(r, group=r.name.split("_")[0]) for r in runs])
    for clean in (digitised(0.02), ladder(), scatter(), scatter(count=300), grid(LAW, 4.0)):
        assert "split" not in kinds(clean)


def test_missing_losses_are_dropped_and_all_of_them_is_refused():
    runs = sourced(ladder(noise=0.003))
    holes = [replace(r, loss=math.nan) if i in (3, 40) else r for i, r in enumerate(runs)]
    kept = quality.drop(holes, ["missing"])
    assert kept.runs == [r for i, r in enumerate(runs) if i not in (3, 40)]
    assert {f.kind for f, _ in kept.dropped} == {"missing"} and "2 of 48 runs have no loss" in kept.dropped[0][0].what
    with pytest.raises(UsageError, match=r"2 of 48 runs have no loss .*runs.csv:5.*--drop=missing"):
        quality.drop(holes, ["duplicates"])
    with pytest.raises(UsageError, match="would leave out all 1 runs"):
        quality.drop(holes[3:4], ["missing"])


def test_the_best_of_a_sweep_is_the_setting_with_the_lowest_mean_at_each_cell():
    runs = sourced(ladder(noise=0.003))
    best = [replace(r, setting="1e-3") for r in runs]
    worse = [replace(r, setting="3e-3", loss=math.nan if i % 2 else 1.1 * r.loss) for i, r in enumerate(runs)]
    again = [replace(best[0], name="seed 2", loss=best[0].loss * 1.001)]
    kept = quality.drop([*worse, *best, *again], [])
    assert kept.runs == [*best, *again] and len(kept.dropped) == 48
    assert "the best is 1e-3 in 48" in kept.dropped[0][0].what and len({f for f, _ in kept.dropped}) == 1


def test_an_unknown_kind_is_refused(tmp_path, capsys):
    path = sheet(tmp_path / "runs.csv", ladder())
    assert main(["fit", path, "--drop=outlier"]) == 2
    assert "--drop: found 'outlier', expected missing, duplicates, diverged, outliers or all" in capsys.readouterr().err
