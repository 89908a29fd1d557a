"""What every reference quantizer is, and the array helpers that they share.

Arrays are NumPy arrays or torch tensors; array-api-compat makes the two look alike. The last axis holds the ``dim``
coordinates of a vector, any axes before it are a batch.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
from array_api_compat import array_namespace, device
from numpy.typing import NDArray

Array = Any  # the arrays of NumPy and torch share no type
CHUNK = 1 << 20  # numbers in a piece that ``Coder.reconstruct`` works on at a time: they fit a processor's cache


@runtime_checkable
class Quantizer(Protocol):
    """Frozen dataclasses, hashable, of parameters alone: what is random in them follows from their seeds.

    ``name`` says the algorithm and its parameters except the dimension, e.g. "turboquant_mse-3b". ``bits`` is the
    storage a coordinate takes, with every scale, norm and radius counted as binary16; the arithmetic keeps those
    in the input's precision, as rounding them to binary16 adds no more than 2^-22 to the relative squared error.
    """

    @property
    def name(self) -> str: ...

    @property
    def bits(self) -> float: ...

    def reconstruct(self, x: Array) -> Array:
        """Vectors (..., dim) after storage: same shape, dtype, device and kind of array.

        Raises ValueError if the quantizer cannot store vectors of that length.
        """
        ...


class Coder:
    """A quantizer with ``encode`` and ``decode``, whose ``reconstruct`` is the one after the other."""

    def encode(self, x: Array) -> Any:  # noqa: ANN401
        """The code of vectors (..., dim): a tuple of arrays with the same leading axes."""
        raise NotImplementedError

    def decode(self, code: Any) -> Array:  # noqa: ANN401
        """Vectors (..., dim) of a code."""
        raise NotImplementedError

    def reconstruct(self, x: Array) -> Array:
        xp = array_namespace(x)
        vectors(x)  # raises for what are none
        flat = xp.reshape(x, (-1, x.shape[-1]))
        step = max(1, CHUNK // max(1, x.shape[-1]))
        parts = [self.decode(self.encode(flat[i : i + step, :])) for i in range(0, max(1, flat.shape[0]), step)]
        return xp.reshape(xp.astype(xp.concat(parts, axis=0), x.dtype), x.shape)


def vectors(x: Array, dim: int | None = None) -> Array:
    """``x`` itself, or in float32 where it is of a shorter type.

    Raises ValueError unless the numbers are real floating point and the last axis has length ``dim``.
    """
    xp = array_namespace(x)
    if x.ndim == 0 or (dim is not None and x.shape[-1] != dim):
        raise ValueError(f"shape {tuple(x.shape)}: want vectors of {dim if dim is not None else 'some'} coordinates")
    if x.dtype in (xp.float32, xp.float64):
        return x
    if not str(x.dtype).endswith("float16"):  # binary16, and torch's bfloat16
        raise ValueError(f"{x.dtype}: want floating point numbers")
    return xp.astype(x, xp.float32)


def constant(values: NDArray[Any], like: Array) -> Array:
    """NumPy numbers as an array of the dtype, device and kind of ``like``."""
    xp = array_namespace(like)
    return xp.asarray(np.array(values), dtype=like.dtype, device=device(like))


def dot(x: Array, y: Array) -> Array:
    """Inner products over the last axis, which stays with length 1."""
    xp = array_namespace(x, y)
    return xp.sum(x * y, axis=-1, keepdims=True)


def norm(x: Array) -> Array:
    """Euclidean norms over the last axis, which stays with length 1."""
    xp = array_namespace(x)
    return xp.sqrt(dot(x, x))


def divide(x: Array, y: Array) -> Array:
    """x / y, and 0 where y is 0."""
    xp = array_namespace(x, y)
    one = xp.ones_like(y)
    return xp.where(y == 0, xp.zeros_like(y), x / xp.where(y == 0, one, y))
