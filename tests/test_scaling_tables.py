"""Facts about tables as people have them: factors, units, formats, missing losses, sweeps, studies, sides of `compare`; and `table`."""

import csv
import io
import json
import math
import os

import numpy as np
import pytest
from planted import ladder, study
from test_scaling_frontier import sampled
from test_scaling_runs import record, table, workdir

from dit_jax.error import UsageError
from dit_jax.scaling import commands
from dit_jax.scaling.__main__ import main
from dit_jax.scaling.fits import fit_isoflop
from dit_jax.scaling.runs import load_runs
from dit_jax.scaling.runs.columns import unit
from dit_jax.scaling.verdicts import quality

DATA = os.path.join(os.path.dirname(__file__), "data")
CASES = os.path.join(DATA, "cases")
GADRE = os.path.join(DATA, "gadre_models_104.csv")
PORIAN = os.path.join(DATA, "porian_isoflop_points.csv")


def case(name: str) -> str:
    return os.path.join(CASES, name)


def refused(capsys, *arguments) -> str:
    """The one line of a command that is refused as typed."""
    assert main(list(arguments)) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    return said.err


def fitted(capsys, tmp_path, *arguments) -> tuple[dict, str]:
    out = tmp_path / "out.json"
    assert main(["fit", *arguments, "--resamples=0", f"--json={out}"]) == 0
    return json.loads(out.read_text()), capsys.readouterr().err


# Columns, factors and units


def test_units_in_names_ask_for_their_factors_and_then_fit(tmp_path, capsys):
    names = {"params": "Size (B)", "tokens": "Data (T)", "flops": "FLOPs (1E21)"}
    words = [f"--column={ours}={theirs}" for ours, theirs in names.items()]
    said = refused(capsys, "fit", case("units_in_names.csv"), *words, "--method=power")
    factors = {"params": "1e9", "tokens": "1e12", "flops": "1e21"}
    for ours, factor in factors.items():
        assert f"--column '{ours}={factor}*{names[ours]}'" in said
    runs = load_runs(case("units_in_names.csv"), columns={k: f"{factors[k]}*{v}" for k, v in names.items()})
    assert [(r.params, r.tokens, r.flops) for r in runs[:2]] == [(7e9, 2e12, 84e21), (13e9, 2e12, 156e21)]
    assert runs[0].convention.counted == "6ND"
    said = refused(
        capsys, "fit", case("units_in_names.csv"), *(w.replace("=S", "=1*S") for w in words), "--method=power"
    )
    assert "params=" not in said and "tokens=1e12*Data (T)" in said


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("Size (B)", "1e9"), ("Params(M)", "1e6"), ("params [k]", "1e3"), ("N_M", "1e6"), ("tokens in billions", "1e9"),
        ("params_millions", "1e6"), ("Tokens (B tokens)", "1e9"), ("FLOPs (1E21)", "1e21"), ("C [10^18 FLOPs]", "1e18"),
        ("1e21 FLOPs", "1e21"), ("ZFLOPs", "1e21"), ("compute (PF-days)", "8.64e19"), ("PFLOP/s-days", "8.64e19"),
        ("Model Size", ""), ("t", ""), ("D", ""), ("Training FLOP", ""), ("param_count", ""), ("M", ""), ("n_embd", ""),
        ("tokens (total)", ""), ("N (non-embedding)", ""),
    ],
)  # fmt: skip
def test_a_unit_is_read_where_a_name_ends_with_one(name, factor):
    assert unit(name) == factor


def test_a_column_is_taken_with_its_factor_and_literally_if_it_is_called_so(tmp_path):
    path = table(tmp_path, "N,2*D,loss\n10,20,3\n")
    (run,) = load_runs(path, columns={"params": "1.5e6 * N", "tokens": "2*D"})
    assert (run.params, run.tokens) == (15e6, 20)
    with pytest.raises(UsageError, match="no column 'M', which --column names"):
        load_runs(path, columns={"params": "1e6*M", "tokens": "2*D"})
    path = table(tmp_path, "N,D,loss\nmany,20,3\n")
    with pytest.raises(UsageError, match="params is 'many', expected a number"):
        load_runs(path, columns={"params": "1e6*N", "tokens": "D"})


