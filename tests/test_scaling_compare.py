"""Facts about comparisons of two ladders: planted crossings come back, and equal ladders are not told apart."""

import json
import math
import os

import numpy as np
import pytest
from planted import BUDGETS, scatter, study
from planted import ladder as planted
from planted import sheet as table
from test_scaling_metric import COMPUTE, LIANG, ladder

from dit_jax.error import UsageError
from dit_jax.scaling.__main__ import main
from dit_jax.scaling.fits import METHODS
from dit_jax.scaling.fits.law import PowerLaw
from dit_jax.scaling.frontier.compare import compare, ladder_of_fit, ladder_of_metric
from dit_jax.scaling.frontier.metric import fit_metric
from dit_jax.scaling.runs import Run
from dit_jax.scaling.verdicts.verdict import ends

A_LAW, B_LAW = PowerLaw(22.0, -0.15), PowerLaw(22.0 * 4e10**0.03, -0.18)  # cross at 4e10


def side(name="a", law=A_LAW, noise=0.003, seed=0, protocol=None, **options):
    found = ladder_of_fit(name, METHODS["isoflop"](study(noise=noise, seed=seed, loss=law), resamples=300, **options))
    return found if protocol is None else type(found)(**vars(found) | {"protocol": protocol})


def sheet(path, law, seed, noise=0.003) -> str:
    rows = [f"{r.name},{r.params},{r.tokens},{r.flops},{r.loss}" for r in study(noise=noise, seed=seed, loss=law)]
    path.write_text("\n".join(["run,params,tokens,flops,loss", *rows]))
    return str(path)


def test_the_crossing_of_two_ladders_is_found_within_its_interval():
    found = compare(side("a"), side("b", B_LAW, seed=1), form="pure")
    assert found["steeper"] == "b" and found["exponents"][0]["law"] == "L_opt_pure"
    assert found["exponents"][0]["interval"][0] < -0.03 < found["exponents"][0]["interval"][1] < 0
    assert (
        found["crossing"]["lower"] == "b" and found["crossing"]["interval"][0] < 4e10 < found["crossing"]["interval"][1]
    )
    assert found["ratio_interval"][0] < B_LAW(found["common"]) / A_LAW(found["common"]) < found["ratio_interval"][1]
    exact = compare(side("a", noise=0.0), side("b", B_LAW, noise=0.0), form="pure")
    assert exact["crossing"]["flops"] == pytest.approx(4e10, rel=1e-5)
    assert exact["exponents"][0]["difference"] == pytest.approx(-0.03, rel=1e-6)
    swapped = compare(side("b", B_LAW, noise=0.0), side("a", noise=0.0), form="pure")
    assert swapped["crossing"]["lower"] == "b" and swapped["crossing"]["flops"] == pytest.approx(4e10, rel=1e-5)


def test_a_crossing_beyond_the_data_says_how_far():
    late = PowerLaw(22.0 * 1.3e12**0.03, -0.18)  # crosses at ten times the largest budget
    found = compare(side("a", noise=0.0), side("late", late, noise=0.0), form="pure")["crossing"]
    assert found["lower"] == "late" and found["beyond"] == pytest.approx(1.3e12 / BUDGETS[-1], rel=1e-5)


def test_equal_ladders_are_not_told_apart():
    same, other = side("a", seed=3), side("b", seed=4)
    found = compare(same, other, form="pure")
    assert found["steeper"] == "" and found["exponents"][0]["interval"][0] < 0 < found["exponents"][0]["interval"][1]
    assert math.isinf(found["crossing"]["interval"][1]) or found["crossing"]["interval"][1] > 1e3 * BUDGETS[-1]


def test_equal_seeds_do_not_tie_two_ladders():
    one = side("a", seed=0)
    found = compare(one, one, form="pure")["exponents"][0]
    width = one.laws["L_opt_pure"].exponent[1:].std()
    assert found["interval"][1] - found["interval"][0] == pytest.approx(2 * 1.96 * math.sqrt(2) * width, rel=0.25)


