"""A folder of picture files: class folders (a class is the first folder of a path) or flat, without labels."""

import collections
import functools
import os

import numpy as np

from dit_jax.config import DataConfig
from dit_jax.data import pictures
from dit_jax.data.pictures import IMAGES, Listing, suffix
from dit_jax.error import StorageError, UsageError
from dit_jax.files import is_folder, names, read, remote
from dit_jax.log import notice


def list_all(root: str, data: DataConfig) -> Listing:
    """List the pictures below a folder, in order of their paths, of both splits. Raises UsageError naming what does not fit."""
    files = pictures.visible(root)
    found = {name: about["bytes"] for name, about in files.items() if suffix(name) in IMAGES}
    left = collections.Counter(suffix(name) or "without a suffix" for name in files if name not in found)
    if found and left:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in left.most_common(5))
        notice(f"data.folder: {sum(left.values()):,} files in {root!r} that are no pictures are left out ({kinds})")
    tops, held_out = {name.partition("/")[0] for name in found if "/" in name}, None
    folders = [root]
    if pictures.both_or_neither(data, data.split in tops, data.held_out_split in tops, root):
        folders = [os.path.join(root, name) for name in (data.split, data.held_out_split)]
        ours = (f"{data.split}/", f"{data.held_out_split}/")
        found = {name: size for name, size in found.items() if name.startswith(ours)}
        held_out = np.array([name.startswith(ours[1]) for name in found])
    inside = [name.partition("/")[2] if held_out is not None else name for name in found]
    of = [name.rpartition("/")[0].partition("/")[0] for name in inside]  # the class; "" in no class folder
    trained = of if held_out is None else [top for top, test in zip(of, held_out, strict=True) if not test]
    classes = tuple(sorted(set(trained)))
    if (len(classes) > 1 and "" in classes) or set(of) - set(classes):
        odd = next(n for n, top in zip(found, of, strict=True) if top not in classes or (len(classes) > 1 and not top))
        expected = (
            f"in one of the class folders {', '.join(filter(None, classes))}" if any(classes) else "no class folder"
        )
        raise UsageError(f"{os.path.join(root, odd)}: found a picture outside, expected it {expected}"[:2000])
    labels = None
    if any(classes):
        _check_empty(folders[0], classes)
        index = {name: number for number, name in enumerate(classes)}
        labels = np.array([index[top] for top in of])
    paths = tuple(found)
    fetch = functools.partial(_fetch, root, paths, tuple(found.values()))
    return Listing(paths, tuple(found.values()), held_out, labels, classes if any(classes) else (), fetch)


def _check_empty(folder: str, classes: tuple[str, ...]) -> None:
    """Raises UsageError if a class folder on the disk holds no picture."""
    for name in [] if remote(folder) else sorted(set(names(folder)) - set(classes)):
        if not name.startswith(".") and is_folder(os.path.join(folder, name)):
            raise UsageError(
                f"data.folder: class {name}: found no pictures in {os.path.join(folder, name)!r}, expected at least one (links to "
                "folders are not followed); add some, or delete the folder"
            )


def _fetch(root: str, paths: tuple, sizes: tuple, records: list[int]) -> list[bytes]:
    return [_content(os.path.join(root, paths[i]), sizes[i]) for i in records]


def _content(path: str, size: int) -> bytes:
    """Read a picture of `size` bytes, as it was listed."""
    if not size:  # what has no size may be a pipe, which would be waited for
        raise UsageError(f"{path}: found an empty file, expected a picture")
    try:
        content = read(path, size)
    except StorageError:
        raise
    except OSError as error:
        raise UsageError(f"{path}: cannot read it ({error.strerror})") from error
    if len(content) != size:
        raise UsageError(f"{path}: found another size than the {size:,} bytes at the start: it changed since")
    return content


open_split = functools.partial(pictures.open_split, list_all)
class_names = functools.partial(pictures.class_names, list_all)
