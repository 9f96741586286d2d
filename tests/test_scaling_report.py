"""Facts about what leaves the wing: texts, the public JSON, figures, and the report in its folder."""

import base64
import hashlib
import io
import itertools
import json
import math
import os
import re
import time
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from planted import ladder, repeated

from dit_jax.error import UsageError
from dit_jax.scaling import names, place
from dit_jax.scaling.__main__ import main
from dit_jax.scaling.fits import METHODS, fit_akima, fit_best, fit_isoflop, fit_varpro
from dit_jax.scaling.report import Report, figures, folder, opening, save, text
from dit_jax.scaling.report.axes import panels, raised, scale, thin
from dit_jax.scaling.report.page import typeset
from dit_jax.scaling.verdicts.verdict import Finding, Verdict

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}$\\frac$"


@dataclass(frozen=True)
class Beyond:
    """A model trained beyond the data."""

    flops: float = 1e22
    params: float = 9e9
    predicted: float = 2.14
    interval: tuple = (2.12, 2.16)
    measured: float = 2.15
    measured_se: float = 0.002
    multiple: float = 10.0
    inside: bool = True


@pytest.fixture(scope="module")
def runs():
    return tuple(ladder(noise=0.002))


@pytest.fixture(scope="module")
def fits(runs):
    options = dict(resamples=60)
    return {
        "isoflop": fit_isoflop(runs, unbias=False, **options),
        "varpro": fit_varpro(runs, **options),
        "akima": fit_akima(runs, **options),
        "power": fit_best(runs, **options),
    }


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures of a page that are a mark only, as drawing takes a second each."""
    monkeypatch.setattr(folder, "png", lambda figure, mark: b"\x89PNG Software\0" + mark.encode())


@pytest.fixture(scope="module")
def saved(tmp_path_factory, runs, fits):
    """The folder of a report of all kinds of figures, as it was saved."""
    path = tmp_path_factory.mktemp("saved") / "out" / "report.html"
    far = Finding("the largest budget is small", {"N_opt": 2.5, "L_opt": math.nan}, "train 1e+22 FLOPs")
    numbers, between = {"N_opt": 3e9, "L_opt": 2.5}, {"N_opt": (2e9, 4e9), "L_opt": (2.4, 2.6)}
    said = Verdict("isoflop", "it is near", 1e22, 10.0, numbers, between, {}, ("isoflop",), (far,))
    grid = io.BytesIO()
    Image.new("RGB", (32, 32)).save(grid, "png")
    made = Report(
        "Digits", fits, "isoflop", runs, test=Beyond(), grid=grid.getvalue(), flops=(1e22, 3e22), verdict=said
    )
    assert save(str(path), made) == str(path)
    return path.parent


class Balanced(HTMLParser):
    """Every element that is opened is closed, in order; the tags and attributes that there are."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()


def stands_alone(page: str) -> Balanced:
    """A page names no address, allows its own script and style only, and is well-formed."""
    bare = re.sub(r"base64,[^\"]*", "", page)
    assert not re.search(r"https?:|url\(|<link|@import", bare)
    for tag in ("script", "style"):
        (inline,) = re.findall(rf"<{tag}>(.*?)</{tag}>", bare, re.DOTALL)
        allowed = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{allowed}'" in page
    assert "default-src 'none'" in page
    found = Balanced()
    found.feed(page)
    assert not found.open and len(found.tags) > 100
    assert not [name for name, _ in found.attributes if name.startswith("on") or name == "style"]
    assert all(value.startswith("data:image/png;base64,") for name, value in found.attributes if name == "src")
    return found


def shown(page: str) -> str:
    """The words of a page, powers and minus signs as the terminal writes them."""
    page = re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.DOTALL)
    sup = re.compile(r"(?:(?<![\d.])|(?P<x>\N{MULTIPLICATION SIGN}))10<sup>(.*?)</sup>")
    page = sup.sub(lambda f: f"{'' if f['x'] else '1'}e{int(f[2].replace(chr(0x2212), '-')):+03d}", page)
    page = re.sub(r"<sup>(.*?)</sup>", lambda f: "^" + f[1].replace(chr(0x2212), "-"), page)
    return re.sub(r"<[^>]*>", " ", page).replace("\N{MINUS SIGN}", "-")


