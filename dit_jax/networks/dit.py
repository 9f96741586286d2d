"""The published DiT's tensors (Peebles & Xie 2023, PyTorch names) to our parameters, and back.

Their Linear weights are (out, in), ours (in, out). Their blocks are separate tensors, ours one leading layer axis. Their patch
embedding is a convolution (d, c, p, p), ours a Linear of rows (p p c).
"""

import re
from collections.abc import Callable, Iterator, Mapping
from math import isqrt, prod

import numpy as np

from dit_jax.config import SIZES, ModelConfig
from dit_jax.error import UsageError
from dit_jax.flops import TIME_FREQUENCIES
from dit_jax.models.conditioning import positions
from dit_jax.networks.tensors import Tensors

LABELS = "y_embedder.embedding_table.weight"
TABLE = 1e-5  # largest difference of a file's position table, which is fixed, from ours
Take = Callable[[str, tuple[int, ...]], np.ndarray]  # (name, shape) -> values of the tensor
Linear = tuple[str, str, tuple[int, ...], tuple[int, ...]]  # our name, the published one, axes in, axes out


def read(tensors: Tensors, heads: int = 0) -> tuple[ModelConfig, dict]:
    """Read (model config, parameters as NumPy arrays) from a published checkpoint, all of whose tensors are used.

    Sizes are inferred from the shapes, which do not show `heads`: by default the published number for this depth and width.
    Raises UsageError naming a tensor that is missing, unknown, of a wrong shape, not finite, or (`pos_embed`) not our table.
    """
    cfg = _infer(tensors, heads)
    for name, shape in shapes(cfg).items():
        if tensors.shape(name) != shape:
            tensors.take(name, shape)  # raises before the arrays are made
    params = assemble(cfg, tensors.take)
    check_positions(tensors, "pos_embed", cfg)
    tensors.done()
    return cfg, params


def add_null_row(tensors: Tensors, classes: int, said: str = "--classes") -> bool:
    """Return whether the label table has a null row; to a table without one, a row of zeros, never used, is added.

    `classes`: their number, which `said` says; 0 = unknown. Raises UsageError if it is, or the table has another number.
    """
    if LABELS not in tensors:
        return True  # the reader says what is missing
    rows, width = _sizes(tensors, LABELS, 2)
    if classes not in (rows, rows - 1) or not classes:
        with_one = f", or {rows - 1} if the last is the null class" if rows > 1 else ""
        raise UsageError(
            f"{said}: found {classes or 'nothing'}, expected {rows} if each row is a class{with_one}: {tensors.where}: {LABELS} "
            f"has {rows} row{'s'[: rows > 1]}"
        )
    if classes == rows:
        table = tensors.arrays[LABELS]
        tensors.arrays[LABELS] = np.concatenate([table, np.zeros((1, width), table.dtype)])
    return classes != rows


def known_classes(tensors: Tensors, notes: Mapping) -> tuple[int, str]:
    """Return (number of classes, what says so), by a training's `args` or the table's rows; (0, "--classes") if neither does.

    One row is one class. 1000 or 1001 rows are ImageNet's classes, without or with a null class.
    """
    rows = tensors.shape(LABELS)[0] if LABELS in tensors and tensors.shape(LABELS) else 0
    args = notes.get("args")  # a text in some safetensors
    said = args.get("num_classes") if isinstance(args, Mapping) else None
    if type(said) is int:
        return said, "args.num_classes"
    return {1: 1, 1000: 1000, 1001: 1000}.get(rows, 0), f"its {rows} rows" if rows in (1, 1000, 1001) else "--classes"


def write(cfg: ModelConfig, params: dict) -> dict[str, np.ndarray]:
    """Return our parameters under their published names, in C order, with the position table.

    Raises UsageError if the model is no published kind.
    """
    _check_published(cfg)
    found = {"pos_embed": _table(cfg), LABELS: _get(params, "label_embedding/table/embedding")}
    kernel = _get(params, "patch_embedding/kernel").reshape(cfg.patch, cfg.patch, cfg.channels, cfg.width)
    found["x_embedder.proj.weight"] = np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))
    found["x_embedder.proj.bias"] = _get(params, "patch_embedding/bias")
    for ours, theirs, into, out in _linears(cfg):
        kernel, bias = _get(params, f"{ours}/kernel"), _get(params, f"{ours}/bias")
        layers = [(theirs, kernel, bias)]
        if ours.startswith("blocks/"):
            layers = [(theirs.format(i), kernel[i], bias[i]) for i in range(cfg.depth)]
        for name, k, b in layers:
            found[f"{name}.weight"] = np.ascontiguousarray(k.reshape(prod(into), prod(out)).T)
            found[f"{name}.bias"] = b.reshape(-1)
    return found