@pytest.mark.parametrize(
    ("name", "columns"),
    [("case_params.csv", {"params": "N", "tokens": "D"}), ("case_loss.csv", {"loss": "val_loss"})],
)
def test_a_name_that_is_given_wins_over_one_that_is_ours_but_for_capitals(name, columns, capsys):
    runs = load_runs(case(name), columns=columns)
    assert [(r.params, r.loss) for r in runs] == [(12e6, 4.1), (25e6, 3.8), (50e6, 3.5)]
    words = [f"--column={ours}={theirs}" for ours, theirs in columns.items()]
    assert main(["fit", case(name), *words, "--method=power", "--resamples=0"]) == 0


def test_sizes_that_no_training_has_are_refused_and_a_factor_mends_them(tmp_path, capsys):
    path, out = case("ladder_in_millions.csv"), tmp_path / "out.json"
    said = refused(capsys, "plan", path, "--flops=1e21")
    assert "params is 35 to 2,320" in said and "--column 'params=1e6*NAME'" in said
    words = ["--column=params=1e6*params", "--column=tokens=1e6*tokens", "--flops=1e21", f"--json={out}"]
    assert main(["plan", path, *words, "--resamples=20", "--next_flops=0"]) == 0
    planned = json.loads(out.read_text())["plans"][0]
    low, high = planned["loss_interval"]
    assert low - 5e-4 < 2.359 < high + 5e-4  # as printed, to a thousandth


@pytest.mark.parametrize(("params", "tokens"), [(1e6, 1.0), (1.0, 1e6), (1e3, 1e9), (1e9, 1e9)])
def test_thousands_millions_and_billions_are_not_fitted(tmp_path, capsys, params, tokens):
    rows = [f"{r.params / params!r},{r.tokens / tokens!r},{r.loss}" for r in ladder()]
    path = table(tmp_path, "\n".join(["params,tokens,loss", *rows]))
    assert "in other units" in (said := refused(capsys, "fit", path)) or "thousands, millions or billions" in said


# Formats


ROWS = [("a", 10.0, 20.0, 3.5), ("b", 20.0, 40.0, 2.5)]
COMMAS = "run,params,tokens,loss\n" + "".join(f"{a},{n},{d},{y}\n" for a, n, d, y in ROWS)
OBJECTS = "".join(json.dumps(dict(zip(("run", "params", "tokens", "loss"), row, strict=True))) + "\n" for row in ROWS)


@pytest.mark.parametrize("name", ["x.csv", "x.CSV", "x.tsv", "x.txt", "x.jsonl", "x.json", "x"])
@pytest.mark.parametrize(
    "text",
    [COMMAS, COMMAS.replace(",", "\t"), COMMAS.replace(",", ";"), OBJECTS, "\ufeff" + OBJECTS, "\n" + OBJECTS],
    ids=["commas", "tabs", "semicolons", "objects", "a mark", "a blank line"],
)
def test_a_table_is_told_by_its_content_whatever_its_ending(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert [(r.name, r.params, r.tokens, r.loss) for r in load_runs(tmp_path / name)] == ROWS
    assert [r.name for r in load_runs(tmp_path / name, where=["run=b"])] == ["b"]


def test_records_are_records_whatever_their_ending(tmp_path):
    (tmp_path / "x.csv").write_text(json.dumps(record()) + "\n")
    assert load_runs(tmp_path / "x.csv")[0].params == 1000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\3\4rest", "found an archive, such as an Excel workbook, expected UTF-8: save the table as CSV"),
        (b"PAR1rest", "found a Parquet file"),
        (b"\x1f\x8brest", "found a compressed file"),
        (b'[\n{"params": 1}]', "found a JSON list, expected UTF-8: save the table as CSV in UTF-8, or as JSON lines"),
        (b'{"params": 1}\n[2]\n', "x.csv:2: found list, expected a JSON object"),
        (b'{"params": 1}\n{2\n', "x.csv:2: not a JSON line"),
        (b'{"params": 1, "tokens": 2}\n', "no column 'loss'"),
        (b'{"params": 1, "tokens": [2], "loss": 3}\n', r"x.csv:1: tokens is '\[2\]'"),
        (b'{"params": 1, "tokens": 2, "loss": 3}\n{"params": 1, "tokens": 2}\n', "x.csv:2: loss is blank, nan or a word in 1 of 2"),
    ],
)  # fmt: skip
def test_files_that_are_no_table_are_named(tmp_path, content, message):
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        load_runs(tmp_path / "x.csv")


