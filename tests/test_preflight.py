"""Facts about preflight: what it says of a slice that is not there, and of what it cannot know."""

import importlib.util
import json

import jax
import pytest
from job import run

from dit_jax import flops
from dit_jax.config import MeshConfig, ModelConfig, SampleConfig, model_config, resolve
from dit_jax.devices.mesh import abstract_mesh
from dit_jax.error import UsageError
from dit_jax.evaluation import scores
from dit_jax.hardware import GIB, topology
from dit_jax.job.launch import load_config
from dit_jax.preflight import compilation, evaluation, hlo, search, text
from dit_jax.program import Program, reuse_notes
from dit_jax.sampling.draw import rows_of

XL = "--config=configs/imagenet256.py:DiT-XL/2"
DIGITS = "--config=configs/digits.py"


def ask(tmp_path, cache_dir, *arguments, code=0):
    """(report, standard error) of a preflight that exits with `code`."""
    out = tmp_path / "report.json"
    found, said, err = run("preflight", *arguments, f"--json={out}", cache_dir=cache_dir)
    assert found == code and "parameters   " in said, err
    return json.loads(out.read_text()), err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([XL, "--topology=v3-250"], "topology: found 'v3-250', expected a slice such as v3-256"),
        ([XL, "--topology=v3-256", "--config.mesh.fsdp=3"], "expected axes that multiply to 256 devices"),
        ([XL, "--topology=v3-256", "--config.train.batch_size=250"], "found 250, expected a multiple of 256"),
        (
            [XL, "--topology=2xv4-64", "--config.mesh.fsdp=64"],
            "mesh.data: found 1, expected a multiple of the 2 slices",
        ),
        ([XL, "--topology=2xv4-64", "--search=64"], "--search: found '64', expected values of mesh.fsdp among 1, 2, 4"),
        ([XL, "--topology=v4-256", "--config.mesh.tensor=8"], "expected a divisor of the 4 devices of one host"),
        (
            [XL, "--topology=v3-8", "--json=nowhere/a.json"],
            "--json: found 'nowhere/a.json', whose folder does not exist",
        ),
        ([XL], "--topology: not given, expected a slice such as v3-256"),
        ([f"{XL},v3-265"], "slice: found 'v3-265', expected one of v3-8, v3-32"),
        ([f"{XL},v3-256,300"], "train.batch_size: found 300, expected a multiple of the 256 devices of v3-256"),
        ([XL, "--topology=v3-8", "--search=3"], "--search: found '3', expected values of mesh.fsdp among 1, 2, 4, 8"),
        ([XL, "--topology=v3-8", "--search=4", "--job=evaluate"], "--search: found --job=evaluate"),
        ([XL, "--topology=v4-8", "--job=evaluate", "--config.eval.loss=false"], "eval.loss, --num: found False and 0"),
        (
            [XL, "--topology=v4-8", "--job=evaluate", "--num=9", "--config.data.image_size=512"],
            "autoencoder.folder: found none for latents of side 32 of images of 512 pixels",
        ),
        ([XL, "--topology=h100x8", "--search=8", "--config.mesh.fsdp=8"], "--search: cannot compile for h100x8"),
        (
            [XL, "--topology=t4x1", "--search=1", "--config.mesh.fsdp=1"],
            "the compiler of GPU programs is told of a100, a100-40gb, h100, h200, b200 only",
        ),
        ([XL, "--topology=h100x12"], "topology: found 'h100x12', expected a slice such as h100x16, h100x8"),
        ([XL, "--topology=cpux8", "--search=8"], "--search: found cpux8, expected TPUs or GPUs"),
        ([XL, "--topology=v3-8", "--price=nan"], "--price: found nan, expected a finite number"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments, message, cache_dir):
    code, out, err = run("preflight", *arguments, cache_dir=cache_dir)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("error: ") and message in err


