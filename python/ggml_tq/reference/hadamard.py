"""The two randomized Hadamard transforms of 64 coordinates (docs/format.md, section 3), in binary32.

Every function works on the last axis, which must have length 64, and returns a new float32 array.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ggml_tq.reference.signs import ROTATION_WORD, SKETCH_WORD, sign_vector

Array = NDArray[np.float32]
BLOCK = 64
_SCALE = np.float32(0.125)  # 1/sqrt(64)
_ROTATION = sign_vector(ROTATION_WORD)
_SKETCH = sign_vector(SKETCH_WORD)


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


def rotate(x: Array) -> Array:
    return fwht(x * _ROTATION) * _SCALE


def unrotate(y: Array) -> Array:
    """Inverse of ``rotate``."""
    return fwht(y) * _SCALE * _ROTATION


def sketch(y: Array) -> Array:
    return fwht(y * _SKETCH) * _SCALE


def unsketch(w: Array) -> Array:
    """Inverse of ``sketch``."""
    return fwht(w) * _SCALE * _SKETCH
