"""Every form of weights that `convert` takes, written by PyTorch and diffusers themselves, and read back to equal outputs."""

import argparse
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_zoo import make_run

from dit_jax import checkpoint
from dit_jax.config import Config, DataConfig
from dit_jax.error import UsageError
from dit_jax.models import vae
from dit_jax.networks import dit as published
from dit_jax.networks import folder, transfer

from .test_dit import SMALL, TOLERANCE, call, inputs, ours, peer, random_params, relative

ARRAYS = published.write(SMALL, random_params(SMALL))
OTHERS = published.write(SMALL, random_params(SMALL, seed=5))


def tensors(torch, arrays, dtype="float32"):
    return {name: torch.from_numpy(a.copy()).to(getattr(torch, dtype)) for name, a in arrays.items()}


@pytest.fixture(scope="module")
def module(torch):
    """A module whose state dict has the published names."""
    root = torch.nn.Module()
    for name, value in tensors(torch, ARRAYS).items():
        *parts, leaf = name.split(".")
        inside = root
        for part in parts:
            if not hasattr(inside, part):
                inside.add_module(part, torch.nn.Module())
            inside = getattr(inside, part)
        inside.register_parameter(leaf, torch.nn.Parameter(value, requires_grad=name != "pos_embed"))
    assert root.state_dict().keys() == ARRAYS.keys()
    return root


@pytest.fixture(scope="module")
def expected(torch, diffusers):
    """Outputs of diffusers' model with the weights of each set."""
    found = {}
    for name, seed in (("params", 0), ("ema", 5)):
        with torch.no_grad():
            found[name] = call(torch, peer(torch, diffusers, SMALL, random_params(SMALL, seed)), *inputs(SMALL)).numpy()
    return found


def check(expected, tmp_path, source, weights, which="params", tolerance=TOLERANCE, **options):
    """Convert, and compare the outputs of the run with the peer's."""
    out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
    transfer.import_dit(source, str(weights), str(out), **options)
    cfg, params = checkpoint.load(str(out))
    assert cfg == SMALL
    x, t, labels = inputs(SMALL)
    assert relative(ours(SMALL)(params, x, t.astype(np.float32), labels), expected[which]) <= tolerance


