"""The published weights of the FID network, under the names of PyTorch's conversions of the TensorFlow graph.

`weights-inception-2015-12-05-6726825d.pth` of torch-fidelity and `pt_inception-2015-12-05-6726825d.pth` of pytorch-fid:
`Mixed_5b.branch1x1.conv.weight` (out, in, h, w), `.bn.weight`, `.bn.bias`, `.bn.running_mean`, `.bn.running_var`;
`fc.weight` (1008, 2048), `fc.bias`.
"""

from collections.abc import Iterator

import numpy as np

from dit_jax.error import UsageError
from dit_jax.models import inception
from dit_jax.networks.tensors import Tensors

NORM = {"scale": "bn.weight", "bias": "bn.bias", "mean": "bn.running_mean", "var": "bn.running_var"}


def read(tensors: Tensors) -> dict:
    """Read the parameters of `dit_jax.models.inception`, NumPy float32, from a state dict of the published names.

    Raises UsageError if a tensor is missing, unknown, of a wrong shape or not finite, or a variance is negative.
    """
    params = {}
    for path, shapes in _layers(inception.shapes()):
        layer = _read_fc(tensors, shapes) if path == ("fc",) else _read_conv(tensors, ".".join(path), shapes)
        place = params
        for name in path[:-1]:
            place = place.setdefault(name, {})
        place[path[-1]] = layer
    tensors.done()
    return params


def _layers(tree: dict, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict]]:
    """Yield (path, layer) of all layers with a kernel."""
    if "kernel" in tree:
        yield path, tree
        return
    for name, below in tree.items():
        yield from _layers(below, (*path, name))


def _read_fc(tensors: Tensors, shapes: dict) -> dict:
    width, classes = shapes["kernel"].shape
    kernel = tensors.take("fc.weight", (classes, width)).T
    return {"kernel": np.ascontiguousarray(kernel), "bias": tensors.take("fc.bias", (classes,))}


def _read_conv(tensors: Tensors, name: str, shapes: dict) -> dict:
    h, w, wide_in, wide_out = shapes["kernel"].shape
    kernel = tensors.take(f"{name}.conv.weight", (wide_out, wide_in, h, w)).transpose(2, 3, 1, 0)
    layer = {ours: tensors.take(f"{name}.{theirs}", (wide_out,)) for ours, theirs in NORM.items()}
    if (layer["var"] < 0).any():
        least = layer["var"].min()
        raise UsageError(f"{tensors.where}: {name}.bn.running_var: found {least}, expected variances, none below 0")
    tensors.skip(f"{name}.bn.num_batches_tracked")
    return layer | {"kernel": np.ascontiguousarray(kernel)}
