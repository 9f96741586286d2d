"""Facts about the methods side by side: powers of compute, envelopes, interpolated minima, and what the command says and writes."""

import csv
import json
import math

import numpy as np
import pytest
from planted import EQUAL, LAW, ladder, scatter
from test_scaling_runs import record, workdir

from dit_jax.error import UsageError
from dit_jax.scaling.__main__ import main
from dit_jax.scaling.akima import fit_akima
from dit_jax.scaling.compute import fit_compute
from dit_jax.scaling.envelope import fit_envelope
from dit_jax.scaling.fit import METHODS, fit_isoflop
from dit_jax.scaling.law import PowerLaw
from dit_jax.scaling.reasons import disagreements
from dit_jax.scaling.runs import Run
from dit_jax.scaling.surface import fit_gadre, fit_varpro


def best_runs(law, noise=0.0, seed=0, count=8):
    rng = np.random.default_rng(seed)
    C = np.geomspace(1e18, 1e22, count)
    loss = law(C) * np.exp(noise * rng.standard_normal(count))
    return [Run("", float(c) ** 0.5, float(c) ** 0.5 / 6, float(c), float(y)) for c, y in zip(C, loss, strict=True)]


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


@pytest.mark.parametrize("loss", ["mse", "huber"])
@pytest.mark.parametrize("residual", ["log", "linear"])
@pytest.mark.parametrize("law", [PowerLaw(2.3943e3, -0.1273, 1.7), PowerLaw(7.0, -0.0273)])
def test_a_planted_power_of_compute_is_recovered(law, residual, loss):
    fit = fit_compute(best_runs(law), residual=residual, loss=loss, resamples=50)
    found = fit.laws["L_opt_irreducible" if law.irreducible else "L_opt_pure"]
    assert found.exponent == pytest.approx(law.exponent, rel=1e-6)
    assert found.coefficient == pytest.approx(law.coefficient, rel=1e-6)
    assert found.irreducible == pytest.approx(law.irreducible, rel=1e-6)


def test_a_noisy_power_is_inside_its_intervals():
    law = PowerLaw(2.3943e3, -0.1573, 1.7)
    fit = fit_compute(best_runs(law, noise=0.002, count=16))
    low, high = np.quantile(fit.draws["L_opt"].exponent, [0.025, 0.975])
    assert low < law.exponent < high < 0
    assert "N_opt" not in fit.laws and fit.identifiable


def test_the_power_takes_the_best_run_of_each_budget():
    fit = fit_compute(ladder(), resamples=0)
    assert len(fit.points) == 6
    law = LAW.optimum(6.0)["L_opt"]
    assert fit.laws["L_opt"].exponent == pytest.approx(law.exponent, rel=0.03)


def test_the_envelope_of_a_ladder_has_the_planted_exponent():
    for law in (LAW, EQUAL):
        fit = fit_envelope(curves(law), resamples=100)
        assert fit.laws["N_opt"].exponent == pytest.approx(law.a, abs=1e-4)
        assert fit.laws["D_opt"].exponent == pytest.approx(law.b, abs=1e-4)
        assert fit.laws["L_opt"].irreducible == pytest.approx(law.E, rel=1e-3)
        assert len(fit.points) == 7 and fit.identifiable
    noisy = fit_envelope(curves(noise=0.001, ratio=4.0), resamples=300)
    low, high = np.quantile(noisy.draws["N_opt"].exponent, [0.025, 0.975])
    assert low < LAW.a < high


def test_an_envelope_needs_training_curves():
    with pytest.raises(
        UsageError, match=r"0 run\(s\) with at least 3 rows of growing tokens, expected at least 3 runs"
    ):
        fit_envelope(ladder())