def test_the_real_step_is_compiled_for_virtual_devices(tmp_path, cache_dir):
    found, _ = ask(tmp_path, cache_dir, DIGITS, "--topology=cpux8", "--config.mesh.fsdp=2", "--config.model.depth=3")
    assert (found["mesh"], found["devices"]) == ({"data": 4, "fsdp": 2, "tensor": 1}, 8)
    assert found["fits"] and found["bytes"]["donated"] == found["bytes"]["state"] > 0
    assert found["bytes"]["temporaries"] > 0 and found["compile_seconds"] > 0
    assert found["collectives"]["all-gather"]["count"] > 3 and "all-to-all" not in found["collectives"]
    model = ModelConfig(depth=3, width=64, heads=4, patch=2, input_size=8, channels=1, classes=10, learn_sigma=False)
    assert found["flops_step"] == flops.train_flops(model, 64) and found["parameters"] == flops.parameters(model)
    assert found["estimated_step_seconds"] is None and found["run"] is None
    assert found["notes"] == [
        "no estimate of the step: the compiler of CPU programs gives none, so no hours and no price"
    ]


WAYS = {"tpu": ("make tpu in a checkout, then PYTHONPATH=.venv/tpu", "'.[tpu]'"),
        "gpu": ("make gpu in a checkout, then PYTHONPATH=.venv/gpu", "'.[gpu-compiler]'")}  # fmt: skip


def check_ways(slice, found, err):
    """The last line says how to get the compiler; the report says the same."""
    made, extra = WAYS[topology(slice).platform]
    *_, last = err.splitlines()
    assert last.startswith(f"error: cannot compile for {slice}, so the report has only what needs no compiler: no ")
    assert last.endswith(f"{made}; or pip install -e {extra}") and err.count("error: ") == 1
    assert found["message"].startswith("not compiled: ") and last.endswith(found["message"].split(": ", 1)[1])
    assert found["fits"] is None


def test_without_the_compiler_what_needs_none_is_reported_and_the_exit_code_is_2(tmp_path, cache_dir):
    found, err = ask(tmp_path, cache_dir, XL, "--topology=h100x8", "--config.mesh.fsdp=8", code=2)
    check_ways("h100x8", found, err)
    cfg = model_config("DiT-XL/2")
    assert found["estimated_step_seconds"] is None and found["notes"] == []
    assert found["bytes"]["memory"] == 80e9
    state = 16 * flops.parameters(cfg) / 8  # float32 weights, EMA and two moments, over 8 devices; vectors are whole
    assert state <= found["bytes"]["state"] <= 1.02 * state
    assert found["flops_step"] == flops.train_flops(cfg, 256)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_tpus_without_a_compiler_too(tmp_path, cache_dir):
    check_ways("v3-8", *ask(tmp_path, cache_dir, f"{XL},v3-8", code=2))


@pytest.mark.slow
def test_a_gpu_that_no_compiler_knows_is_no_missing_package(tmp_path, cache_dir):
    found, err = ask(tmp_path, cache_dir, DIGITS, "--topology=t4x1")
    assert found["message"].startswith("not compiled: the compiler of GPU programs is told of ") and "error" not in err


def test_the_real_sampler_is_compiled_and_its_images_counted(tmp_path, cache_dir):
    small = ["--config.model.depth=1", "--config.model.width=16", "--config.sample.steps=5", "--num=1000"]
    found, err = ask(tmp_path, cache_dir, DIGITS, "--topology=cpux8", "--job=sample", *small)
    assert err.startswith("sample of digits for cpux8: 8 x CPU, hosts: 1\ncompiling ...\n")
    model = ModelConfig(depth=1, width=16, heads=4, patch=2, input_size=8, channels=1, classes=10, learn_sigma=False)
    evaluations = 2 * 5 - 1  # Heun's method; all of them guided
    assert (found["images"], found["mesh"]["data"]) == (8 * rows_of(model), 8)
    assert found["flops_step"] == 8 * rows_of(model) * 2 * evaluations * flops.forward_flops(model)
    assert found["fits"] and not found["collectives"] and found["bytes"]["arguments"] > 4 * flops.parameters(model)


