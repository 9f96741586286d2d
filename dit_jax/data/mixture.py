"""Several data drawn by weights: the `Source` of a mixture, whose order is a closed function of (seed, global position).

With weights w_1, ..., w_k (whole numbers, W their sum), positions q W to (q + 1) W - 1 are period q. A period holds w_i
examples of part i, ordered by hashes of their positions, so after q W examples part i has given q w_i, exactly. Example
number c of part i is the one that this part alone has at position c (`data.order`), with epochs of its own.
"""

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np

from dit_jax.config import DataConfig
from dit_jax.data.counter import MIXTURE, hash_counters
from dit_jax.data.order import make_order
from dit_jax.data.skip import Skips
from dit_jax.error import UsageError


def interleave(weights: tuple[int, ...], positions: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (part (b,), number of that part's examples before (b,)) of the examples at rising positions (b,)."""
    period, slots = sum(weights), np.repeat(np.arange(len(weights)), weights)
    periods = np.arange(positions[0] // period, positions[-1] // period + 1)
    keys = hash_counters(seed, MIXTURE, 0, periods[:, None] * period + np.arange(period))
    parts = slots[np.argsort(keys, axis=1, kind="stable")]
    before = np.zeros_like(parts)
    for part, weight in enumerate(weights):
        here = parts == part
        before += here * (periods[:, None] * weight + np.cumsum(here, axis=1) - 1)
    within = positions - periods[0] * period
    return parts.ravel()[within], before.ravel()[within]


@dataclass(frozen=True)
class _Skips(Skips):
    """Malformed records of all parts. A record is replaced by one of its part."""

    starts: tuple = ()  # of the parts

    def instead(self, index: int, size: int) -> int:
        part = int(np.searchsorted(self.starts, index, "right")) - 1
        start, end = (*self.starts, size)[part : part + 2]
        for i in itertools.chain(range(index, end), range(start, index)):
            if i not in self.found:
                return i
        raise UsageError(
            f"data.skip_bad: found all {end - start} records of part {part + 1} malformed, the last: {self.found[index]}"
        )


@dataclass(frozen=True)
class Mixture:
    """The `Source` of a mixture. Its records are those of the parts, one part after another. `weights` (): of a held-out split."""

    split: str
    parts: tuple
    weights: tuple
    class_names: tuple
    starts: tuple  # the number of each part's first record
    skips: Skips
    key = "data.mixture"

    @property
    def where(self) -> str:
        shares = [f"{weight} of {sum(self.weights)} " for weight in self.weights] or itertools.repeat("")
        return "; ".join(
            f"{share}{part.where} ({len(part):,})" for share, part in zip(shares, self.parts, strict=False)
        )

    @property
    def classes(self) -> int:
        return self.parts[0].classes

    @property
    def image_shape(self) -> tuple:
        return self.parts[0].image_shape

    @property
    def identity(self) -> dict:
        """The weights, and the identity of each part, "1: " and so on before its keys."""
        weights = {"weights": list(self.weights)} if self.weights else {}
        parts = {f"{i}: {k}": v for i, part in enumerate(self.parts, 1) for k, v in part.identity.items()}
        return {"name": "mixture", "split": self.split, **weights, **parts, "records": len(self)}

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, dict]:
        """Read stored arrays and `cond` at `indices`, each from its part. Raises UsageError naming a record of a part."""
        of = np.searchsorted(self.starts, indices, "right") - 1
        rows = [np.flatnonzero(of == i) for i in range(len(self.parts))]
        found = [
            part.read(indices[some] - start)
            for part, start, some in zip(self.parts, self.starts, rows, strict=True)
            if len(some)
        ]
        back = np.argsort(np.concatenate(rows))
        return found[0] if len(found) == 1 else jax.tree.map(lambda *x: np.concatenate(x)[back], *found)

    def training(self, arrays: np.ndarray, positions: np.ndarray, seed: int) -> np.ndarray:
        return self.parts[0].training(arrays, positions, seed)

    def evaluation(self, arrays: np.ndarray) -> np.ndarray:
        return self.parts[0].evaluation(arrays)

    def make_order(self, seed: int) -> Callable[[np.ndarray], np.ndarray]:
        """Make a function: consecutive positions (b,) -> records (b,)."""
        alone = [make_order(len(part), seed) for part in self.parts]

        def records_at(positions: np.ndarray) -> np.ndarray:
            of, count = interleave(self.weights, positions, seed)
            found = np.empty(len(positions), np.int64)
            for i in np.unique(of).tolist():
                found[of == i] = self.starts[i] + alone[i](count[of == i])
            return found

        return records_at

    def drawn(self, count: int, seed: int) -> list[dict]:
        """Return the position of each part after `count` examples: its images drawn so far, and as epochs of its own."""
        period = sum(self.weights)
        some = interleave(self.weights, np.arange(count // period * period, count + 1), seed)[0][:-1]
        counts = np.array(self.weights) * (count // period) + np.bincount(some, minlength=len(self.parts))
        return [{"images": n, "epochs": n / len(part)} for n, part in zip(counts.tolist(), self.parts, strict=True)]

    def overlaps(self, other: "Mixture") -> bool:
        """Return whether a part of one shares a record with a part of the other. Raises UsageError if one model cannot use both."""
        return any(_share(a, b) for a in self.parts for b in other.parts)

    def describe(self) -> dict:
        """Describe what all parts have in common, and then each part. Weights are no part of a split."""
        parts = [part.describe() for part in self.parts]
        common = {key: value for key, value in parts[0].items() if all(one.get(key) == value for one in parts)}
        named = {"autoencoder": parts[0]["autoencoder"]} if "autoencoder" in parts[0] else {}
        whole = hashlib.sha256("".join(one["sha256"] for one in parts).encode()).hexdigest()
        own = {"dataset": "mixture", "split": self.split, "records": len(self), "sha256": whole, "parts": parts}
        return {"image_shape": list(self.image_shape)} | named | common | own


def open_split(data: DataConfig, split: str, open_source: Callable, class_names: Callable) -> Mixture:
    """Open the training split of all parts, or the held-out split of all, each different one once, in the order of the parts.

    `open_source`, `class_names`: for one part. Raises UsageError, also for parts that one model cannot use or that share images.
    """
    if split not in (data.split, data.held_out_split):
        raise UsageError(f"split: found {split!r}, expected {data.split!r} or {data.held_out_split!r} of data.mixture")
    train, titles, found = split == data.split, [], {}
    for number, (row, part) in enumerate(zip(data.mixture, data.parts, strict=True), 1):
        title = f"part {number} ({', '.join(row[1:]) or part.title})"
        try:
            source = open_source(part, part.split if train else part.held_out_split)
        except UsageError as error:
            raise UsageError(f"data.mixture: {title}: {error}") from error
        if train or (source.where, source.identity) not in ((one.where, one.identity) for one in found.values()):
            found[title] = source
            titles.append((title, part))
    parts = tuple(found.values())
    names = [
        (getattr(one, "class_names", ()) or class_names(part)) if one.classes else ()
        for one, (_, part) in zip(parts, titles, strict=True)
    ]
    _check(found, names)
    starts = (0, *itertools.accumulate(map(len, parts[:-1])))
    weights = tuple(row[0] for row in data.mixture) if train else ()
    return Mixture(split, parts, weights, next(filter(None, names), ()), starts, _Skips(data.skip_bad, starts=starts))


def _check(found: dict, names: list[tuple]) -> None:
    """Raises UsageError naming two parts that differ in what a model sees or in their classes, or that share images."""
    facts = {title: _facts(part) for title, part in found.items()}
    (first, expected), *others = facts.items()
    for title, has in others:
        if wrong := next(((a, b) for a, b in zip(has, expected, strict=True) if a != b), None):
            raise UsageError(
                f"data.mixture: {title} has {wrong[0]}, {first} has {wrong[1]}; expected the same of all parts"
            )
    named = [(title, known) for title, known in zip(found, names, strict=True) if known]
    for title, known in named[1:]:
        if known != named[0][1]:
            only = [", ".join(sorted({*a} - {*b})[:8]) for a, b in ((known, named[0][1]), (named[0][1], known))]
            differ = (
                f"only there {only[0]}, only in {named[0][0]} {only[1]}"
                if any(only)
                else f"those of {named[0][0]} in another order"
            )
            raise UsageError(
                f"data.mixture: {title}: found other classes, {differ}; expected the same names in one order: rename them"
            )
    for (title, one), (other, two) in itertools.combinations(found.items(), 2):
        if _share(one, two):
            raise UsageError(f"data.mixture: {title} and {other} share images, expected each image in one part")


def _share(one, two) -> bool:
    return type(one) is type(two) and one.overlaps(two)


def _facts(part) -> tuple[str, ...]:
    """What must be equal in all parts: the form of what is stored, the shape, the number of classes."""
    info = getattr(part, "info", None)
    form = f"latents in {info.dtype} (mirrored: {info.mirrored}, moments: {info.moments})" if info else "images"
    shape = " x ".join(map(str, part.image_shape))
    return form, f"images {shape}", f"{part.classes} classes" if part.classes else "no labels"
