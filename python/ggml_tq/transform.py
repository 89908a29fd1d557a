"""The randomized Hadamard transform of 64 coordinates (docs/format.md, section 3), in binary32.

Every function works on the last axis, which must have length 64, and returns a new float32 array.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
BLOCK = 64
_SCALE = np.float32(0.125)  # 1/sqrt(64)


def fwht(v: Array) -> Array:
    """Unnormalized fast Walsh-Hadamard transform, in the specified order of additions."""
    shape = v.shape
    for h in (1, 2, 4, 8, 16, 32):
        pairs = v.reshape(*shape[:-1], BLOCK // (2 * h), 2, h)
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        v = np.stack([low + high, low - high], axis=-2)
    return v.reshape(shape)


def tree_sum(v: Array) -> Array:
    """Sum of the last axis in the specified order of additions; the axis stays, with length 1."""
    for h in (32, 16, 8, 4, 2, 1):
        v = v[..., :h] + v[..., h:]
    return v


def rht(x: Array, signs: Array) -> Array:
    """Randomized Hadamard transform: ``signs`` (64,) of +1 and -1, then FWHT/8. Orthogonal."""
    return fwht(x * signs) * _SCALE


def rht_inverse(y: Array, signs: Array) -> Array:
    return fwht(y) * _SCALE * signs