def test_the_sampler_that_reuses_outputs_is_compiled(tmp_path, cache_dir):
    small = [
        "--config.model.depth=2",
        "--config.model.width=16",
        "--config.sample.sampler=euler",
        "--config.sample.steps=6",
    ]
    found, _ = ask(tmp_path, cache_dir, DIGITS, "--topology=cpux1", "--job=sample", "--config.sample.reuse=0.5", *small)
    model = ModelConfig(depth=2, width=16, heads=4, patch=2, input_size=8, channels=1, classes=10, learn_sigma=False)
    passes, parts = rows_of(model) * 2 * 6, flops.part_macs(model)  # all of them guided
    every, blocks = passes * flops.forward_flops(model), passes * 2 * 2 * sum(parts.values())
    assert every - 0.6 * blocks < found["flops_step"] <= every - 0.5 * blocks
    kept = rows_of(model) * 2 * 2 * sum(16 * 16 * 4 for _ in parts)  # bytes of outputs of 2 layers, of both halves
    assert found["fits"] and found["bytes"]["temporaries"] > kept
    assert found["notes"][0].startswith("sample.reuse: which outputs are reused")


def test_an_evaluation_is_all_programs_that_score_a_checkpoint():
    """50,000 images of XL/2, and 10,000 of the held-out loss, on a v4-8: what goes through which program."""
    cfg = resolve(load_config("configs/imagenet256.py:DiT-XL/2"))
    mesh = abstract_mesh(MeshConfig(), 4)
    forward = flops.forward_flops(cfg.model)

    def of(changes, num=50_000):
        return list(evaluation.parts(search.changed(cfg, changes), mesh, mesh, num))

    draw, decode, features, loss = of({})
    assert [p.name for p in (draw, decode, features, loss)] == ["draw", "decode", "features", "loss"]
    assert [p.images for p in (draw, decode, features)] == [50_000] * 3 and loss.images == 10_000
    assert [p.program.images for p in (draw, decode, features, loss)] == [4 * 16, 4 * 4, 4 * 16, 4 * 4]
    assert (draw.program.flops, draw.about) == (4 * 16 * 2 * 250 * forward, "ddpm 250, guidance 1.5")
    assert loss.program.flops == 4 * 4 * 16 * forward and loss.program.arguments[1].shape == (16, 32, 32, 4)
    assert decode.program.arguments[1].shape == (16, 32, 32, 4)
    assert features.program.arguments[1].shape == (64, 256, 256, 3) and features.about == "Inception"
    assert features.program.flops == pytest.approx(64 * 2 * 5.71e9, rel=0.05) and features.slow and not draw.slow
    # A grid of 2 x 3 settings: of the six, those that cost the same are compiled once, and all are counted.
    grid = {"eval.steps": (50, 250), "eval.guidance": (1.0, 1.5, 4.0)}
    found = of(grid)
    assert [(p.about, p.images) for p in found if p.name == "draw"] == [
        ("ddpm 50, guidance 1", 50_000),
        ("ddpm 50, guidance 1.5, 4", 100_000),
        ("ddpm 250, guidance 1", 50_000),
        ("ddpm 250, guidance 1.5, 4", 100_000),
    ]
    assert [p.images for p in found[-3:]] == [300_000, 300_000, 10_000]
    (_, half, *_) = of({"eval.reuse": (1.0, 0.5)})  # one program more, which takes what is computed as an argument
    assert half.about == "ddpm 250, guidance 1.5, reuse 0.5" and half.program.arguments[-1]["mlp"].shape == (250, 28)
    assert 0.48 < half.program.plan.share <= 0.5 and half.program.flops == pytest.approx(
        0.5 * 64 * 500 * forward, rel=0.05
    )
    assert of({"eval.weights": ("ema", "params")})[-1].images == 20_000
    widths = {"eval.ema": (0.05, 0.1), "optim.ema_tracks": (0.05, 0.1), "eval.weights": ("ema", "params")}
    assert of(widths)[-1].images == 30_000  # a width of raw weights is none
    assert [p.name for p in of({}, 0)] == ["loss"] and of({"eval.loss": False}, 0) == []
    pixels = list(evaluation.parts(resolve(load_config("configs/digits.py")), mesh, mesh, 9))
    assert [(p.name, p.images) for p in pixels] == [("draw", 9), ("features", 9), ("loss", 0)]


