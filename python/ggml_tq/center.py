"""Centered keys (docs/format.md, section 10): what a key's center is at its token's position, bit for bit.

A center m is a vector in the basis before RoPE. The cache holds key - X_p(m) for position p, and attention adds
<q, X_p(m)> to the score. X_p is RoPE made from a table, so that encoder and attention have the same bits. The key at
position 0, which most models make their attention's sink, has a center of its own: it is hardly ever like the others,
but in most layers the same for every text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ggml_tq.params import ParamsError, fnv1a

Floats = NDArray[np.float32]
Kind = Literal["none", "bias", "mean"]
KINDS: tuple[Kind, ...] = get_args(Kind)
BIAS_HASH = 0x62696173  # "bias"
MAX_CENTER = np.float32(1e6)
MAX_SCALE = np.float32(1024)
PAGE = 256  # positions, rows of a part of the table
PARTS = 3  # digits of a position in base PAGE


# ---- what a model's keys are centered by


@dataclass(frozen=True)
class Centers:
    """``kind`` and, for ``mean``, all centers and scales: layers in order, each its key heads one after another."""

    kind: Kind
    key: Floats | None = None
    scale: Floats | None = None  # of the rows' coordinates; for `mean` ones, if not given
    first: Floats | None = None  # centers at position 0; the same as elsewhere, if not given

    def __post_init__(self) -> None:
        if self.key is not None and self.scale is None:
            object.__setattr__(self, "scale", np.ones_like(self.key))

    @cached_property
    def hash(self) -> int:
        """Of ``mean``: 64-bit FNV-1a of the bytes of centers, scales, and what is given for position 0. Of ``bias``: as
        if a layer has one.
        """
        if self.key is not None:
            assert self.scale is not None
            parts = (self.key, self.scale) if self.first is None else (self.key, self.scale, self.first)
            return fnv1a(b"".join(p.astype("<f4").tobytes() for p in parts))
        return BIAS_HASH if self.kind == "bias" else 0


def check_centers(values: ArrayLike, want: int, key: str) -> Floats:
    """``values`` as ``want`` centers in float32; raises ParamsError, which names ``key``, if they are not valid."""
    m = np.array(values, dtype=np.float32)
    if m.shape != (want,):
        raise ParamsError(key, f"{m.size} numbers, want {want}")
    if not np.isfinite(m).all():
        raise ParamsError(key, "a number is not finite")
    if want and np.max(np.abs(m)) >= MAX_CENTER:
        raise ParamsError(key, f"a number is not below {MAX_CENTER:g} in magnitude")
    m.flags.writeable = False
    return m


def check_scales(values: ArrayLike, want: int, key: str) -> Floats:
    """``values`` as ``want`` scales in float32; raises ParamsError, which names ``key``, if they are not valid."""
    s = np.array(values, dtype=np.float32)
    if s.shape != (want,):
        raise ParamsError(key, f"{s.size} numbers, want {want}")
    if not np.all((s >= 1 / MAX_SCALE) & (s <= MAX_SCALE)):
        raise ParamsError(key, "a number is not from 1/1024 to 1024")
    s.flags.writeable = False
    return s


# ---- centers at positions


def make_table(freqs: ArrayLike) -> Floats:
    """The rotation table of a layer whose pairs turn by ``freqs`` (n_rot/2,) radians a position: (768, n_rot).

    Row 256 k + j has the cosines, then the sines, of 256^k j positions.
    """
    f = np.asarray(freqs, dtype=np.float64)
    position = (np.arange(PAGE) * PAGE ** np.arange(PARTS)[:, None]).reshape(-1, 1)
    angles = position * f
    # the C library's functions, not NumPy's, whose last bits can differ
    parts = [np.array([function(a) for a in angles.flat]).reshape(angles.shape) for function in (math.cos, math.sin)]
    return np.concatenate(parts, axis=1).astype(np.float32)


@dataclass(frozen=True)
class Turn:
    """RoPE of one layer as X_p applies it, to the first n_rot coordinates of a head.

    What RoPE multiplies them by besides (YaRN's magnitude) is not in the table; whoever makes a center scales it.
    """

    table: Floats  # (768, n_rot)
    neox: bool  # pairs are (i, i + n_rot/2), otherwise (2i, 2i + 1)

    def apply(self, m: ArrayLike, positions: ArrayLike, first: ArrayLike | None = None) -> Floats:
        """X_p(m) of centers m (..., dim) at positions (tokens,): (tokens, ..., dim). Negative positions count as 0.

        ``first``: the centers at position 0, if they are others.
        """
        m = np.asarray(m, dtype=np.float32)
        p = np.maximum(np.asarray(positions, dtype=np.int64), 0) & PAGE**PARTS - 1
        pairs = self.table.shape[1] // 2
        row = self.table[p % PAGE]
        c, s = row[:, :pairs], row[:, pairs:]
        for part in range(1, PARTS):
            digit = (p // PAGE**part % PAGE)[:, None]
            row = self.table[PAGE * part + digit[:, 0]]
            c1, s1 = row[:, :pairs], row[:, pairs:]
            c, s = np.where(digit, c * c1 - s * s1, c), np.where(digit, c * s1 + s * c1, s)
        c, s = (v.reshape(len(p), *(1,) * (m.ndim - 1), pairs) for v in (c, s))
        a, b = (
            (slice(pairs), slice(pairs, 2 * pairs)) if self.neox else (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2))
        )
        x = np.repeat(m[None], len(p), axis=0)
        x[..., a] = m[..., a] * c - m[..., b] * s
        x[..., b] = m[..., a] * s + m[..., b] * c
        if first is not None:
            x[np.asarray(positions) <= 0] = np.asarray(first, dtype=np.float32)
        return x