def training_file(torch, module, path):
    """What a training saves: weights, their average, AdamW's state after a step, and its options."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.0)
    sum(p.sum() for p in module.parameters() if p.requires_grad).backward()
    optimizer.step()
    options = argparse.Namespace(model="DiT-XL/2", image_size=64, num_classes=10, results_dir="results", vae="ema")
    ema = tensors(torch, OTHERS)
    torch.save({"model": module.state_dict(), "ema": ema, "opt": optimizer.state_dict(), "args": options}, path)


def test_a_trainings_checkpoint(torch, module, expected, tmp_path):
    path = tmp_path / "0000070.pt"
    training_file(torch, module, path)
    check(expected, tmp_path, "dit", path, "ema", heads=3)  # classes by its options
    check(expected, tmp_path, "dit", path, "ema", heads=3, item="ema", classes=10)
    check(expected, tmp_path, "dit", path, "params", heads=3, item="params", step=70)
    with pytest.raises(UsageError, match="--classes: found 9"):
        transfer.import_dit("dit", str(path), str(tmp_path / "no"), heads=3, classes=9)


@pytest.mark.filterwarnings("ignore")
def test_namespaces_of_options_are_allowed_by_name_and_nothing_else_is(torch, module, tmp_path):
    class Evil(argparse.Namespace):
        pass

    globals()["Evil"] = Evil
    Evil.__qualname__ = "Evil"
    for args in (types.SimpleNamespace(a=1), Evil(a=1), argparse.HelpFormatter):
        torch.save({"model": module.state_dict(), "args": args}, tmp_path / "x.pt")
        with pytest.raises(UsageError, match=r"refused by torch.load\(weights_only=True\)"):
            transfer.import_dit("dit", str(tmp_path / "x.pt"), str(tmp_path / "no"), heads=3, classes=10)
    inside = argparse.Namespace(num_classes="10", hook=argparse.Namespace(num_classes=3))
    torch.save({"model": module.state_dict(), "args": inside}, tmp_path / "x.pt")
    with pytest.raises(UsageError, match="--classes: found nothing, expected 11"):  # a text is no number of classes
        transfer.import_dit("dit", str(tmp_path / "x.pt"), str(tmp_path / "no"), heads=3)


@pytest.mark.parametrize(
    "form", ["plain", "parallel", "compiled", "both", "state_dict", "lightning", "model", "averaged"]
)
@pytest.mark.parametrize("ending", [".pt", ".ckpt"])
def test_wrappers_of_pytorch(torch, module, expected, tmp_path, form, ending):
    parallel = torch.nn.DataParallel(module)
    forms = {
        "plain": lambda: module.state_dict(),
        "parallel": lambda: parallel.state_dict(),
        "compiled": lambda: torch.compile(module).state_dict(),
        "both": lambda: torch.compile(parallel).state_dict(),
        "state_dict": lambda: {"state_dict": module.state_dict(), "epoch": 3},
        "lightning": lambda: {
            "state_dict": {f"model.{n}": v for n, v in module.state_dict().items()},
            "loops": {"a": [1]},
        },
        "averaged": lambda: torch.optim.swa_utils.AveragedModel(module).state_dict(),
        "model": lambda: {"model": parallel.state_dict(), "scheduler": {"last": 7}},
    }
    path = tmp_path / f"x{ending}"
    torch.save(forms[form](), path)
    check(expected, tmp_path, "dit", path, heads=3, classes=10)


@pytest.mark.parametrize("dtype,tolerance", [("bfloat16", 3e-2), ("float16", 3e-3), ("float64", TOLERANCE)])
def test_other_precisions(torch, expected, tmp_path, dtype, tolerance):
    torch.save(tensors(torch, ARRAYS, dtype), tmp_path / "x.pt")
    check(expected, tmp_path, "dit", tmp_path / "x.pt", heads=3, classes=10, tolerance=tolerance)


def test_folders_and_pipelines_of_diffusers(torch, diffusers, expected, tmp_path):
    model = peer(torch, diffusers, SMALL, random_params(SMALL))
    model.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert len(list((tmp_path / "shards").glob("*-of-*.safetensors"))) > 2
    check(expected, tmp_path, "diffusers", tmp_path / "shards")
    half = peer(torch, diffusers, SMALL, random_params(SMALL)).to(torch.float16)
    half.save_pretrained(tmp_path / "half", variant="fp16")
    half.save_pretrained(tmp_path / "half_shards", variant="fp16", max_shard_size="30KB")
    for name in ("half", "half_shards"):
        check(expected, tmp_path, "diffusers", tmp_path / name, tolerance=3e-3)
    autoencoder, scheduler = sixteen(torch, diffusers), diffusers.DDIMScheduler()
    diffusers.DiTPipeline(model, autoencoder, scheduler).save_pretrained(tmp_path / "pipeline")
    check(expected, tmp_path, "diffusers", tmp_path / "pipeline")
    transfer.import_network("sd-vae", str(tmp_path / "pipeline"), str(tmp_path / "network"))
    same_images(torch, autoencoder, tmp_path / "network")


def test_back_out_to_a_folder_that_diffusers_opens(torch, diffusers, expected, tmp_path):
    cfg = Config(model=SMALL, data=DataConfig(image_size=64))
    run, out = tmp_path / "run", tmp_path / "transformer"
    run = make_run(run, cfg)
    _, params = checkpoint.load(run)
    transfer.export_dit(run, str(out))
    model = diffusers.DiTTransformer2DModel.from_pretrained(out).eval()
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    x, t, labels = inputs(SMALL)
    with torch.no_grad():
        theirs = call(torch, model, x, t, labels).numpy()
    assert relative(ours(SMALL)(params, x, t.astype(np.float32), labels), theirs) <= TOLERANCE
    model.save_pretrained(tmp_path / "again")  # and from there to us: the same bits
    transfer.import_dit("diffusers", str(tmp_path / "again"), str(tmp_path / "back"))
    jax.tree.map(np.testing.assert_array_equal, checkpoint.load(str(tmp_path / "back"))[1], params)


def sixteen(torch, diffusers, shift=0.1159, scale=0.3611):
    """An autoencoder as SD3's and FLUX's are: 16 channels, no quant convolutions, a shift."""
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(16, 32),
        layers_per_block=1, latent_channels=16, norm_num_groups=8, scaling_factor=scale, shift_factor=shift,
        use_quant_conv=False, use_post_quant_conv=False,
    ).eval()  # fmt: skip


def same_images(torch, model, network):
    """Moments, images and normalisation of a converted autoencoder are the peer's."""
    found, params, _ = folder.load_network(str(network), "sd-vae")
    cfg = vae.VAEConfig(**{**found, "widths": tuple(found["widths"])})
    assert (cfg.scale, cfg.shift) == (model.config.scaling_factor, model.config.shift_factor) and not cfg.quant
    images = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    with torch.no_grad():
        posterior = model.encode(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).latent_dist
        decoded = model.decode(posterior.mean).sample.permute(0, 2, 3, 1).numpy()
    mean, log_variance = vae.encode(cfg, params, jnp.asarray(images))
    assert relative(mean, posterior.mean.permute(0, 2, 3, 1).numpy()) <= TOLERANCE
    assert relative(log_variance, posterior.logvar.permute(0, 2, 3, 1).numpy()) <= TOLERANCE
    assert relative(vae.decode(cfg, params, mean), decoded) <= TOLERANCE


@pytest.mark.parametrize("shift,scale", [(0.0609, 1.5305), (0.1159, 0.3611)], ids=["SD3", "FLUX"])
def test_autoencoders_of_sixteen_channels(torch, diffusers, tmp_path, shift, scale):
    model = sixteen(torch, diffusers, shift, scale)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["shift_factor"] == shift
    for name in ("whole", "shards"):
        transfer.import_network("sd-vae", str(tmp_path / name), str(tmp_path / f"{name}-n"))
        same_images(torch, model, tmp_path / f"{name}-n")
