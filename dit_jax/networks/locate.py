"""Finds weights in the forms that people have: files, checkpoints of a training, folders of diffusers and of transformers (also half,
in shards), pipelines."""

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from dit_jax.error import UsageError, shown
from dit_jax.files import file_sha256, is_file, is_folder, read_json
from dit_jax.networks.tensors import Tensors
from dit_jax.networks.weights import fetched, read_file

STEM = "diffusion_pytorch_model"  # of a file of weights in a folder of diffusers
DIFFUSERS, TRANSFORMERS = (STEM, STEM), ("model", "pytorch_model")  # that of each ending
VARIANTS, ENDINGS = ("", ".fp16", ".bf16"), (".safetensors", ".bin")  # the full precision first
WRAPPERS = (
    "module",
    "_orig_mod",
    "state_dict",
)  # DataParallel, torch.compile, Lightning: parts of names that say nothing
COUNTER = "n_averaged"  # of PyTorch's AveragedModel


@dataclass(frozen=True)
class Found:
    """Where weights lie: `files`; `config`, the config.json beside them, or ""; `index`, tensor -> file of a sharded folder."""

    name: str
    files: tuple
    config: str
    index: Mapping

    def describe(self, form: str, item: str = "") -> dict:
        """Return the origin of weights, as kept in checkpoints and network folders."""
        digests = [file_sha256(file) for file in self.files]
        lines = "".join(f"{digest}  {os.path.basename(f)}\n" for digest, f in zip(digests, self.files, strict=True))
        whole = digests[0] if len(digests) == 1 else hashlib.sha256(lines.encode()).hexdigest()
        chosen = {"item": item} if item else {}
        return {"file": os.path.basename(self.name), "sha256": whole, "format": form} | chosen


def find(weights: str, part: str, stems: tuple[str, str] = DIFFUSERS) -> Found:
    """Find a file, or the weights in a folder of diffusers or in the folder `part` of a pipeline's root. Raises UsageError.

    `stems`: TRANSFORMERS for a folder of transformers.
    """
    if is_file(weights):
        return Found(weights, (weights,), "", {})
    if not is_folder(weights):
        raise UsageError(f"--weights: no file or folder {weights!r}")
    kinds = list(zip(stems, ENDINGS, strict=True))
    pairs = [(f"{stem}{v}{end}", f"{stem}{end}.index{v}.json") for v in VARIANTS for stem, end in kinds]
    for folder in (weights, os.path.join(weights, part)):
        config = os.path.join(folder, "config.json")
        config = config if is_file(config) else ""
        for whole, index in pairs:
            if is_file(path := os.path.join(folder, whole)):
                return Found(path, (path,), config, {})
            if is_file(path := os.path.join(folder, index)):
                shards = _shards(path)
                return Found(path, tuple(sorted({os.path.join(folder, s) for s in shards.values()})), config, shards)
    forms = f"{pairs[0][0]} (or {pairs[0][1]}), or {pairs[1][0]}"
    raise UsageError(f"--weights: {weights!r}: found none of {forms}, in the folder or in {part}/")


@contextlib.contextmanager
def fetched_files(found: Found) -> Iterator[Found]:
    """Yield what was found with its files on the disk."""
    with contextlib.ExitStack() as stack:
        files = tuple(stack.enter_context(fetched(file)) for file in found.files)
        yield dataclasses.replace(found, files=files)


def _shards(path: str) -> dict:
    """Return tensor -> file name of an index. Raises UsageError if it names files elsewhere, or none."""
    found = read_json(path).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise UsageError(f"{path}: weight_map: found {shown(found)}, expected a file for each tensor")
    for name, file in found.items():
        if not isinstance(file, str) or os.path.basename(file) != file or not file.endswith(ENDINGS):
            raise UsageError(f"{path}: {name}: found the file {shown(file)}, expected one of this folder")
    return found


def read(
    found: Found, marker: str, item: str = "", unused: Callable[[str], bool] = lambda name: False
) -> tuple[Tensors, dict, str]:
    """Read (tensors, the file's notes, a line that says what was found). `marker`: a tensor that the network has.

    `item`: "ema" or "params", for a file that holds both; by default the EMA. Raises UsageError if it does not. Tensors that are
    `unused(name)` are not read.
    """
    arrays, notes, group = {}, {}, ""

    def choose(names: list) -> dict:
        nonlocal group
        names = [name for name in names if not unused(name)]
        kept, group = (
            (dict(zip(names, names, strict=True)), "") if found.index else _choose(found.name, names, marker, item)
        )
        return kept

    for file in found.files:
        part, said = read_file(file, choose=choose)
        notes |= said
        if found.index and (other := [n for n in part if found.index.get(n) != os.path.basename(file)]):
            raise UsageError(f"{file}: found {other[0]!r}, which {found.name} does not place there")
        arrays |= part
    if missing := [name for name in found.index if name not in arrays and not unused(name)]:
        raise UsageError(f"{found.name}: {missing[0]}: missing from {found.index[missing[0]]}")
    kinds = ", ".join(sorted({a.dtype.name for a in arrays.values()}))
    line = f"{found.name}: {len(arrays)} tensors of {kinds}" + (f", {group} of the file's groups" if group else "")
    return Tensors(arrays, found.name), notes, line


def _choose(where: str, names: list, marker: str, item: str) -> tuple[dict, str]:
    """Return ({name: new name} of one set of weights in a file, its group, "" without groups)."""
    parts = {name: name.split(".") for name in names if not name.endswith(COUNTER)}
    clean = {name: ".".join(part for part in found if part not in WRAPPERS) for name, found in parts.items()}
    if len(set(clean.values())) < len(clean):
        raise UsageError(
            f"{where}: found the same tensors with and without one of {', '.join(WRAPPERS)} in their names"
        )
    groups = [n.removesuffix(marker) for n in clean.values() if n == marker or n.endswith(f".{marker}")]
    averages = [g for g in groups if "ema" in g]
    fitting = averages if item == "ema" else [g for g in groups if g not in averages]
    fitting = (averages or fitting) if not item else fitting
    if groups and (len(fitting) != 1 or (item and len(groups) == 1 and groups == [""])):
        held = ", ".join(repr(g.rstrip(".")) for g in groups) if groups != [""] else "one set without a name"
        raise UsageError(f"{where}: --item: found weights {held}, expected one {item or 'ema'} among several")
    prefix = fitting[0] if groups else ""
    others = tuple(g for g in groups if g not in ("", prefix))
    kept = {n: new[len(prefix) :] for n, new in clean.items() if new.startswith(prefix) and not new.startswith(others)}
    return kept, prefix.rstrip(".")
