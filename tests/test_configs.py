"""The door: every file of configs/ becomes a typed config, and bad values name their key."""

import dataclasses
import importlib.util
import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from job import run

from dit_jax import flops
from dit_jax.config import SIZES, Config, resolve, template, to_dict
from dit_jax.error import UsageError
from dit_jax.workdir.folder import check_same_run, read_config

FOLDER = Path(__file__).parent.parent / "configs"
FILES = sorted(FOLDER.glob("*.py"))
PUBLISHED = [f"DiT-{size}/{patch}" for size in SIZES for patch in (2, 4, 8)]
DEFAULTS = to_dict(Config())
KEYS = [f"{group}.{key}" for group, values in DEFAULTS.items() for key in values]
FLOATS = [key for key in KEYS if isinstance(DEFAULTS[key.split(".")[0]][key.split(".")[1]], float)]


def module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def changed(key, value):
    """The defaults as plain nested values, with one key set."""
    values = to_dict(Config())
    group, name = key.split(".")
    values[group][name] = value
    return values


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_files_resolve_and_open_with_their_command(path):
    found = module(path)
    cfg = resolve(found.get_config())
    assert isinstance(cfg, Config)
    command = f"python -m dit_jax.{'sweep' if cfg.sweep.budgets else 'train'} --config=configs/{path.name}"
    assert command in "\n".join(found.__doc__.splitlines()[:6])


@pytest.mark.parametrize("size", [256, 512])
@pytest.mark.parametrize("name", PUBLISHED)
def test_imagenet_files_take_every_published_size(name, size):
    cfg = resolve(module(FOLDER / f"imagenet{size}.py").get_config(name))
    depth, width, heads = SIZES[name[4:-2]]
    assert (cfg.model.depth, cfg.model.width, cfg.model.heads) == (depth, width, heads)
    assert (cfg.model.patch, cfg.model.input_size, cfg.model.channels) == (int(name[-1]), size // 8, 4)
    assert (cfg.data.dataset, cfg.data.image_size, cfg.data.cache) == ("imagenet2012", size, False)


def test_imagenet_files_train_as_the_paper_does():
    cfgs = [resolve(module(FOLDER / f"imagenet{size}.py").get_config()) for size in (256, 512)]
    for cfg in cfgs:
        assert (cfg.optim.learning_rate, cfg.optim.schedule, cfg.optim.weight_decay) == (1e-4, "constant", 0.0)
        assert (cfg.optim.b1, cfg.optim.b2, cfg.optim.warmup_steps, cfg.optim.clip) == (0.9, 0.999, 0, 0.0)
        assert (cfg.optim.ema, cfg.optim.ema_decay, cfg.train.batch_size) == ("constant", 0.9999, 256)
        assert (cfg.data.flip, cfg.train.cond_dropout, cfg.model.learn_sigma) == (True, 0.1, True)
        assert (cfg.diffusion.process, cfg.diffusion.schedule, cfg.diffusion.timesteps) == ("ddpm", "linear", 1000)
        sample = cfg.sample
        assert (sample.sampler, sample.steps, sample.guidance, sample.channels) == ("ddpm", 250, 1.5, "first3")
    assert [cfg.train.steps for cfg in cfgs] == [7_000_000, 3_000_000]
    assert [flops.forward_macs(cfg.model) / 1e9 for cfg in cfgs] == pytest.approx([118.62, 524.54], abs=0.01)


def test_the_text_model_has_a_billion_parameters_and_is_laid_out_for_slices():
    make = module(FOLDER / "text.py").get_config
    plain, tpu, gpu = (resolve(make(slice)) for slice in ("", "v4-256", "h100x8"))
    assert 1.0e9 < flops.parameters(plain.model) < 1.05e9 and plain.model.state_width == 2048
    assert [(cfg.mesh.data, cfg.mesh.fsdp, cfg.model.remat) for cfg in (tpu, gpu)] == [(8, 16, "none"), (1, 8, "dots")]


@pytest.mark.parametrize("file", ["imagenet256", "imagenet512"])
@pytest.mark.parametrize(("name", "hint"), [("DiT-XXL/2", "DiT-XL/2"), ("DiT-B/3", "DiT-B/"), ("DIT-S/8", "DiT-S/8")])
def test_an_unknown_size_names_the_nearest(file, name, hint):
    with pytest.raises(UsageError, match=f"(?s){name}.*did you mean '{hint}"):
        module(FOLDER / f"{file}.py").get_config(name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/imagenet256.py:DiT-XXL/2"], "did you mean 'DiT-XL/2'"),
        (["--config=configs/imagenet256.py", "--config.train.stepz=3"], "did you mean 'steps'"),
        (["--config=configs/imagenet256.py", "--config.optm.clip=3"], "did you mean 'optim'"),
        (["--config=configs/imagenet1024.py"], "configs/imagenet1024.py"),
        ([], "--config"),
    ],
)
def test_a_bad_config_is_one_line_and_exit_2(arguments, message, tmp_path, cache_dir):
    code, out, err = run("train", *arguments, f"--workdir={tmp_path}/new", cache_dir=cache_dir)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("error: ") and message in err
    assert not (tmp_path / "new").exists()


