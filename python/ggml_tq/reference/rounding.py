"""Rounding to a codebook, which EDEN, PolarQuant and TurboQuant share."""

from __future__ import annotations

import numpy as np
from array_api_compat import array_namespace, device
from numpy.typing import NDArray

from ggml_tq.reference.protocol import Array, constant

FEW = 31  # up to so many thresholds, comparing with each is faster than a binary search


def nearest(u: Array, thresholds: NDArray[np.float64]) -> Array:
    """Indices, uint8: the number of thresholds below each ``u``, at most 255 of them."""
    xp = array_namespace(u)
    t = constant(thresholds, u)
    if len(thresholds) > FEW:
        return xp.astype(xp.searchsorted(t, u), xp.uint8)
    index = xp.zeros(u.shape, dtype=xp.uint8, device=device(u))
    for k in range(len(thresholds)):
        index += xp.astype(u > t[k], xp.uint8)
    return index


def lookup(centroids: NDArray[np.float64], index: Array, like: Array) -> Array:
    """The centroid of each index, in the dtype of ``like``."""
    xp = array_namespace(like)
    return constant(centroids, like)[xp.astype(index, xp.int32)]
