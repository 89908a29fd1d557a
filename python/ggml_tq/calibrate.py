"""Where a model's codebooks come from: exact for a block's dimension, the Gaussian limit, or its own rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ggml_tq.cache_types import BLOCK, CODEBOOK_TYPES, TqType
from ggml_tq.capture import Capture
from ggml_tq.codebook import Codebook, from_samples, solve
from ggml_tq.params import Params, Quantizer
from ggml_tq.signs import ROTATION_SEED, SKETCH_SEED
from ggml_tq.transform import rht

Floats = NDArray[np.float32]
MAX_BLOCKS = 1 << 16  # for each of keys and values: 4 million coordinates


def params_of(
    book: Callable[[TqType], Codebook], rotation_seed: int = ROTATION_SEED, sketch_seed: int = SKETCH_SEED
) -> Params:
    """Parameters with the codebook ``book(type)`` for each type, and kappa from its distortion (format, section 2)."""

    def quantizer(tq: TqType) -> Quantizer:
        b = book(tq)
        return Quantizer(b.centroids_f32, b.kappa if tq.qjl else np.float32(0))

    return Params(rotation_seed, sketch_seed, {name: quantizer(tq) for name, tq in CODEBOOK_TYPES.items()})


def sphere(tq: TqType) -> Codebook:
    """The built-in codebook: exact for a uniform direction in a block's 64 dimensions."""
    return solve(tq.code_bits, BLOCK)


def gaussian(tq: TqType) -> Codebook:
    """The limit of many dimensions, N(0, 1)."""
    return solve(tq.code_bits, None)


def normalized(rows: Floats, signs: Floats) -> Floats:
    """Rotated blocks of unit mean square, (blocks, 64), of rows (..., n) with 64 dividing n: what codes are chosen for.

    Blocks without a finite positive norm are left out.
    """
    y = rht(rows.reshape(-1, BLOCK), signs)
    norm = np.sqrt(np.mean(np.square(y, dtype=np.float64), axis=-1, keepdims=True))
    usable = np.isfinite(norm[:, 0]) & (norm[:, 0] > 0)
    unit: Floats = (y[usable] / norm[usable]).astype(np.float32)
    return unit


def calibrated(capture: Capture, rotation_seed: int = ROTATION_SEED) -> Callable[[TqType], Codebook]:
    """Codebooks from a capture of the model's rows: ``_qjl`` types from keys, ``_mse`` types from keys and values.

    Evenly spaced blocks of all layers, at most MAX_BLOCKS of keys and of values. Raises ValueError where 64 does not
    divide the head dimensions.
    """
    signs = Params(rotation_seed=rotation_seed).rotation_signs

    def sample(rows: Callable[[int], Floats]) -> Floats:
        parts = []
        for layer in capture.layers:
            x = rows(layer)
            if x.shape[-1] % BLOCK:
                raise ValueError(f"layer {layer} has heads of {x.shape[-1]} coordinates, which {BLOCK} does not divide")
            blocks = x.reshape(-1, BLOCK)
            step = max(1, len(blocks) * len(capture.layers) // MAX_BLOCKS)
            parts.append(normalized(blocks[::step], signs))
        return np.concatenate(parts)

    keys = sample(capture.k)
    both = np.concatenate([keys, sample(capture.v)])
    return lambda tq: from_samples(keys if tq.qjl else both, tq.code_bits)