def test_a_report_is_a_page_its_figures_and_its_data(saved, runs, fits):
    pictures = ["D_opt", "L_opt", "N_opt", "isoflop", "residuals", "residuals-varpro", "tested"]
    assert sorted(os.listdir(saved)) == sorted([*(f"{n}.png" for n in pictures), "report.html", "report.json"])
    for name in pictures:
        picture = np.asarray(Image.open(saved / f"{name}.png").convert("RGB"))
        assert min(picture.shape[:2]) > 300 and len(np.unique(picture)) > 20
    page = (saved / "report.html").read_text()
    assert stands_alone(page).tags.count("img") == len(pictures) + 1
    assert (
        0
        < shown(page).index("N_opt 3e+09 (2e+09 to 4e+09)")
        < shown(page).index("train 1e+22 FLOPs")
        < shown(page).index("a = 0.")
    )
    said = json.loads((saved / "report.json").read_text())
    assert list(said["methods"]) == list(fits) and said["test"]["inside"] is True
    made = said["verdict"]
    assert (made["method"], made["N_opt"], made["intervals"]["L_opt"]) == ("isoflop", 3e9, [2.4, 2.6])
    assert made["findings"][0]["effect_percent"] == {"N_opt": 2.5, "L_opt": None} and len(made["text"]) == 3
    assert {len(column) for name, column in said["runs"].items() if name != "law"} == {len(runs)}
    assert said["runs"]["law"]["power"][0] is None  # it tells no two sizes of one compute apart


def test_the_numbers_of_the_page_are_those_of_the_fits(saved, fits):
    page = " ".join(shown((saved / "report.html").read_text()).split())
    for fit in fits.values():
        for row in (*text.law_rows(fit), *(row for _, _, rows in fit.tables for row in rows)):
            assert " ".join(cell for cell in row if cell) in page
    assert f"a = {fits['isoflop'].laws['N_opt'].exponent:.3f}" in page
    assert "Tested 10.0x beyond" in page and "2.1500 ± 0.0020, inside the interval" in page
    assert "4 methods were fitted; no two disagree" in page and "30.0x beyond" in page
    for method in fits:
        assert names.EXPLAINED[method].split("^")[0] in page


def test_hostile_names_are_text(tmp_path, runs, fits, undrawn):
    odd = (replace(runs[0], name=HOSTILE), *runs[1:])
    fit = replace(fits["varpro"], notes=(HOSTILE,), tables=((HOSTILE, (HOSTILE,), ((HOSTILE,),)),))
    texts = (HOSTILE,)
    made = Report(
        HOSTILE, {HOSTILE: fit}, HOSTILE, odd, texts, {HOSTILE: HOSTILE}, texts, dropped=texts, tables=((HOSTILE,) * 3,)
    )
    page = Path(save(str(tmp_path / "report.html"), made)).read_text()
    found = stands_alone(page)
    assert page.count("&lt;script&gt;alert(1)") > 8 and page.count("{{ 7*7 }}") > 8
    assert found.tags.count("script") == 1


def test_a_report_overwrites_only_itself(tmp_path, runs, fits, undrawn):
    made = Report("t", {"power": fits["power"]}, "power", runs, test=Beyond())
    path = save(str(tmp_path / "report.html"), made)
    (tmp_path / "notes.png").write_bytes(b"mine")
    with open(tmp_path / "large.json", "wb") as large:
        large.truncate(2**28)  # more than is read at once
    save(path, replace(made, title="again", test=None))
    assert "again" in Path(path).read_text() and (tmp_path / "notes.png").read_bytes() == b"mine"
    assert not (tmp_path / "tested.png").exists()  # no figure of the report before stays beside this one
    for name, content in (
        ("L_opt.png", b"\x89PNG mine"),
        ("report.json", b'{"mine": 1}'),
        ("report.html", b"<html>mine"),
    ):
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=f"--out: .*{name} was not written by a report"):
            save(path, replace(made, title="third"))
        assert (tmp_path / name).read_bytes() == content and "third" not in Path(path).read_text()
        (tmp_path / name).write_bytes(before)
    for other in ("other.html", "L_opt.png"):
        held = sorted(os.listdir(tmp_path))
        with pytest.raises(
            UsageError, match=r"--out: .* belongs to another report, \[report.html\], expected another folder"
        ):
            save(str(tmp_path / other), made)
        assert sorted(os.listdir(tmp_path)) == held


