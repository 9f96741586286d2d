"""Facts about conventions: they are stated, do not mix, and convert to what a recount would give."""

import csv
import json
import os
from dataclasses import replace

import numpy as np
import pytest
from planted import study
from test_scaling_runs import PROTOCOL, record, table, workdir

from dit_jax.error import UsageError
from dit_jax.scaling.__main__ import main
from dit_jax.scaling.runs import Run, load_runs
from dit_jax.scaling.runs.conventions import (
    Convention,
    check_units,
    factor,
    of_record,
    require_same,
    training_flops,
)

OURS = Convention()
MACS = Convention(unit="MACs", passes="forward")
RUN = Run("a", 100.0, 1600.0, 2e6, 0.5, params_total=150.0, images=100.0)

DATA = os.path.join(os.path.dirname(__file__), "data")


def test_the_gflops_of_the_dit_paper_are_a_sixth_of_training_flops():
    assert factor(MACS, OURS) == 6 and factor(OURS, MACS) == pytest.approx(1 / 6)
    per_image = 118.6214e9  # XL/2, multiply-adds of a forward pass
    (run,) = training_flops([replace(RUN, flops=per_image, convention=MACS)])
    assert run.flops == pytest.approx(0.7117e12, rel=1e-4) and run.convention == OURS
    assert training_flops([run]) == [run]


def test_conventions_do_not_mix():
    require_same(OURS, Convention())
    with pytest.raises(UsageError, match=r"b.csv: unit is 'MACs' and 'FLOPs'; one fit takes one convention"):
        require_same(OURS, MACS, "b.csv")
    with pytest.raises(UsageError, match="unit is 'flop', expected one of FLOPs, MACs"):
        Convention(unit="flop")
    with pytest.raises(UsageError, match="6ND is FLOPs of training, found MACs of training"):
        Convention(counted="6ND", unit="MACs")


def test_records_say_their_convention():
    flops = "exact, 2 x MACs, training = 3 x forward"
    assert of_record({"flops": flops, "weights": {"ema": "power"}}) == OURS
    assert of_record({"flops": flops, "weights": "params (raw)"}).loss == "held-out, raw"
    assert of_record({"flops": flops + ", of the diffusion model alone"}) == OURS
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


@pytest.mark.parametrize(
    ("params", "tokens", "flops", "says"),
    [
        (1e-6, 1, 1, "in thousands, millions or billions"),
        (1, 1e-9, 1, "in thousands, millions or billions"),
        (1, 1, 1 / 8.64e19, "in PF-days"),
        (1e-6, 1, 1 / 8.64e19, "in PF-days"),
        (1, 1 / 256, 1, "tokens seems to count images, of 256 tokens each: say --data=images"),
        (1, 1, 47, "cannot be FLOPs, parameters and tokens all three"),
        (1, 1e-14, 1e-14, "in thousands, millions or billions, or in PF-days"),
    ],
)
def test_units_that_do_not_belong_together_are_refused(params, tokens, flops, says):
    runs = [
        replace(r, params=r.params * params, tokens=r.tokens * tokens, flops=r.flops * flops, source="x.csv:2")
        for r in study()
    ]
    with pytest.raises(UsageError, match=f"x.csv:2: .*{says}"):
        check_units(runs)


HEAD = "params,tokens,loss,images,flops"


def sheet(tmp_path, scale=1.0, columns="", cells="") -> str:
    rows = [f"{r.params},{r.tokens},{r.loss},{r.images},{r.flops * scale}{cells}" for r in study(noise=0.002)]
    return table(tmp_path, "\n".join([HEAD + columns, *rows]) + "\n")


def fitted(tmp_path, capsys, *arguments) -> tuple[dict, str]:
    out = tmp_path / "out.json"
    assert main(["fit", *arguments, f"--json={out}", "--resamples=50"]) == 0
    return json.loads(out.read_text()), capsys.readouterr().out