def _comparisons_cover(studies: int, resamples: int, two: PowerLaw = B_LAW) -> dict:
    """How often the intervals of a comparison of two ladders (5 budgets x 5 sizes) hold the truth; how often a difference is known."""
    hits: dict = {name: [] for name in ("loss", "N_opt", "D_opt", "ratio", "crossing", "known")}
    for seed in range(studies):
        pair = enumerate((("a", A_LAW), ("b", two)))
        sides = [
            ladder_of_fit(
                name,
                METHODS["isoflop"](
                    study(0.003, 2 * seed + i, loss=law), resamples=resamples, seed=10**6 + 2 * seed + i
                ),
            )
            for i, (name, law) in pair
        ]
        found = compare(*sides, form="pure")
        truths = (two.exponent - A_LAW.exponent, 0.0, 0.0)
        for name, difference, truth in zip(("loss", "N_opt", "D_opt"), found["exponents"], truths, strict=True):
            hits[name].append(difference["interval"][0] <= truth <= difference["interval"][1])
        low, high = found["ratio_interval"]
        hits["ratio"].append(low <= two(found["common"]) / A_LAW(found["common"]) <= high)
        low, high = found["crossing"]["interval"]
        hits["crossing"].append(found["crossing"]["lower"] == "b" and low <= 4e10 <= high)
        hits["known"].append(bool(found["steeper"]))
    return {name: float(np.mean(h)) for name, h in hits.items()}


@pytest.mark.slow
def test_comparisons_cover_in_500_studies():
    found = _comparisons_cover(500, 1000)
    print(found)  # for docs/scaling.md
    assert found.pop("known") == 1.0
    assert all(0.93 <= share <= 0.97 for share in found.values()), found


@pytest.mark.slow
def test_a_difference_that_is_not_there_is_seldom_called_known():
    found = _comparisons_cover(500, 1000, PowerLaw(22.0, -0.15))
    print(found)
    assert 0.03 <= found["known"] <= 0.07, found


def test_irreducible_laws_are_compared_as_such():
    one, two = PowerLaw(22.0, -0.22, 0.38), PowerLaw(22.0, -0.22, 0.30)
    found = compare(side("a", one, noise=0.0), side("b", two, noise=0.0))
    assert found["form"] == "irreducible" and found["exponents"][0]["difference"] == pytest.approx(0, abs=1e-5)
    assert found["crossing"]["lower"] == "b" and found["crossing"]["flops"] == 0
    assert any("irreducible terms decide" in w for w in found["warnings"])


def test_ladders_measured_otherwise_have_no_crossing():
    base = {"data": {"dataset": "x"}, "process": {"time_law": "uniform"}, "flops": "exact"}
    a = side("a", protocol=base)
    other = compare(a, side("b", B_LAW, protocol=base | {"process": {"time_law": "logit_normal"}}), form="pure")
    assert other["crossing"] is None and "process.time_law is 'uniform' and 'logit_normal'" in other["warnings"][0]
    data = compare(a, side("b", B_LAW, protocol=base | {"data": {"dataset": "y"}}), form="pure")
    assert data["crossing"] and "different data (data.dataset is 'x' and 'y')" in data["warnings"][0]
    with pytest.raises(UsageError, match="protocol field 'flops' is 'MACs', but 'exact' in a; convert"):
        compare(a, side("b", B_LAW, protocol=base | {"flops": "MACs"}))


def test_ladders_of_a_metric_compare_too():
    laws = {"a": LIANG, "b": PowerLaw(4e7, -0.3)}
    a, b = (ladder_of_metric(n, fit_metric(ladder(law, 0.02, i))) for i, (n, law) in enumerate(laws.items()))
    found = compare(a, b)
    truth = (4e7 / 2.2566e6) ** (1 / 0.066)
    assert found["steeper"] == "b" and found["crossing"]["interval"][0] < truth < found["crossing"]["interval"][1]
    few = ladder_of_metric("few", fit_metric(ladder(compute=COMPUTE[:2])))
    with pytest.raises(UsageError, match="few: too few budgets for a law with an irreducible term"):
        compare(few, b, form="irreducible")