def test_an_evaluation_of_scenes_has_their_own_network():
    mesh = abstract_mesh(MeshConfig(), 4)
    draw, features, _ = evaluation.parts(resolve(load_config("configs/scenes.py")), mesh, mesh, 9)
    assert (draw.images, features.images, features.slow) == (9, 9, False)
    params, rows = features.program.arguments
    assert rows.shape == (4 * scores.ROWS, 16, 16, 3)
    assert jax.eval_shape(scores.scene_rows, params, rows).shape[0] == 4 * scores.ROWS


def test_what_an_evaluation_costs_is_the_sum_of_its_programs():
    one = {"estimated_step_seconds": 1.0, "collective_seconds": 0.5, "chips": 4}
    runs = [(one | {"images": 64}, 50_000), (one | {"images": 16}, 10_000)]
    found = [{"wanted": wanted, "run": compilation.run_costs(part, wanted, 3.0)} for part, wanted in runs]
    total = evaluation._total([*found, {"wanted": 0, "run": None}], 50_000)
    batches = 782 + 625
    assert total["hours"] == pytest.approx([batches / 3600, 1.5 * batches / 3600])
    assert total["price"] == pytest.approx([12 * hours for hours in total["hours"]])
    assert evaluation._total([*found, {"wanted": 9, "run": None}], 50_000) is None


@pytest.mark.slow
def test_an_evaluation_without_a_compiler_or_a_clock_says_so(tmp_path, cache_dir):
    found, err = ask(tmp_path, cache_dir, XL, "--topology=h100x8", "--job=evaluate", "--num=50000", code=2)
    check_ways("h100x8", found, err)
    assert found["run"] is None
    assert [part["part"] for part in found["parts"]] == ["draw", "decode", "features", "loss"]
    assert found["parts"][0]["bytes"]["arguments"] >= 4 * flops.parameters(model_config("DiT-XL/2"))
    tiny = ["--config.model.depth=1", "--config.model.width=16", "--config.sample.sampler=euler"]
    found, err = ask(tmp_path, cache_dir, DIGITS, "--topology=cpux1", "--job=evaluate", "--num=100", *tiny)
    assert found["fits"] and found["run"] is None and "compiling: features, a classifier ..." in err
    assert all(part["bytes"]["temporaries"] > 0 for part in found["parts"])
    time, loss = found["notes"]
    assert time == "no estimate of the step: the compiler of CPU programs gives none, so no hours and no price"
    assert loss.startswith("not counted: the held-out loss, because eval.max_images is 0")


@pytest.mark.slow
def test_a_search_compiles_every_layout(capsys):
    cfg = resolve(load_config("configs/digits.py"))
    cfg = search.changed(cfg, {"model.depth": 2, "model.width": 16, "model.attention": "xla"})
    found = search.search(cfg, topology("cpux8"), [2])
    assert [(one["mesh"]["fsdp"], one["accumulate"]) for one in found] == [(2, 1)] * 3
    assert {one["remat"] for one in found} == {"none", "dots", "full"} and all(one["fits"] for one in found)
    assert len({one["bytes"]["temporaries"] for one in found}) > 1 and capsys.readouterr().err.count("remat") == 3


def test_the_compiler_s_messages_are_understood():
    alone = "Ran out of memory on HBM, the total memory required for HLO temporaries (46.50G) exceeds available HBM (15.48G)."
    whole = "Ran out of memory in memory space hbm. Used 16.50G of 15.48G hbm. Exceeded hbm capacity by 1.02G."
    assert compilation.temporaries_of(alone, 2**30) == 46.5 * 2**30
    assert compilation.temporaries_of(whole, 2**30) == 15.5 * 2**30
    assert compilation.temporaries_of("something else", 2**30) is None