def test_a_table_with_other_names_and_other_studies_gives_the_same_law(tmp_path, capsys):
    own = [f"{r.params},{r.tokens},{r.loss},{r.flops}" for r in study(noise=0.002)]
    plain, _ = fitted(tmp_path, capsys, table(tmp_path, "\n".join(["params,tokens,loss,flops", *own])))
    other = [f"B,{line}" for line in own[:3]]
    theirs = table(
        tmp_path, "\n".join(["study,Model Size,D,loss,Training FLOP", *(f"A,{line}" for line in own), *other])
    )
    names = ("--column", "params=Model Size", "--column=tokens=D", "--column=flops=Training FLOP")
    renamed, _ = fitted(tmp_path, capsys, theirs, *names, "--where=study=A")
    assert renamed["law"] == plain["law"] and renamed["n_runs"] == len(own)
    assert main(["fit", theirs]) == 2
    assert "no column 'params'; " in capsys.readouterr().err
    assert main(["compare", theirs, theirs, *names, "--where=study=A", "--resamples=20"]) == 0


def test_a_fit_of_records_states_their_convention(tmp_path, capsys):
    for r in study(noise=0.002):
        values = dict(params_active=r.params, tokens_seen=r.tokens, flops_train=r.flops * 1.3, images_seen=r.images)
        values["params"] = 2 * r.params
        workdir(tmp_path / "w" / r.name, record(run=r.name, metrics={"loss": r.loss}, **values))
    said, printed = fitted(tmp_path, capsys, str(tmp_path / "w"))
    assert said["convention"] == {**vars(OURS), "assumed": []}
    assert printed.startswith(
        "Convention: C: exact FLOPs of training; N: active parameters; D: tokens; L: held-out, EMA\n"
    )
    assert main(["fit", str(tmp_path / "w"), "--unit=macs"]) == 2
    assert "unit is 'FLOPs' by the record, 'MACs' by the command" in capsys.readouterr().err


def test_a_table_says_what_it_counts_by_its_numbers_its_columns_or_the_command(tmp_path, capsys):
    plain, printed = fitted(tmp_path, capsys, sheet(tmp_path))
    assert plain["convention"]["counted"] == "6ND" and plain["convention"]["assumed"] == ["params", "data", "loss"]
    assert "(assumed, not stated: params, data, loss)" in printed
    exact, _ = fitted(tmp_path, capsys, sheet(tmp_path, 1.4))
    assert exact["convention"]["counted"] == "exact" and "unit" in exact["convention"]["assumed"]
    columns, _ = fitted(tmp_path, capsys, sheet(tmp_path, 1 / 6, ",unit,pass,params_kind", ",macs,forward,total"))
    options, _ = fitted(tmp_path, capsys, sheet(tmp_path, 1 / 6), "--unit=macs", "--pass=forward", "--params=total")
    for said in (columns, options):
        assert said["convention"]["unit"] == "FLOPs" and said["convention"]["passes"] == "training"
        assert said["convention"]["params"] == "total" and said["convention"]["assumed"] == ["data", "loss"]
        assert said["law"]["N_opt"]["exponent"] == pytest.approx(plain["law"]["N_opt"]["exponent"])
        assert said["law"]["N_opt"]["coefficient"] == pytest.approx(plain["law"]["N_opt"]["coefficient"], rel=1e-6)