# Losses that are missing, sweeps, seeds, studies


def test_blank_losses_are_named_at_once_and_dropped_if_asked(tmp_path, capsys):
    assert "blank_loss.csv:3: loss is blank, nan or a word in 1 of 4 rows" in refused(
        capsys, "fit", case("blank_loss.csv"), "--method=power"
    )
    said, err = fitted(capsys, tmp_path, case("blank_loss.csv"), "--method=power", "--drop=missing")
    assert said["n_runs"] == 3 and "1 of 4 runs dropped" in err
    assert [(d["kind"], d["run"]) for d in said["dropped"]] == [("missing", "b")]
    rows = ["10,20,nan", "20,40,", "30,50,2.5", "40,60,diverged", "50,70,inf"]
    path = table(tmp_path, "\n".join(["params,tokens,loss", *rows]))
    with pytest.raises(UsageError, match=r"runs.csv:2, 3, 5, 6: loss is blank, nan or a word in 4 of 5 rows"):
        load_runs(path)
    assert [math.isnan(r.loss) for r in load_runs(path, missing=True)] == [True, True, False, True, True]


SMALL = (
    "12e6,240e6,4.1",
    "25e6,500e6,3.8",
    "50e6,1e9,3.5",
)  # too few for the methods that answer, so that a command is fast


def test_a_report_says_what_was_dropped(tmp_path, capsys):
    path, out = table(tmp_path, "\n".join(["params,tokens,loss", *SMALL, SMALL[1], "3e8,1e10,"])), tmp_path / "report"
    words = ["--method=power", "--resamples=0", "--drop=missing,duplicates", f"--out={out}/report.html"]
    assert main(["report", path, *words]) == 0
    told, page = json.loads((out / "report.json").read_text())["dropped"], (out / "report.html").read_text()
    said = capsys.readouterr().err
    assert len(told) == 2
    for text, kind in zip(told, ("missing", "duplicates"), strict=True):
        assert text.partition(" (")[0] in page and f"dropped ({kind}): {text}" in said


def test_the_best_of_a_sweep_over_learning_rates_is_the_ladder_of_the_best(tmp_path, capsys):
    rows = ["params,tokens,loss,lr"]
    for i, row in enumerate(SMALL):
        rows += [f"{row},3e-4", f"{row}1,1e-4", f"{row}5,1e-3" if i else f"{row.rpartition(',')[0]},nan,1e-3"]
    swept = table(tmp_path, "\n".join(rows))
    best, err = fitted(capsys, tmp_path, swept, "--best_of=lr", "--method=power")
    plain = table(tmp_path, "\n".join(["params,tokens,loss", *SMALL]))
    assert best["law"] == fitted(capsys, tmp_path, plain, "--method=power")[0]["law"] and best["n_runs"] == 3
    assert "dropped (best_of): 6 of 9 rows" in err and "the best is 3e-4 in 3" in err
    assert {d["kind"] for d in best["dropped"]} == {"best_of"} and len(best["dropped"]) == 6
    swept = table(tmp_path, "\n".join([*rows, "1e9,1e10,,1e-4"]))
    assert "no column 'rate', which --best_of names" in refused(capsys, "fit", swept, "--best_of=rate")
    assert "1 of 4 runs have no loss" in refused(capsys, "fit", swept, "--best_of=lr")
    workdir(tmp_path / "w", record())
    assert "holds records, expected a table with the column 'lr'" in refused(
        capsys, "fit", str(tmp_path / "w"), "--best_of=lr"
    )


