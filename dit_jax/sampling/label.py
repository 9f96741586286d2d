"""Classes to draw, by their numbers or by names of the data set."""

import os
from collections.abc import Sequence

from dit_jax.config import Config
from dit_jax.data.source import class_names
from dit_jax.error import UsageError, alike
from dit_jax.files import is_file, json_text, read_json, write_file

NAMES = "classes.json"  # in a run's folder


def keep_names(workdir: str, names: Sequence[str]) -> None:
    """Write the names of a run's classes into its folder, as a folder of pictures may change, and its names with it."""
    if names:
        write_file(os.path.join(workdir, NAMES), json_text({"names": [*names]}) + "\n")


def known_names(cfg: Config, workdir: str) -> tuple[str, ...]:
    """The name of each class of a run's model: as the run keeps it, else as the data have it; () if neither says, or without classes."""
    classes, path = cfg.model.classes, os.path.join(workdir, NAMES)
    kept = read_json(path).get("names") if classes and is_file(path) else None
    found = tuple(map(str, kept)) if isinstance(kept, list) else class_names(cfg.data) if classes else ()
    return found if len(found) == classes else ()


def names_of(cfg: Config, workdir: str) -> tuple[str, ...]:
    """A name for each class of a run's model, its number if no name is known; () without classes."""
    return known_names(cfg, workdir) or tuple(map(str, range(cfg.model.classes)))


def find_classes(values: Sequence[str], cfg: Config, workdir: str) -> tuple[int, ...]:
    """The numbers of the classes that `--labels` names: each a number, a name or a part of one. Raises UsageError."""
    if values and not cfg.model.classes:
        raise UsageError(f"--labels: found {','.join(values)}, expected none: this model has no classes")
    names = () if all(map(_number, values)) else [_plain(name) for name in names_of(cfg, workdir)]
    for value in values:
        if _number(value) and not int(value) < cfg.model.classes:
            expected = f"expected class numbers from 0 to {cfg.model.classes - 1}, with commas"
            raise UsageError(f"--labels: found {value!r}, {expected}")
    return tuple(int(value) if _number(value) else _named(value, names) for value in values)


def _number(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def _plain(text: str) -> str:
    return " ".join(text.casefold().replace("_", " ").replace("-", " ").split())


def _named(value: str, names: Sequence[str]) -> int:
    fitting = [i for i, name in enumerate(names) if name == _plain(value)]
    fitting = fitting or [i for i, name in enumerate(names) if _plain(value) and _plain(value) in name]
    if len(fitting) > 1:
        some = ", ".join(f"{names[i]} ({i})" for i in fitting[:4]) + ", ..." * (len(fitting) > 4)
        raise UsageError(f"--labels: found {value!r}, which names {len(fitting)} classes: {some}; expected one")
    if not fitting:
        near = "".join(f"; did you mean {name!r}?" for name in alike(_plain(value), names, cutoff=0.4)[:1])
        numbers = f"class numbers from 0 to {len(names) - 1}, or names, if the data set is on this machine"
        raise UsageError(f"--labels: found {value!r}, expected {numbers}, with commas{near}")
    return fitting[0]