def test_a_report_that_fails_leaves_nothing(tmp_path, runs, fits, monkeypatch, undrawn):
    made, sync = Report("t", {"power": fits["power"]}, "power", runs), place.sync

    def full(path):
        if "report.json" in path:
            raise OSError("no space left on device")
        sync(path)

    save(path := str(tmp_path / "report.html"), made)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.setattr(place, "sync", full)
    with pytest.raises(OSError, match="no space left"):
        save(path, replace(made, title="again", flops=(1e25,)))
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("method", METHODS)
def test_any_method_has_a_report_of_its_own(method, tmp_path, runs, undrawn):
    options = {"unbias": False} if method == "isoflop" else {}
    fit = METHODS[method](runs, resamples=0, **options)
    page = Path(save(str(tmp_path / "report.html"), Report("t", {method: fit}, method, runs))).read_text()
    stands_alone(page)
    assert not re.search(r"\b(nan|inf)\b", shown(page))


@pytest.mark.slow
def test_a_report_of_5000_rows_is_small_and_quick(tmp_path):
    many = tuple(ladder(noise=0.002, budgets=8, sizes=625))
    fits = {"isoflop": fit_isoflop(many, resamples=20, unbias=False), "varpro": fit_varpro(many, resamples=20)}
    start = time.process_time()
    path = save(str(tmp_path / "report.html"), Report("many", fits, "isoflop", many))
    assert time.process_time() - start < 30
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 2e6
    page = Path(path).read_text()
    assert "300 of 5,000 runs are drawn" in page and "300 of 5000 runs; report.json holds all" in page


def test_the_public_json_of_a_law_and_of_a_surface(fits):
    said = json.loads(json.dumps(text.to_json(fits["isoflop"]), allow_nan=False))
    keys = "method n_runs law objective exponents intervals identifiable warnings predictions points"
    assert set(keys.split()) <= set(said)
    assert set(said["law"]["N_opt"]) == {"coefficient", "exponent"} and "irreducible" in said["law"]["L_opt"]
    assert said["intervals"]["a"] == said["intervals"]["N_opt.exponent"]
    low, high = said["intervals"]["a"]
    assert low < said["exponents"]["a"] < high and said["identifiable"] is True
    said = text.to_json(fits["varpro"])
    assert list(said["law"]) == ["E", "A", "B", "alpha", "beta"] and set(said["optimum"]) == {"N_opt", "D_opt", "L_opt"}
    assert said["optimum"]["N_opt"]["exponent"] == pytest.approx(said["exponents"]["a"])
    said = text.to_json(fits["power"])
    assert said["exponents"] == {"a": None, "b": None} and said["intervals"]["a"] is None


def test_numbers_that_do_not_exist_are_null_or_a_dash():
    assert text.finite({"a": (math.nan, np.float64(1.5), np.inf), "b": np.arange(2)}) == {
        "a": [None, 1.5, None],
        "b": [0, 1],
    }
    assert text.span((math.nan, math.nan)) == text.written(math.nan) == text.DASH


def test_a_fit_that_is_not_identified_says_so_first(runs, fits):
    unsure = replace(fits["varpro"], reasons=("nothing tests it",))
    assert "do not identify this law: nothing tests it" in opening(Report("t", {"varpro": unsure}, "varpro", runs))


def test_powers_are_typeset_alike_and_names_are_left_alone():
    assert typeset("3e+18 FLOPs, C^-0.18, N^alpha, 1e+18, D'^beta, 10^21, -1.5") == (
        "3×10<sup>18</sup> FLOPs, C<sup>−0.18</sup>, N<sup>α</sup>, 10<sup>18</sup>, D&#39;<sup>β</sup>, 10<sup>21</sup>, −1.5"  # noqa: RUF001
    )
    assert typeset("1e+18_0 <b>") == "1e+18_0 &lt;b&gt;" and typeset("a1e5, w8-d2") == "a1e5, w8-d2"
    assert raised("3e+18 C^-0.18") == "3×10$^{18}$ C$^{−0.18}$"  # noqa: RUF001


def test_a_figure_says_a_law_in_the_digits_of_the_text(fits):
    (label,) = (t for t in figures.law({"isoflop": fits["isoflop"]}, "L_opt").legends[0].texts if "=" in t.get_text())
    assert label.get_text() == raised("L_opt = " + text.law_text(fits["isoflop"].laws["L_opt"]))