def assemble(cfg: ModelConfig, take: Take) -> dict:
    """Assemble our parameters from published tensors; `take(name, shape)` returns one."""
    params, d = {}, cfg.width
    weight = take("x_embedder.proj.weight", (d, cfg.channels, cfg.patch, cfg.patch))
    _put(params, "patch_embedding/kernel", np.ascontiguousarray(weight.transpose(2, 3, 1, 0)).reshape(-1, d))
    _put(params, "patch_embedding/bias", take("x_embedder.proj.bias", (d,)))
    _put(params, "label_embedding/table/embedding", take(LABELS, (cfg.classes + 1, d)))
    for ours, theirs, into, out in _linears(cfg):
        layers = cfg.depth if ours.startswith("blocks/") else 1
        kernels, biases = np.empty((layers, *into, *out), np.float32), np.empty((layers, *out), np.float32)
        for i in range(layers):
            name = theirs.format(i)
            kernels[i] = take(f"{name}.weight", (prod(out), prod(into))).T.reshape(*into, *out)
            biases[i] = take(f"{name}.bias", (prod(out),)).reshape(out)
        one = not ours.startswith("blocks/")
        _put(params, f"{ours}/kernel", kernels[0] if one else kernels)
        _put(params, f"{ours}/bias", biases[0] if one else biases)
    return params


def shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Map the name of every tensor of a published checkpoint to its shape."""
    found = {
        "pos_embed": (1, cfg.tokens, cfg.width),
        "x_embedder.proj.weight": (cfg.width, cfg.channels, cfg.patch, cfg.patch),
        "x_embedder.proj.bias": (cfg.width,),
        LABELS: (cfg.classes + 1, cfg.width),
    }
    for ours, theirs, into, out in _linears(cfg):
        for name in [theirs.format(i) for i in range(cfg.depth)] if ours.startswith("blocks/") else [theirs]:
            found |= {f"{name}.weight": (prod(out), prod(into)), f"{name}.bias": (prod(out),)}
    return found


def check_positions(tensors: Tensors, name: str, cfg: ModelConfig) -> None:
    """Raises UsageError unless the file's position table is the model's, within TABLE and rounded to the file's dtype."""
    found, table = tensors.take(name, (1, cfg.tokens, cfg.width)), _table(cfg)
    stored = tensors.arrays[name].dtype
    low, high = ((table + gap).astype(stored).astype(np.float32) for gap in (-TABLE, TABLE))  # rounding keeps the order
    if not ((low <= found) & (found <= high)).all():
        side = cfg.input_size // cfg.patch
        raise UsageError(
            f"{tensors.where}: {name}: differs by up to {np.abs(found - table).max():.3g} from the sin-cos table of a grid "
            f"of {side} x {side} patches, expected at most {TABLE:g} before rounding to {stored}; other positions than the "
            "published model's cannot be taken over"
        )


def known_heads(where: str, depth: int, width: int, heads: int) -> int:
    """Return `heads`; if 0, the heads of the published size of this depth and width. Raises UsageError without one."""
    known = {(d, w): h for d, w, h in SIZES.values()}
    if not heads and (depth, width) not in known:
        raise UsageError(
            f"{where}: found {depth} blocks of width {width}, which is no published size "
            f"({', '.join(f'{name} {d} x {w}' for name, (d, w, _) in SIZES.items())}); "
            "shapes do not show the number of attention heads: say it with --heads"
        )
    return heads or known[depth, width]


