"""Facts about conventions: they are stated, do not mix, and convert to what a recount would give."""

import math
from dataclasses import replace

import numpy as np
import pytest
from test_scaling_fit import study

from dit_jax.config import UsageError
from dit_jax.scaling.conventions import Convention, check_units, convert, convert_law, factor, of_record, require_same
from dit_jax.scaling.fit import fit_isoflop
from dit_jax.scaling.law import PowerLaw
from dit_jax.scaling.runs import Run

OURS = Convention()
MACS = Convention(unit="MACs", passes="forward")
RUN = Run("a", 100.0, 1600.0, 2e6, 0.5, params_total=150.0, images=100.0)


def test_the_gflops_of_the_dit_paper_are_a_sixth_of_training_flops():
    assert factor(MACS, OURS) == 6 and factor(OURS, MACS) == pytest.approx(1 / 6)
    per_image = 118.6214e9  # XL/2, multiply-adds of a forward pass
    (run,) = convert([replace(RUN, flops=per_image)], MACS, OURS)
    assert run.flops == pytest.approx(0.7117e12, rel=1e-4)


def test_a_fit_of_converted_runs_is_the_converted_fit():
    runs = study()
    as_macs = convert(runs, OURS, MACS)
    ours, theirs = fit_isoflop(runs, resamples=0), fit_isoflop(as_macs, resamples=0)
    for name in ("N_opt", "D_opt", "L_opt_pure", "L_opt_irreducible"):
        expected = convert_law(ours.laws[name], OURS, MACS)
        for part in ("coefficient", "exponent", "irreducible"):
            assert getattr(theirs.laws[name], part) == pytest.approx(float(getattr(expected, part)), rel=1e-5)
    law = PowerLaw(2.3943, -0.0273)
    assert convert_law(law, OURS, MACS)(1e20) == pytest.approx(law(6e20))


def test_parameters_and_data_convert_by_what_was_recorded():
    (total,) = convert([RUN], OURS, replace(OURS, params="total"))
    assert (total.params, total.params_total, total.flops) == (150, 100, 2e6)
    (images,) = convert([RUN], OURS, replace(OURS, data="images"))
    assert images.tokens == 100
    (back,) = convert([images], replace(OURS, data="images"), OURS, tokens_per_image=16)
    assert back == RUN
    (simple,) = convert([RUN], OURS, replace(OURS, counted="6ND"))
    assert simple.flops == 6 * 100 * 1600
    (simple,) = convert([RUN], OURS, replace(OURS, counted="6ND", params="total", data="images"))
    assert simple.flops == 6 * 150 * 1600 and simple.tokens == 100
    assert convert([RUN], OURS, OURS) == [RUN]


@pytest.mark.parametrize(
    ("run", "have", "want", "message"),
    [
        (RUN, Convention(loss="training, smoothed"), OURS, "the loss is 'training, smoothed'.* cannot be converted"),
        (RUN, Convention(counted="6ND"), OURS, "6ND has lost the exact FLOPs"),
        (replace(RUN, params_total=math.nan), OURS, Convention(params="total"), "a: params_total is not recorded"),
        (replace(RUN, images=math.nan), OURS, Convention(data="images"), "a: images is not recorded"),
        (RUN, Convention(data="images"), OURS, "a: D is in images; tokens need tokens_per_image"),
    ],
)
def test_what_cannot_be_converted_is_refused(run, have, want, message):
    with pytest.raises(UsageError, match=message):
        convert([run], have, want)


def test_conventions_do_not_mix():
    require_same(OURS, Convention())
    with pytest.raises(UsageError, match=r"b.csv: unit is 'MACs' and 'FLOPs'; one fit takes one convention"):
        require_same(OURS, MACS, "b.csv")
    with pytest.raises(UsageError, match="unit is 'flop', expected one of FLOPs, MACs"):
        Convention(unit="flop")
    with pytest.raises(UsageError, match="6ND is FLOPs of training, found MACs of training"):
        Convention(counted="6ND", unit="MACs")
    with pytest.raises(UsageError, match="a law converts between units and passes only"):
        convert_law(PowerLaw(1.0, 0.5), OURS, Convention(params="total"))


def test_records_say_their_convention():
    flops = "exact, 2 x MACs, training = 3 x forward"
    assert of_record({"flops": flops, "weights": {"ema": "power"}}) == OURS
    assert of_record({"flops": flops, "weights": "params (raw)"}).loss == "held-out, raw"
    with pytest.raises(UsageError, match="protocol field 'flops' is '6ND'"):
        of_record({"flops": "6ND"})
    assert str(OURS) == "C: exact FLOPs of training; N: active parameters; D: tokens; L: held-out, EMA"


@pytest.mark.parametrize(("over", "what"), [(2, "MACs"), (3, "forward passes alone"), (6, "forward passes alone")])
def test_units_that_look_like_another_convention_are_named(over, what):
    runs = [replace(r, flops=r.flops / over, source="x.csv:2") for r in study()]
    with pytest.raises(UsageError, match=rf"x.csv:2: flops is .* in all 25 runs, which looks like .*{what}.*by {over}"):
        check_units(runs)
    check_units(study())
    exact = [replace(r, flops=r.flops * x) for r, x in zip(study(), np.linspace(1.2, 2.5, 25).tolist(), strict=True)]
    check_units(exact)
