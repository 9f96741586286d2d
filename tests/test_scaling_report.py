"""Facts about what leaves the wing: the report, the JSON and the command line."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.path import Path as MatplotlibPath
from PIL import Image
from planted import LAW, ladder, scatter
from test_scaling_fit import BUDGETS, L_LAW, N_LAW, study
from test_scaling_methods import curves
from test_scaling_runs import record, workdir

from dit_jax.scaling import plane
from dit_jax.scaling.__main__ import main
from dit_jax.scaling.chart import Axis, ticks
from dit_jax.scaling.clouds import region
from dit_jax.scaling.fit import METHODS, fit_isoflop
from dit_jax.scaling.methods import fit_methods
from dit_jax.scaling.page import page
from dit_jax.scaling.predict import extrapolate, holdout_largest
from dit_jax.scaling.report import Report, make_charts, report_json, write_report
from dit_jax.scaling.runs import Run
from dit_jax.scaling.surface import fit_surface


def stands_alone(text: str) -> None:
    """A page names no address, runs its own script only, and is well-formed."""
    page = re.sub(r"base64,[^\"]*", "", text)
    assert "http" not in page and "url(" not in page and "<link" not in page and "@import" not in page
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'" in text
    assert not re.search(r"<[^>]* on\w+=", page)
    balanced = Balanced()
    balanced.feed(page)
    assert not balanced.open and balanced.count > 100


class Balanced(HTMLParser):
    """Every element that is opened is closed, in order."""

    def __init__(self):
        super().__init__()
        self.open, self.count = [], 0

    def handle_starttag(self, tag, attrs):
        self.count += 1
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.count += 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()


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
    stands_alone(text)
    sources = re.findall(r'src="([^"]{0,22})', text)
    assert sources == ["data:image/png;base64,"]  # the samples; figures are drawn in the page
    for part in (
        "Tested 4.0x beyond",
        "95% interval",
        "a &lt;note&gt;",
        "d&lt;igits",
        "data.name",
        "curvature",
    ):
        assert part in text
    pictures = ["clouds.png", "isoflop.png", "laws.png", "residuals.png"]
    assert sorted(os.listdir(tmp_path / "out")) == sorted([*pictures, "fit.json", "report.html", "report.json"])
    assert (tmp_path / "out" / "laws.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((tmp_path / "out" / "fit.json").read_text())["predictions"][0]["beyond"] == pytest.approx(
        4, rel=0.01
    )


def test_the_report_stands_without_intervals_samples_or_protocol(tmp_path):
    exact = study(sizes=3)
    path = write_report(str(tmp_path / "r.html"), fit_isoflop(exact), exact, None, title="t")
    text = Path(path).read_text(encoding="utf-8")
    assert "Warnings" in text and "no interval" in text
    assert not re.search(r"\bnan\b|\binf\b", re.sub(r"base64,[^\"]*|<script>.*", "", text, flags=re.DOTALL))


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


@pytest.mark.slow
def test_report_command_finds_the_test_of_the_law(tmp_path, runs, capsys):
    out = tmp_path / "out" / "report.html"
    assert main(["report", sweep(tmp_path / "sweep", runs), f"--out={out}"]) == 0
    assert "Tested 4.0x beyond" in capsys.readouterr().out
    text = out.read_text()
    assert "held_out.seed" in text and "1234" in text


def table(path, runs) -> str:
    """A CSV of runs without images."""
    lines = [f"{r.name},{r.params!r},{r.tokens!r},{r.flops!r},{r.loss!r}" for r in runs]
    path.write_text("\n".join(["run,params,tokens,flops,loss", *lines]))
    return str(path)


def drawn(runs, names=tuple(METHODS), rows=None) -> tuple:
    """(the page, the JSON) of a report, without its pictures."""
    found = fit_methods(runs, rows, names=names, options=lambda method: {"resamples": 40})
    made = Report("t", found, tuple(runs), rows)
    charts = make_charts(made)
    text = page(made, charts)
    stands_alone(text)
    return text, json.loads(json.dumps(report_json(made, charts), allow_nan=False))


def test_the_report_of_all_methods_holds_each_of_them(tmp_path, capsys):
    out = tmp_path / "out" / "report.html"
    sheet = table(tmp_path / "runs.csv", ladder(noise=0.002))
    assert main(["report", sheet, f"--out={out}", "--resamples=40", "--flops=1e22"]) == 0
    text, said = out.read_text(), json.loads((out.parent / "report.json").read_text())
    stands_alone(text)
    methods = ["isoflop", "akima", "surface", "varpro", "gadre", "power"]
    assert list(said["methods"]) == methods and list(said["refused"]) == ["envelope"]
    assert list(said["charts"]) == ["isoflop", "laws", "methods", "residuals", "clouds"]
    for name in said["charts"]:
        picture = np.asarray(Image.open(tmp_path / "out" / f"{name}.png"))
        assert min(picture.shape[:2]) > 300 and len(np.unique(picture)) > 20
    for method in methods:
        assert f'data-method="{method}"' in text and f'value="{method}"' in text
    assert (
        "10.0x beyond" in text
        and "What the numbers count" in text
        and "assumed, not stated: params, data, loss" in text
    )
    figure = said["charts"]["methods"]["panels"][0]  # the forest of a: gadre's is a premise, power has none
    assert sorted(m["method"] for m in figure["marks"]) == sorted(methods[:-1])
    assert said["methods"]["varpro"]["predictions"][0]["beyond"] == pytest.approx(10)
    assert capsys.readouterr().out.count("report.html") == 1


def test_figures_are_read_without_colour_and_without_a_script():
    text, said = drawn(ladder(noise=0.002))
    looks = {m: re.search(rf'value="{m}">(<svg.*?</svg>)', text).group(1) for m in said["methods"]}
    grey = {re.sub(r"#\w{6}", "", look) for look in looks.values()}
    assert len(grey) == len(looks)  # dashes and markers tell them apart
    titles = re.findall(r'<g class="p" data-run="1e\+18_0"><title>(.*?)</title>', text, re.DOTALL)
    assert len(titles) >= 5 and all("loss" in t and "varpro: law" in t and "C 1e+18 FLOPs" in t for t in titles)
    axes = re.findall(r'data-names="([^"]*)"', text)
    assert len(axes) > 20 and all(name.split("|")[0] for name in axes)


def test_the_residuals_are_those_of_the_runs():
    runs = ladder(noise=0.002)
    _, said = drawn(runs, ("varpro",))
    law = said["methods"]["varpro"]["law"]
    (marks,) = [
        [m for m in p["marks"] if m["kind"] == "points"]
        for p in said["charts"]["residuals"]["panels"]
        if "by C" in p["title"]
    ]
    for r, off in zip(runs, marks[0]["y"], strict=True):
        expected = law["E"] + law["A"] / r.params ** law["alpha"] + law["B"] / r.tokens ** law["beta"]
        assert off == pytest.approx(100 * (r.loss / expected - 1), abs=1e-6)
    assert [r["law"]["varpro"] for r in said["runs"]] == pytest.approx(
        [r.loss / (1 + y / 100) for r, y in zip(runs, marks[0]["y"], strict=True)]
    )


def test_the_region_of_a_cloud_holds_its_share():
    rng = np.random.default_rng(0)
    x, y = rng.multivariate_normal([3, 5], [[1, 0.9], [0.9, 1]], 4000).T
    for u, v in ((x, y), (x, y + x**2), (1e9 * x, 1e-9 * y)):
        lines, closed = region(u, v, 0.95)
        assert closed
        inside = np.zeros(len(u), bool)
        scale = np.ptp(u), np.ptp(v)
        for line in lines:
            inside ^= MatplotlibPath(np.stack([line[0] / scale[0], line[1] / scale[1]], 1)).contains_points(
                np.stack([u / scale[0], v / scale[1]], 1)
            )
        assert inside.mean() == pytest.approx(0.95, abs=0.01)
    (line,), closed = region(x, 1 - x, 0.95)
    assert not closed and np.ptp(line[0]) == pytest.approx(np.ptp(np.quantile(x, [0.025, 0.975])), rel=1e-6)
    assert region(np.full(100, 0.5), np.full(100, 0.5), 0.95) == ([], False)


@pytest.mark.parametrize("method", ["isoflop", "akima", "surface", "varpro", "gadre", "power"])
def test_any_method_has_a_report_of_its_own(method):
    text, said = drawn(ladder(noise=0.002, budgets=4), (method,))
    assert list(said["methods"]) == [method] and "methods" not in said["charts"] and 'type="checkbox"' not in text
    assert {"laws", "residuals"} <= set(said["charts"])


def test_runs_of_no_budgets_are_shown_by_their_size():
    made = [(r, float(10 ** (round(2 * np.log10(r.params)) / 2))) for r in scatter()]  # 7 sizes
    runs = [Run(r.name, n, r.tokens, 6 * n * r.tokens, float(LAW(n, r.tokens))) for r, n in made]
    text, said = drawn(runs)
    assert said["charts"]["isoflop"]["title"] == "Loss against data at each size" and "isoflop" in said["refused"]
    assert "By surface, the best loss" in text


def test_runs_of_no_budgets_and_no_sizes_are_shown_with_lines_of_equal_loss():
    runs = scatter(count=60)
    fit = fit_surface(runs, resamples=0)
    found = plane.panel(fit, runs, {}, {"C": "FLOPs", "N": "parameters"})
    lines = [m for m in found.marks if m.kind == "line"]
    edges = np.quantile([r.loss for r in runs], np.arange(1, 6) / 6)
    assert len(lines) == 6 and sum(len(m.x) for m in found.marks if m.kind == "points") == 60
    for mark, loss in zip(lines[:-1], edges, strict=True):  # on the planted law, to what the fit has found of it
        n, c = np.array(mark.y), np.array(mark.x)
        assert len(n) > 20 and LAW(n, c / (6 * n)) == pytest.approx(loss, rel=1e-6)
    text, said = drawn(runs, ("surface",))
    assert said["charts"]["isoflop"]["title"] == "Lines of equal loss" and "loss 2." in text


def test_training_curves_and_their_envelope_are_shown():
    rows = tuple(curves(points=12, sizes=6))
    text, said = drawn(rows, ("envelope",), rows)
    marks = said["charts"]["training"]["panels"][0]["marks"]
    assert len([m for m in marks if m["kind"] == "line"]) == 7 and "Training curves and their envelope" in text
    assert [len(m["x"]) for m in marks if m["method"] == "envelope" and m["kind"] == "points"] == [5]


def test_one_log_axis_or_another_has_ticks():
    for low in np.geomspace(1e-3, 1e21, 40):
        for ratio in (1.001, 1.3, 3.0, 30.0, 1e3, 1e9):
            for axis in (Axis("x"), Axis("x", kind="count"), Axis("x", kind="flops"), Axis("x", log=False)):
                found = ticks(axis, low, low * ratio)
                texts = [text for _, text in found]
                assert 2 <= len(found) <= 12 and len(set(texts)) == len(texts), (low, ratio, axis)


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
        (["report", "nowhere.csv", "--method=all"], "nowhere.csv: no such file or folder"),
        (["report", "SHEET", "--method=al"], "invalid choice: 'al'"),
        (["report", "SHEET", "--method=envelope"], "expected at least 3 runs"),
        (["report", "SHEET", "--out=."], "--out: found the folder '.', expected a file"),
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
    assert (
        done.returncode == 2
        and done.stderr
        == f"error: {bad}: no column 'loss'; nearest found 'los'; --column loss=NAME says that another one is it\n"
    )
    script = (
        "import sys; from dit_jax.scaling.__main__ import main; import dit_jax.scaling.figure; "
        f"main(['fit', {sheet!r}]); sys.exit(bool({{'jax', 'flax', 'tensorflow', 'torch'}} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0
