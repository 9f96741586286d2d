"""Counter-based random numbers, independent of any library's stream: a hash of integers, and normals from its bits.

The hash is SplitMix64 (Steele, Lea & Flood 2014); normals are by Box & Muller (1958). A draw depends on (seed, position)
only, not on the batch, the process, or earlier draws.
"""

import numpy as np

ORDER, FLIP, NOISE, CROP, BATCHES, SCENE, MIXTURE, CAPTION, DEGRADE = range(1, 10)  # streams of the hash
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_ROWS = 16  # positions at a time, so that temporaries stay in the cache


def hash_counters(seed: int, stream: int, index: int, counters: np.ndarray) -> np.ndarray:
    """Hash counters to uint64: SplitMix64 chained over seed, stream, index and counter."""
    state = np.zeros(1, np.uint64)
    for word in (seed, stream, index):
        state = _mix(state + np.uint64(word))
    return _mix(state + counters.astype(np.uint64))


def mirrored(seed: int, positions: np.ndarray) -> np.ndarray:
    """Draw whether the examples at the global positions (b,) are mirrored left to right, bool (b,)."""
    return hash_counters(seed, FLIP, 0, positions) >> np.uint64(63) == 1


def normals(seed: int, positions: np.ndarray, size: int, stream: int = NOISE) -> np.ndarray:
    """Draw standard normals float32 (b, size); row i depends on (seed, positions[i]) only.

    The uniforms have 32 bits, so no value exceeds 6.7. The bits are the same everywhere, but the last digit of NumPy's
    float32 logarithm, sine and cosine may differ between kinds of processors.
    """
    keys = hash_counters(seed, stream, 0, positions)
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
