"""Facts about the sampling frontier: planted crossings come back, published examples come out, mixed protocols are refused."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from test_scaling_runs import record, workdir

from dit_jax.error import UsageError
from dit_jax.scaling.__main__ import main
from dit_jax.scaling.frontier import answers
from dit_jax.scaling.frontier.frontier import fit_frontier, front, serve
from dit_jax.scaling.frontier.points import Point, find_metric, higher_is_better, load_points

STEPS = (4, 8, 16, 32, 64, 128, 256)
SAMPLING = {"sampler": "ddim", "steps": 20, "guidance": 1.5, "spacing": "linspace", "channels": "all", "num": 1000}
PROTOCOL = {"data": {"dataset": "digits"}, "weights": "ema", "reference": "train", "metrics": {"bootstrap": 20}}


def planted(noise=0.0, seed=0, models=(("S", 1e9, 20, 60), ("L", 5e9, 10, 100))) -> list[Point]:
    """Models (name, FLOPs a step, floor, height) whose score is floor + height steps^-0.9, times noise of known size."""
    rng = np.random.default_rng(seed)
    return [
        Point(name, y * math.exp(noise * rng.standard_normal()), noise * y, step * n, steps=float(n), sampler="ddim")
        for name, step, floor, height in models
        for n, y in ((n, floor + height * n**-0.9) for n in STEPS)
    ]


def crossing() -> float:
    """Where the planted curves cross: bisection on the formula, as continuous functions of cost."""
    low, high = 5e9 * 4, 1e9 * 256
    for _ in range(100):
        cost = math.sqrt(low * high)
        ahead = 20 + 60 * (cost / 1e9) ** -0.9 < 10 + 100 * (cost / 5e9) ** -0.9
        low, high = (cost, high) if ahead else (low, cost)
    return low


def sampled(name="a", fid=10.0, cost=1e9, protocol=None, **sampling) -> dict:
    protocol = (protocol or PROTOCOL) | {"samples": SAMPLING | sampling}
    return record(
        run=name,
        metrics={"fid": fid, "fid_low": 0.98 * fid, "fid_high": 1.02 * fid},
        flops_sample=cost,
        protocol=protocol,
    )


def table(path, *lines) -> str:
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_a_planted_crossing_is_found_within_its_interval():
    fit = fit_frontier(planted(noise=0.02, seed=1), "fid")
    (stop,) = fit.handovers
    assert (stop.model, stop.then, stop.censored) == ("S", "L", False)
    assert stop.interval[0] < crossing() < stop.interval[1] < 2 * stop.interval[0]
    exact = fit_frontier(planted(), "fid")
    assert exact.handovers[0].cost == pytest.approx(crossing(), rel=0.05)  # straight between steps that differ twofold
    assert math.isnan(exact.handovers[0].interval[0]) and any("no score has an error" in w for w in exact.warnings)
    assert [w.model for w in fit.winners] == ["S", "L"] and fit.winners[0].high == pytest.approx(stop.cost, rel=0.01)


def test_intervals_of_a_crossing_cover():
    truth = fit_frontier(planted(), "fid").handovers[0].cost
    hits = []
    for seed in range(150):
        low, high = fit_frontier(planted(noise=0.02, seed=seed), "fid", resamples=200, seed=seed).handovers[0].interval
        hits.append(low <= truth <= high)
    assert 0.89 <= np.mean(hits) <= 0.99


def test_the_front_is_what_no_point_beats():
    rng = np.random.default_rng(4)
    points = [Point(str(i), s, flops=c) for i, (s, c) in enumerate(rng.integers(1, 12, (60, 2)).astype(float))]
    front = fit_frontier(points, "fid").front
    best = {
        (p.flops, p.score)
        for p in points
        if not any(
            q.flops <= p.flops and q.score <= p.score and (q.flops, q.score) != (p.flops, p.score) for q in points
        )
    }
    assert {(p.flops, p.score) for p in front} == best
    assert [p.flops for p in front] == sorted(p.flops for p in front)


def test_more_is_better_for_an_inception_score():
    points = [replace(p, score=1000 / p.score, score_se=1e-3) for p in planted()]
    up, down = fit_frontier(points, "is_digits"), fit_frontier(planted(), "fid")
    assert up.handovers[0].cost == pytest.approx(down.handovers[0].cost)
    assert [p.flops for p in up.front] == [p.flops for p in down.front]


def test_the_best_guidance_is_chosen_per_model_and_steps_first():
    """At guidance 3 alone the large model wins everywhere; each at its own best, the small one wins where both are cheap."""
    rows = {("S", 10): {1.5: 20, 2: 22, 3: 40}, ("L", 10): {1.5: 30, 2: 25, 3: 15}, ("S", 1): {1.5: 30, 2: 31, 3: 60}}
    points = [
        Point(name, float(fid), 0.1, (1e9 if name == "S" else 4e9) * steps, sampler="ddim", steps=steps, guidance=g)
        for (name, steps), scores in rows.items()
        for g, fid in scores.items()
    ]
    fit = fit_frontier(points, "fid")
    chosen = {(c.best.name, c.best.steps): c for c in fit.choices}
    assert {k: c.best.guidance for k, c in chosen.items()} == {("S", 10): 1.5, ("L", 10): 3, ("S", 1): 1.5}
    assert {k: c.edge for k, c in chosen.items()} == {("S", 10): "lowest", ("L", 10): "highest", ("S", 1): "lowest"}
    assert any("at the edge of those tried in 3 of 3 samplings" in w for w in fit.warnings)
    assert fit.best(1.2e10)[:2] == ("S", pytest.approx(20)) and fit.best(4e10)[0] == "L"
    assert fit.best(1e8)[0] is None


def test_guidance_one_is_no_edge_and_stays_in_the_race_at_half_the_cost():
    points = [
        Point("S", fid, 0.1, cost, steps=10, guidance=g) for g, fid, cost in ((1, 12, 1e9), (2, 11, 2e9), (3, 13, 2e9))
    ]
    fit = fit_frontier(points, "fid")
    assert [p.guidance for p in fit.front] == [1, 2] and not any("edge" in w for w in fit.warnings)


def test_a_total_is_shared_by_training_and_images():
    points = [
        Point("S", 20, flops=1e9, train=1e15),
        Point("S", 15, flops=8e9, train=1e15),
        Point("L", 12, flops=2e9, train=9e15),
    ]
    points = [replace(p, steps=float(i)) for i, p in enumerate(points)]
    few, many = serve(points, 1e3), serve(points, 1e6)
    assert few[0].total == 1e15 + 1e3 * 1e9 and few[0].sampling_share == pytest.approx(1e12 / 1.001e15)
    assert [s.point.score for s in front(few)] == [20, 15, 12]
    assert [(s.point.name, s.point.score) for s in front(many)] == [("S", 20), ("S", 15), ("L", 12)]
    with pytest.raises(UsageError, match="no flops_train of S"):
        serve([replace(points[0], train=math.nan)], 10)


def test_a_student_pays_for_the_weights_that_it_began_with(tmp_path):
    begun = {"init": {"run": "teacher", "step": 9, "flops_train": 1e15}}
    workdir(tmp_path / "a", sampled("student", fid=20) | begun)
    (point,) = load_points(tmp_path)
    (paid,) = serve([point], 10)
    assert paid.total == point.train + 1e15 + 10 * point.flops
    assert paid.sampling_share == pytest.approx(10 * point.flops / paid.total)
    assert main(["frontier", str(tmp_path), "--images_served=10", f"--json={tmp_path / 'out.json'}"]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["totals"][0]["total"] == paid.total


def test_stated_times_are_a_sampling_and_a_field_that_others_have_can_be_chosen(tmp_path):
    stated = sampled("student", fid=9)
    stated["protocol"]["samples"] |= {"times": [1.0, 0.9, 0.5, 0.0], "spacing": "stated"}
    workdir(tmp_path / "a", stated)
    workdir(tmp_path / "b", sampled("teacher", fid=10))
    assert {p.times for p in load_points(tmp_path)} == {"", "1.0 to 0.9 to 0.5 to 0.0"}
    chosen = ["samples.times=[1.0, 0.9, 0.5, 0.0]"]
    assert [p.score for p in load_points(tmp_path, where=chosen)] == [9]
    assert [p.score for p in load_points(tmp_path, where=["samples.times="])] == [10]
    with pytest.raises(UsageError, match=r"no field 'samples\.tmes'"):
        load_points(tmp_path, where=["samples.tmes="])


def test_records_may_differ_in_how_images_are_drawn_only(tmp_path):
    drawn = [
        sampled(fid=20),
        sampled(fid=18, steps=40, cost=2e9),
        sampled(fid=17, guidance=3.0),
        sampled(fid=25, sampler="ddpm"),
    ]
    path = workdir(tmp_path / "a", record(step=10), *drawn, sampled(fid=99) | {"step": 9})
    points = load_points(path, sampled=True)
    assert [(p.sampler, p.steps, p.guidance, p.score) for p in points] == [
        ("ddim", 20, 1.5, 20), ("ddim", 40, 1.5, 18), ("ddim", 20, 3, 17), ("ddpm", 20, 1.5, 25)
    ]  # fmt: skip
    assert points[1].flops == 2e9 and points[0].loss == pytest.approx(0.5)
    assert points[0].score_se == pytest.approx(0.02 * 20 / 2.0930, rel=1e-4)  # t of 19 degrees
    assert [p.score for p in load_points(path, where=["samples.sampler=ddpm"])] == [25]
    assert len(load_points(path, where=["samples.guidance=1.50", "samples.steps=20"])) == 2


@pytest.mark.parametrize(
    ("other", "field"),
    [
        (sampled("b", channels="first3"), "samples.channels"),
        (sampled("b", num=500), "samples.num"),
        (sampled("b", protocol=PROTOCOL | {"reference": "test"}), "reference"),
        (sampled("b", protocol=PROTOCOL | {"weights": "params (raw)"}), "weights"),
        (sampled("b", protocol=PROTOCOL | {"data": {"dataset": "cifar10"}}), "data.dataset"),
    ],
)
def test_mixed_protocols_are_refused_naming_the_field(tmp_path, other, field, capsys):
    workdir(tmp_path / "a", sampled())
    workdir(tmp_path / "b", other)
    out = tmp_path / "out.json"
    assert main(["frontier", str(tmp_path), f"--json={out}", f"--out={tmp_path / 'f.png'}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and f"'{field}'" in said and said.count("\n") == 1
    assert not out.exists() and not (tmp_path / "f.png").exists()


def test_runs_of_one_name_in_two_folders_are_two_models(tmp_path):
    for name, fid in (("x", 10), ("y", 9)):
        workdir(tmp_path / name, sampled("same", fid=fid))
    points = load_points(tmp_path)
    assert len({p.name for p in points}) == 2 and points[1].name.startswith("same (")


def test_the_cost_of_a_csv_counts_the_passes_of_guidance(tmp_path):
    head = "name,flops_step,steps,guidance,fid,fid_low,fid_high"
    points = load_points(table(tmp_path / "x.csv", head, "a,10,4,1,9,8,10", "a,10,4,2,8,7,9", "b,10,4,,7,,"))
    assert [p.flops for p in points] == [40, 80, 40] and points[2].score_se == 0
    assert points[0].score_se == pytest.approx(1 / 1.959964, rel=1e-5)
    (given,) = load_points(table(tmp_path / "y.csv", "name,flops_sample,fid,seconds_sample", "a,7,9,0.5"))
    assert (given.flops, given.seconds) == (7, 0.5)
    assert fit_frontier([given], "fid", unit="seconds").front[0].seconds == 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,flops_step,steps\na,1,2", "no column 'fid'"),
        ("model,flops_sample,fid\na,1,2", "no column 'name'"),
        ("name,flop_sample,fid\na,1,2", "unknown column 'flop_sample'; did you mean 'flops_sample'?"),
        ("name,steps,fid\na,1,2", "x.csv:2: no flops_sample of a, expected the FLOPs of one sampled image"),
        ("name,flops_sample,fid\na,1,2\nb,1,nan", "x.csv:3: fid is nan"),
        ("name,flops_sample,fid\na,-1,2", "x.csv:2: flops_sample is -1"),
        ("name,flops_sample,fid\na,1,2\na,2,3", "x.csv:3: a (no sampling) is also in"),
        ("name,flops_sample,fid,fid_low,fid_high\na,1,2,3,1", "x.csv:2: fid_low is 3, above fid_high, 1"),
        ("name,flops_sample,fid\n", "found a header and no row"),
        ("name,flops_sample,fid\na,1,2,3", "found 4 fields, expected 3"),
    ],
)
def test_a_bad_csv_is_one_line_and_exit_2(tmp_path, text, message, capsys):
    path = table(tmp_path / "x.csv", text)
    assert main(["frontier", path, f"--json={tmp_path / 'out.json'}", f"--out={tmp_path / 'out.png'}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1
    assert os.listdir(tmp_path) == ["x.csv"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--metric=fidd"], "no record has metrics.fidd; found fid"),
        (["--images_served=-3"], "--images_served: found -3"),
        (["--cost=seconds"], "no seconds_sample of a"),
        (["--where=samples.sampl=x"], "no field 'samples.sampl'; nearest found 'samples.sampler'"),
        (["--where=samples.sampler=heun"], "found no fid in"),
        (["--where=ddim"], "--where: found 'ddim', expected FIELD=VALUE"),
        (["--resamples=-1"], "--resamples, --seed"),
        (["--out=."], "--out: found the folder '.', expected a file"),
    ],
)
def test_bad_use_is_one_line_and_exit_2(tmp_path, more, message, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = workdir(tmp_path / "a", sampled())
    assert main(["frontier", path, "--json=out.json", *more]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1
    assert os.listdir(tmp_path) == ["a"]


def test_the_verdict_says_what_the_scores_leave_open():
    sure = answers.of_frontier(fit_frontier(planted(0.001), "fid"))
    assert sure.findings == () and ", then " in sure.reason
    open_ = answers.of_frontier(fit_frontier(planted(0.3), "fid"))
    assert any("of the resamples from" in f.text and f.advice == "score with more images" for f in open_.findings)
    dear = [p for p in planted(0.001) if p.name == "S" or p.steps >= 64]
    late = answers.of_frontier(fit_frontier(dear, "fid"))
    assert "is the best at or below" in late.reason and "from its cheapest sampling on" in late.findings[0].text


def test_the_command_prints_tables_and_writes_json_and_a_figure(tmp_path, capsys):
    lines = [f"{p.name},{p.flops},{p.sampler},{p.steps},{p.score},{p.score_se},{p.flops * 1e9}" for p in planted(0.02)]
    path = table(tmp_path / "x.csv", "name,flops_sample,sampler,steps,fid,fid_se,flops_train", *lines)
    out, png = tmp_path / "out.json", tmp_path / "out.png"
    options = ["--at=5e9", "--images_served=1e9", f"--json={out}", f"--out={png}"]
    assert main(["frontier", path, *options]) == 0
    captured = capsys.readouterr()
    for part in (
        "Pareto front",
        "Where a model stops winning",
        "95% interval",
        "Training and 1e+09 images",
    ):
        assert part in captured.out
    assert "warning: one guidance only" in captured.err
    result = json.loads(out.read_text())
    (stop,) = result["handovers"]
    assert stop["interval"][0] < stop["cost"] < stop["interval"][1] and result["best_at"][0]["model"] == "S"
    assert captured.out.startswith(f"Verdict: S is the best up to {stop['cost']:.3g} FLOPs an image (")
    assert result["verdict"]["reason"].endswith(f"then {stop['then']} from there on")
    assert result["front"][0]["name"] == "S" and result["totals"]
    assert png.read_bytes()[:4] == b"\x89PNG"


def test_the_command_needs_neither_jax_nor_flax_nor_matplotlib(tmp_path):
    path = table(tmp_path / "x.csv", "name,flops_sample,fid", "a,1,2", "b,2,1")
    script = (
        f"import sys; from dit_jax.scaling.__main__ import main; assert main(['frontier', {path!r}]) == 0; "
        "sys.exit(bool({'jax', 'flax', 'tensorflow', 'torch', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0


def test_records_state_which_metrics_are_better_when_higher(tmp_path):
    """A metric of no known name, and one whose name misleads; a record without signs is judged by the name."""

    def loaded(metric, **more):
        folder = tmp_path / f"{metric}-{len(more)}-{more.get('metric_signs')}"
        return load_points(workdir(folder, record(metrics={metric: 2.0}, **more)), metric)

    assert higher_is_better("light", loaded("light", metric_signs={"light": 1}))
    assert not higher_is_better("is_lower", loaded("is_lower", metric_signs={"is_lower": -1}))
    assert not higher_is_better("light", loaded("light")) and higher_is_better("is", loaded("is", metric_signs={}))
    for wrong in (2, {"light": "up"}):
        with pytest.raises(UsageError, match=r"records.jsonl:1: metric_signs: found .* for light, expected 1 or -1"):
            loaded("light", metric_signs=wrong)


def test_the_metric_is_the_one_that_the_runs_have(tmp_path):
    def folder(name, **metrics):
        return workdir(tmp_path / name, record(metrics={"loss": 0.5, "loss_se": 0.1}), record(metrics=metrics))

    assert find_metric([folder("a", fd_digits=2.0, fd_digits_low=1.0, fd_digits_high=3.0)]) == "fd_digits"
    assert find_metric([folder("b", fid=2.0, sfid=3.0), str(tmp_path / "a")]) == "fid"
    with pytest.raises(UsageError, match="--metric: found none, expected one of kid, sfid"):
        find_metric([folder("c", kid=2.0, kid_std=1.0, sfid=3.0)])
    one = table(tmp_path / "x.csv", "name,flops_sample,steps,clip,clip_se,note", "a,1,2,3,4,x")
    assert find_metric([one]) == "clip" and find_metric([one], columns={"kid": "clip"}) == "kid"
    assert find_metric([table(tmp_path / "y.csv", "name,flops_sample,FID,kid", "a,1,2,3")]) == "fid"
    with pytest.raises(UsageError, match="--metric: found none, expected one of clip, kid"):
        find_metric([table(tmp_path / "z.csv", "name,clip,kid", "a,2,3")])
    assert main(["frontier", one]) == 0


def scored_ladder(path) -> str:
    """The folder of a sweep of curves whose cells were scored: three sizes, evaluated at three steps each, with the loss and with samples
    at three guidances, and a model trained beyond them; in the records that `evaluate` writes."""
    data = {
        "data": {"dataset": "digits", "image_size": 8},
        "weights": "ema",
        "flops": "exact, 2 x MACs, training = 3 x forward",
    }
    drawn = {
        "sampler": "heun",
        "steps": 20,
        "spacing": "linspace",
        "interval": [0.0, 1.0],
        "channels": "all",
        "labels": "uniform",
    }
    for i, name in enumerate(("cells/w4-d1", "cells/w8-d2", "cells/w12-d3", "extrapolation")):
        rows, n = [], 1000.0 * 4**i
        for step in (400, 1000, 2500) if i < 3 else (9000,):
            c = 6 * n * 128 * step
            size = dict(
                params_active=n,
                params=n + 100,
                flops_train=c,
                unique_images=1500,
                metric_signs={"loss": -1, "fd_digits": -1},
            )
            fd = 1 + 5e3 * c**-0.35 * (1 + 0.02 * (i - 1) ** 2)
            rows.append(
                record(name.split("/")[-1], step, 0.3 + 30 * c**-0.2, protocol=data | {"held_out": {"seed": 1}}, **size)
            )
            rows[-1]["metrics"].pop("fd_digits")
            for guidance in (1.0, 1.5, 2.0):
                score = fd * math.exp(0.3 * math.log(guidance / 1.4) ** 2)
                protocol = data | {"samples": drawn | {"guidance": guidance, "num": 70, "seed": 3}}
                protocol |= {"metrics": {"fd_digits": "Frechet", "bootstrap": 10}, "reference": "train"}
                metrics = {"fd_digits": score, "fd_digits_low": 0.97 * score, "fd_digits_high": 1.03 * score}
                cost = 2 * n * 16 * 20 * 2 * (1 if guidance == 1 else 2)
                more = dict(metrics=metrics, protocol=protocol, protocol_id=f"s{guidance}", flops_sample=cost)
                rows.append(record(name.split("/")[-1], step, **size | more))
        workdir(path / name, *rows)
    return str(path)


def test_the_folder_of_a_scored_sweep_gives_a_law_and_a_frontier(tmp_path, capsys):
    path, out = scored_ladder(tmp_path / "sweep"), tmp_path / "out.json"
    assert find_metric([path]) == "fd_digits"
    assert main(["metric", path, "--curves", "--each", "--flops=1e13", "--resamples=200", f"--json={out}"]) == 0
    said, law = capsys.readouterr(), json.loads(out.read_text())
    assert len(law["used"]) == 9 and "w8-d2 at step 1000" in law["used"] and law["correlation"]["models"] == 9
    assert all(c["guidance"] == pytest.approx(1.4, rel=1e-3) and c["tried"] == 3 for c in law["choices"])
    low, high = law["predictions"][0]["interval"]
    assert low < 1 + 5e3 * 1e13**-0.35 < high and "9 points are steps of 3 runs" in said.err
    assert main(["metric", path, "--each", f"--json={out}"]) == 0
    assert sorted(json.loads(out.read_text())["used"]) == ["w12-d3", "w4-d1", "w8-d2"]
    assert (
        main(["frontier", path, "--curves", "--images_served=1e4", f"--json={out}", f"--out={tmp_path / 'f.png'}"]) == 0
    )
    found = json.loads(out.read_text())
    assert len(found["choices"]) == 18 and {p["guidance"] for p in found["front"]} <= {1.0, 1.5, 2.0}  # as measured
    assert all(p["name"].endswith("at step 2500") for p in found["front"])
    assert main(["frontier", path, f"--json={out}"]) == 0
    assert {p["name"] for p in json.loads(out.read_text())["front"]} == {"w4-d1", "w8-d2", "w12-d3"}


def test_the_error_of_a_score_is_that_of_the_bootstrap_of_its_record(tmp_path):
    point = next(p for p in load_points(scored_ladder(tmp_path), "fd_digits"))
    assert point.score_se == pytest.approx(0.03 * point.score / 2.2622, rel=1e-4)  # t of 9 degrees
