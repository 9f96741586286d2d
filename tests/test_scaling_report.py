"""Facts about what leaves the wing: the report, the JSON and the command line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_scaling_fit import BUDGETS, L_LAW, N_LAW, study
from test_scaling_runs import record, workdir

from dit_jax.scaling.__main__ import main
from dit_jax.scaling.fit import fit_isoflop
from dit_jax.scaling.predict import extrapolate, holdout_largest
from dit_jax.scaling.report import write_report
from dit_jax.scaling.runs import Run


@pytest.fixture(scope="module")
def runs():
    return study(noise=0.003, se=0.002)


@pytest.fixture
def sheet(tmp_path, runs):
    path = tmp_path / "runs.csv"
    lines = [f"{r.name},{r.params},{r.tokens},{r.images},{r.flops},{r.loss}" for r in runs]
    path.write_text("\n".join(["run,params,tokens,images,flops,loss", *lines]))
    return str(path)


def sweep(path, runs) -> str:
    """A sweep folder with one workdir per run, and the model that tests the law beyond them."""
    far = 4 * float(BUDGETS[-1])
    test = Run("far", float(N_LAW(far)), 1e7, far, float(L_LAW(far)), 0.002, images=6e5)
    for r in [*runs, test]:
        values = dict(
            images_seen=int(r.images), tokens_seen=int(r.tokens), params_active=int(r.params), flops_train=r.flops
        )
        folder = path / ("extrapolation" if r is test else f"cells/{r.name}")
        workdir(folder, record(run=r.name, metrics={"loss": r.loss, "loss_se": r.loss_se}, **values))
    return str(path)


def test_the_report_is_one_self_contained_file(tmp_path, runs):
    fit = fit_isoflop(runs, resamples=100)
    far = Run("far", 6e4, 1e7, 5.2e11, 0.44, 0.002)
    grid = tmp_path / "grid.bin"
    grid.write_bytes(b"\x89PNG....")
    path = str(tmp_path / "out" / "report.html")
    options = dict(extrapolation=extrapolate(fit, far), grid_png=str(grid), notes=("a <note>",))
    write_report(
        path, fit, runs, holdout_largest(runs), title="Digits", protocol={"data": {"name": "d<igits"}}, **options
    )
    text = Path(path).read_text(encoding="utf-8")
    page = re.sub(r"base64,[^\"]*", "", text)
    assert "http" not in page and "url(" not in page and "<script" not in page and "<link" not in page
    sources = re.findall(r'src="([^"]{0,22})', text)
    assert len(sources) == 3 and all(s == "data:image/png;base64," for s in sources)
    for part in (
        "Tested 4.0x beyond",
        "95% interval",
        "a &lt;note&gt;",
        "d&lt;igits",
        "data.name",
        "curvature",
    ):
        assert part in text
    assert sorted(os.listdir(tmp_path / "out")) == ["fit.json", "isoflop.png", "laws.png", "report.html"]
    assert (tmp_path / "out" / "laws.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((tmp_path / "out" / "fit.json").read_text())["predictions"][0]["beyond"] == pytest.approx(
        4, rel=0.01
    )


def test_the_report_stands_without_intervals_samples_or_protocol(tmp_path):
    exact = study(sizes=3)
    path = write_report(str(tmp_path / "r.html"), fit_isoflop(exact), exact, None, title="t")
    text = Path(path).read_text(encoding="utf-8")
    assert "Warnings" in text and "no interval" in text and "nan" not in re.sub(r"base64,[^\"]*", "", text)


def test_a_missing_grid_leaves_nothing_behind(tmp_path, runs):
    with pytest.raises(FileNotFoundError):
        write_report(str(tmp_path / "r.html"), fit_isoflop(runs, resamples=0), runs, None, title="t", grid_png="no.png")
    assert os.listdir(tmp_path) == []


def test_fit_prints_tables_and_writes_the_public_json(sheet, tmp_path, capsys):
    out = tmp_path / "fit.json"
    assert main(["fit", sheet, f"--json={out}", "--seed=1", "--flops=1e12"]) == 0
    printed = capsys.readouterr().out
    for part in ("N_opt", "D_opt", "L_opt, irreducible (chosen)", "fit without the largest budget", "7.7x beyond"):
        assert part in printed
    result = json.loads(out.read_text())
    keys = "method n_runs law objective exponents intervals identifiable warnings predictions bias quality convention"
    assert set(result) == set(keys.split())
    assert result["method"] == "isoflop" and result["n_runs"] == 25 and result["identifiable"] is True
    assert set(result["law"]["N_opt"]) == {"coefficient", "exponent"} and set(result["exponents"]) == {"a", "b"}
    assert {"D_opt", "L_opt"} <= set(result["law"])
    low, high = result["intervals"]["a"]
    assert low < result["exponents"]["a"] < high
    assert result["predictions"][0]["flops"] == 1e12


def test_predict_and_plan_print_their_distance_from_the_data(sheet, capsys):
    assert main(["predict", sheet, "--flops=5.2e11"]) == 0
    assert "4.0x beyond" in capsys.readouterr().out
    assert main(["plan", sheet, "--flops=2e11"]) == 0
    assert "images" in capsys.readouterr().out


def test_report_command_finds_the_test_of_the_law(tmp_path, runs, capsys):
    out = tmp_path / "out" / "report.html"
    assert main(["report", sweep(tmp_path / "sweep", runs), f"--out={out}"]) == 0
    assert "Tested 4.0x beyond" in capsys.readouterr().out
    text = out.read_text()
    assert "held_out.seed" in text and "1234" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "SHEET", "--method=surfac"], "invalid choice: 'surfac'"),
        (["fit"], "required: RUNS"),
        (["fits", "SHEET"], "invalid choice: 'fits'"),
        (["fit", "nowhere.csv"], "nowhere.csv: no such file or folder"),
        (["predict", "SHEET"], "required: --flops"),
        (["predict", "SHEET", "--flops=-3"], "--flops: found -3.0, expected a number above 0"),
        (["fit", "SHEET", "--window=0.5"], "--window: found 0.5"),
        (["report", "SHEET", "--grid=no.png"], "--grid: no.png: no such file"),
    ],
)
def test_bad_use_is_one_line_and_exit_2(arguments, message, sheet, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir(tmp_path))
    assert main([sheet if a == "SHEET" else a for a in arguments] + ["--json=out.json"] * ("SHEET" in arguments)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and message in captured.err and captured.err.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == before


def test_exit_code_reaches_the_shell_and_the_wing_needs_neither_jax_nor_tensorflow(sheet, tmp_path):
    bad = tmp_path / "bad.csv"
    bad.write_text("params,tokens,los\n1,2,3\n")
    command = [sys.executable, "-m", "dit_jax.scaling", "fit"]
    done = subprocess.run([*command, str(bad)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == f"error: {bad}: no column 'loss'; nearest found 'los'\n"
    script = (
        "import sys; from dit_jax.scaling.__main__ import main; import dit_jax.scaling.figure; "
        f"main(['fit', {sheet!r}]); sys.exit(bool({{'jax', 'flax', 'tensorflow', 'torch'}} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0