@pytest.mark.filterwarnings("error")
def test_an_axis_has_3_ticks_and_no_two_alike():
    axis = panels()[1][0, 0]
    for low in np.geomspace(1e-3, 1e21, 13):
        for ratio in (1.001, 1.3, 3.0, 5.0, 9.0, 13.0, 30.0, 1e3, 1e5, 1e9, 1e20):
            for log in (True, False):
                scale(axis, "x", "", [[low, low * ratio]], log=log)
                ends, values = axis.get_xlim(), axis.xaxis.get_majorticklocs()
                seen = [v for v in values if ends[0] <= v <= ends[1]]
                texts = axis.xaxis.get_major_formatter().format_ticks(seen)
                assert 3 <= len(seen) <= 10 and len({*texts, ""}) == len(seen) + 1, (low, ratio, log, texts)
    scale(axis, "y", "loss", [[2.0, 2.0]], [[np.inf]])
    assert len([t for t in axis.get_yticklabels() if t.get_text()]) >= 3


def test_figures_are_told_apart_without_colour(fits):
    figure = figures.law(fits, "L_opt", (1e24,))
    for axis in figure.axes:
        laws = [line for line in axis.lines if line.get_label() in fits]
        assert len({(str(line.get_linestyle()), line.get_marker()) for line in laws}) == len(fits)
        assert axis.get_xlim()[1] > 1e24 and max(
            max(line.get_xdata(), default=0) for line in axis.lines
        ) == pytest.approx(1e24)
        assert len([t for t in axis.get_xticklabels() if t.get_text()]) >= 4


def test_the_loss_is_drawn_less_its_irreducible_part_too(runs, fits):
    figure = figures.law({"varpro": fits["varpro"]}, "L_opt", (1e24,), runs, Beyond())
    whole, less = figure.axes
    law = fits["varpro"].laws["L_opt"]
    for axis, off in ((whole, 0.0), (less, law.irreducible)):
        curve = next(line for line in axis.lines if len(line.get_xdata()) == figures.CURVE and line.get_linewidth() > 1)
        assert curve.get_ydata() == pytest.approx(law(curve.get_xdata()) - off)
        dots = next(line for line in axis.lines if line.get_label() == "a run")
        assert sorted(dots.get_ydata()) == pytest.approx(sorted(r.loss - off for r in runs))
        measured = next(bar for bar in axis.containers if bar.get_label() == "measured")
        assert measured.lines[0].get_ydata()[0] == pytest.approx(Beyond.measured - off)


def test_residuals_of_repeated_data_are_about_the_law_that_was_fitted():
    law = repeated(3e8)
    runs = [replace(r, unique=3e8) for r in ladder(law, budgets=5, high=1e20)]
    fit = fit_varpro(runs, resamples=0)
    assert "R_star" in fit.parameters
    assert text.expected(fit, runs) == pytest.approx([r.loss for r in runs], rel=2e-3)
    curve = next(line for line in figures.isoflop(fit, runs).axes[0].lines if len(line.get_xdata()) == figures.CURVE)
    n, c = curve.get_xdata(), runs[0].flops
    assert curve.get_ydata() == pytest.approx(law(n, c / (6 * n)), rel=3e-3)


def test_the_curves_of_a_fit_pass_through_what_it_expects(runs, fits):
    figure = figures.isoflop(fits["varpro"], runs)
    curve = next(line for line in figure.axes[0].lines if len(line.get_xdata()) == figures.CURVE)
    n = curve.get_xdata()
    law, c = fits["varpro"].parameters, runs[0].flops
    d = c / (fits["varpro"].k * n)
    assert curve.get_ydata() == pytest.approx(law["E"] + law["A"] / n ** law["alpha"] + law["B"] / d ** law["beta"])
    flat = figures.isoflop(fits["power"], runs)  # only marks: it says nothing of sizes
    assert not [line for line in flat.axes[0].lines if len(line.get_xdata()) == figures.CURVE]


def test_many_marks_are_thinned_to_their_ends():
    kept = thin(range(5000))
    assert len(kept) == 300 and kept[0] == 0 and kept[-1] == 4999 and thin([1, 2]) == [1, 2]


@dataclass(frozen=True)
class Front:
    """What `figures.frontier` reads of a frontier, and of a sampling."""

    metric: str = "fid"
    higher: bool = False
    unit: str = "flops"
    front: tuple = ()
    handovers: tuple = ()
    costs: dict = None
    curves: dict = None


