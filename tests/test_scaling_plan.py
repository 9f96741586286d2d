"""Facts about plans: real models, exact budgets, commands that work, what a wrong size and serving cost."""

import json
import math
import shlex
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from absl import flags as absl_flags
from ml_collections import config_flags
from planted import BUDGETS, L_LAW, LAW, N_LAW, ladder, repeated, study
from scipy import optimize
from test_scaling_runs import record, workdir

from dit_jax import flops
from dit_jax.config import Config, ModelConfig, OptimConfig, TrainConfig, model_config, resolve, to_dict
from dit_jax.error import UsageError
from dit_jax.hardware import topology
from dit_jax.scaling.__main__ import main
from dit_jax.scaling.fits import METHODS, fit_akima, fit_isoflop, fit_varpro
from dit_jax.scaling.fits.law import PowerLaw
from dit_jax.scaling.plans.family import DIT, Family, family_of, sized
from dit_jax.scaling.plans.plan import plan
from dit_jax.scaling.plans.recipe import make_recipe
from dit_jax.scaling.plans.serving import data_of, serve
from dit_jax.scaling.plans.settings import Settings, settings
from dit_jax.scaling.runs import load_runs
from dit_jax.scaling.runs.conventions import Convention

ROOT = Path(__file__).parent.parent
XL = model_config("DiT-XL/2")
SHAPES = ((8, 2), (12, 3), (16, 4), (20, 5), (24, 6))  # width = 4 x depth
DIGITS = ModelConfig(4, 16, 1, 2, 8, 1, 10, learn_sigma=False)


# Family


def test_the_rule_gives_back_the_large_published_models():
    for name in ("DiT-L/2", "DiT-XL/2"):
        published = model_config(name)
        found = sized(DIT, flops.active_parameters(published), published)
        assert (found.width, found.depth) == (published.width, published.depth)
        assert found.width // found.heads == 64
    assert pytest.approx(43.5, abs=0.1) == DIT.aspect


@pytest.mark.parametrize("family", [DIT, Family("RUNS", 4.0, 16.0, 0, 4), Family("RUNS", 4.0, 64.0, 1, 4)])
@pytest.mark.parametrize("count", [flops.active_parameters, flops.parameters])
def test_every_size_is_a_model_that_can_be_built(family, count):
    for params in np.geomspace(1e5, 1e12, 15).tolist():
        model = sized(family, params, XL, count)
        assert model.width % model.heads == 0 and model.width % (64 if model.width >= 256 else family.step) == 0
        assert 1 / 3 < model.width / model.heads / family.head_width < 3 or (
            model.heads == family.heads and model.width / model.heads <= family.head_width
        )
        assert abs(math.log(count(model) / params)) < 0.15 and model.patch == 2
        if params > 1e8:
            assert abs(math.log(count(model) / params)) < 0.05
            assert abs(math.log(model.width / model.depth / family.aspect)) < 0.25


def test_the_family_of_a_ladder_is_its_own():
    models = [replace(DIGITS, width=w, depth=d) for w, d in SHAPES]
    found = family_of(models)
    assert (found.aspect, found.heads, found.step) == (pytest.approx(4.0), 1, 4)
    assert str(found) == "RUNS: width = 4 x depth, 1 head(s) up to 64 wide"
    for model in models:
        assert sized(found, flops.active_parameters(model), model) == model
    assert family_of([model_config(f"DiT-{s}/2") for s in ("S", "B", "L")]).head_width == pytest.approx(64)
    with pytest.raises(UsageError, match="size: found inf parameters"):
        sized(found, math.inf, DIGITS)


# Recipes


