"""The trellis codes of the ``_tcq`` types (docs/format.md, section 9), in binary32, bit for bit.

The algorithm is ``ggml_tq.reference.trellis``'s, which in float32 has the format's order of operations and ties; here
are the format's three codes, its choice among multiples of a block, and its sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray

from ggml_tq.reference.trellis import Graph, encode_path, tables
from ggml_tq.transform import tree_sum

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]

MULTIPLES = tuple(np.float32(m) for m in ("0.85214379", "0.92311635", "1", "1.08328707", "1.17351087"))


@dataclass(frozen=True)
class Trellis:
    """The code of ``bits`` bits a coordinate: one coded bit and ``bits`` - 1 free ones."""

    graph: Graph
    levels: Floats  # (labels, free): 32 of them
    distortion: float  # of the best scale, measured on uniform directions with this search and these levels

    @cached_property
    def labels(self) -> Codes:
        """(64,): the label of each register."""
        return self.graph.labels().astype(np.uint8)


@cache
def trellis(bits: int) -> Trellis:
    """The format's code of 2, 3 or 4 bits."""
    name = f"32x32-{bits}b"
    table = tables()[name]
    levels = np.array(table.int8, dtype=np.float32) * np.float32(table.unit)  # rounded once, to binary32
    levels.flags.writeable = False
    return Trellis(table.graph, levels.reshape(-1, table.graph.free), table.distortion["search5_int8"])


def encode(u: Floats, bits: int) -> tuple[Codes, Floats]:
    """Blocks (..., 64) of unit mean square as codes w + c * 2^(bits - 1), and their levels; both (..., 64)."""
    t, shape = trellis(bits), u.shape
    u = u.reshape(-1, shape[-1])
    code, q = np.zeros(u.shape, np.uint8), np.zeros_like(u)
    best = np.full((len(u), 1), -np.inf, np.float32)
    for m in MULTIPLES:
        register, w, level = encode_path(u * m, t.graph, t.levels)
        quality = np.divide(tree_sum(u * level), np.sqrt(tree_sum(level * level)), dtype=np.float32)
        better = quality > best
        np.copyto(best, quality, where=better)
        np.copyto(code, w | (register & 1).astype(np.uint8) << t.graph.bits - 1, where=better)
        np.copyto(q, level, where=better)
    return code.reshape(shape), q.reshape(shape)


def decode(code: Codes, bits: int) -> Floats:
    """The levels of codes (..., 64)."""
    t = trellis(bits)
    c = code >> t.graph.bits - 1
    register = sum(np.roll(c, i, axis=-1) << i for i in range(t.graph.memory + 1))  # bit i: c of i places before
    levels: Floats = t.levels[t.labels[register], code & t.graph.free - 1]
    return levels
