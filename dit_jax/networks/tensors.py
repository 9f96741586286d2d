"""Named tensors of a file, which must all be present, have their shapes, and be used."""

import numpy as np

from dit_jax.error import UsageError, alike


class Tensors:
    """A file's arrays, taken one by one; `done` raises if some were not taken.

    `where` names the file in errors, which are UsageErrors.
    """

    def __init__(self, arrays: dict[str, np.ndarray], where: str):
        self.arrays, self.where, self.left = arrays, where, set(arrays)

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without taking it."""
        return self._find(name).shape

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Return the float32 values of a tensor of floats, in their own layout."""
        return np.asarray(self._check(name, shape), np.float32)

    def pop(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Return the values of a tensor of floats in its own dtype and let go of it, so that a large file is not held twice."""
        values = self._check(name, shape)
        del self.arrays[name]
        return values

    def _check(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        found = self._find(name)
        if found.shape != tuple(shape):
            raise UsageError(f"{self.where}: {name}: found shape {found.shape}, expected {tuple(shape)}")
        if not (np.issubdtype(found.dtype, np.floating) or found.dtype.name == "bfloat16"):
            raise UsageError(f"{self.where}: {name}: found {found.dtype}, expected floats")
        if not np.isfinite(found).all():
            raise UsageError(f"{self.where}: {name}: holds numbers that are not finite")
        self.left.discard(name)
        return found

    def skip(self, *names: str) -> None:
        """Ignore tensors if they are present (counters, tables that are recomputed)."""
        self.left.difference_update(names)

    def done(self) -> None:
        if self.left:
            few = ", ".join(sorted(self.left)[:5])
            raise UsageError(f"{self.where}: found {len(self.left)} tensors that the network does not have: {few}")

    def _find(self, name: str) -> np.ndarray:
        if name not in self.arrays:
            hint = "".join(f"; the nearest is {near}" for near in alike(name, self.arrays))
            raise UsageError(f"{self.where}: {name}: missing, among {len(self.arrays)} tensors{hint}")
        return self.arrays[name]
