"""Our parameters as other projects' files hold them: what the readers of `dit_jax.networks` are tested with."""

import jax
import numpy as np

from dit_jax.networks import diffusers_dit, dit, inception, vae


def write_vae(cfg, params):
    """An autoencoder's tensors under diffusers' names and in its layout, float32."""
    name_of = vae._namer(cfg, "", vae._DIFFUSERS)
    found = {name_of(path): np.asarray(leaf, np.float32) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    return {n: np.ascontiguousarray(v.transpose(3, 2, 0, 1) if v.ndim == 4 else v.T) for n, v in found.items()}


def write_inception(params):
    """The Inception network's state dict by its published names."""
    found = {}
    for path, layer in inception._layers(params):
        name, kernel = ".".join(path), np.asarray(layer["kernel"])
        if path == ("fc",):
            found |= {"fc.weight": np.ascontiguousarray(kernel.T), "fc.bias": np.asarray(layer["bias"])}
            continue
        found[f"{name}.conv.weight"] = np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))
        found |= {f"{name}.{theirs}": np.asarray(layer[ours]) for ours, theirs in inception.NORM.items()}
    return found


def write_diffusers_dit(cfg, params):
    """(tensors by name, config.json) of a DiT in diffusers' folder."""
    found = {}
    for name, values in dit.write(cfg, params).items():
        if name == "pos_embed":
            continue
        if diffusers_dit._embedder(name):
            found |= dict.fromkeys(diffusers_dit._places(name, cfg.depth), values)
            continue
        places = diffusers_dit._places(name, 1)
        found |= dict(zip(places, np.split(values, len(places)), strict=True))
    config = {
        "_class_name": diffusers_dit.CLASSES[0],
        "num_attention_heads": cfg.heads,
        "attention_head_dim": cfg.width // cfg.heads,
        "in_channels": cfg.channels,
        "out_channels": cfg.out_channels,
        "num_layers": cfg.depth,
        "sample_size": cfg.input_size,
        "patch_size": cfg.patch,
        "num_embeds_ada_norm": cfg.classes,
        **{key: allowed[0] for key, allowed in list(diffusers_dit.FIXED.items())[:4]},
        "norm_eps": 1e-6,
    }
    return found, config