def test_compare_prints_its_verdict_and_writes_json(tmp_path, capsys):
    a, b = sheet(tmp_path / "a.csv", A_LAW, 3), sheet(tmp_path / "b.csv", B_LAW, 1)
    out = tmp_path / "out.json"
    assert main(["compare", a, b, "--law=pure", "--resamples=300", f"--json={out}"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Verdict: b.csv scales better: ") and "b.csv is the lower one from" in printed
    result = json.loads(out.read_text())
    made = result["verdict"]
    assert (
        made["method"] == "pure" and made["at_flops"] == result["common"] and made["values"]["ratio"] == result["ratio"]
    )
    assert made["intervals"]["ratio"] == result["ratio_interval"] and printed.startswith(f"Verdict: {made['reason']}.")
    assert result["steeper"] == "b.csv" and result["crossing"]["interval"][0] < 4e10 < result["crossing"]["interval"][1]
    assert {d["law"] for d in result["exponents"]} == {"L_opt_pure", "N_opt", "D_opt"}
    assert main(["compare", a, b, "--through=best", "--resamples=300"]) == 0
    far = sheet(tmp_path / "far.csv", PowerLaw(22.0 * 1.3e12**0.03, -0.18), 2, noise=1e-5)
    assert main(["compare", a, far, "--law=pure"]) == 0
    assert "x beyond the data; 95% interval of the crossing: " in capsys.readouterr().out


def test_a_budget_that_alone_changes_a_comparison_is_a_finding(tmp_path):
    a, b, out = sheet(tmp_path / "a.csv", A_LAW, 3), tmp_path / "b.csv", tmp_path / "out.json"
    sheet(b, B_LAW, 1)
    head, *rows = b.read_text().splitlines()
    largest = max(float(row.split(",")[3]) for row in rows)
    cells = [row.split(",") for row in rows]
    worse = [",".join([*c[:4], str(1.05 * float(c[4]))] if float(c[3]) == largest else c) for c in cells]
    b.write_text("\n".join([head, *worse]))
    assert main(["compare", str(a), str(b), "--law=pure", "--resamples=300", f"--json={out}"]) == 0
    silent, end = json.loads(out.read_text())["verdict"]["findings"]
    assert silent["text"].startswith("b.csv tells no law beyond its data, so neither does the comparison: ")
    assert end["text"] == "without the largest budget of b.csv" and end["effect_percent"]["exponent_a"] == 0
    assert -4 < end["effect_percent"]["ratio"] < -1 and end["effect_percent"]["exponent_b"] > 5 and end["advice"]


def test_one_table_beside_itself_has_two_names_and_the_ends_of_both(tmp_path, capsys):
    runs, out = [*planted(noise=0.002, seed=1), *planted(noise=0.002, seed=2)], tmp_path / "out.json"
    rows = [f"{'xy'[i >= len(runs) // 2]},{r.params},{r.tokens},{r.flops},{r.loss}" for i, r in enumerate(runs)]
    (tmp_path / "t.csv").write_text("\n".join(["study,params,tokens,flops,loss", *rows]))
    sides = ["--a_where=study=x", "--b_where=study=y", "--law=pure", "--resamples=0", f"--json={out}"]
    assert main(["compare", str(tmp_path / "t.csv"), str(tmp_path / "t.csv"), *sides]) == 0
    result, said = json.loads(out.read_text()), capsys.readouterr().out
    assert (result["a"], result["b"]) == ("t.csv (A)", "t.csv (B)") and "(no interval)" in said
    told = {f["text"] for f in result["verdict"]["findings"]}
    assert {f"without the {end} budget of t.csv ({side})" for end in ("smallest", "largest") for side in "AB"} >= told
    assert {text[-3:] for text in told} == {"(A)", "(B)"}


def test_runs_scattered_over_compute_have_no_budget_at_an_end():
    assert len(ends(planted())) == 2 and ends(scatter(noise=0.005)) == [] and ends(planted()[:15]) == []


def test_compare_says_why_a_fit_is_not_identified(tmp_path, capsys):
    runs = study(noise=0.003, seed=0, budgets=BUDGETS[:2], loss=A_LAW)
    rows = [f"{r.name},{r.params},{r.tokens},{r.flops},{r.loss}" for r in runs]
    (tmp_path / "two.csv").write_text("\n".join(["run,params,tokens,flops,loss", *rows]))
    a, out = sheet(tmp_path / "a.csv", B_LAW, 1), tmp_path / "out.json"
    assert main(["compare", a, str(tmp_path / "two.csv"), "--resamples=100", f"--json={out}"]) == 0
    text = "two.csv: two budgets: any two minima lie on a power law"
    assert text.partition(": ")[2] in capsys.readouterr().out and any(
        text in w for w in json.loads(out.read_text())["warnings"]
    )


def test_ladders_compare_by_a_metric_at_the_best_guidance(tmp_path, capsys):
    """The vertices of FID, each model at its own best guidance, which at guidance 1 alone would be others."""
    paths = []
    for name, law, seed in (("a", A_LAW, 0), ("b", B_LAW, 1)):
        rows = ["name,params,tokens,flops_train,guidance,fid"]
        for i, r in enumerate(study(noise=0.003, seed=seed, loss=law)):
            rows += [
                f"{r.name},{r.params},{r.tokens},{r.flops},{g},{r.loss * (1 + x)}"
                for g, x in ((1, 0.1 * (i % 3)), (2, 0.0), (3, 0.2))
            ]
        paths.append(str(tmp_path / f"{name}.csv"))
        (tmp_path / f"{name}.csv").write_text("\n".join(rows))
    out = tmp_path / "out.json"
    assert main(["compare", *paths, "--metric=fid", "--law=pure", "--resamples=300", f"--json={out}"]) == 0
    result = json.loads(out.read_text())
    assert result["steeper"] == "b.csv" and result["crossing"]["interval"][0] < 4e10 < result["crossing"]["interval"][1]
    assert main(["compare", *paths, "--metric=fid", "--where=guidance=1", "--through=best", "--resamples=300"]) == 0
    assert "the fid of b.csv is" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "A"], "required: RUNS_B"),
        (["compare", "A", "nowhere.csv"], "nowhere.csv: no such file or folder"),
        (["compare", "A", "BAD"], "no column 'loss'; nearest found 'los'"),
        (["compare", "A", "A", "--law=cubic"], "invalid choice: 'cubic'"),
        (
            ["compare", "A", "A", "--metric=is_digits"],
            "expected one of which less is better; of a share such as precision give 1-NAME",
        ),
        (["compare", "A", "A", "--window=0.5"], "--window: found 0.5"),
        (["metric", "A"], "no column 'name'; found run, params,"),
        (["metric", "A", "--choose=scale"], "--choose: found 'scale', expected names among sampler, steps"),
        (["metric", "A", "--flops=-1"], "--flops: found -1"),
        (["metric", "A", "--pure", "--irreducible"], "--pure: found it with --irreducible, expected one of them"),
    ],
)
def test_bad_use_is_one_line_and_exit_2(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {"A": sheet(tmp_path / "a.csv", A_LAW, 0), "BAD": str(tmp_path / "bad.csv")}
    (tmp_path / "bad.csv").write_text("params,tokens,los\n1,2,3\n")
    before = sorted(os.listdir(tmp_path))
    assert main([files.get(a, a) for a in arguments] + ["--json=out.json"] * ("A" in arguments)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and message in captured.err and captured.err.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == before


def test_compare_by_a_surface_and_a_side_that_tells_no_law_beyond_its_data(tmp_path, capsys):
    good, bent = tmp_path / "good.csv", tmp_path / "bent.csv"
    table(good, planted(noise=0.002, seed=1))
    table(bent, study(noise=0.001, sizes=7, bend=-0.1, budgets=np.geomspace(4e9, 4e11, 5), seed=2))
    out = tmp_path / "out.json"
    for method, words in (("varpro", "residuals are systematic"), ("isoflop", "the exponent of N_opt changes")):
        more = [f"--method={method}", "--resamples=60", f"--json={out}"]
        assert main(["compare", str(good), str(bent), *more]) == 0
        said = capsys.readouterr().out
        assert "bent.csv tells no law beyond its data, so neither does the comparison: " in said and words in said
        assert json.loads(out.read_text())["identifiable"] == {"a": True, "b": False}
    one = tmp_path / "one.csv"
    table(one, [Run(f"r{i}", 1e8, 1e9 * 2**i, 6e17 * 2**i, 3 - 0.1 * i) for i in range(6)])
    assert main(["compare", str(good), str(one), "--method=varpro", "--resamples=60"]) == 2
    assert "one.csv: all runs have the same params" in capsys.readouterr().err
    assert main(["compare", str(good), str(bent), "--method=varpro", "--law=pure", "--resamples=60"]) == 2
    assert "a surface has a loss law with an irreducible term only" in capsys.readouterr().err