def test_seeds_of_one_cell_are_told_apart_by_their_column(tmp_path):
    rows = [
        f"{r.name},{r.params!r},{r.tokens!r},{r.loss * x!r},{seed}"
        for r in ladder(budgets=3)
        for seed, x in ((0, 1.0), (1, 1.001))
    ]
    runs = load_runs(table(tmp_path, "\n".join(["run,params,tokens,loss,seed", *rows])))
    (found,) = quality.findings(runs)
    assert found.kind == "seeds" and "1e+18_0, seed 1" in found.runs
    assert "24 cell(s) of params and tokens have several runs (seeds), up to 0.10% apart" in found.text


def test_text_columns_that_split_a_table_into_studies_ask_for_where(tmp_path, capsys):
    rows = [
        f"{data},{r.name}-{data},{r.params!r},{r.tokens!r},{r.loss + extra!r}"
        for data, extra in (("c4", 0.0), ("rpj", 0.2), ("rw", 0.4))
        for r in ladder(noise=0.002, budgets=3)
    ]
    path = table(tmp_path, "\n".join(["dataset,model,params,tokens,loss", *rows]))
    said = refused(capsys, "fit", path)
    assert (
        "dataset (c4, rpj, rw); take one with --where 'dataset=c4'" in said
        and "--where 'dataset=*'" in said
        and "model" not in said
    )
    assert len(load_runs(path, where=["dataset=c4"])) == 24
    assert len(load_runs(path, where=["dataset=*"])) == 72


def test_text_columns_of_one_study_are_let_be(tmp_path):
    """Sizes by name, budgets by name, phases of growing compute, and names of runs."""
    rows = [
        f"{r.params:.3g}M,budget {r.flops:.0e},{'pilot' if i < 16 else 'main'},{r.params!r},{r.tokens!r},{r.loss!r}"
        for i, r in enumerate(ladder())
    ]
    assert len(load_runs(table(tmp_path, "\n".join(["size,budget,phase,params,tokens,loss", *rows])))) == 48


def test_the_real_tables_name_their_studies():
    with pytest.raises(UsageError, match=r"dataset \(c4_original, rpj, rw_original\); take one with --where"):
        load_runs(GADRE, columns={"loss": "loss_c4_val"})
    assert len(load_runs(GADRE, columns={"loss": "loss_c4_val"}, where=["dataset=*"])) == 104
    names = {"params": "n", "tokens": "t"}
    with pytest.raises(UsageError, match=r"dataset \(rw, owt2\); hparams"):
        load_runs(PORIAN, columns=names)
    kinds = set()
    with open(PORIAN, newline="") as file:
        fields = ("file", "dataset", "hparams", "warmup", "decay", "param_count", "val")
        kinds = {tuple(row[f] for f in fields) for row in csv.DictReader(file)}
    for kind in sorted(kinds)[::5]:
        assert load_runs(PORIAN, columns=names, where=[f"{f}={v}" for f, v in zip(fields, kind, strict=True)])


def test_budgets_read_off_a_figure_are_said_with_the_way_out(tmp_path):
    rng = np.random.default_rng(0)
    runs = [(r, r.flops * math.exp(rng.uniform(-0.12, 0.12))) for r in ladder(noise=0.003)]
    rows = [f"{r.params!r},{c / 6 / r.params!r},{c!r},{r.loss!r},{r.flops:.0e}" for r, c in runs]
    path = table(tmp_path, "\n".join(["params,tokens,flops,loss,line", *rows]))
    read = load_runs(path)
    suspects = commands._suspects(read, quality.findings(read))
    (said,) = [text for text, advice, _, bad in suspects if bad and "--column group=NAME" in advice]
    assert "as read off a figure" in said
    grouped = load_runs(path, columns={"group": "line"})
    assert (
        "split" not in {f.kind for f in quality.findings(grouped)}
        and len(fit_isoflop(grouped, resamples=0).points) == 6
    )


# Sides of `compare`