def _infer(tensors: Tensors, heads: int) -> ModelConfig:
    width, channels, patch, _ = _sizes(tensors, "x_embedder.proj.weight", 4)
    rows, _ = _sizes(tensors, LABELS, 2)
    _, tokens, _ = _sizes(tensors, "pos_embed", 3)
    hidden, _ = _sizes(tensors, "blocks.0.mlp.fc1.weight", 2)
    out, _ = _sizes(tensors, "final_layer.linear.weight", 2)
    depth = count_blocks(tensors, r"blocks\.(\d+)\.")
    for name, found, expected, right in (
        ("pos_embed", tokens, "a square number of positions", isqrt(tokens) ** 2 == tokens),
        ("blocks.0.mlp.fc1.weight", hidden, f"rows in multiples of the width {width}", hidden % width == 0),
        (
            "final_layer.linear.weight",
            out,
            f"{patch * patch * channels} rows, or with a learned variance {2 * patch * patch * channels}",
            out in (patch**2 * channels, 2 * patch**2 * channels),
        ),
    ):
        if not right:
            raise UsageError(f"{tensors.where}: {name}: found {found}, expected {expected}")
    return make_config(
        tensors.where,
        depth=depth,
        width=width,
        heads=known_heads(tensors.where, depth, width, heads),
        patch=patch,
        input_size=isqrt(tokens) * patch,
        channels=channels,
        classes=rows - 1,
        mlp_ratio=hidden // width,
        learn_sigma=out == 2 * patch**2 * channels,
    )


def make_config(where: str, **values) -> ModelConfig:
    """Make a ModelConfig. Raises UsageError naming the file `where` if a value is invalid."""
    try:
        return ModelConfig(**values)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


def count_blocks(tensors: Tensors, pattern: str) -> int:
    """Return the largest block number + 1. Raises UsageError if that exceeds the number of tensors."""
    numbers = [(int(m[1][:9]), name) for name in tensors.arrays if (m := re.match(pattern, name, re.ASCII))]
    number, name = max(numbers, default=(0, ""))
    if number > len(tensors.arrays):
        raise UsageError(f"{tensors.where}: {name}: found block {number} among {len(tensors.arrays)} tensors")
    return number + 1


def _sizes(tensors: Tensors, name: str, axes: int) -> tuple[int, ...]:
    shape = tensors.shape(name)
    if len(shape) != axes or 0 in shape:
        raise UsageError(f"{tensors.where}: {name}: found shape {shape}, expected {axes} axes, none of them empty")
    return shape


def _linears(cfg: ModelConfig) -> Iterator[Linear]:
    """Yield every Linear except the patch embedding; {} stands for the block number."""
    d, hidden, heads = (cfg.width,), (cfg.mlp_ratio * cfg.width,), (cfg.heads, cfg.width // cfg.heads)
    yield "time_embedding/fc1", "t_embedder.mlp.0", (TIME_FREQUENCIES,), d
    yield "time_embedding/fc2", "t_embedder.mlp.2", d, d
    yield "blocks/modulation/linear", "blocks.{}.adaLN_modulation.1", d, (6 * cfg.width,)
    yield "blocks/attention/qkv", "blocks.{}.attn.qkv", d, (3, *heads)
    yield "blocks/attention/proj", "blocks.{}.attn.proj", heads, d
    yield "blocks/mlp/fc1", "blocks.{}.mlp.fc1", d, hidden
    yield "blocks/mlp/fc2", "blocks.{}.mlp.fc2", hidden, d
    yield "output/modulation/linear", "final_layer.adaLN_modulation.1", d, (2 * cfg.width,)
    yield "output/linear", "final_layer.linear", d, (cfg.patch**2 * cfg.out_channels,)


def _check_published(cfg: ModelConfig) -> None:
    published = {
        "conditioning": "adaln_zero",
        "qk_norm": False,
        "positions": "sincos",
        "block": "dit",
        "target": "",
        "time_scale": 1.0,
        "superres": 0,
    }
    for key, expected in published.items():
        if (found := getattr(cfg, key)) != expected:
            why = f"only 'adaln_zero' with the other defaults of {', '.join([*published][1:])} has published names"
            raise UsageError(f"model.{key}: found {found!r}, expected {expected!r}; {why}")
    if not cfg.classes:
        raise UsageError("model.classes: found 0; only a model with classes has published names")


def _table(cfg: ModelConfig) -> np.ndarray:
    return positions(cfg.input_size // cfg.patch, cfg.width)[None]


def _put(params: dict, path: str, value: np.ndarray) -> None:
    *folders, leaf = path.split("/")
    for name in folders:
        params = params.setdefault(name, {})
    params[leaf] = value


def _get(params: dict, path: str) -> np.ndarray:
    for name in path.split("/"):
        params = params[name]
    return np.ascontiguousarray(params)
