"""Facts about published tables: `scaling frontier` reads them under their own columns and gives the statements of the papers."""

import csv
import json
import os
import subprocess
import sys

import pytest

from dit_jax.scaling.__main__ import main
from dit_jax.scaling.frontier.frontier import fit_frontier, front, serve
from dit_jax.scaling.frontier.points import Point, load_points

PUBLISHED = os.path.join(os.path.dirname(__file__), "data", "published")
COLUMNS = {  # table -> our columns in it, as `--column` takes them; the Gflops of all are MACs
    "mei_table1": ("name=Params", "flops_step=Relative cost"),
    "dit_fig10": ("name=Model", "flops_step=2e9*Gflops", "steps=Sampling steps", "fid=FID-10K"),
    "dit_table4": ("name=Model", "flops_sample=2e9*Gflops", "fid=FID-50K"),
    "few_steps": ("name=Model", "flops_step=2e9*Gflops", "steps=NFE"),
}


def arguments(name: str, out, *more: str) -> list[str]:
    """The command that a user types for a table."""
    columns = [f"--column={text}" for text in COLUMNS[name]]
    return ["frontier", os.path.join(PUBLISHED, f"{name}.csv"), *columns, f"--json={out}", *more]


def frontier(name: str, tmp_path, *more: str) -> dict:
    assert main(arguments(name, tmp_path / "out.json", *more)) == 0
    return json.loads((tmp_path / "out.json").read_text())


def rows(name: str) -> list[dict]:
    with open(os.path.join(PUBLISHED, f"{name}.csv"), newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


MEI = {row["Params"]: (float(row["Relative cost"]), float(row["FID"])) for row in rows("mei_table1")}


def test_the_findings_of_mei_et_al(tmp_path):
    """On their printed scores every size is on the front, and larger ones win one after another as the cost grows; at a cost of 7, where
    the 866M model has 7 steps, the 83M model with its 50 is the best there is. Their 866M model costs 50 in 50 steps."""
    command = arguments("mei_table1", tmp_path / "out.json", "--at=7", "--at=49", "--at=50", "--at=1e4")
    done = subprocess.run([sys.executable, "-m", "dit_jax.scaling", *command], capture_output=True, text=True)
    assert done.returncode == 0 and "Best model at each cost" in done.stdout
    assert "one guidance only" in done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert [p["name"] for p in found["front"]] == [w["model"] for w in found["winners"]] == list(MEI)
    assert found["front"][8]["flops"] == pytest.approx(50) and found["front"][1]["flops"] == pytest.approx(6.5)
    assert [b["model"] for b in found["best_at"]] == ["83M", "704M", "866M", "5B"]
    assert found["best_at"][0]["score"] == pytest.approx(24.30) and all(h["censored"] for h in found["handovers"])


@pytest.mark.parametrize("slope", [20, 30, 40])
def test_smaller_models_win_at_small_cost(slope):
    """Mei et al.: at cost 3 the 83M model has the best FID. What fewer steps cost is in their figures only, so it is planted here,
    slope / steps for all sizes; the costs and the scores of 50 steps are theirs, and so is the grid of steps."""
    points = [
        Point(name, fid + slope * (1 / n - 1 / 50), 0.05, cost * n, steps=n)
        for name, (cost, fid) in MEI.items()
        for n in (4, 6, 8, 10, 20, 50)
    ]
    fit = fit_frontier(points, "fid")
    assert fit.best(3)[0] == "83M" and fit.best(0.3)[0] == "39M" and fit.best(258.5)[0] == "5B"
    stop = fit.handovers[0]
    assert (stop.model, stop.then, stop.censored) == ("39M", "83M", False) and stop.interval[1] < 3
    sizes = [list(MEI).index(w.model) for w in fit.winners]
    assert sizes == sorted(sizes)


def test_more_sampling_does_not_buy_back_a_smaller_model(tmp_path):
    """Peebles & Xie: L/2 with 1000 steps costs 80.7 Tflops (MACs) an image and has FID-10K 25.9; XL/2 with 128 steps 15.2 and 23.7."""
    found = frontier("dit_fig10", tmp_path, "--at=2e14")
    assert [(p["name"], p["steps"]) for p in found["front"]] == [("DiT-XL/2", 128)] and not found["handovers"]
    assert found["best_at"][0]["model"] == "DiT-XL/2" and len(found["choices"]) == 2
    costs = {c["name"]: c["flops"] / 2e12 for c in found["choices"]}
    assert costs == {"DiT-L/2": pytest.approx(80.7, abs=0.05), "DiT-XL/2": pytest.approx(15.2, abs=0.05)}
    # With few images to serve the cheaper training counts; with many, the larger model is the better one in total too.
    path = os.path.join(PUBLISHED, "dit_fig10.csv")
    points = load_points(path, sampled=True, columns=dict(text.split("=", 1) for text in COLUMNS["dit_fig10"]))
    points = [Point(p.name, p.score, flops=p.flops, train=1.3e20 if p.name == "DiT-L/2" else 2e20) for p in points]
    assert [s.point.name for s in front(serve(points, 1e5))] == ["DiT-L/2", "DiT-XL/2"]
    assert [s.point.name for s in front(serve(points, 1e7))] == ["DiT-XL/2"]


def test_more_gflops_win_and_not_more_parameters(tmp_path):
    """Peebles & Xie, section 5: the FID follows Gflops. The largest model wins at the end; of two models of about equal Gflops, S/2 and
    B/4, neither is far ahead; patches of 8 lose to smaller models with smaller patches, of up to 20 times fewer parameters."""
    found = frontier("dit_table4", tmp_path)
    best = [p["name"] for p in found["front"]]
    assert best == ["DiT-S/8", "DiT-S/4", "DiT-B/4", "DiT-L/4", "DiT-B/2", "DiT-XL/4", "DiT-L/2", "DiT-XL/2"]
    scores = {c["name"]: c["score"] for c in found["choices"]}
    assert abs(scores["DiT-S/2"] / scores["DiT-B/4"] - 1) < 1e-3 and scores["DiT-XL/8"] > scores["DiT-S/4"]
    assert [w["model"] for w in found["winners"]] == best


def test_larger_models_and_more_steps_win_among_models_of_few_steps(tmp_path):
    """iMF: each larger model has the better FID in one step, and XL a better one in two; one step of iMF-XL/2 beats one of DMF-XL/2+,
    whose four steps are the best of all, at the greatest cost."""
    found = frontier("few_steps", tmp_path)
    front = [(p["name"], p["steps"], p["score"]) for p in found["front"]]
    assert front == [
        ("iMF-B/2", 1, 3.39), ("iMF-M/2", 1, 2.27), ("iMF-L/2", 1, 1.86), ("iMF-XL/2", 1, 1.72), ("iMF-XL/2", 2, 1.54),
        ("DMF-XL/2+", 4, 1.51),
    ]  # fmt: skip
    assert [w["model"] for w in found["winners"]] == ["iMF-B/2", "iMF-M/2", "iMF-L/2", "iMF-XL/2", "DMF-XL/2+"]
    ours = sorted(c["flops"] for c in found["choices"] if c["name"].startswith("iMF"))
    assert ours[-1] == 2 * ours[-2]  # guidance is inside: an evaluation costs one pass
    derived = [float(r["Depth"]) * (12 * 256 * float(r["Width"]) ** 2 + 2 * 256**2 * float(r["Width"])) / 1e9
               for r in rows("few_steps") if r["Model"].startswith("iMF")]  # fmt: skip
    assert [float(r["Gflops"]) for r in rows("few_steps")][:5] == pytest.approx(derived, abs=0.006)
