"""Facts about cross-validation: exact laws predict exactly what is held out, intervals hold it, every method that predicts takes part."""

import json
import math

import numpy as np
import pytest
from planted import EQUAL, LAW, ladder, scatter
from test_scaling_fit import study
from test_scaling_methods import curves
from test_scaling_quality import sheet

from dit_jax.error import UsageError
from dit_jax.scaling import crossval, trust
from dit_jax.scaling.__main__ import main
from dit_jax.scaling.crossval import cross_validate
from dit_jax.scaling.fit import METHODS, fit_isoflop
from dit_jax.scaling.predict import holdout_largest, predict
from dit_jax.scaling.runs import Run, budgets, scattered


def values(found, quantity: str):
    return [i for i in found.items if i.quantity == quantity]


@pytest.mark.parametrize(
    ("method", "law", "split"),
    [("varpro", LAW, split) for split in crossval.SPLITS] + [("surface", LAW, "largest"), ("gadre", EQUAL, "budgets")],
)
def test_surfaces_predict_exact_runs_exactly(method, law, split):
    found = cross_validate(ladder(law, budgets=4, sizes=3), method, split, resamples=0)
    count = {"largest": 3, "budgets": 12, "models": 12}[split]
    assert len(values(found, "loss")) == count and not found.refused
    assert all(abs(i.error) < 1e-4 and i.inside is None for i in found.items)
    optima = {"largest": 1, "budgets": 4, "models": 0}[split]
    assert len(values(found, "N_opt")) == len(values(found, "L_opt")) == optima


@pytest.mark.parametrize("split", crossval.SPLITS)
def test_parabolas_predict_exact_parabolas_exactly(split):
    found = cross_validate(study(sizes=6), "isoflop", split, resamples=0)
    assert found.items and all(abs(i.error) < 1e-5 for i in found.items)


def test_the_largest_budget_of_isoflop_is_the_one_of_predict():
    runs = study(noise=0.003, seed=2)
    n, loss = cross_validate(runs, "isoflop", "largest", seed=4).items[:2]
    known = holdout_largest(runs, seed=4)
    assert (n.predicted, n.measured) == pytest.approx((known.n_opt, known.n_measured))
    assert n.interval == pytest.approx(known.n_interval)
    assert (loss.predicted, loss.measured) == pytest.approx((known.loss, known.loss_measured))
    assert loss.interval == pytest.approx(known.loss_interval) and n.beyond == pytest.approx(known.multiple)


def test_every_budget_is_left_out_once_and_does_not_enter_its_own_prediction():
    runs = ladder(noise=0.003, budgets=4, sizes=6)
    found = cross_validate(runs, "varpro", "budgets", resamples=0)
    assert [i.left for i in values(found, "N_opt")] == ["1e+18", "1e+19", "1e+20", "1e+21"]
    item = next(i for i in found.items if i.run == runs[7].name)
    rest = METHODS["varpro"]([r for r in runs if r.flops != runs[7].flops], resamples=0)
    assert item.predicted == pytest.approx(float(rest.surface(runs[7].params, runs[7].tokens)), rel=1e-12)
    assert item.measured == runs[7].loss and item.beyond == pytest.approx(runs[7].flops / 1e21)


def test_every_run_of_a_model_is_left_out_with_it():
    sizes = np.geomspace(1e8, 3e9, 5).tolist()
    cells = [(n, c / 6 / n, c) for n in sizes for c in (1e19, 1e20, 1e21)]
    runs = [Run(f"{n:.3g}_{c:.2g}", n, d, c, float(LAW(n, d))) for n, d, c in cells]
    found = cross_validate(runs, "varpro", "models", resamples=0)
    assert len(found.items) == 15 and len({i.left for i in found.items}) == 5
    rest = METHODS["varpro"]([r for r in runs if r.params != sizes[2]], resamples=0)
    for i in [i for i in found.items if i.params == sizes[2]]:
        assert i.predicted == pytest.approx(float(rest.surface(i.params, i.flops / 6 / i.params)), rel=1e-12)
        assert abs(i.error) < 1e-6


