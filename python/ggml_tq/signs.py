"""Sign words of the two randomized Hadamard transforms (docs/format.md, section 3)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

ROTATION_SEED = 0x7475726263617368  # "turbcash"
SKETCH_SEED = 0x716A6C736B657463  # "qjlsketc"
_MASK = 2**64 - 1


def splitmix64(seed: int) -> Iterator[int]:
    """The unbounded stream of 64-bit outputs of SplitMix64 from the state ``seed``."""
    while True:
        seed = (seed + 0x9E3779B97F4A7C15) & _MASK
        z = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        yield z ^ (z >> 31)


def sign_word(seed: int) -> int:
    """The 64-bit sign word of a seed: bit i = 1 means that coordinate i changes sign."""
    return next(splitmix64(seed))


def sign_vector(word: int) -> NDArray[np.float32]:
    """A sign word as 64 numbers +1 (bit 0) or -1 (bit 1)."""
    return np.array([-1 if word >> i & 1 else 1 for i in range(64)], dtype=np.float32)