def test_what_is_over_the_memory_is_told_from_what_fills_it():
    sizes = {"over": 16.35, "full": 15.0, "fits": 14.4}
    said = {name: compilation.too_large(int(size * GIB), 16 * GIB) for name, size in sizes.items()}
    assert said["over"] == "16.35 GiB of 16.00 GiB: it compiles, and needs more than there is"
    assert said["full"] == "15.00 GiB of 16.00 GiB: it compiles, with less than 10% to spare"
    assert said["fits"] == "" == compilation.too_large(16 * GIB, None)


def test_a_slice_of_an_unknown_clock_is_ranked_and_shown_by_its_cycles_else_by_its_links(capsys):
    assert compilation.no_estimate(topology("v6e-8")) == "the clock of v6e is not published"
    assert compilation.no_estimate(topology("v4-8")) == "the compiler of TPU programs gives none"
    report = {"mesh": {"fsdp": 16}, "remat": "dots", "accumulate": 1, "fits": True, "job": "train", "run": None}
    report |= {"bytes": {"arguments": GIB, "temporaries": GIB}, "collective_seconds": 0.0125}
    known = report | {"estimated_step_seconds": 0.05, "estimated_mfu": 0.25}
    report |= {"estimated_cycles": None, "estimated_step_seconds": None, "estimated_mfu": None}
    assert text.row(report) == "fsdp  16, remat dots, accumulate  1  links   12.5 ms, 2.00 GiB"
    assert text.row(known).endswith("    50.0 ms + links   12.5 ms, MFU 25.0%, 2.00 GiB")
    assert dict(text._speed(report)) == {"links": "12.5 ms, for the collectives at the links' full rate"}
    assert compilation.bounds(report) == [0.0125, 0.0125]
    cycles = report | {"estimated_cycles": 251_230_396}
    assert text.row(cycles).endswith("accumulate  1     251.2 M cycles, links   12.5 ms, 2.00 GiB")
    assert dict(text._speed(cycles))["cycles"].startswith("251,230,396 a step: the compiler's estimate")
    fewer = cycles | {"estimated_cycles": 251_230_395, "collective_seconds": 0.1}  # of another kind of TPU: no seconds
    assert sorted([cycles, fewer], key=search.cost) == [fewer, cycles]
    slow = known | {"estimated_cycles": 1, "collective_seconds": 0.1}  # seconds, where they are known
    assert sorted([slow, known | {"estimated_cycles": 2}], key=search.cost)[1] is slow
    search.show_ranks([cycles], topology("v6e-8"))
    search.show_ranks([report], topology("h100x8"))
    by = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ranked by ")]
    assert by[0] == "ranked by the compiler's cycles alone: the clock of v6e is not published"
    assert by[1] == "ranked by collectives alone: the compiler of GPU programs gives none"


def test_the_notes_say_what_is_left_out_and_why():
    report = {"job": "sample", "suggestion": "", "collectives": {}, "estimated_step_seconds": 0.05}
    (asked,) = compilation.notes(report, topology("v3-8"), 0, None)
    assert asked == "no hours and no price: eval.samples is 0; say for how many images, such as --num=50000"
    assert compilation.notes(report, topology("v3-8"), 10, None) == []
    assert compilation.notes(report, topology("v3-32"), 10, None) == []
    refused = report | {"job": "train", "collectives": None, "estimated_step_seconds": None}
    assert compilation.notes(refused, topology("v3-8"), 10, 4) == ["none of the 4 layouts tried fits"]
    assert compilation.notes(refused, topology("v3-8"), 10, 0)[0].startswith("none was tried")
    assert compilation.notes(refused | {"suggestion": "--config.mesh.fsdp=8"}, topology("v3-8"), 10, 1) == []
    two = {"job": "train", "suggestion": "", "collectives": {}, "estimated_step_seconds": 0.05}
    (network,) = compilation.notes(two, topology("2xv4-64"), 10, None)
    assert network == "in no time: the sums of gradients between the 2 slices, which cross the data-center network"
    assert compilation.notes(two, topology("v4-64"), 10, None) == []
    assert reuse_notes(SampleConfig(), SampleConfig(guidance=2.0)) == []
    (reuse,) = reuse_notes(SampleConfig(), SampleConfig(reuse=0.5), SampleConfig(reuse=0.7))
    assert reuse.startswith("sample.reuse: which outputs are reused is found with a run's weights; ")
    (clock,) = compilation.notes(report | {"estimated_step_seconds": None}, topology("v6e-4"), 0, None)
    assert clock == "no estimate of the step: the clock of v6e is not published, so no hours and no price"