@dataclass(frozen=True)
class Sampling:
    name: str
    flops: float
    score: float


def test_a_frontier_has_no_marker_where_nothing_was_measured():
    points = [Sampling("S", 10.0**i, y) for i, y in enumerate((50.0, 20.0, 22.0, 15.0, 16.0))]
    costs = {"S": np.array([p.flops for p in points])}
    curves = {"S": np.minimum.accumulate([[p.score for p in points]], axis=1)}
    figure = figures.frontier(Front(front=tuple(points[:2]), costs=costs, curves=curves), points)
    (step,) = [line for line in figure.axes[0].lines if line.get_markevery()]
    assert step.get_markevery() == [0, 1, 3]


@dataclass(frozen=True)
class Total:
    """What `figures.frontier` reads of a sampling with its training."""

    point: Sampling
    total: float
    images: float = 1e6


def test_the_front_over_training_and_images_is_drawn_as_it_is_given():
    served = [Total(Sampling("S", 1e9, y), 10.0**i) for i, y in enumerate((50.0, 20.0, 30.0), 15)]
    costs, curves = {"S": np.array([1e9])}, {"S": np.array([[20.0]])}
    figure = figures.frontier(Front(costs=costs, curves=curves), [s.point for s in served], served, served[:2])
    drawn = [tuple(zip(*line.get_data(), strict=True)) for line in figure.axes[1].lines]
    assert drawn.count(((1e15, 50.0), (1e16, 20.0))) == 2  # a line, and its rings


@dataclass(frozen=True)
class Stop:
    """What `figures.frontier` reads of the cost at which a model stops winning."""

    model: str
    then: str
    cost: float
    interval: tuple
    censored: bool = True


def test_the_names_of_models_that_stop_winning_are_whole_and_apart():
    names = [f"a model of {i} layers" for i in range(10)]
    points = [Sampling(name, 10.0**i, 50.0 - i) for i, name in enumerate(names)]
    one = dict(
        costs={p.name: np.array([p.flops]) for p in points}, curves={p.name: np.array([[p.score]]) for p in points}
    )
    stops = [Stop(a.name, b.name, b.flops, (b.flops / 3, math.inf)) for a, b in itertools.pairwise(points)]
    figure = figures.frontier(Front(front=tuple(points), handovers=tuple(stops), **one), points)
    FigureCanvasAgg(figure).draw()
    boxes = [t.get_window_extent() for t in (*figure.axes[0].texts, *figure.legends[0].texts)]
    assert len(boxes) == len(stops) + len(points) + 2
    for i, box in enumerate(boxes):
        assert figure.bbox.contains(*box.min) and figure.bbox.contains(*box.max)
        assert not any(box.overlaps(other) for other in (*boxes[:i], figure.axes[1].bbox))


def test_figures_are_saved_by_the_ending(tmp_path, runs, fits):
    made = Report("t", {"power": fits["power"]}, "power", runs, test=Beyond(), flops=(1e24,))
    for ending, start in ((".png", b"\x89PNG"), (".svg", b"<?xml"), (".PDF", b"%PDF")):
        path = save(str(tmp_path / f"laws{ending}"), made)
        data = Path(path).read_bytes()
        assert data.startswith(start) and len(data) < 5e5
        assert place.owner(path) == place.mark(path)  # it may be written again
        Path(path).write_bytes(start + b" mine")
        with pytest.raises(UsageError, match=f"--out: .*laws{ending} was not written by a report"):
            place.check(path)
    assert len(re.findall(rb"/Type /Page\b", data)) == 3 and b"/Type3" not in data
    with pytest.raises(UsageError, match=r"--out: found .*laws.jpg', expected .* \.png, \.svg, \.pdf"):
        save(str(tmp_path / "laws.jpg"), made)
    assert sorted(os.listdir(tmp_path)) == ["laws.PDF", "laws.png", "laws.svg"]


@pytest.mark.parametrize("command", ["report", "frontier"])
def test_other_endings_and_files_of_others_are_refused_before_anything_is_read(command, tmp_path, capsys):
    (tmp_path / "mine.png").write_bytes(b"mine")
    for out, said in (
        ("a.jpg", "expected a file that ends in"),
        ("a", "ends in"),
        ("mine.png", "was not written by a report"),
    ):
        assert main([command, str(tmp_path / "absent.csv"), f"--out={tmp_path / out}"]) == 2
        assert said in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["mine.png"]