def test_intervals_hold_the_runs_that_are_held_out():
    found = cross_validate(ladder(noise=0.003, sizes=6, budgets=4), "varpro", "budgets", resamples=100)
    summary = found.summary()["loss"]
    assert summary["judged"] == summary["count"] == 24 and summary["inside"] >= 18
    assert 0.001 < summary["rms"] < 0.006 and summary["rms"] < abs(summary["worst"])
    assert found.resamples == 100
    assert cross_validate(ladder(noise=0.003, sizes=4, budgets=3), "gadre", "budgets").resamples == crossval.RESAMPLES


def test_intervals_hold_runs_far_off_the_optimum():
    """Budgets have curvatures of their own: what the median one says 4x off the optimum is less sure than at it."""
    found = cross_validate(ladder(noise=0.001, sizes=6), "isoflop", "budgets", resamples=100)
    summary = found.summary()["loss"]
    assert summary["judged"] == 36 and summary["inside"] >= 30
    fit = fit_isoflop(ladder(noise=0.001, sizes=6), resamples=400)
    assert fit.curvature_scatter > 0.1 * fit.curvature
    widths = [
        np.diff(predict(fit, 1e20, params)["L_run_interval"])[0] for params in (None, 4 * fit.laws["N_opt"](1e20))
    ]
    assert widths[1] > 2 * widths[0]


def test_points_are_held_out_of_methods_that_have_only_points():
    runs = ladder(sizes=25)
    akima = cross_validate(runs, "akima", "budgets")
    assert len(values(akima, "N_opt")) == 6 and akima.summary()["N_opt"]["rms"] < 0.01 and not values(akima, "loss")
    power = cross_validate(runs, "power", "budgets")
    assert len(values(power, "L_opt")) == 6 and power.summary()["L_opt"]["rms"] < 0.01 and not values(power, "N_opt")
    assert sum(i.inside for i in akima.items) >= 9
    for method in ("akima", "power"):
        assert {i.left for i in cross_validate(runs, method, "largest").items} == {"1e+21"}
        with pytest.raises(UsageError, match="says nothing of a run off its optimum"):
            cross_validate(runs, method, "models")


def test_training_curves_are_held_out_by_size():
    largest = cross_validate(curves(), "envelope", "largest", resamples=50)
    assert {i.left for i in largest.items} == {"n7"} and largest.summary()["N_opt"]["rms"] < 1e-3
    models = cross_validate(curves(), "envelope", "models", resamples=50)
    assert {i.left for i in models.items} == {f"n{i}" for i in range(8)}
    with pytest.raises(UsageError, match="no budgets"):
        cross_validate(curves(), "envelope", "budgets")


def test_scattered_runs_have_models_and_no_budgets():
    runs = scatter(noise=0.002, count=10)
    assert cross_validate(runs, "varpro", "models", resamples=0).summary()["loss"]["count"] == 10
    found = cross_validate(runs, "varpro", "largest", resamples=0)
    assert {i.run for i in found.items} == {r.name for r in sorted(runs, key=lambda r: r.flops)[-2:]}
    assert found.unscored == 0 and min(i.beyond for i in found.items) > 1
    with pytest.raises(UsageError, match="form no budgets"):
        cross_validate(runs, "varpro", "budgets")


def test_methods_are_tested_on_the_same_part_of_scattered_runs():
    """Chance groups among them, some with a parabola: all runs from one compute on are left out and, where a method can, predicted."""
    runs = scatter(noise=0.002, count=150)
    assert any(len({r.params for r in members}) > 3 for _, members in budgets(runs)) and scattered(budgets(runs))
    found = {m: cross_validate(runs, m, "largest", resamples=0) for m in ("varpro", "isoflop", "power")}
    (label,) = {i.left for one in found.values() for i in one.items}
    left = sorted(runs, key=lambda r: r.flops)[-found["varpro"].summary()["loss"]["count"] :]
    assert 30 <= len(left) < 40 and label == f"from {left[0].flops:.3g}"
    for method in ("varpro", "isoflop"):
        assert {i.quantity for i in found[method].items} == {"loss"} and found[method].unscored == 0
        assert {i.run for i in found[method].items} == {r.name for r in left}
    assert found["power"].items and all(i.flops >= left[0].flops for i in found["power"].items)