def test_data_in_images_need_their_tokens_for_6nd(tmp_path, capsys):
    rows = [f"{r.params},{r.images},{r.loss}" for r in study(noise=0.002)]
    path = table(tmp_path, "\n".join(["params,tokens,loss", *rows]))
    said, printed = fitted(tmp_path, capsys, path, "--data=images", "--tokens_per_image=16", "--flops=1e12")
    assert said["convention"]["data"] == "images" and "D_opt (images)" in printed
    assert said["law"]["N_opt"]["exponent"] == pytest.approx(0.52, abs=0.1)
    assert main(["fit", path, "--data=images"]) == 2
    assert "D is in images and flops is absent; give flops, or --tokens_per_image" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("scale", "columns", "cells", "options", "message"),
    [
        (1 / 2, "", "", [], "looks like multiply-adds (MACs) of training; expected FLOPs of training: multiply it by 2"),
        (1 / 3, "", "", [], "looks like FLOPs of the forward passes alone; expected FLOPs of training: multiply it by 3"),
        (1 / 6, "", "", [], "multiply it by 6, or say --unit=macs --pass=forward"),
        (1, "", "", ["--unit=macs"], "looks like FLOPs of training, but is said to be MACs of training"),
        (1.4, "", "", ["--counted=6nd"], "counted is '6ND', but flops is not 6 x params x tokens in 25 rows"),
        (1, ",unit", ",macs", ["--unit=flops"], "runs.csv:2: unit is 'MACs' by its column and 'FLOPs' by the command"),
        (1, ",unit", ",watts", [], "runs.csv:2: found 'watts', expected one of flops, macs"),
        (1, "", "", ["--pass=backward"], "--pass: found 'backward', expected one of training, forward, train"),
        (1, "", "", ["--tokens_per_image=-1"], "--tokens_per_image: found -1, expected a number above 0"),
        (1, "", "", ["--counted=6nd", "--unit=macs"], "6ND is FLOPs of training, found MACs of training"),
    ],
)  # fmt: skip
def test_units_that_cannot_be_are_refused_in_one_line(tmp_path, capsys, scale, columns, cells, options, message):
    path = sheet(tmp_path, scale, columns, cells)
    assert main(["fit", path, f"--json={tmp_path / 'out.json'}", *options]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and message in said.err, said.err
    assert not (tmp_path / "out.json").exists()


def test_runs_of_two_conventions_are_refused_naming_the_field(tmp_path):
    one, two = tmp_path / "a.csv", tmp_path / "b.csv"
    one.write_text("params,tokens,loss,flops,unit\n10,20,3,1700,flops\n")
    two.write_text("params,tokens,loss,flops,unit\n10,20,3,850,macs\n")
    with pytest.raises(UsageError, match=r"b.csv:2: unit is 'MACs' and 'FLOPs'; one fit takes one convention"):
        load_runs([one, two])
    both = tmp_path / "c.csv"
    both.write_text("params,tokens,loss,flops,unit\n10,20,3,1700,flops\n10,20,3,850,macs\n")
    with pytest.raises(UsageError, match=r"c.csv:3: unit is 'MACs' and 'FLOPs' in .*c.csv:2"):
        load_runs([both])
    two.write_text("params,tokens,loss\n10,20,3\n")
    with pytest.raises(UsageError, match=r"b.csv:2: counted is '6ND' and 'exact'"):
        load_runs([workdir(tmp_path / "w", record(protocol={})), two])
    raw = record(run="b", protocol={**PROTOCOL, "weights": "params (raw)"})
    (run,) = load_runs(workdir(tmp_path / "raw", raw))
    assert run.convention.loss == "held-out, raw"
    with pytest.raises(UsageError, match=r"records.jsonl:1: protocol field 'flops' is '6ND', expected 'exact"):
        load_runs(workdir(tmp_path / "x", record(protocol={"flops": "6ND"})))


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_published_tables_are_not_taken_for_another_unit(tmp_path, step):
    """Porian et al.'s 15 configurations and Gadre et al.'s runs: C is 6ND, given or by default."""
    with open(os.path.join(DATA, "porian_isoflop_points.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    names = ("file", "dataset", "hparams", "warmup", "decay", "param_count", "val")
    kinds = {tuple(r[n] for n in names) for r in rows}
    assert len(kinds) == 15
    for kind in sorted(kinds)[::step]:
        mine = [f"{r['n']},{r['t']},{r['loss']},{r['flops']}" for r in rows if tuple(r[n] for n in names) == kind]
        runs = training_flops(load_runs(table(tmp_path, "\n".join(["params,tokens,loss,flops", *mine]))))
        check_units(runs)
    with open(os.path.join(DATA, "gadre_models_104.csv"), newline="") as file:
        mine = [f"{r['params']},{r['tokens']},{r['loss_c4_val']}" for r in csv.DictReader(file)]
    runs = training_flops(load_runs(table(tmp_path, "\n".join(["params,tokens,loss", *mine]))))
    check_units(runs)
    assert len(runs) == 104 and runs[0].convention.counted == "6ND"
