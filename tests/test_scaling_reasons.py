"""Facts about why methods disagree: a reason is named where a planted fault is in the runs, and none where there is no fault."""

import dataclasses
import json
import math

import numpy as np
import pytest
from planted import EQUAL, LAW, ladder
from test_scaling_methods import curves, sheet

from dit_jax.scaling.__main__ import main
from dit_jax.scaling.methods import fit_methods
from dit_jax.scaling.reasons import Check, disagreements
from dit_jax.scaling.runs import Run

METHODS = ("isoflop", "akima", "surface", "varpro", "gadre", "power")


def wide(law=LAW, factor=8.0, off=4.0, noise=0.001, sizes=25, seed=0) -> list[Run]:
    """IsoFLOP runs over a wide grid of sizes whose centre lies `off` times above the optimum."""
    rng, runs = np.random.default_rng(seed), []
    for c in np.geomspace(1e18, 1e21, 5):
        for u in np.linspace(-1, 1, sizes) * math.log(factor):
            n = float(law.optimum(6.0)["N_opt"](c)) * math.exp(u) * off
            d = float(c / (6 * n))
            runs.append(
                Run(f"{c:.2g}_{u:.2f}", n, d, float(c), float(law(n, d)) * math.exp(noise * rng.standard_normal()))
            )
    return runs


def fitted(runs, names=METHODS, rows=None, **options):
    own = {"isoflop": options}
    return fit_methods(runs, rows, names=names, options=lambda method: {"resamples": 100, **own.get(method, {})})


def failed(found, method) -> set:
    return {t.reason for t in found.tests if t.fails and t.method == method}


def test_on_a_clean_narrow_ladder_no_reason_is_named():
    found = fitted(ladder(EQUAL, noise=0.002))
    assert not found.disagreements
    assert {t.method for t in found.tests} == set(METHODS) and not [t for t in found.tests if t.fails]


def test_a_wide_grid_off_its_centre_is_named():
    found = fitted(wide(), ("isoflop", "akima", "varpro"))
    assert {"its curves are no parabolas", "it is biased at these runs"} <= failed(found, "isoflop")
    assert not failed(found, "varpro") and not failed(found, "akima")
    (told,) = [d for d in found.disagreements if d.methods == ("isoflop", "varpro") and d.quantity == "N_opt"]
    assert {t.method for t in told.reasons} == {"isoflop"}
    assert "Why: isoflop: its curves are no parabolas, it is biased at these runs" in str(told)
    said = " ".join(t.found for t in told.reasons)
    assert "F test against quartics" in said and "sizes span 64x, their middle lies 3" in said and "too high" in said


def simulated(found, method) -> Check:
    (test,) = [t for t in found.tests if t.method == method and t.reason == "it is biased at these runs"]
    return test


def test_the_simulated_bias_is_that_of_the_parabola():
    """What the parabolas of a wide grid are off by, told from the fitted surface, is what they are off by from the planted one."""
    found = fitted(wide(noise=0.0003), ("isoflop", "varpro"))
    told = simulated(found, "isoflop").bias
    for name in ("N_opt", "L_opt"):
        truth = float(LAW.optimum(6.0)[name](found.flops))
        assert told[name] == pytest.approx(float(found.fits["isoflop"].laws[name](found.flops)) - truth, rel=0.1)


@pytest.mark.parametrize("method", ["akima", "power"])
def test_the_lowest_of_noisy_runs_is_no_reason(method):
    """The estimate is too low by twice the noise. The intervals are not, and agree with the surface's."""
    found = fitted(wide(noise=0.01, off=1.0), (method, "varpro"))
    test = simulated(found, method)
    assert not test.fails and abs(test.bias["L_opt"]) < 0.01
    assert "its estimates are off, L_opt 0.03" in test.found and "too low, which the intervals make good" in test.found
    assert not [d for d in found.disagreements if d.quantity == "L_opt"]


def test_the_best_of_three_sizes_is_a_reason():
    """With 3 sizes there are no curves to clear power's intervals by: the best run of each budget is as far off, and its law too high."""
    found = fitted(wide(sizes=3, off=2.0), ("power", "varpro"))
    test = simulated(found, "power")
    assert test.fails and "its intervals lie about L_opt 0.0" in test.found and "too high" in test.found
    (told,) = [d for d in found.disagreements if d.quantity == "L_opt"]
    assert told.reasons == (test,) and told.why == "power: it is biased at these runs"


def test_a_bias_that_was_subtracted_is_no_reason():
    assert not simulated(fitted(wide(sizes=13), ("isoflop", "varpro"), unbias=True), "isoflop").fails
    assert simulated(fitted(wide(sizes=13), ("isoflop", "varpro")), "isoflop").fails