def sweep(path, c_of=lambda c, n: c, noise=0.002) -> str:
    """A folder of evaluated workdirs of a ladder of digits models, its loss following a parabola at each budget."""
    rng = np.random.default_rng(0)
    for c in (1e10, 3e10, 9e10, 2.7e11):
        for width, depth in SHAPES:
            model = replace(DIGITS, width=width, depth=depth)
            steps = round(c / flops.train_flops(model, 32))
            n, images = flops.active_parameters(model), steps * 32
            loss = 0.38 + 40 * c**-0.22 + 0.02 * math.log(n / (0.02 * c**0.52)) ** 2 + noise * rng.standard_normal()
            rate = 0.006 * (64 / width) ** 0.5
            cfg = Config(
                model, train=TrainConfig(steps, 32), optim=OptimConfig(rate, clip=1.0, warmup_steps=50, ema="power")
            )
            cfg = replace(cfg, diffusion=replace(cfg.diffusion, process="flow"))
            folder = path / f"C{c:.0e}-w{width}"
            values = dict(images_seen=images, tokens_seen=images * 16, params=flops.parameters(model), params_active=n)
            values |= dict(flops_train=flops.train_flops(model, images), metrics={"loss": loss})
            workdir(folder, record(run=folder.name, step=steps, **values))
            (folder / "config.json").write_text(json.dumps({"config": to_dict(cfg)}))
    return str(path)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    return sweep(tmp_path_factory.mktemp("plan") / "sweep")


# ml_collections reads config files with it
READS = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def parsed(command: str, monkeypatch) -> Config:
    """The config that a command line gives, by the door that every job uses."""
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "dit_jax.train"] and words[-1].startswith("--workdir=")
    values = absl_flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    monkeypatch.setattr("sys.argv", ["train", *words[3:-1]])  # ml_collections looks there for overrides
    values(["train", *words[3:-1]])
    return resolve(values.config)