def test_what_is_not_known_of_gpus_is_said():
    module = hlo.parse("""HloModule step
ENTRY %main (a: f32[8]) -> f32[8] {
  ROOT %sum.1 = f32[450]{0} all-reduce(%a), replica_groups=[1,2]<=[2], to_apply=%add
}
""")
    found = Program(None, (), 10, 1, 0)
    one, two = (compilation.timing(module, topology(name), found) for name in ("h100x8", "h100x16"))
    assert one["estimated_step_seconds"] is one["estimated_mfu"] is two["estimated_step_seconds"] is None
    assert one["collective_seconds"] == pytest.approx(450 * 4 / 450e9) and two["collective_seconds"] is None
    report = {"job": "train", "suggestion": "", "fits": True, "bytes": {"arguments": 10e9, "temporaries": 49e9}} | two
    time, memory_, network = compilation.notes(report, topology("h100x16"), 10, None)
    assert time == "no estimate of the step: the compiler of GPU programs gives none, so no hours and no price"
    assert memory_.startswith("the memory is an estimate: ")
    assert network == "no time of the collectives: the rate of the network between the 2 nodes is not known"
    report["bytes"]["temporaries"] = 51e9
    assert compilation.notes(report, topology("h100x8"), 10, None)[2].startswith("JAX takes 75% of a GPU's memory")
    assert compilation.run_costs(report | {"images": 1}, 10, 2.0) is None


def test_a_search_over_nodes_of_gpus_is_refused(monkeypatch):
    monkeypatch.setattr(search, "why_not_compiled", lambda topology: "")
    with pytest.raises(UsageError, match="--search: found h100x16, expected GPUs of one node"):
        search.check_sizes(["8"], topology("h100x16"), 16)
    assert search.check_sizes(["8"], topology("h100x8"), 8) == [8]


def test_hours_and_price_follow_from_the_step():
    report = {"estimated_step_seconds": 0.05, "collective_seconds": 0.01, "images": 256, "chips": 128}
    costs = compilation.run_costs(report, 256 * 7_000_000, 2.0)
    assert costs["hours"] == pytest.approx([7e6 * 0.05 / 3600, 7e6 * 0.06 / 3600])
    assert costs["chip_hours"] == pytest.approx([128 * h for h in costs["hours"]])
    assert costs["price"] == pytest.approx([2 * h for h in costs["chip_hours"]])
    assert compilation.run_costs(report, 10, None)["price"] is None
    assert compilation.run_costs(report, 257, None)["steps"] == 2 and compilation.run_costs(report, 0, None) is None


@pytest.mark.parametrize(
    "side, patch, rows", [(32, 2, 16), (8, 2, 16), (16, 4, 16), (16, 8, 64), (1, 1, 64), (6, 2, 28)]
)
def test_images_of_few_tokens_are_drawn_more_at_a_time(side, patch, rows):
    """A product of fewer than 256 rows uses a core badly; with more than 64 a handful of images would cost too much."""
    assert rows_of(ModelConfig(depth=1, width=16, heads=4, patch=patch, input_size=side)) == rows