def test_interpolated_minima_follow_a_symmetric_curve_exactly():
    runs = []
    for c in np.geomspace(1e18, 1e21, 5):
        for u in np.linspace(-1, 1, 9):
            n = 0.1 * c**0.52 * math.exp(u)
            runs.append(Run("", n, float(c / 6 / n), float(c), math.exp(c**-0.01 + 0.02 * math.cosh(2 * u))))
    fit = fit_akima(runs, resamples=50)
    assert fit.laws["N_opt"].exponent == pytest.approx(0.52, rel=1e-6)
    assert fit.laws["N_opt"].coefficient == pytest.approx(0.1, rel=1e-6)
    assert fit.laws["D_opt"].coefficient == pytest.approx(1 / 0.6, rel=1e-6)
    assert all(p.loss == pytest.approx(math.exp(p.flops**-0.01 + 0.02), rel=1e-9) for p in fit.points)


def test_interpolation_is_not_biased_where_a_parabola_is():
    """A wide grid, centred at four times the optimum: the parabola's minimum moves, the interpolated one hardly."""
    runs = []
    for c in np.geomspace(1e18, 1e21, 5):
        for u in np.linspace(-1, 1, 33) * math.log(16):
            n = float(LAW.optimum(6.0)["N_opt"](c)) * math.exp(u + math.log(4))
            runs.append(Run("", n, float(c / 6 / n), float(c), float(LAW(n, c / 6 / n))))
    truth = float(LAW.optimum(6.0)["N_opt"](1e20))
    off = [abs(f(runs, resamples=0).laws["N_opt"](1e20) / truth - 1) for f in (fit_isoflop, fit_akima)]
    assert off[1] < 1e-3 and off[0] > 0.05
    assert any("no parabolas" in w for w in fit_isoflop(runs).warnings)


def test_methods_that_disagree_are_named():
    other = type(LAW)(1.8, 5000.0, 900.0, 0.5, 0.3)
    mine, theirs, equal = (
        fit_varpro(ladder(noise=0.001), resamples=100),
        fit_akima(ladder(law=other, noise=0.0002), resamples=100),
        fit_gadre(ladder(law=other, noise=0.001), resamples=100),
    )
    said = [str(d) for d in disagreements({"varpro": mine, "akima": theirs}, 1e21)]
    assert any(
        text.startswith("a: varpro finds") and text.endswith("no premise that was tested on these runs explains it")
        for text in said
    )
    assert not any(d.quantity == "a" for d in disagreements({"varpro": mine, "gadre": equal}, 1e21))
    assert not disagreements({"varpro": mine, "surface": mine}, 1e21)


def sheet(path, runs) -> str:
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["run", "params", "tokens", "loss"])
        rows.writerows([r.name, repr(r.params), repr(r.tokens), repr(r.loss)] for r in runs)
    return str(path)


def fitted(tmp_path, runs, *options) -> dict:
    out = tmp_path / "out.json"
    assert main(["fit", sheet(tmp_path / "runs.csv", runs), f"--json={out}", "--resamples=100", *options]) == 0
    return json.loads(out.read_text())


KEYS = {"method", "n_runs", "law", "objective", "exponents", "intervals", "identifiable", "warnings", "predictions"}


@pytest.mark.parametrize("method", ["surface", "varpro", "gadre"])
@pytest.mark.parametrize("options", [[], ["--residual=linear", "--loss=mse"], ["--residual=log", "--loss=huber"]])
def test_the_json_of_a_surface(tmp_path, capsys, method, options):
    law = EQUAL if method == "gadre" else LAW
    said = fitted(tmp_path, ladder(law=law), f"--method={method}", "--flops=1e22", *options)
    assert set(said) >= KEYS and said["method"] == method and said["n_runs"] == 48 and said["identifiable"] is True
    for name in ("E", "A", "B", "alpha", "beta"):
        assert said["law"][name] == pytest.approx(getattr(law, name), rel=1e-6)
    assert said["exponents"]["a"] == pytest.approx(law.a, rel=1e-6)
    assert said["intervals"]["a"] == pytest.approx([law.a] * 2, rel=1e-5)
    assert said["predictions"][0]["N_opt"] == pytest.approx(law.optimum(6.0)["N_opt"](1e22), rel=1e-5)
    assert said["predictions"][0]["D_opt_delta_interval"][0] == pytest.approx(said["predictions"][0]["D_opt"], rel=1e-3)
    printed = capsys.readouterr().out
    assert "delta-method interval" in printed and "Condition number" in printed and "10.0x beyond" in printed