def test_the_template_resolves_to_the_defaults():
    assert resolve(template()) == Config() == resolve(to_dict(Config())) == resolve({})


def test_a_resolved_config_survives_json():
    cfg = resolve(module(FOLDER / "digits_isoflop.py").get_config())
    assert resolve(json.loads(json.dumps(to_dict(cfg)))) == cfg


@pytest.mark.parametrize("key", KEYS)
def test_the_template_takes_every_key(key):
    c, (group, name) = template(), key.split(".")
    c[group][name] = DEFAULTS[group][name]
    assert resolve(c) == Config()


def test_the_template_takes_no_other_key():
    for group in (template(), template().train):
        with pytest.raises((AttributeError, KeyError), match="stepz"):
            group.stepz = 3


def test_older_names_of_keys_are_read(tmp_path):
    """By config files, and in the config.json of older runs, which go on."""
    c = template()
    c.train.update(label_dropout=0.25)
    assert resolve(c).train.cond_dropout == 0.25 == c.train.cond_dropout
    stored = to_dict(cfg := resolve(c))
    stored["train"]["label_dropout"] = stored["train"].pop("cond_dropout")
    (tmp_path / "config.json").write_text(json.dumps({"config": stored}))
    assert read_config(str(tmp_path)) == cfg
    check_same_run(cfg, str(tmp_path))
    assert to_dict(resolve(template(cfg))) == to_dict(cfg)
    stored["train"]["cond_dropout"] = 0.5
    with pytest.raises(UsageError, match=r"train.label_dropout: found 0.25, and train.cond_dropout = 0.5, expected"):
        resolve(stored)


def test_older_names_of_keys_are_options(tmp_path, cache_dir):
    flags = ["--config=configs/digits.py", f"--workdir={tmp_path / 'new'}"]
    code, _, err = run("train", *flags, "--config.train.label_dropout=1.5", cache_dir=cache_dir)
    assert code == 2 and "train.cond_dropout: found 1.5, expected a value from 0 to 1" in err


def test_integers_serve_as_floats_and_lists_as_tuples():
    assert resolve({"sample": {"guidance": 2}}).sample.guidance == 2.0
    assert resolve({"sample": {"interval": [0.25, 0.75]}}).sample.interval == (0.25, 0.75)
    sweep = {"budgets": [1e9], "sizes": [[8, 2, 2]], "windows": [[0, 1]]}
    assert resolve({"sweep": sweep}).sweep.sizes == ((8, 2, 2),)


