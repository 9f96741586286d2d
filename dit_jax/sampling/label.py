"""Classes to draw, by their numbers or by names of the data set."""

from collections.abc import Sequence

from dit_jax.config import Config
from dit_jax.data.source import class_names
from dit_jax.error import UsageError, alike


def names_of(cfg: Config) -> tuple[str, ...]:
    """A name for each class of the model: the data set's if it is on this machine and fits, else its number; () without classes."""
    classes = cfg.model.classes
    found = class_names(cfg.data) if classes else ()
    return found if len(found) == classes else tuple(map(str, range(classes)))


def find_classes(values: Sequence[str], cfg: Config) -> tuple[int, ...]:
    """The numbers of the classes that `--labels` names: each a number, a name or a part of one. Raises UsageError."""
    if values and not cfg.model.classes:
        raise UsageError(f"--labels: found {','.join(values)}, expected none: this model has no classes")
    names = () if all(map(_number, values)) else [_plain(name) for name in names_of(cfg)]
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
