"""The autoencoder beside diffusers' AutoencoderKL, in float32: moments, images, gradients, names in both directions."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign import write_vae
from test_vae import latent_diffusion_names

from dit_jax.models import vae
from dit_jax.models.vae import VAEConfig
from dit_jax.networks import vae as foreign
from dit_jax.networks.tensors import Tensors

SMALL = VAEConfig(latent_channels=5, widths=(16, 24, 32), blocks=1, groups=8, scale=0.0)  # 5 channels: no known scale
TOLERANCE = 1e-4  # of the largest number


def arrays(model):
    return {name: value.numpy() for name, value in model.state_dict().items()}


def make_peer(torch, diffusers, cfg):
    """Theirs of this config; biases and norms are drawn too, lest one that is lost or exchanged go unseen."""
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        in_channels=cfg.channels,
        out_channels=cfg.channels,
        down_block_types=("DownEncoderBlock2D",) * len(cfg.widths),
        up_block_types=("UpDecoderBlock2D",) * len(cfg.widths),
        block_out_channels=cfg.widths,
        layers_per_block=cfg.blocks,
        latent_channels=cfg.latent_channels,
        norm_num_groups=cfg.groups,
    )
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim == 1:
                value.add_(0.3 * torch.randn_like(value))
    return model.eval()


@pytest.fixture(scope="module")
def peer(torch, diffusers):
    model = make_peer(torch, diffusers, SMALL)
    with torch.no_grad():
        for conv in (model.encoder.conv_in, model.decoder.conv_in):
            for value in conv.parameters():
                value.mul_(3e-3)  # the first norms' variances are small enough for their eps to show
    return model


@pytest.fixture(scope="module")
def params(peer):
    cfg, params = foreign.read(Tensors(arrays(peer), "diffusers"), SMALL.groups)
    assert cfg == SMALL
    return params


def channels_first(torch, x):
    return torch.from_numpy(np.ascontiguousarray(np.asarray(x).transpose(0, 3, 1, 2)))


def channels_last(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


def assert_close(name, found, expected, tolerance=TOLERANCE):
    assert found.shape == expected.shape
    error = np.abs(found - expected).max() / np.abs(expected).max()
    print(f"{name}: relative error {error:.1e}")
    assert error <= tolerance, f"{name}: {error}"


def compare(torch, model, cfg, params, images):
    with torch.no_grad():
        posterior = model.encode(channels_first(torch, images)).latent_dist
        decoded = model.decode(posterior.mean).sample
    mean, log_variance = jax.jit(functools.partial(vae.encode, cfg))(params, images)
    assert_close("mean", mean, channels_last(posterior.mean))
    assert_close("log variance", log_variance, channels_last(posterior.logvar))
    latents = channels_last(posterior.mean)
    assert_close("images", jax.jit(functools.partial(vae.decode, cfg))(params, latents), channels_last(decoded))
    return mean, log_variance


def random_images(*shape):
    return np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)


def test_a_small_one_of_three_widths(torch, peer, params):
    compare(torch, peer, SMALL, params, random_images(2, 16, 28, 3))


def test_stable_diffusions_config(torch, diffusers):
    cfg = VAEConfig()
    model = make_peer(torch, diffusers, cfg)
    assert sum(value.numel() for value in model.parameters()) == 83_653_863
    found, params = foreign.read(Tensors(arrays(model), "diffusers"))
    assert found == cfg
    compare(torch, model, cfg, params, random_images(1, 64, 48, 3))


def test_log_variances_are_clipped_alike(torch, peer):
    model = copy.deepcopy(peer)
    with torch.no_grad():
        model.quant_conv.bias.copy_(torch.tensor([0.0, 0, 0, 0, 0, 40, -50, 5, 0, -5]))  # means, then log variances
    _, params = foreign.read(Tensors(arrays(model), "diffusers"), SMALL.groups)
    _, log_variance = compare(torch, model, SMALL, params, random_images(2, 8, 8, 3))
    assert (log_variance.min(), log_variance.max()) == vae.LOG_VARIANCE


def test_gradients_of_a_reconstruction_in_every_tensor(torch, peer, params):
    images = jnp.asarray(random_images(2, 8, 12, 3))

    def loss(params):
        mean, log_variance = vae.encode(SMALL, params, images)
        reconstructed = vae.decode(SMALL, params, mean + jnp.exp(0.5 * log_variance))
        return jnp.mean((reconstructed - images) ** 2)

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    theirs = channels_first(torch, images)
    posterior = peer.encode(theirs).latent_dist
    expected = ((peer.decode(posterior.mean + posterior.std).sample - theirs) ** 2).mean()
    peer.zero_grad()
    expected.backward()
    assert float(value) == pytest.approx(expected.item(), rel=TOLERANCE)
    found, worst = write_vae(SMALL, jax.device_get(gradients)), 0.0
    largest = max(float(parameter.grad.abs().max()) for parameter in peer.parameters())
    for name, parameter in peer.named_parameters():
        wanted = parameter.grad.numpy()  # that of a key's bias is 0: softmax does not see it
        error = np.abs(found[name] - wanted).max() / max(np.abs(wanted).max(), 1e-3 * largest)
        worst = max(worst, error)
        assert error <= 1e-3, f"{name}: {error}"
    print(f"gradients: relative error {worst:.1e}")


def test_what_is_written_loads_strictly_and_is_the_same_in_every_bit(torch, diffusers, peer, params):
    written, tensors = write_vae(SMALL, params), arrays(peer)
    assert written.keys() == tensors.keys()
    assert all(np.array_equal(written[name], tensors[name]) for name in tensors)
    again = foreign.read(Tensors(written, "written"), SMALL.groups)[1]
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, again, params)))
    other = make_peer(torch, diffusers, SMALL)
    with torch.no_grad():
        for value in other.parameters():
            value.zero_()
    other.load_state_dict({name: torch.from_numpy(value) for name, value in written.items()}, strict=True)
    latents = torch.randn(1, SMALL.latent_channels, 2, 3)
    with torch.no_grad():
        assert torch.equal(other.decode(latents).sample, peer.decode(latents).sample)


def test_diffusers_reads_latent_diffusions_names_as_we_do(torch, peer, params):
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    tensors = latent_diffusion_names(arrays(peer), foreign.PREFIX)
    converted = convert_ldm_vae_checkpoint(
        {name: torch.from_numpy(value) for name, value in tensors.items()}, dict(peer.config)
    )
    assert converted.keys() == peer.state_dict().keys()
    assert all(torch.equal(value, peer.state_dict()[name]) for name, value in converted.items())
    _, found = foreign.read(Tensors(tensors, "latent diffusion"), SMALL.groups)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, found, params)))
