"""What was studied and not built (docs/decisions/0009): splits by channel, codebooks a layer, types a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ggml_tq import native
from ggml_tq.cache_types import CODEBOOK_TYPES, TqType
from ggml_tq.capture import Floats
from ggml_tq.codebook import from_samples
from ggml_tq.params import DEFAULT, Params
from ggml_tq.params import Quantizer as Book
from ggml_tq.quantizers import Recipe, Role
from ggml_tq.reference.protocol import Quantizer


@dataclass(frozen=True)
class OfHeads(Recipe):
    """A quantizer of its own for each (layer, KV head)."""

    own: Mapping[tuple[int, int], Quantizer] = field(default_factory=dict, compare=False)

    def of_head(self, role: Role, dim: int, layer: int, head: int) -> Quantizer:
        return self.own[layer, head]

    def _build(self, role: Role, dim: int) -> Quantizer:
        return next(iter(self.own.values()))


# ---- the paper's outlier channels


@dataclass(frozen=True)
class Split:
    """Some channels to one quantizer, the others to another (arXiv:2504.19874, section 4.3), chosen beforehand."""

    dim: int
    channels: tuple[int, ...]
    outliers: Quantizer
    rest: Quantizer

    @property
    def name(self) -> str:
        return f"split-{len(self.channels)}of{self.dim}"

    @property
    def bits(self) -> float:
        n = len(self.channels)
        return (n * self.outliers.bits + (self.dim - n) * self.rest.bits) / self.dim

    def reconstruct(self, x: Floats) -> Floats:
        if x.shape[-1] != self.dim:
            raise ValueError(f"shape {x.shape}: want vectors of {self.dim} coordinates")
        loud = np.zeros(self.dim, dtype=bool)
        loud[list(self.channels)] = True
        y = np.empty_like(x)
        y[..., loud] = self.outliers.reconstruct(np.ascontiguousarray(x[..., loud]))
        y[..., ~loud] = self.rest.reconstruct(np.ascontiguousarray(x[..., ~loud]))
        return y


def loudest(x: Floats, n: int, pairs: tuple[slice, slice] = (slice(0, 0), slice(0, 0))) -> tuple[int, ...]:
    """The ``n`` channels of most energy over tokens (tokens, dim); those of a RoPE pair count alike."""
    energy = np.sum(x.astype(np.float64) ** 2, axis=0)
    a, b = pairs
    energy[a] = energy[b] = (energy[a] + energy[b]) / 2
    return tuple(sorted(np.argsort(-energy, kind="stable")[:n].tolist()))


# ---- codebooks


@dataclass(frozen=True)
class Native:
    """A cache type with parameters of its own, by the C library: trellis codes take the reference 50 times as long."""

    tq: TqType
    params: Params = field(default=DEFAULT, compare=False)

    @property
    def name(self) -> str:
        return f"{self.tq.name}-{self.params.hash:016x}"

    @property
    def bits(self) -> float:
        return self.tq.bits_per_value

    def reconstruct(self, x: Floats) -> Floats:
        return native.decode(native.encode(x, self.tq, self.params), self.tq, self.params)


def booked(tq: TqType, blocks: Floats) -> Native:
    """An ``_mse`` type with the Lloyd-Max codebook of normalized blocks (blocks, 64), see ``calibrate.normalized``."""
    if tq.kind != "mse":
        raise ValueError(f"{tq.name}: want an _mse type")
    own = Book(from_samples(blocks, tq.code_bits).centroids_f32, np.float32(0))
    return Native(tq, Params(quantizers={n: own if n == tq.name else DEFAULT.quantizers[n] for n in CODEBOOK_TYPES}))


# ---- types a layer


def assign(costs: ArrayLike, widths: Sequence[int], total: int) -> NDArray[np.int64]:
    """The width of each layer, (layers,), that makes the sum of ``costs`` (layers, widths) least at a sum of widths.

    Exact, by dynamic programming. Raises ValueError where no assignment has that sum.
    """
    c = np.asarray(costs, dtype=np.float64)
    best = np.full(total + 1, np.inf)
    best[0] = 0
    choices = []
    for row in c:
        options = np.full((len(widths), total + 1), np.inf)
        for i, width in enumerate(widths):
            options[i, width:] = best[: total + 1 - width] + row[i]
        choices.append(np.argmin(options, axis=0))
        best = np.min(options, axis=0)
    if not np.isfinite(best[total]):
        raise ValueError(f"no assignment of {len(c)} layers to widths {list(widths)} has the sum {total}")
    out, left = np.zeros(len(c), dtype=np.int64), total
    for i in reversed(range(len(c))):
        out[i] = widths[choices[i][left]]
        left -= int(out[i])
    return out