@pytest.mark.parametrize("key", KEYS)
def test_a_misspelt_key_names_the_nearest(key):
    group, name = key.split(".")
    with pytest.raises(UsageError) as error:
        resolve({group: {name + "x": 1}})
    assert str(error.value) == f"{group}.{name}x: unknown config key; did you mean '{name}'?"


@pytest.mark.parametrize("group", DEFAULTS)
def test_a_misspelt_group_names_the_nearest(group):
    with pytest.raises(UsageError, match=rf"^{group}s: unknown config key; did you mean '{group}'\?$"):
        resolve({group + "s": {}})
    with pytest.raises(UsageError, match=rf"^{group}: found 3, expected a group of keys$"):
        resolve({group: 3})


@pytest.mark.parametrize("key", KEYS)
def test_a_wrong_type_names_the_key_and_both_types(key):
    group, name = key.split(".")
    kind = type(DEFAULTS[group][name])
    for wrong in ({}, None, "3" if kind is not str else 3, 1.5 if kind is not float else True):
        if type(wrong) is kind:
            continue
        with pytest.raises(UsageError) as error:
            resolve(changed(key, wrong))
        assert str(error.value) == f"{key}: found {wrong!r} ({type(wrong).__name__}), expected {kind.__name__}"


@pytest.mark.parametrize("key", FLOATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_floats_are_finite(key, value):
    with pytest.raises(UsageError, match=f"^{key}: found {value}, expected a finite number$"):
        resolve(changed(key, value))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("model.depth", 0, "at least 1"),
        ("model.width", -4, "at least 1"),
        ("model.width", 390, "a multiple of 4"),
        ("model.heads", 7, "a divisor of model.width = 384"),
        ("model.patch", 5, "a divisor of model.input_size = 32"),
        ("model.unroll", 5, "a divisor of model.depth = 12"),
        ("model.dtype", "bfloat", "did you mean 'bfloat16'?"),
        ("model.remat", "dot", "did you mean 'dots'?"),
        ("model.attention", "cuda", "one of auto, xla, cudnn"),
        ("diffusion.process", "flows", "did you mean 'flow'?"),
        ("diffusion.schedule", "cosin", "did you mean 'cosine'?"),
        ("diffusion.timesteps", 1, "at least 2"),
        ("data.image_size", 0, "at least 1"),
        ("data.workers", -1, "at least 0"),
        ("optim.learning_rate", -1e-4, "at least 0"),
        ("optim.ema_decay", 1.5, "a value from 0 to 1"),
        ("optim.ema_width", 0.5, "a value from 0.001 to 0.28"),
        ("optim.accumulate", 0, "at least 1"),
        ("train.steps", 0, "at least 1"),
        ("train.steps", 2**31, "at most 2147483647: devices count in 32 bits"),
        ("optim.warmup_steps", 2**40, "at most 2147483647"),
        ("eval.samples", 2**31, "at most 2147483647"),
        ("train.seed", 2**31, "at most 2147483647"),
        ("train.cond_dropout", 1.1, "a value from 0 to 1"),
        ("train.batch_size", 0, "at least 1"),
        ("mesh.fsdp", 0, "a number of devices"),
        ("sample.guidance", -1.0, "a value from 0 to 1000"),
        ("sample.channels", "first4", "did you mean 'first3'?"),
        ("sample.weights", "raw", "one of ema, params"),
        ("sample.interval", [0.8, 0.2], "0 <= low <= high <= 1"),
        ("eval.times_per_image", 12, "a multiple of eval.buckets = 8"),
        ("sweep.windows", [[0, 1]], "(first, end) within 0 sizes"),
    ],
)
def test_a_value_out_of_range_names_the_key_and_what_was_expected(key, value, expected):
    with pytest.raises(UsageError) as error:
        resolve(changed(key, value))
    message = str(error.value)
    assert message.startswith(f"{key}: found ") and expected in message and "\n" not in message


