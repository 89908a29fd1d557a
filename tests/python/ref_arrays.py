"""What the tests of the reference quantizers share: both kinds of arrays, random vectors, and measures of error."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

KINDS = {"numpy": np.asarray, "torch": torch.asarray}
torch.set_num_threads(1)  # small arrays: threads would wait for each other, long where the cores are busy
BOTH = pytest.mark.parametrize("to", KINDS.values(), ids=KINDS)


def unit(rows: int, dim: int, seed: int = 0) -> np.ndarray:
    """Uniform unit vectors (rows, dim), float32."""
    x = np.random.default_rng(seed).standard_normal((rows, dim))
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def at_cosine(x: np.ndarray, cosine: float, seed: int = 1) -> np.ndarray:
    """For each unit vector another at the given cosine to it, otherwise uniform."""
    z = unit(*x.shape, seed=seed).astype(np.float64)
    z -= np.sum(z * x, axis=-1, keepdims=True) * x
    z /= np.linalg.norm(z, axis=-1, keepdims=True)
    return cosine * x + np.sqrt(1 - cosine**2) * z


def vnmse(x: np.ndarray, decoded: Any) -> float:  # noqa: ANN401
    """Squared error relative to the vectors' own squares, over all of them."""
    e = np.asarray(decoded, dtype=np.float64) - x
    return float(np.sum(e * e) / np.sum(np.asarray(x, dtype=np.float64) ** 2))


def slope(x: np.ndarray, decoded: Any) -> float:  # noqa: ANN401
    """<x, decoded> / <x, x> over all vectors: 1 where inner products are unbiased."""
    return float(np.sum(np.asarray(decoded, dtype=np.float64) * x) / np.sum(np.asarray(x, dtype=np.float64) ** 2))


def inner_error(y: np.ndarray, x: np.ndarray, decoded: Any) -> float:  # noqa: ANN401
    """dim * E[<y, decoded - x>^2], the paper's D_prod times dim, for unit vectors y."""
    e = np.asarray(decoded, dtype=np.float64) - x
    return float(x.shape[-1] * np.mean(np.sum(y * e, axis=-1) ** 2))
