"""The job `convert` and folders of networks: whole or not at all, nothing done twice or over."""

import dataclasses
import hashlib
import json
import shutil
import struct

import jax
import numpy as np
import pytest
from converted import TINY, convert, random_params, same, tree
from foreign import write_diffusers_dit
from job import ROOT, run
from safetensors.numpy import load_file, save_file

from dit_jax import checkpoint
from dit_jax.config import model_config
from dit_jax.error import JobError, UsageError
from dit_jax.models import vae
from dit_jax.networks import dit as published
from dit_jax.networks import notes
from dit_jax.networks.folder import load_network, save_network
from dit_jax.workdir import manifest

# the job


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint file and a folder of diffusers, of one tiny model."""
    folder = tmp_path_factory.mktemp("files")
    save_file(published.write(TINY, random_params()), folder / "dit.safetensors")
    save_file(published.write(TINY, random_params(seed=1)), folder / "other.safetensors")
    arrays, config = write_diffusers_dit(TINY, random_params())
    (folder / "transformer").mkdir()
    save_file(arrays, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def workdir(files, tmp_path_factory, cache_dir):
    out = tmp_path_factory.mktemp("converted") / "w"
    code, stdout, err = convert(
        cache_dir,
        "--source=dit",
        f"--weights={files / 'dit.safetensors'}",
        f"--out={out}",
        "--heads=2",
        "--classes=5",
        "--step=70",
    )
    assert (code, stdout) == (0, ""), err
    return out


def test_a_checkpoint_becomes_a_run_folder(workdir, files):
    assert checkpoint.steps(str(workdir)) == [70] and manifest.problems(checkpoint.path_of(str(workdir), 70)) == []
    for item in ("ema", "params"):
        cfg, params = checkpoint.load(str(workdir), item=item)
        assert cfg == TINY
        same(jax.tree.map(np.asarray, params), random_params())
    meta = checkpoint.read_meta(str(workdir), 70)
    digest = hashlib.sha256((files / "dit.safetensors").read_bytes()).hexdigest()
    assert meta["source"] == {"file": "dit.safetensors", "sha256": digest, "format": "dit"} and meta["step"] == 70
    assert sorted(p.name for p in workdir.parent.iterdir()) == ["w"]


def test_the_config_is_the_papers_with_the_files_model():
    for pixels, schedule_steps in ((256, 7_000_000), (512, 3_000_000)):
        model = model_config("DiT-XL/2", pixels)
        cfg = notes.apply(None, model, True, "F")
        assert cfg.model == model and cfg.data.image_size == pixels and cfg.train.steps == schedule_steps
        assert (cfg.sample.sampler, cfg.sample.steps, cfg.sample.channels) == ("ddpm", 250, "first3")


def test_the_same_command_finds_it_done(workdir, files, cache_dir):
    before = tree(workdir)
    same_command = [
        "--source=dit",
        f"--weights={files / 'dit.safetensors'}",
        f"--out={workdir}",
        "--heads=2",
        "--classes=5",
        "--step=70",
    ]
    code, _, err = convert(cache_dir, *same_command)
    assert code == 0 and f"{workdir}: done before, from the same" in err
    for change, expected in (
        (["--heads=4"], "was made with 2 heads, not 4"),
        (["--step=71"], "holds a run with checkpoints of steps [70], not [71]"),
        (
            [f"--weights={files / 'other.safetensors'}"],
            "holds other weights, of 'dit.safetensors' (sha256: the folder has",
        ),
    ):
        code, _, err = convert(cache_dir, *same_command, *change)
        assert code == 2 and expected in err and err.count("\n") == 1, err
    code, _, err = convert(
        cache_dir, "--source=diffusers", f"--weights={files / 'transformer'}", f"--out={workdir}", "--step=70"
    )
    assert code == 2 and "format: the folder has 'dit', the command 'diffusers'" in err
    assert tree(workdir) == before


def test_a_damaged_folder_is_not_taken_for_done(workdir, files, cache_dir, tmp_path):
    shutil.copytree(workdir, tmp_path / "w")
    part = max((tmp_path / "w" / "checkpoints").rglob("*"), key=lambda p: p.stat().st_size)
    whole = part.read_bytes()
    part.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    command = [
        "--source=dit",
        f"--weights={files / 'dit.safetensors'}",
        f"--out={tmp_path / 'w'}",
        "--heads=2",
        "--classes=5",
        "--step=70",
    ]
    code, _, err = convert(cache_dir, *command)
    assert code == 1 and "damaged" in err and "convert again" in err


def test_diffusers_through_a_run_to_published_names_and_back(files, tmp_path, cache_dir):
    out, exported = tmp_path / "w", tmp_path / "dit.safetensors"
    assert convert(cache_dir, "--source=diffusers", f"--weights={files / 'transformer'}", f"--out={out}")[0] == 0
    assert checkpoint.steps(str(out)) == [0]
    command = ["--source=workdir", f"--weights={out}", f"--out={exported}", "--item=params"]
    assert convert(cache_dir, *command)[0] == 0
    first = exported.read_bytes()
    found, expected = load_file(exported), load_file(files / "dit.safetensors")
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    code, _, err = convert(cache_dir, *command)
    assert code == 0 and "done before" in err and exported.read_bytes() == first
    exported.write_bytes(b"mine")
    code, _, err = convert(cache_dir, *command)
    assert code == 2 and "exists and holds something else" in err and exported.read_bytes() == b"mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dit.safetensors", "w"]


def test_a_converted_model_samples_and_does_not_train(workdir, tmp_path, data_dir, cache_dir):
    """Also to images and a score, on one GPU's worth of devices or more: the mesh of the paper's config is for training."""
    tiny = vae.VAEConfig(latent_channels=3, widths=(8, 8, 8, 8), groups=4, blocks=1)
    weights = jax.tree.map(np.asarray, vae.init(tiny, jax.random.key(0)))
    folder, out = tmp_path / "vae", tmp_path / "images.npz"
    source = {"file": "none", "sha256": "0" * 64, "format": "sd-vae"}
    save_network(str(folder), "sd-vae", dataclasses.asdict(tiny), weights, source)
    arguments = [f"--workdir={workdir}", "--num=2", "--steps=2", "--guidance=1", f"--out={out}"]
    code, _, err = run("sample", *arguments, cache_dir=cache_dir)
    assert code == 2 and "autoencoder.folder: found none for a model of latents of 8 x 8" in err
    code, _, err = run("sample", *arguments, f"--autoencoder={folder}", cache_dir=cache_dir)
    assert code == 0, err
    assert np.load(out)["arr_0"].shape == (2, 64, 64, 3)
    code, _, err = run("train", "--config=configs/digits.py", f"--workdir={workdir}", cache_dir=cache_dir)
    assert code == 2 and err.count("\n") == 1, err
    assert "holds weights only, converted from dit.safetensors" in err and "not trained on" in err


def wrong_commands(files, folder):
    dit_file, full = files / "dit.safetensors", folder / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    (folder / "file").write_text("mine")
    (folder / "empty").mkdir()
    cut = folder / "cut.safetensors"
    cut.write_bytes(dit_file.read_bytes()[:-10])
    header = folder / "header.safetensors"
    header.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    pickled = folder / "bare.pt"
    pickled.write_bytes(b"\x80\x04cos\nsystem\n(S'touch owned'\ntR.")
    no_config = folder / "no_config"
    no_config.mkdir()
    shutil.copy(files / "transformer" / "diffusion_pytorch_model.safetensors", no_config)
    bad_config = folder / "bad_config"
    shutil.copytree(files / "transformer", bad_config)
    (bad_config / "config.json").write_text("[" * 50 + "]" * 50)
    new = folder / "new"
    yield ["dit", dit_file, full], "is not empty and holds no run"
    yield ["dit", dit_file, folder / "file"], "is a file, expected a folder"
    yield ["dit", folder / "absent.pt", new], "no file or folder"
    yield ["dit", dit_file, new, "--classes=5"], "say it with --heads"
    yield ["dit", cut, new, "--heads=2"], "damaged or no safetensors"
    yield ["dit", header, new, "--heads=2"], "found a header of"
    yield ["dit", pickled, new, "--heads=2"], "not read here"
    yield ["dit", files / "transformer", new, "--heads=2"], "x_embedder.proj.weight: missing"
    yield ["dit", folder / "empty", new], "found none of diffusion_pytorch_model.safetensors (or"
    yield ["diffusers", dit_file, new], "expected a folder of diffusers"
    yield ["diffusers", no_config, new], "expected a folder of diffusers"
    yield ["diffusers", bad_config, new], "nested more than"
    yield ["diffusers", files / "transformer", new, "--heads=2"], "--heads: is for --source=dit"
    yield (
        ["dit", dit_file, new, "--heads=2", "--item=ema"],
        "--item: found weights one set without a name, expected one ema",
    )
    yield (
        ["dit", dit_file, new, "--heads=2"],
        "--classes: found nothing, expected 6 if each row is a class, or 5 if the last",
    )
    yield (
        ["inception", dit_file, new, "--item=ema"],
        "--item: is for --source=dit or diffusers or sd-vae, not inception",
    )
    yield ["workdir", folder / "empty", folder / "x.safetensors"], "holds no config.json"
    yield ["workdir", full, folder / "x.pt"], "that ends in .safetensors, or a folder for diffusers"
    yield ["dits", dit_file, new], "--source"


def test_what_the_job_cannot_do_is_one_line_and_leaves_nothing(files, tmp_path, cache_dir):
    commands = list(wrong_commands(files, tmp_path))
    before = tree(tmp_path)
    for (source, weights, out, *more), expected in commands:
        code, stdout, err = convert(cache_dir, f"--source={source}", f"--weights={weights}", f"--out={out}", *more)
        assert (code, stdout) == (2, "") and err.count("\n") == 1 and expected in err, (source, weights, code, err)
    assert tree(tmp_path) == before and not (tmp_path / "new").exists() and not (ROOT / "owned").exists()


def test_a_full_disk_leaves_nothing_and_a_killed_jobs_rest_is_removed(files, tmp_path, cache_dir):
    out = tmp_path / "w"
    command = ["--source=dit", f"--weights={files / 'dit.safetensors'}", f"--out={out}", "--heads=2", "--classes=5"]
    code, _, err = run("convert", *command, cache_dir=cache_dir, file_size=20_000)
    *_, last = err.splitlines()  # before it JAX may say that its cache of programs could not be written
    assert code == 1 and last.startswith("error: ") and "could not be written" in last and "Traceback" not in err, err
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "w.unfinished" / "checkpoints").mkdir(parents=True)
    assert convert(cache_dir, *command)[0] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["w"]


# folders of networks


def network():
    """Nested dicts, one array not in C order."""
    rng = np.random.default_rng(0)
    params = {"a": {"kernel": rng.standard_normal((3, 4), np.float32), "b": {"bias": np.arange(4, dtype=np.float32)}}}
    return params | {"table": rng.standard_normal((2, 2), np.float32)[:, ::-1]}


def test_a_networks_folder_gives_back_what_was_saved(tmp_path):
    config, source = {"channels": [1, 2], "scale": 0.18215}, {"file": "x.pt", "sha256": "0" * 64, "format": "toy"}
    written = save_network(str(tmp_path / "n"), "toy", config, network(), source)
    assert sorted(p.name for p in (tmp_path / "n").iterdir()) == ["meta.json", "weights.safetensors"]
    found, params, meta = load_network(str(tmp_path / "n"), "toy")
    assert found == config and meta == written and meta["parameters"] == 20 and meta["source"] == source
    same(params, network())
    save_network(str(tmp_path / "again"), "toy", config, network(), source)
    assert tree(tmp_path / "n") == tree(tmp_path / "again")


def test_a_networks_folder_is_read_strictly(tmp_path):
    folder = tmp_path / "n"
    save_network(str(folder), "toy", {}, network(), {"file": "x"})
    meta, weights = (folder / "meta.json").read_text(), (folder / "weights.safetensors").read_bytes()
    with pytest.raises(UsageError, match="found a network of kind 'toy', expected 'sd-vae'"):
        load_network(str(folder), "sd-vae")
    with pytest.raises(UsageError, match=r"cannot be read .* expected a folder made by dit_jax.convert"):
        load_network(str(tmp_path), "toy")
    (folder / "weights.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(UsageError, match=r"weights.safetensors: found sha256 .* convert the network again"):
        load_network(str(folder), "toy")
    (folder / "weights.safetensors").unlink()
    with pytest.raises(UsageError, match=r"weights.safetensors: missing"):
        load_network(str(folder), "toy")
    (folder / "weights.safetensors").write_bytes(weights)
    for changed, expected in (
        (meta[:-5], "not readable as JSON"),
        (meta.replace('"parameters": 20', '"parameters": 21'), "found 20 parameters, expected 21"),
        (meta.replace('"parameters": 20', '"parameters": "20"'), "parameters: found a str, expected int"),
        (meta.replace('"config"', '"configs"'), "found other keys than expected"),
        ("[]", "found a list, expected an object"),
    ):
        (folder / "meta.json").write_text(changed)
        with pytest.raises(UsageError, match=expected):
            load_network(str(folder), "toy")


def test_a_network_is_saved_whole_or_not_at_all(tmp_path):
    with pytest.raises(JobError, match="expected names without '/'"):
        save_network(str(tmp_path / "n"), "toy", {}, {"a/b": np.zeros(2)}, {})
    with pytest.raises(JobError, match="not JSON serializable"):
        save_network(str(tmp_path / "n"), "toy", {"x": object()}, network(), {})
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(JobError, match="could not be written"):
        save_network(str(tmp_path / "full"), "toy", {}, network(), {})
    assert sorted(tree(tmp_path)) == ["full/mine.txt"]