def test_each_side_of_compare_has_its_own_columns_and_rows(tmp_path, capsys):
    runs = study(noise=0.002)
    rows = [
        f"{kind},{r.params!r},{r.tokens!r},{r.flops!r},{r.loss * x!r}"
        for kind, x in (("x", 1), ("y", 1.05))
        for r in runs
    ]
    one = table(tmp_path, "\n".join(["kind,params,tokens,flops,loss", *rows]))
    two = tmp_path / "two.csv"
    two.write_text(
        "\n".join(["N (M),tokens,flops,val", *(f"{r.params / 1e6!r},{r.tokens!r},{r.flops!r},{r.loss}" for r in runs)])
    )
    words = ["--b_column=params=1e6*N (M)", "--b_column=loss=val", "--resamples=20"]
    assert main(["compare", one, str(two), "--a_where=kind=y", *words]) == 0
    assert "two.csv is 0.9524 times that of runs.csv" in capsys.readouterr().out.replace("the loss of ", "")
    assert main(["compare", one, one, "--a_where=kind=x", "--b_where=kind=y", "--resamples=20"]) == 0
    capsys.readouterr()
    assert "split the runs into studies" in refused(capsys, "compare", one, one, "--b_where=kind=y")


# `table`


@pytest.fixture
def scored(tmp_path) -> str:
    """Two checkpoints, each at four guidances with the best at 1.5 and 2, and a held-out loss of raw weights."""
    records = [
        record(
            run="a", step=20, protocol={"weights": "params (raw)", "flops": "exact, 2 x MACs, training = 3 x forward"}
        )
    ]
    for step, best in ((10, 1.5), (20, 2.0)):
        for g in (1.0, 1.5, 2.0, 3.0):
            fid = 10 + math.log(g / best) ** 2
            one = sampled(name="a", guidance=g) | {"step": step}
            one["metrics"] = {"fid": fid, "fid_low": fid - 0.1, "fid_high": fid + 0.1, "precision": 0.5 + 0.1 * g}
            records.append(one)
    return workdir(tmp_path / "w", *records)


def test_a_table_of_records_has_a_row_each_and_the_best_guidances(scored, tmp_path, capsys):
    out = tmp_path / "out.json"
    assert main(["table", scored, f"--json={out}"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("Protocol (loss): flops=exact") and said[1].startswith(
        "Protocol (samples): data.dataset=digits, "
    )
    assert "samples.num=1000" in said[1] and "guidance" not in said[1]
    row = next(line for line in said if "10 (9.9 to 10.1)" in line)
    assert row.split()[:6] == ["a", "10", "ema", "ddim", "20", "1.5"]
    assert any("raw" in line and "0.5 (0.4961 to 0.5039)" in line for line in said)
    result = json.loads(out.read_text())
    assert len(result["records"]) == 9
    best = {(b["step"], b["metric"]): b for b in result["best_guidance"]}
    assert [float(best[step, "fid"]["guidance"]) for step in (10, 20)] == pytest.approx([1.5, 2.0], rel=0.01)
    assert best[10, "precision"]["guidance"] == "3, the highest tried" and best[10, "fid"]["tried"] == 4


def test_a_table_as_csv_is_read_back_and_as_markdown_has_its_bars(scored, capsys):
    assert main(["table", scored, "--csv"]) == 0
    said = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(said.out)))
    assert len(rows) == 9 and float(rows[0]["fid_low"]) > 9
    assert {"run", "step", "weights", "sampler", "steps", "guidance", "protocol_id", "fid", "fid_low", "loss"} <= set(
        rows[0]
    )
    assert said.err.count("Protocol (") == 2
    assert main(["table", scored, "--md", "--where", "samples.guidance=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| a |") for line in lines) == 3 and "| --- | --- |" in "\n".join(lines)


def test_records_that_differ_otherwise_have_a_column_for_it(tmp_path, capsys):
    workdir(tmp_path / "w", sampled(name="a", seed=1), sampled(name="a", seed=2, fid=11.0))
    assert main(["table", str(tmp_path / "w")]) == 0
    assert "samples.seed" in capsys.readouterr().out
    assert "holds no records" in refused(capsys, "table", case("case_loss.csv"))
    assert "not allowed with argument" in refused(capsys, "table", "x", "--csv", "--md")
