"""Our parameters as other projects' files hold them: what the readers of `dit_jax.networks` are tested with."""

import jax
import numpy as np

from dit_jax.networks import diffusers_dit, inception, vae


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


write_diffusers_dit = diffusers_dit.write
