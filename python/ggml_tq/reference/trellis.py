"""Tail-biting trellis codes: the bytes of a scalar code, and up to 40 % less error.

Trellis-coded quantization (M. Marcellin and T. Fischer, IEEE Trans. Commun. 38, 1990) with R bits a coordinate. One of
them, c_t, goes through a shift register of ``memory`` past bits; the other R - 1, w_t, do not:

    register_t = c_t + 2 c_(t-1) + ... + 2^memory c_(t-memory)        (t modulo the block's length: tail-biting)
    label_t, bit i = parity(taps[i] & register_t)
    value_t = scale * levels[label_t * 2^(R-1) + w_t]

So decoding reads a window of one bit plane and the R - 1 others, and looks up one table, coordinate by coordinate in
any order. Taps 1, 2, 4, ... make the label the register itself. Others share levels among registers, as Ungerboeck's
codes do (IEEE Trans. Inf. Theory 28, 1982): the label's bits are then exclusive ors of the rotated plane, a few word
operations a block, and the table stays small however many states there are. Without memory it is a scalar code.

Encoding is Viterbi's algorithm on u, the rotated block scaled to unit mean square. With ``search`` > 1 it is run on
several multiples of u and the path of largest cosine with u is kept; the scale is EDEN's (``ggml_tq.reference.eden``).
``ggml_tq.reference.trellis_training`` makes the tables.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any, Literal, NamedTuple

import numpy as np
from array_api_compat import array_namespace, device
from numpy.typing import NDArray

from ggml_tq.codebook import solve
from ggml_tq.reference.eden import Scale
from ggml_tq.reference.protocol import Array, Coder, constant, divide, dot
from ggml_tq.reference.rotation import Rotation
from ggml_tq.signs import ROTATION_SEED

Floats = NDArray[np.float64]
TABLES = "trellis_tables.json"
AT_A_TIME = 4096  # blocks: one step's arrays fit a processor's cache

Tail = Literal["wrap", "wide", "exact"]


@dataclass(frozen=True)
class Graph:
    """What a code is without its levels. Registers are numbers of ``memory`` + 1 bits, the newest bit lowest."""

    bits: int  # a coordinate, R
    memory: int
    taps: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.bits < 1 or self.memory < 0 or not self.taps:
            raise ValueError(f"{self}: want a bit or more a coordinate, no negative memory, and taps")
        if not all(0 < tap < 2 * self.states for tap in self.taps):
            raise ValueError(f"taps {self.taps}: want masks of {self.memory + 1} bits")

    @property
    def states(self) -> int:
        """Of the trellis: registers without their newest bit."""
        return 1 << self.memory

    @property
    def free(self) -> int:
        """Levels under one label."""
        return 1 << (self.bits - 1)

    @property
    def entries(self) -> int:
        """Of the table of levels."""
        return self.free << len(self.taps)

    @property
    def symmetric(self) -> bool:
        """Whether the complement of a path has the complement of every label: then levels can be taken symmetric."""
        return all(tap.bit_count() % 2 for tap in self.taps)

    @property
    def name(self) -> str:
        """Entries of the table, states and bits: "32x16-3b"."""
        return f"{self.entries}x{self.states}-{self.bits}b"

    def labels(self) -> NDArray[np.int64]:
        """(2 states,): the label of each register."""
        register = np.arange(2 * self.states)
        bits = [[(r & tap).bit_count() & 1 for r in register.tolist()] for tap in self.taps]
        return np.asarray(sum(np.array(b) << i for i, b in enumerate(bits)))


@dataclass(frozen=True)
class Table:
    """A code: a graph, and the levels of coordinates of unit variance."""

    graph: Graph
    levels: tuple[float, ...]  # graph.entries of them
    int8: tuple[int, ...]  # the same in units of ``unit``
    unit: float
    distortion: Mapping[str, float] = field(default_factory=dict)  # measured, by encoder

    def values(self, int8: bool = False) -> Floats:
        """(labels, free)"""
        flat = np.array(self.int8) * self.unit if int8 else np.array(self.levels)
        return flat.reshape(-1, self.graph.free)


@cache
def tables() -> dict[str, Table]:
    """The trained codes, by name."""
    data = json.loads(resources.files("ggml_tq.reference").joinpath(TABLES).read_text())
    return {
        name: Table(
            Graph(t["bits"], t["memory"], tuple(t["taps"])),
            tuple(t["levels"]),
            tuple(t["int8"]),
            float(t["unit"]),
            t["distortion"],
        )
        for name, t in data["tables"].items()
    }


@cache
def table(code: str, bits: int, block: int) -> Table:
    """The code with that name, as "32x16", and width. "scalar" is a Lloyd-Max codebook: no memory.

    Raises ValueError where there is none.
    """
    if code == "scalar":
        levels = solve(bits, block).centroids
        unit = float(levels[-1]) / 127
        return Table(
            Graph(bits, 0, (1,)), tuple(levels.tolist()), tuple(np.rint(levels / unit).astype(int).tolist()), unit
        )
    found = tables().get(f"{code}-{bits}b")
    if found is None:
        raise ValueError(f"no trellis code '{code}' of {bits} bits: want scalar, or one of {', '.join(tables())}")
    return found


# ---- encoding: paths through the trellis. Arrays are (..., blocks), so that operations run along the batch.


def _distances(u: Array, levels: Array) -> Array:
    """Of u (blocks,) from the nearest level of each label, squared: (labels, blocks)."""
    xp = array_namespace(u)
    best = (u - levels[:, 0, None]) ** 2
    for w in range(1, levels.shape[1]):
        best = xp.minimum(best, (u - levels[:, w, None]) ** 2)
    return best


def _forward(u: Array, levels: Array, graph: Graph, cost: Array) -> tuple[list[Array], Array]:
    """Viterbi's algorithm over u (coordinates, blocks) from costs (states, blocks) of the states before it.

    Returns for each coordinate the oldest bit of the best register into each state, and the costs at the end.
    """
    xp, states = array_namespace(u), graph.states
    labels = graph.labels()
    plain = np.array_equal(labels, np.arange(2 * states))
    index = xp.asarray(labels, device=device(u))
    oldest = []
    for t in range(u.shape[0]):
        d = _distances(u[t, :], levels)
        into = xp.reshape(cost[:, None, :] + xp.reshape(d if plain else d[index, :], (states, 2, -1)), (2, states, -1))
        oldest.append(into[1, ...] < into[0, ...])
        cost = xp.minimum(into[0, ...], into[1, ...])
    return oldest, cost


def _back(oldest: list[Array], end: Array, graph: Graph) -> tuple[list[Array], Array]:
    """The registers (blocks,) of the path that ends in states ``end`` (blocks,), and the states that it starts from."""
    xp, state, path = array_namespace(end), end, []
    for bit in reversed(oldest):
        top = xp.take_along_axis(bit, state[None, :], axis=0)[0, :]
        register = state + xp.astype(top, state.dtype) * graph.states
        path.append(register)
        state = register >> 1
    return path[::-1], state


def _only(state: Array, graph: Graph, like: Array) -> Array:
    """Costs (states, blocks) that admit one state (blocks,)."""
    xp = array_namespace(like)
    every = xp.arange(graph.states, device=device(like))[:, None]
    zero = xp.zeros((), dtype=like.dtype, device=device(like))
    return xp.where(every == state[None, :], zero, zero + xp.inf)


def _circular(u: Array, levels: Array, graph: Graph, reach: int) -> list[Array]:
    """Registers of a tail-biting path, nearly always the best one.

    A first run goes around the seam, where the block begins, from ``reach`` coordinates before it to as many after it,
    with any state at either end. At the seam its best path has a state that knows the coordinates on both sides. A
    second run, over the block, starts and ends in it.
    """
    xp, n = array_namespace(u), u.shape[0]
    free = xp.zeros((graph.states, u.shape[1]), dtype=u.dtype, device=device(u))
    oldest, cost = _forward(xp.concat([u[n - reach :, :], u[:reach, :]]), levels, graph, free)
    _, seam = _back(oldest[reach:], xp.argmin(cost, axis=0), graph)
    oldest, _ = _forward(u, levels, graph, _only(seam, graph, u))
    return _back(oldest, seam, graph)[0]


def _exact(u: Array, levels: Array, graph: Graph) -> list[Array]:
    """Registers of the best tail-biting path: every state in turn is start and end."""
    xp = array_namespace(u)
    best_path: Array = None
    best: Array = None
    for s in range(graph.states):
        seam = xp.full((u.shape[1],), s, dtype=xp.int64, device=device(u))
        oldest, cost = _forward(u, levels, graph, _only(seam, graph, u))
        path = xp.stack(_back(oldest, seam, graph)[0])
        if s == 0:
            best, best_path = cost[s, :], path
        else:
            better = cost[s, :] < best
            best = xp.where(better, cost[s, :], best)
            best_path = xp.where(better[None, :], path, best_path)
    return [best_path[t, :] for t in range(u.shape[0])]


def _nearest(u: Array, levels: Array, label: Array) -> tuple[Array, Array]:
    """For u and labels (coordinates, blocks), the number of the nearest level under the label, and that level."""
    xp = array_namespace(u)
    q = levels[:, 0][label]
    best, w = (u - q) ** 2, xp.zeros(u.shape, dtype=xp.uint8, device=device(u))
    for i in range(1, levels.shape[1]):
        level = levels[:, i][label]
        d = (u - level) ** 2
        w = xp.where(d < best, xp.asarray(i, dtype=xp.uint8, device=device(u)), w)
        q = xp.where(d < best, level, q)
        best = xp.minimum(d, best)
    return w, q


def encode_path(u: Array, graph: Graph, values: NDArray[Any], tail: Tail = "wrap") -> tuple[Array, Array, Array]:
    """The nearest tail-biting path to blocks u (blocks, coordinates) in the code with levels ``values`` (labels, free).

    In float32 its operations and ties are those of the cache types (docs/format.md, section 9, steps 2 and 3).
    Returns registers (int64), free bits w (uint8) and levels, each (blocks, coordinates).
    """
    xp = array_namespace(u)
    levels = constant(values, u)
    labels = xp.asarray(graph.labels(), device=device(u))
    parts: list[tuple[Array, Array, Array]] = []
    step = AT_A_TIME if "cpu" in str(device(u)) else 16 * AT_A_TIME
    for i in range(0, max(1, u.shape[0]), step):
        v = xp.asarray(xp.matrix_transpose(u[i : i + step, :]), copy=True)  # rows contiguous
        if tail == "exact":
            register = xp.stack(_exact(v, levels, graph))
        else:
            n = u.shape[1]
            register = xp.stack(_circular(v, levels, graph, n // 2 if tail == "wrap" else n - n // 4))
        w, q = _nearest(v, levels, labels[register])
        parts.append((xp.matrix_transpose(register), xp.matrix_transpose(w), xp.matrix_transpose(q)))
    register, w, q = (xp.concat([part[k] for part in parts]) for k in range(3))
    return register, w, q


# ---- the quantizer


def multiples(search: int) -> list[float]:
    """The factors on u that a search tries, 1 among them: 3 reach e^-0.12 ... e^0.12, 5 e^-0.16 ... e^0.16, and so on.

    For each number that reach is within 0.1 % of the least error.
    """
    if search < 1 or search % 2 == 0:
        raise ValueError(f"search {search}: want an odd number")
    reach = 0.08 + 0.02 * (search - 1) if search > 1 else 0.0
    return [float(m) for m in np.exp(np.linspace(-reach, reach, search))]


class TrellisCode(NamedTuple):
    c: Array  # (..., blocks, block), uint8: the coded bit
    w: Array  # (..., blocks, block), uint8: the R - 1 free bits as a number
    scale: Array  # (..., blocks, 1)


@dataclass(frozen=True)
class Trellis(Coder):
    """A trellis code over blocks of ``block`` coordinates, each rotated by a Hadamard transform and scaled on its own.

    ``code``: a name of ``table``; ``search``: multiples of the block that the encoder tries; ``int8``: with the levels
    rounded to signed bytes; ``tail``: how the state at the seam is found, from half a block on either side ("wrap") or
    three quarters ("wide"), or by trying every one ("exact").
    """

    dim: int
    b: int
    code: str = "32x16"
    scale: Scale = "unbiased"
    search: int = 5
    block: int = 64
    int8: bool = False
    tail: Tail = "wrap"
    seed: int = ROTATION_SEED

    def __post_init__(self) -> None:
        if self.dim % self.block:
            raise ValueError(f"dimension {self.dim}: blocks of {self.block} must divide it")
        if self.scale not in ("biased", "unbiased", "matched"):
            raise ValueError(f"scale {self.scale!r}: want 'biased', 'unbiased' or 'matched'")
        if self.tail not in ("wrap", "wide", "exact"):
            raise ValueError(f"tail {self.tail!r}: want 'wrap', 'wide' or 'exact'")
        if self.block <= self.table.graph.memory:
            raise ValueError(f"blocks of {self.block}: want more than {self.table.graph.memory} coordinates")
        multiples(self.search)

    @property
    def table(self) -> Table:
        return table(self.code, self.b, self.block)

    @property
    def name(self) -> str:
        options = (
            f"-search{self.search}" * (self.search > 1) + "-int8" * self.int8 + f"-{self.tail}" * (self.tail != "wrap")
        )
        return f"trellis_{self.code}_{self.scale}-{self.b}b-{self.block}{options}"

    @property
    def bits(self) -> float:
        return self.b + 16 / self.block

    def encode(self, x: Array) -> TrellisCode:
        xp = array_namespace(x)
        shape = (*x.shape[:-1], x.shape[-1] // self.block, self.block)
        if x.shape[-1] != self.dim:
            raise ValueError(f"shape {tuple(x.shape)}: want vectors of {self.dim} coordinates")
        y = Rotation(self.block, seed=self.seed).forward(xp.reshape(x, (-1, self.block)))
        u = divide(y, xp.sqrt(dot(y, y) / self.block))
        graph, values = self.table.graph, self.table.values(self.int8)
        best: Array = None
        for m in multiples(self.search):
            register, w, q = encode_path(u * m, graph, values, self.tail)
            cosine = divide(dot(u, q), xp.sqrt(dot(q, q)))
            found = (cosine, xp.astype(register & 1, xp.uint8), w, q)
            best = (
                found
                if best is None
                else tuple(xp.where(cosine > best[0], new, old) for new, old in zip(found, best, strict=True))
            )
        _, c, w, q = best
        if self.scale == "biased":
            s = divide(dot(y, q), dot(q, q))
        elif self.scale == "unbiased":
            s = divide(dot(y, y), dot(y, q))
        else:
            s = xp.sqrt(divide(dot(y, y), dot(q, q)))
        return TrellisCode(xp.reshape(c, shape), xp.reshape(w, shape), xp.reshape(s, (*shape[:-1], 1)))

    def decode(self, code: TrellisCode) -> Array:
        xp = array_namespace(code.scale)
        graph = self.table.graph
        register = xp.zeros(code.c.shape, dtype=xp.int64, device=device(code.c))
        for i in range(graph.memory + 1):
            register += xp.astype(xp.roll(code.c, i, axis=-1), xp.int64) << i  # bit i is c of i places before
        label = xp.asarray(graph.labels(), device=device(code.c))[register]
        levels = constant(self.table.values(self.int8).reshape(-1), code.scale)
        y = code.scale * levels[label * graph.free + xp.astype(code.w, xp.int64)]
        x = Rotation(self.block, seed=self.seed).inverse(y)
        return xp.reshape(x, (*x.shape[:-2], self.dim))


# ---- bytes


def pack(code: TrellisCode, bits: int) -> NDArray[np.uint8]:
    """(..., blocks, 2 + bits * block / 8): the scale in binary16, the planes of w low bit first, the plane of c.

    Bit i of a plane, counted from the low end of its first byte, belongs to coordinate i: docs/format.md's blocks.
    """
    c, w, scale = (np.asarray(part) for part in code)
    planes = [(w >> p) & 1 for p in range(bits - 1)] + [c]
    packed = np.packbits(np.stack(planes, axis=-2), axis=-1, bitorder="little")
    d = scale.astype("<f2").view(np.uint8)
    return np.concatenate([d, packed.reshape(*packed.shape[:-2], -1)], axis=-1)


def unpack_values(data: NDArray[np.uint8], code: Table, int8: bool = False) -> NDArray[np.float32]:
    """Rotated blocks (..., blocks, block) of what ``pack`` wrote, plane by plane as a kernel would do it.

    The register's bits are rotations of the plane of c as one word, the label's exclusive ors of those.
    """
    graph = code.graph
    n = (data.shape[-1] - 2) * 8 // graph.bits
    planes = [int.from_bytes(row.tobytes(), "little") for row in data[..., 2:].reshape(-1, n // 8)]
    every = (1 << n) - 1
    index = np.zeros((len(planes) // graph.bits, n), dtype=np.int64)
    for row in range(len(index)):
        *free, c = planes[row * graph.bits : (row + 1) * graph.bits]
        register = [((c << i) | (c >> (n - i))) & every for i in range(graph.memory + 1)]
        word = list(free)
        for tap in graph.taps:
            label = 0
            for i, plane in enumerate(register):
                label ^= plane if tap >> i & 1 else 0
            word.append(label)
        for k, plane in enumerate(word):
            bits = np.frombuffer(plane.to_bytes(n // 8, "little"), np.uint8)
            index[row] |= np.unpackbits(bits, bitorder="little").astype(np.int64) << k
    d = np.ascontiguousarray(data[..., :2]).view("<f2").astype(np.float32)
    levels = code.values(int8).reshape(-1).astype(np.float32)
    return d * levels[index].reshape(*data.shape[:-1], n)
