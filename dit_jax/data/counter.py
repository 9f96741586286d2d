"""Random numbers as functions of counters: a hash of integers, and normals from it, so that no library's stream matters.

The hash is SplitMix64 (Steele, Lea & Flood 2014); normals come from its bits by Box & Muller (1958). What is drawn for a
position depends on (seed, position) only: never on the batch around it, the process, or what was drawn before.
"""

import numpy as np

ORDER, FLIP, NOISE = 1, 2, 3  # streams of the hash
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_ROWS = 16  # positions at a time, so that what they need stays in the processor's cache


def hash_counters(seed: int, stream: int, index: int, counters: np.ndarray) -> np.ndarray:
    """uint64 per counter: SplitMix64 chained over seed, stream, index and counter."""
    state = np.zeros(1, np.uint64)
    for word in (seed, stream, index):
        state = _mix(state + np.uint64(word))
    return _mix(state + counters.astype(np.uint64))


def mirrored(seed: int, positions: np.ndarray) -> np.ndarray:
    """Whether the examples at the global positions (b,) are mirrored left to right, bool (b,)."""
    return hash_counters(seed, FLIP, 0, positions) >> np.uint64(63) == 1


def normals(seed: int, positions: np.ndarray, size: int) -> np.ndarray:
    """Standard normals float32 (b, size), row i a function of (seed, positions[i]) only.

    The uniforms have 32 bits, so no value is beyond 6.7. The bits are the same everywhere; logarithm, sine and cosine
    are numpy's float32 ones, whose last digit may differ between kinds of processors.
    """
    keys = hash_counters(seed, NOISE, 0, positions)
    pairs = (size + 1) // 2
    steps = np.arange(pairs, dtype=np.uint64) * _GAMMA
    found = np.empty((len(keys), 2 * pairs), np.float32)
    for start in range(0, len(keys), _ROWS):
        bits = _mix(keys[start : start + _ROWS, None] + steps).view(np.uint32).reshape(-1, pairs, 2)
        radius = (bits[..., 1].astype(np.float32) + np.float32(0.5)) * np.float32(2**-32)  # in (0, 1]
        radius = np.sqrt(np.float32(-2) * np.log(radius))
        angle = bits[..., 0].astype(np.float32) * np.float32(2 * np.pi * 2**-32)
        rows = found[start : start + _ROWS]
        np.multiply(radius, np.cos(angle), out=rows[:, :pairs])
        np.multiply(radius, np.sin(angle), out=rows[:, pairs:])
    return found[:, :size]


def _mix(z: np.ndarray) -> np.ndarray:
    z = z + _GAMMA
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z