@READS
def test_a_plan_from_records_is_ready_to_train(swept, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    out = tmp_path / "plan.json"
    assert main(["plan", swept, "--flops=1e13", f"--json={out}", "--resamples=200"]) == 0
    printed, said = capsys.readouterr().out, json.loads(out.read_text())
    (plan,) = said["plans"]
    assert plan["command"] in printed and "37.0x beyond the largest budget fitted" in printed
    cfg = parsed(plan["command"], monkeypatch)
    assert asdict(cfg.model) == plan["model"] and cfg.model.channels == 1 and cfg.model.tokens == 16
    assert (cfg.train.steps, cfg.train.batch_size) == (plan["steps"], 32)
    assert cfg.diffusion.process == "flow" and cfg.optim.warmup_steps == 50 and cfg.optim.ema_width == 0.05
    assert cfg.optim.learning_rate == pytest.approx(0.006 * (64 / cfg.model.width) ** 0.5, rel=1e-3)
    assert flops.train_flops(cfg.model, plan["images"]) == plan["flops_train"] == pytest.approx(1e13, rel=1e-3)
    assert plan["params_active"] == flops.active_parameters(cfg.model) and plan["params"] == flops.parameters(cfg.model)
    assert plan["n"] == pytest.approx(plan["n_opt"], rel=0.15) and plan["tokens"] == plan["images"] * 16
    assert plan["n_opt"] == pytest.approx(0.02 * 1e13**0.52, rel=0.2) and not plan["warnings"]
    assert plan["loss_interval"][0] < 0.38 + 40 * 1e13**-0.22 < plan["loss_interval"][1]
    assert said["convention"]["counted"] == "exact" and said["family"].startswith("RUNS: width = 4 x depth")
    assert len({(c["flops"], c["params"]) for c in said["next"]["cells"]}) == len(said["next"]["cells"]) > 3
    assert said["next"]["cost"] <= said["next"]["limit"] == pytest.approx(2e12, rel=0.01)
    for cell in said["next"]["cells"]:
        model = replace(cfg.model, **{k: cell[k] for k in ("width", "depth", "heads")})
        assert flops.active_parameters(model) == cell["params"]
        assert flops.train_flops(model, cell["images"]) == cell["flops_train"] == pytest.approx(cell["flops"], rel=0.1)


def test_a_plan_for_hours_of_chips(swept, tmp_path, capsys):
    out = tmp_path / "plan.json"
    arguments = ["--chip_hours=0.001", "--topology=v3-256", "--mfu=0.3", "--next_flops=0", "--resamples=50"]
    assert main(["plan", swept, f"--json={out}", *arguments]) == 0
    plan = json.loads(out.read_text())["plans"][0]
    chip = topology("v3-8").peak() * 2
    assert plan["flops"] == pytest.approx(0.001 * 3600 * chip * 0.3) and chip == 123e12
    where = plan["hardware"]
    assert where["chip_hours"] == pytest.approx(0.001, rel=1e-3) and where["device_hours"] == 2 * where["chip_hours"]
    assert where["hours"] == pytest.approx(0.001 / 128, rel=1e-3) and where["devices"] == 256
    printed = capsys.readouterr().out
    assert "128 chips, which JAX counts as 256 devices; a batch of 32 does not divide over them" in printed
    assert "assumed MFU of 0.3 in bfloat16" in printed and "Runs to train next" not in printed


@READS
def test_named_models_and_config_files_set_the_rest(swept, monkeypatch):
    monkeypatch.chdir(ROOT)
    runs = load_runs(swept)
    named = settings(runs, name="DiT-B/4", size=512)
    assert (named.model.patch, named.model.input_size, named.file) == (4, 64, "configs/imagenet512.py:DiT-B/4")
    filed = settings(runs, file="configs/digits.py", batch=48)
    assert (filed.model.classes, filed.batch, filed.file) == (10, 48, "configs/digits.py")
    own = settings(runs)
    assert own.file == "configs/digits.py" and own.batch == 32 and own.rate[1] == pytest.approx(-0.5)
    for given in (named, filed, own):
        recipe = make_recipe(fit_isoflop(runs, resamples=0), 1e14, given, runs)
        cfg = parsed(recipe["command"], monkeypatch)
        assert (
            cfg.model == recipe["model"] and cfg.train.steps == recipe["steps"] and cfg.train.batch_size == given.batch
        )


def test_a_plan_of_a_table_assumes_and_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "runs.csv"
    rows = [f"{r.params},{r.tokens},{r.loss},{r.tokens / 64}" for r in ladder(noise=0.003)]
    path.write_text("\n".join(["params,tokens,loss,images", *rows]))
    arguments = ["--flops=1e22", "--method=varpro", "--resamples=50", "--next_flops=0"]
    assert main(["plan", str(path), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "DiT-XL/2 at 256 pixels, since neither RUNS nor --config nor --model say otherwise" in printed
    assert "the planned model has 256 tokens an image, RUNS 64: name their model" in printed
    assert "FLOPs, 6ND: 10.0x beyond" in printed and "--config.model.patch=2" in printed


def test_exact_budgets_are_met_whatever_the_fit_counts():
    """A fit of 6ND: C in 6ND differs from a machine's FLOPs by a factor that depends on the model."""
    runs = [replace(r, convention=Convention(counted="6ND")) for r in ladder()]
    fit, given = fit_varpro(runs, resamples=0), Settings(XL, 256, DIT, "test")
    recipe = make_recipe(fit, 1e21, given, runs, exact=True)
    assert recipe["flops_train"] == pytest.approx(1e21, rel=1e-3) and recipe["flops"] < 0.99e21
    assert recipe["flops"] == pytest.approx(6 * recipe["n"] * recipe["tokens"], rel=1e-3)
    assert recipe["n_opt"] == pytest.approx(float(LAW.optimum(6.0)["N_opt"](recipe["flops"])), rel=1e-3)
    counted = make_recipe(fit, 1e21, given, runs)
    assert counted["flops"] == 1e21 == pytest.approx(6 * counted["n"] * counted["tokens"], rel=1e-3)
    total = [replace(r, convention=Convention(params="total")) for r in runs]
    assert make_recipe(fit, 1e21, given, total)["params"] == pytest.approx(counted["n_opt"], rel=0.05)
    with pytest.raises(UsageError, match=r"--batch: 1e\+21 FLOPs buy .* images of the recommended model, less than a"):
        make_recipe(fit, 1e21, replace(given, batch=10**10), runs)


# Training and serving


@pytest.mark.parametrize("served", [1e9, 1e11, 1e13])
def test_the_joint_optimum_is_that_of_an_independent_minimiser(served):
    """On a planted surface: the least loss of a total, and the least total of a loss, by scipy in other variables."""
    fit, k = fit_varpro(ladder(), resamples=0), 6.0
    total = 1e22

    def loss(x):
        return LAW(math.exp(x), total / (k * math.exp(x)) - served)

    found, top = serve(fit, served, total=total), math.log(total / k / served)
    best = optimize.minimize_scalar(
        loss, bounds=(10.0, min(top, 30.0) - 1e-9), method="bounded", options={"xatol": 1e-9}
    )
    assert found.n == pytest.approx(math.exp(best.x), rel=1e-3) and found.loss == pytest.approx(best.fun, rel=1e-8)
    assert found.train + k * found.n * served == pytest.approx(total, rel=1e-6) == pytest.approx(found.plain_total)
    assert found.loss < found.plain_loss and found.n < found.plain_n

    def spent(x):
        left = found.loss - LAW.E - LAW.A * math.exp(-LAW.alpha * x)
        return k * math.exp(x) * ((LAW.B / left) ** (1 / LAW.beta) + served) if left > 0 else math.inf

    least = optimize.minimize_scalar(spent, bounds=(best.x - 1, best.x + 1), method="bounded", options={"xatol": 1e-9})
    again = serve(fit, served, loss=found.loss)
    assert again.total == pytest.approx(total, rel=1e-6) == pytest.approx(least.fun, rel=1e-5)
    assert again.plain_total > total and again.plain_loss == pytest.approx(found.loss)


def test_without_images_the_joint_optimum_is_that_of_training():
    fit = fit_varpro(ladder(), resamples=0)
    found = serve(fit, 0.0, total=1e22)
    assert found.n == pytest.approx(LAW.optimum(6.0)["N_opt"](1e22), rel=1e-3) == pytest.approx(found.plain_n)
    assert data_of(10, 50, 1.0, 16) == 10 * 50 * 16 / 3 and data_of(10, 50, 1.5, 16) == 2 * data_of(10, 50, 1.0, 16)


@pytest.mark.parametrize(
    ("method", "studies"), [(fit_varpro, 12), pytest.param(fit_varpro, 200, marks=pytest.mark.slow)]
)
def test_intervals_of_the_joint_optimum_hold_the_truth(method, studies):
    truth, hits = serve(method(ladder(), resamples=0), 1e12, total=1e22), []
    for seed in range(studies):
        found = serve(method(ladder(noise=0.005, seed=seed), resamples=100, seed=seed), 1e12, total=1e22)
        pairs = ((found.n_interval, truth.n), (found.loss_interval, truth.loss))
        hits.append([low <= value <= high for (low, high), value in pairs])
    assert np.mean(hits, axis=0).min() > (0.9 if studies > 100 else 0.7), np.mean(hits, axis=0)


@READS
def test_a_plan_for_training_and_serving(swept, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(ROOT)
    out = tmp_path / "plan.json"
    more = [
        "--images_served=1e6",
        "--sampling_steps=20",
        "--guidance=2",
        "--next_flops=0",
        "--resamples=50",
        "--method=varpro",
    ]
    assert main(["plan", swept, "--flops=1e13", "--target_loss=0.46", f"--json={out}", *more]) == 0
    printed, plans = capsys.readouterr().out, json.loads(out.read_text())["plans"]
    assert "Best model for 1e+06 images of 20 steps at guidance 2" in printed and "training alone" in printed
    for one in plans:
        said = one["serving"]
        image = 20 * 2 * flops.forward_flops(ModelConfig(**one["model"]))
        assert one["flops_train"] + 1e6 * image == pytest.approx(
            said["total"], rel=0.15
        )  # of a model that can be built
        assert one["flops"] == pytest.approx(said["train"]) and 0 < said["sampling_share"] < 1
        assert one["n"] == pytest.approx(said["n"], rel=0.2) and said["n"] < said["plain_n"]
    assert plans[0]["serving"]["total"] == 1e13 and plans[1]["serving"]["loss"] == pytest.approx(0.46, rel=1e-4)
    assert plans[1]["serving"]["plain_total"] > plans[1]["serving"]["total"]


def test_where_no_other_size_or_loss_is_known_there_is_no_joint_optimum():
    with pytest.raises(UsageError, match="--images_served: method akima tells the loss of the best size alone"):
        serve(fit_akima(ladder(noise=0.002)), 1e12, total=1e22)
    with pytest.raises(UsageError, match=r"--images_served: .*budgets"):
        serve(fit_isoflop(study(noise=0.002, budgets=BUDGETS[::2])), 1e6, total=1e13)
    with pytest.raises(UsageError, match=r"--target_loss: found 1\.8, expected more than 1\.817"):
        serve(fit_varpro(ladder(), resamples=0), 1e12, loss=1.8)
    with pytest.raises(UsageError, match="no size and data reach the target"):
        serve(fit_varpro(ladder(), resamples=0), 1e40, total=1e22)


# What a plan takes for granted


def test_a_plan_far_outside_practice_says_how_far_and_what_is_nearer():
    """A family of narrow models and a batch of 32 at 1e22 FLOPs: a depth and a number of steps that nobody has trained."""
    runs, family = [replace(r, convention=Convention(counted="6ND")) for r in ladder()], Family("RUNS", 8.0, 64.0)
    fit = fit_varpro(runs, resamples=0)
    said = make_recipe(fit, 1e22, Settings(XL, 32, family, "test", seen={"depth": 12, "steps": 9000}), runs)
    deep, long = said["warnings"][-2:]
    assert (
        said["model"].depth > 80
        and f"{said['model'].depth / 28:.3g}x DiT-XL/2's 28" in deep
        and "x the largest of RUNS, 12" in deep
    )
    assert "--family=dit makes it width" in deep
    assert said["steps"] > 7e6 and "x DiT-XL/2's 7,000,000" in long and "--batch=" in long
    batch = int(long.partition("--batch=")[2].split()[0])
    nearer = make_recipe(fit, 1e22, Settings(XL, batch, DIT, "test"), runs)
    assert not [w for w in nearer["warnings"] if "steps" in w] and nearer["model"].depth < said["model"].depth / 2
    assert "batch of 32 images and learning rate unknown (no config)" in said["assumptions"][0]


def test_a_plan_says_what_repeated_data_cost():
    runs = [replace(r, convention=Convention(counted="6ND")) for r in ladder()]
    fit, given = fit_varpro(runs, resamples=0), Settings(XL, 256, DIT, "test")
    never, eight = (make_recipe(fit, 1e22, given, runs, unique=u) for u in (1e15, 1.28e6))
    assert (
        never["epochs"] < 1 and never["repetition"] == 0 and math.isnan(make_recipe(fit, 1e22, given, runs)["epochs"])
    )
    assert eight["epochs"] == pytest.approx(eight["images"] / 1.28e6)
    law = repeated(1.28e6 * 256, 15.39)
    d = eight["flops"] / (6 * eight["n"])
    assert eight["repetition"] == pytest.approx(law(eight["n"], d) - LAW(eight["n"], d), rel=1e-3)
    assert "R* = 15.4, of language models" in eight["assumptions"][1]


# Sizes and units


def test_a_plan_takes_the_nearest_size_of_a_ladder():
    fit = fit_isoflop(study(), resamples=0)
    n = float(N_LAW(1e12))
    chosen = plan(fit, 1e12, [("small", n / 3, 1e5), ("near", 1.2 * n, 4e5), ("large", 3 * n, 1e6)])
    assert chosen.name == "near" and chosen.off == pytest.approx(1.2, rel=1e-6)
    assert chosen.images == pytest.approx(1e12 / (3 * 4e5))
    assert chosen.loss == pytest.approx(L_LAW(1e12) + 0.02 * math.log(1.2) ** 2, rel=1e-6)
    nowhere = replace(fit, laws=fit.laws | {"N_opt": PowerLaw(0.0, 1.0)})
    with pytest.raises(UsageError, match=r"puts N_opt at 0 for 1e\+20 FLOPs"):
        plan(nowhere, 1e20, [("a", 1e5, 1e5)])
    with pytest.raises(UsageError, match=r"ladder: found \[\], expected"):
        plan(fit, 1e12, [])
    with pytest.raises(UsageError, match="--method: power has no law of N_opt"):
        plan(METHODS["power"](study(), resamples=0), 1e12, [("a", 1e5, 1e5)])


def in_units(runs, params: float, tokens: float) -> str:
    rows = [f"{r.params / params},{r.tokens / tokens},{r.loss}" for r in runs]
    return "\n".join(["params,tokens,loss", *rows])


@pytest.mark.parametrize(("params", "tokens", "flops_"), [(1e6, 1e6, "1e21"), (1e9, 1.0, "1e21"), (1.0, 1.0, "1e36")])
def test_sizes_in_other_units_are_refused_with_the_column_and_the_factor(tmp_path, capsys, params, tokens, flops_):
    path = tmp_path / "runs.csv"
    runs = ladder(noise=0.002, seed=3)
    path.write_text(in_units(runs, params, tokens))
    assert main(["plan", str(path), f"--flops={flops_}", "--resamples=20", "--method=varpro"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ") and "--column 'params=1e6*NAME'" in said
    if params == tokens == 1.0:
        assert (
            "RUNS: " in said
            and "parameters at" in said
            and "expected 500 to 1e+15" in said
            and "--column 'params=1e6*NAME'" in said
        )


def test_where_no_loss_is_known_beyond_the_data_the_plan_says_so():
    runs = [replace(r, convention=Convention(counted="6ND")) for r in study(noise=0.002, budgets=BUDGETS[::2])]
    given = Settings(DIGITS, 32, DIT, "test")
    recipe = make_recipe(fit_isoflop(runs, resamples=50), 10 * float(BUDGETS[-1]), given, runs)
    assert math.isnan(recipe["loss"]) and all(math.isnan(o.rise) and "3 budgets" in o.source for o in recipe["off"])
    assert any(w.startswith("no loss is expected of this run: 3 budgets") for w in recipe["warnings"])


# Bad use


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "plan: found no budget, expected --flops, or --chip_hours with --topology"),
        (["--chip_hours=5"], "--chip_hours: found it without --topology"),
        (["--chip_hours=5", "--topology=v3-200"], "topology: found 'v3-200', expected a slice such as v3-256"),
        (["--chip_hours=5", "--topology=cpux8"], "--topology: no peak rate is published for bfloat16 on cpux8"),
        (["--chip_hours=-5", "--topology=v3-8"], "--chip_hours: found -5, expected a number above 0"),
        (["--flops=1e13", "--topology=v4-8", "--dtype=int8"], "dtype: found 'int8', expected bfloat16"),
        (["--flops=1e13", "--mfu=1.5"], "--mfu: found 1.5, expected a share of the peak, at most 1"),
        (["--flops=1e13", "--config=none.py"], "no config file 'none.py'"),
        (["--flops=1e13", "--config=bad.py"], "--config: bad.py cannot be read: KeyError: 'get_config'"),
        (["--flops=1e13", "--model=DiT-XXL/2"], "model name: found 'DiT-XXL/2', expected one of"),
        (["--flops=1e13", "--image_size=256"], "--image_size: found it with the settings of a config"),
        (["--flops=1e13", "--batch=-4"], "--batch: found -4, expected at least 1"),
        (["--flops=1e13", "--batch=100000000"], "less than a batch of 100000000"),
        (["--flops=1e13", "--next_flops=3"], "--next_flops: 3 FLOPs buy no cell; the cheapest is 2e+10"),
        (["--flops=1e13", "--next_flops=1e12", "--method=akima"], "--next_flops: method akima tells the loss of the best size alone"),
        (["--target_loss=0.4"], "--target_loss: found it without --images_served"),
        (["--images_served=1e6"], "plan: found no budget"),
        (["--flops=1e13", "--images_served=-1"], "--images_served: found -1, expected a number above 0"),
        (["--chip_hours=5", "--topology=v3-8", "--images_served=1"], "--images_served: found it with --chip_hours"),
        (["--flops=1e13", "--method=power"], "--method: power has no law of N_opt in compute"),
    ],
)  # fmt: skip
def test_bad_use_is_one_line_exit_2_and_no_file(swept, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.py").write_text("x = 1\n")
    assert main(["plan", swept, "--json=out.json", "--resamples=20", *arguments]) == 2
    said = capsys.readouterr().err.splitlines()
    assert message in said[-1] and said[-1].startswith("error: ") and all(s.startswith("warning: ") for s in said[:-1])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.py"]
