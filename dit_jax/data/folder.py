"""A folder of picture files: class folders (a class is the first folder of a path) or flat, without labels; captions beside them."""

import collections
import functools
import os
import re

import numpy as np

from dit_jax.config import DataConfig
from dit_jax.data import captions, pictures
from dit_jax.data.pictures import IMAGES, Listing, suffix
from dit_jax.error import UsageError
from dit_jax.files import is_folder, names, read, remote
from dit_jax.log import notice

_SPLIT = r"(?i)(train|test|val|dev|eval|held)([-_ ]?(ing|set|id|idation|uation|data|images|split|out|\d))*"
_once = functools.cache(notice)  # the splits of a job list the same folder


def list_all(root: str, data: DataConfig) -> Listing:
    """List the pictures of both splits, in order of their paths. Raises UsageError naming what does not fit."""
    files = pictures.visible(root)
    found = {name: about["bytes"] for name, about in files.items() if suffix(name) in IMAGES}
    tops = {name.partition("/")[0] for name in found if "/" in name}
    named = pictures.both_or_neither(data, data.split in tops, data.held_out_split in tops, root)
    ours = (f"{data.split}/", f"{data.held_out_split}/") if named else ""
    paths = [name for name in found if name.startswith(ours)]
    words, used = captions.in_folder(root, files, found, paths, lambda name: name.startswith(ours))
    left = collections.Counter(suffix(name) or "without a suffix" for name in {*files} - {*found} - used)
    if found and left:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in left.most_common(5))
        _once(f"data.folder: files in {root!r} that are no pictures are left out ({kinds})")
    if left := len(found) - len(paths):
        _once(f"data.folder: {left:,} pictures outside {data.split!r} and {data.held_out_split!r} are left out")
    test = np.array([named and name.startswith(ours[1]) for name in paths], bool)
    of = np.array(["".join(name.split("/")[named:-1][:1]) for name in paths], str)  # the class; "" in no folder
    classes = np.unique(of[~test]).tolist()
    flat, known = not any(classes), {*classes}
    for name, top in zip(paths, of.tolist(), strict=True):
        if top not in known or not (top or flat):
            where = f"outside the class folders ({', '.join(filter(None, classes))})"
            raise UsageError(f"{os.path.join(root, name)}: found a picture {where}, expected all in them, or none")
    folder = os.path.join(root, data.split) if named else root
    for name in [] if flat or remote(root) else sorted({*names(folder)} - known):
        if not pictures.hidden(name) and is_folder(os.path.join(folder, name)):
            expected = "expected at least one (links to folders are not followed); add some, or delete the folder"
            raise UsageError(f"data.folder: class {name}: found no pictures in {folder!r}, {expected}")
    _check_classes(root, [] if flat else [name.split("/")[named:-1] for name in paths])
    labels = None if flat else np.searchsorted(classes, of)
    return Listing(
        paths, [found[name] for name in paths], test if named else None, labels, () if flat else tuple(classes),
        lambda records: [_content(os.path.join(root, paths[i]), found[paths[i]]) for i in records], words,
    )  # fmt: skip


def _check_classes(root: str, folders: list[list[str]]) -> None:
    """Raises UsageError if the classes, each picture's first folder, all have names of splits, or hold the same folders."""
    inside = {}
    for top, *deeper in folders:
        inside.setdefault(top, set()).add(deeper[0] if deeper else "")
    held, *others = inside.values() or [set()]
    same = others and len(held) > 1 and "" not in held and all(some == held for some in others)
    why = f"all hold the folders {', '.join(sorted(held)[:4])}" if same else ""
    if inside and (why := "are named like splits" if all(re.fullmatch(_SPLIT, top) for top in inside) else why):
        advice = "for splits name two in data.split and data.held_out_split, for classes rename them or what they hold"
        raise UsageError(f"data.folder: found classes {', '.join([*inside][:4])} in {root!r}, which {why}; {advice}")


def _content(path: str, size: int) -> bytes:
    with pictures.reading(path, size):
        content = read(path, size)
    if len(content) != size:
        raise UsageError(f"{path}: found another size than the {size:,} bytes at the start: it changed since")
    return content


open_split = functools.partial(pictures.open_split, list_all)