def test_keys_that_contradict_each_other_are_named():
    with pytest.raises(UsageError, match=r"^model\.learn_sigma: found True.*diffusion\.process = 'flow'"):
        resolve({"diffusion": {"process": "flow"}})
    with pytest.raises(UsageError, match=r"^train\.batch_size: found 256.*optim\.accumulate = 3"):
        resolve({"optim": {"accumulate": 3}})
    with pytest.raises(UsageError, match=r"^mesh: found .*at most one -1"):
        resolve({"mesh": {"fsdp": -1}})


def test_configs_are_frozen_and_hashable():
    cfg = Config()
    assert hash(cfg) == hash(resolve(template()))
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.train.steps = 3


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = sorted({*DEFAULTS, *(name for group in DEFAULTS.values() for name in group)})


def resolves_or_complains(values):
    """`resolve` gives a config or raises a UsageError."""
    try:
        assert isinstance(resolve(values), Config)
    except UsageError as error:
        assert str(error)


@settings(max_examples=200, deadline=None)
@given(JSON | st.dictionaries(st.sampled_from(NAMES), st.dictionaries(st.sampled_from(NAMES), JSON), max_size=3))
def test_any_json_resolves_or_complains(values):
    resolves_or_complains(values)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(KEYS), JSON | st.lists(st.lists(st.integers() | st.floats(), max_size=4), max_size=4))
@example("sample.interval", ["a", "b"])
@example("sample.interval", [0, {}])
@example("sample.interval", [0, 10**400])
@example("sweep.windows", [1])
@example("sweep.budgets", [10**400])
@example("sweep.sizes", [[8, 2]])
@example("optim.learning_rate", 10**400)
@example("model.width", 10**400)
def test_any_value_of_a_key_resolves_or_complains(key, value):
    resolves_or_complains(changed(key, value))


def test_windows_and_budgets_that_are_not_numbers_are_named():
    sweep = {"budgets": [1e9], "sizes": [[8, 2, 2]]}
    for windows in ([3], [["a", 1]], [[0]], [[0, 1, 2]], ["ab"], [None]):
        with pytest.raises(UsageError, match=r"^sweep\.windows: found "):
            resolve({"sweep": {**sweep, "windows": windows}})
    for budgets in (["big"], [None], [[1]], [-1.0], [math.inf], [True]):
        with pytest.raises(UsageError, match=r"^sweep\.budgets: found "):
            resolve({"sweep": {**sweep, "windows": [[0, 1]], "budgets": budgets}})
    for sizes in ([3], [[8, 2]], [["a", 1, 1]], [[8.5, 1, 1]], [[0, 1, 1]]):
        with pytest.raises(UsageError, match=r"^sweep\.sizes: found "):
            resolve({"sweep": {**sweep, "windows": [[0, 1]], "sizes": sizes}})


@pytest.mark.parametrize(
    ("job", "arguments"),
    [
        ("train", ["--config=configs/digits.py", "--workdir=s3://bucket/run"]),
        ("sweep", ["--config=configs/digits_isoflop.py", "--workdir", "gs:/bucket/run"]),
        ("evaluate", ["--workdir=s3://bucket/run"]),
        ("sample", ["--workdir=runs/x", "--out=az://bucket/a.npz"]),
        ("scaling", ["report", "tests/data/digits_isoflop.csv", "--out=s3://bucket/a.html"]),
        ("encode", ["--config=configs/digits.py", "--out=x", "--config.data.data_dir=s3://bucket/tfds"]),
    ],
)
def test_a_store_that_is_not_supported_is_refused_before_anything_is_written(job, arguments, cache_dir):
    code, out, err = run(job, *arguments, cache_dir=cache_dir)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert re.match(
        r"error: --(workdir|out|config.data.data_dir): found '(gs|s3|az):.*, expected a path on a disk or gs://BUCKET/",
        err,
    )
    assert not [path for path in FOLDER.parent.iterdir() if path.name.endswith(":")]