def test_runs_that_are_set_aside_unscored_are_counted(tmp_path, capsys):
    """The largest budget has its sizes on one side of the optimum, so no minimum to compare with: only the one below is scored."""
    runs = ladder(noise=0.001, budgets=5, sizes=8)
    runs = [r for r in runs if r.flops < 9e20 or r.params < 0.7 * LAW.optimum(6.0)["N_opt"](1e21)]
    gone = sum(r.flops > 9e20 for r in runs)
    assert gone >= 3
    found = cross_validate(runs, "isoflop", "largest", resamples=0)
    assert found.unscored == gone and all(i.flops < 9e20 for i in found.items)
    out, path = tmp_path / "fit.json", sheet(tmp_path / "runs.csv", runs)
    assert main(["fit", path, "--holdout=largest", "--resamples=0", f"--json={out}"]) == 0
    assert f"isoflop: {gone} run(s) set aside and not scored" in capsys.readouterr().out
    assert json.loads(out.read_text())["holdout"]["unscored"] == gone


def test_what_cannot_be_refitted_is_named():
    with pytest.raises(UsageError, match=r"predicts nothing that budgets leaves out .*1 usable budget"):
        cross_validate(study(budgets=np.array([4e9, 1.3e11])), "isoflop", "budgets")
    with pytest.raises(UsageError, match="expected one of largest, budgets, models"):
        cross_validate(study(), "isoflop", "runs")


def test_the_summary_is_of_its_items():
    found = cross_validate(study(noise=0.005), "isoflop", "budgets", resamples=50)
    for name, s in found.summary().items():
        errors = [i.predicted / i.measured - 1 for i in values(found, name)]
        assert s["rms"] == pytest.approx(math.sqrt(np.mean(np.square(errors))))
        assert s["worst"] == max(errors, key=abs) and s["count"] == len(errors)
        assert s["inside"] == sum(i.interval[0] <= i.measured <= i.interval[1] for i in values(found, name))


def test_fit_prints_what_is_held_out_and_writes_it(tmp_path, capsys):
    path, out = sheet(tmp_path / "runs.csv", ladder(noise=0.003, budgets=3, sizes=5)), tmp_path / "fit.json"
    for method in ("isoflop", "varpro"):
        assert main(["fit", path, f"--method={method}", "--holdout=budgets", "--resamples=30", f"--json={out}"]) == 0
        said, held = capsys.readouterr().out, json.loads(out.read_text())["holdout"]
        assert "Held out: budgets" in said and "RMS error" in said
        assert held["split"] == "budgets" and held["method"] == method and held["resamples"] == 30
        assert {"left", "quantity", "predicted", "measured", "error", "inside", "interval"} <= set(held["items"][0])
        assert held["summary"]["N_opt"]["count"] == sum(i["quantity"] == "N_opt" for i in held["items"])
    assert main(["fit", path, "--method=all", "--holdout=largest", "--resamples=0", f"--json={out}"]) == 0
    said, result = capsys.readouterr().out, json.loads(out.read_text())
    assert set(result["holdout"]) == set(METHODS) - {"envelope"} and "Errors on what is held out (largest)" in said
    assert main(["fit", path, "--method=power", "--holdout=models"]) == 2
    assert "says nothing of a run off its optimum" in capsys.readouterr().err


def test_a_method_that_predicts_nothing_of_a_split_is_said_beside_the_others(capsys):
    runs = ladder(noise=0.003, budgets=2, sizes=4)
    methods = {"akima": (runs, {}), "gadre": (runs, {"resamples": 0})}
    assert set(trust.tell_holdouts("models", methods)["holdout"]) == {"gadre"}
    assert "akima: --holdout: method akima says nothing of a run off its optimum" in capsys.readouterr().out


def test_corrected_parabolas_are_held_out_corrected():
    runs = ladder(LAW)
    plain, mended = (cross_validate(runs, "isoflop", "budgets", resamples=0, unbias=u) for u in (False, True))
    assert mended.summary()["N_opt"]["rms"] < 1e-6 < plain.summary()["N_opt"]["rms"]
    assert values(mended, "N_opt")[0].measured == pytest.approx(fit_isoflop(runs, resamples=0, unbias=True).used[0].n_opt)  # fmt: skip