def test_the_json_of_the_other_methods(tmp_path, capsys):
    said = fitted(tmp_path, ladder(), "--method=power")
    assert set(said) >= KEYS and said["exponents"] == {"a": None, "b": None}
    assert set(said["law"]["L_opt"]) == {"coefficient", "exponent", "irreducible"} and len(said["points"]) == 6
    said = fitted(tmp_path, curves(), "--method=envelope", "--flops=1e22")
    assert set(said) >= KEYS and said["exponents"]["a"] == pytest.approx(LAW.a, abs=1e-4)
    assert said["intervals"]["a"][0] <= said["exponents"]["a"] <= said["intervals"]["a"][1]


def test_all_methods_side_by_side(tmp_path, capsys):
    said = fitted(tmp_path, ladder(noise=0.004), "--method=all", "--residual=log")
    assert set(said["methods"]) | set(said["refused"]) == set(METHODS) and "envelope" in said["refused"]
    printed = capsys.readouterr().out
    assert "Methods, 95% intervals" in printed and "envelope: not fitted" in printed
    assert all(f"\n  {method}" in printed for method in said["methods"])


def test_the_envelope_takes_every_step_of_a_workdir(tmp_path, capsys):
    for i, r in enumerate([r for r in curves(points=12) if r.name < "n5"]):
        values = dict(params_active=r.params, tokens_seen=r.tokens, flops_train=r.flops, metrics={"loss": r.loss})
        path = tmp_path / "sweep" / f"{r.name}_{i}"
        workdir(path, record(run=r.name, step=i + 1, **values))
    out = tmp_path / "out.json"
    assert main(["fit", str(tmp_path / "sweep"), "--method=envelope", f"--json={out}"]) == 0
    assert json.loads(out.read_text())["exponents"]["a"] == pytest.approx(LAW.a, abs=0.01)


HEAD = "params,tokens,loss\n"


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("param,tokens,loss\n1,2,3\n", [], "no column 'params'; nearest found 'param'"),
        (HEAD + "1e8,2e9,3\n1e8,2e9,nan\n", [], "runs.csv:3: loss is nan"),
        (HEAD + "1e8,-2e9,3\n", [], "runs.csv:2: tokens is -2e9"),
        (
            HEAD + "1e8,2e9,3\n2e8,4e9,2.8\n",
            [],
            "2 runs of different (params, tokens), but method surface has 5 parameters",
        ),
        (HEAD + "".join(f"{n}e8,{12 / n}e9,{3 + n / 100}\n" for n in range(1, 9)), [], "all 8 runs are of one budget"),
        (HEAD, ["--window=2"], "--window: method surface has no such option"),
        (HEAD, ["--residual=cubic"], "invalid choice: 'cubic'"),
    ],
)
def test_bad_input_is_one_line_exit_2_and_no_file(tmp_path, capsys, text, options, message):
    path = tmp_path / "runs.csv"
    path.write_text(text if text != HEAD else HEAD + "".join(f"{r.params},{r.tokens},{r.loss}\n" for r in scatter()))
    assert main(["fit", str(path), "--method=surface", f"--json={tmp_path / 'out.json'}", *options]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and message in said.err
    assert not (tmp_path / "out.json").exists()


def test_methods_without_a_law_of_size_cannot_predict_it(tmp_path, capsys):
    path = sheet(tmp_path / "runs.csv", ladder())
    assert main(["predict", path, "--method=power", "--flops=1e22"]) == 2
    assert "power says nothing of N_opt" in capsys.readouterr().err
    assert main(["plan", path, "--method=power", "--flops=1e22"]) == 2
