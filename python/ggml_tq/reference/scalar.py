"""Uniform scalar quantization by the largest magnitude of a group: the baselines.

``Q4_0`` and ``Q8_0`` are the rules of upstream's quantize_row_q4_0_ref and quantize_row_q8_0_ref
(ggml/src/ggml-quants.c) bit for bit, their binary16 scales included: in binary32, every operation rounded. Where a
compiler fuses the multiplication and the addition of q4_0, one value in some millions is a tie that rounds otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from array_api_compat import array_namespace

from ggml_tq.reference.protocol import Array, Coder, divide, vectors


class ScalarCode(NamedTuple):
    levels: Array  # (..., dim/group, group), integers as floats
    scale: Array  # (..., dim/group, 1)


def _groups(x: Array, group: int) -> Array:
    xp, x = array_namespace(x), vectors(x)
    if x.shape[-1] % group:
        raise ValueError(f"shape {tuple(x.shape)}: {group} must divide the length of a vector")
    return xp.reshape(x, (*x.shape[:-1], x.shape[-1] // group, group))


def _inverse(d: Array) -> Array:
    """1/d, and 0 where the binary16 scale is 0: whatever upstream's levels are there, the values are 0."""
    xp = array_namespace(d)
    return divide(xp.ones_like(d), xp.where(xp.astype(d, xp.float16) == 0, xp.zeros_like(d), d))


def _vectors(groups: Array) -> Array:
    xp = array_namespace(groups)
    return xp.reshape(groups, (*groups.shape[:-2], groups.shape[-2] * groups.shape[-1]))


@dataclass(frozen=True)
class Absmax(Coder):
    """2^b equal cells between -max and max of each group, and their midpoints as levels.

    The error is at most max * 2^-b, which no other 2^b levels between -max and max can better.
    """

    b: int
    group: int = 32

    @property
    def name(self) -> str:
        return f"absmax-{self.b}b"

    @property
    def bits(self) -> float:
        return self.b + 16 / self.group

    def encode(self, x: Array) -> ScalarCode:
        xp, x = array_namespace(x), _groups(x, self.group)
        top = xp.max(xp.abs(x), axis=-1, keepdims=True)
        half = 2 ** (self.b - 1)
        return ScalarCode(xp.clip(xp.floor(divide(x, top) * half), -half, half - 1), top)

    def decode(self, code: ScalarCode) -> Array:
        return _vectors((code.levels + 0.5) * (code.scale / 2 ** (self.b - 1)))


@dataclass(frozen=True)
class Q8_0(Coder):
    """Upstream's q8_0: 32 signed bytes and a binary16 scale max/127."""

    name: str = "q8_0"
    bits: float = 8.5

    def encode(self, x: Array) -> ScalarCode:
        xp = array_namespace(x)
        x = xp.astype(_groups(x, 32), xp.float32)
        d = xp.max(xp.abs(x), axis=-1, keepdims=True) / 127
        v = x * _inverse(d)
        whole = xp.trunc(v)  # C's roundf: halves away from 0
        levels = whole + xp.where(xp.abs(v - whole) >= 0.5, xp.sign(v), xp.zeros_like(v))
        return ScalarCode(levels, xp.astype(d, xp.float16))

    def decode(self, code: ScalarCode) -> Array:
        return _vectors(code.levels * vectors(code.scale))


@dataclass(frozen=True)
class Q4_0(Coder):
    """Upstream's q4_0: 32 levels of 4 bits and a binary16 scale. The largest magnitude is the level -8 or nearly so."""

    name: str = "q4_0"
    bits: float = 4.5

    def encode(self, x: Array) -> ScalarCode:
        xp = array_namespace(x)
        x = xp.astype(_groups(x, 32), xp.float32)
        # of equal magnitudes the first counts, with its sign
        where = xp.argmax(xp.abs(x), axis=-1, keepdims=True)
        d = xp.take_along_axis(x, where, axis=-1) / -8
        v = xp.trunc(x * _inverse(d) + 8.5)
        return ScalarCode(xp.clip(v, None, 15) - 8, xp.astype(d, xp.float16))

    def decode(self, code: ScalarCode) -> Array:
        return _vectors(code.levels * vectors(code.scale))