def test_unequal_exponents_are_named():
    found = fitted(ladder(dataclasses.replace(LAW, alpha=0.45, beta=0.28, B=400.0), noise=0.001), ("varpro", "gadre"))
    assert "the exponents of N and D differ" in failed(found, "gadre")
    (test,) = [t for t in found.tests if t.reason == "the exponents of N and D differ"]
    assert test.p < 1e-4 and "alpha = 0.4" in test.found
    assert [d for d in found.disagreements if "gadre" in d.methods and test in d.reasons]


def test_a_law_without_an_irreducible_term_is_named():
    found = fitted(ladder(noise=0.001, budgets=3), names=("isoflop", "varpro"))
    assert "no irreducible term" in failed(found, "isoflop")
    assert "L_opt_irreducible" not in found.fits["isoflop"].laws


def test_one_bad_run_is_named_where_squares_follow_it():
    runs = ladder(EQUAL, noise=0.001)
    runs[0] = dataclasses.replace(runs[0], loss=runs[0].loss * 1.05)
    found = fitted(runs, names=("surface", "varpro"))
    assert "one run is far off" in failed(found, "varpro") and "one run is far off" not in failed(found, "surface")
    (test,) = [t for t in found.tests if t.reason == "one run is far off"]
    assert f"N = {runs[0].params:.3g}, D = {runs[0].tokens:.3g}" in test.found


def test_a_surface_that_does_not_fit_is_named_and_simulates_nothing():
    bent = [
        dataclasses.replace(r, loss=r.loss * math.exp(0.02 * math.log(r.params / 5e8) ** 2))
        for r in wide(noise=0.002, off=1.0)
    ]
    found = fitted(bent, ("isoflop", "varpro"))
    assert "its surface does not fit the runs" in failed(found, "varpro")
    assert not [t for t in found.tests if t.reason == "it is biased at these runs"]


@pytest.mark.parametrize("what", ["warm-up", "decay of the learning rate", None])
def test_checkpoints_that_are_not_like_others_are_named(what):
    rows = curves(noise=0.001, points=20)
    ends = {r.name: max(s.tokens for s in rows if s.name == r.name) for r in rows}
    if what == "warm-up":
        rows = [dataclasses.replace(r, loss=r.loss * (1 + 0.1 * math.exp(-r.tokens / (5 * r.params)))) for r in rows]
    elif what:
        rows = [dataclasses.replace(r, loss=r.loss * (0.97 if r.tokens == ends[r.name] else 1.0)) for r in rows]
    found = fitted(rows, names=("envelope", "varpro"), rows=rows)
    assert failed(found, "envelope") & {"warm-up", "decay of the learning rate"} == ({what} if what else set())


def test_a_bias_of_the_wrong_sign_or_size_explains_nothing():
    one, two = (
        fitted(ladder(law, noise=0.001), names=("varpro",)).fits["varpro"]
        for law in (LAW, dataclasses.replace(LAW, E=1.5))
    )
    fits = {"varpro": one, "akima": two}  # E of the first is larger

    def told(bias) -> set:
        tests = [Check("varpro", "a premise", "why", "because", True, bias={"irreducible": bias})]
        return {bool(d.reasons) for d in disagreements(fits, 1e21, tests) if d.quantity == "irreducible"}

    assert told(0.2) == {True} and told(-0.2) == {False} and told(0.01) == {False}


def test_fit_of_all_methods_says_why(tmp_path, capsys):
    path, out = sheet(tmp_path / "runs.csv", wide()), tmp_path / "out.json"
    assert main(["fit", path, "--method=all", "--resamples=60", f"--json={out}"]) == 0
    printed = capsys.readouterr().out
    assert "The methods disagree on" in printed and "F test against quartics" in printed
    assert "isoflop: its curves are no parabolas" in printed
    said = json.loads(out.read_text())
    assert any("Why: isoflop" in text for text in said["disagreements"])
    assert any(t["fails"] and t["p"] < 0.01 for t in said["tests"])


@pytest.mark.slow
def test_how_often_reasons_are_named():
    """Of 60 clean ladders: tests fail seldom, and hardly any reason is given. Of 30 wide grids: always the right one."""
    clean = [fitted(ladder(EQUAL, noise=0.002, seed=seed)) for seed in range(60)]
    shares = {m: float(np.mean([bool(failed(found, m)) for found in clean])) for m in METHODS}
    disagree = float(np.mean([bool(found.disagreements) for found in clean]))
    named = float(np.mean([any(d.reasons for d in found.disagreements) for found in clean]))
    print(f"tests that fail {shares}; disagreements in {disagree:.2f}, with a reason in {named:.2f}")
    assert max(shares.values()) < 0.15 and named < 0.1
    for seed in range(30):
        found = fitted(wide(seed=seed), ("isoflop", "varpro"))
        assert any(d.quantity == "N_opt" and d.why.startswith("isoflop: its") for d in found.disagreements)
