"""The ``_tcq`` types against docs/format.md, section 9, done block by block in plain Python."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ggml_tq import codec, transform, trellis
from ggml_tq.cache_types import TYPES, TqType
from ggml_tq.params import DEFAULT

FORMAT = Path(__file__).resolve().parents[2] / "docs" / "format.md"
TCQ = pytest.mark.parametrize("tq", [t for t in TYPES.values() if t.kind == "tcq"], ids=lambda t: t.name)
F = np.float32
Block = list[np.float32]


class Spec:
    """The code of N bits as the specification's table has it, and its encoder, a number at a time."""

    def __init__(self, n: int) -> None:
        row = re.search(rf"^\| {n} \| ([\d, ]+) \| ([\d.]+) \| ([-\d ]+) \|$", FORMAT.read_text(), re.M)
        assert row is not None
        self.taps = [int(tap) for tap in row[1].split(",")]
        self.table = [F(byte) * F(row[2]) for byte in row[3].split()]
        self.free = n - 1
        self.labels = [sum((tap & r).bit_count() % 2 << k for k, tap in enumerate(self.taps)) for r in range(64)]

    def dist(self, v: np.float32, register: int) -> tuple[np.float32, int]:
        best, free = F(np.inf), 0
        for w in range(1 << self.free):
            e = v - self.table[self.labels[register] << self.free | w]
            if e * e < best:
                best, free = e * e, w
        return best, free

    def run(self, v: Block, cost: Block) -> tuple[list[list[int]], Block]:
        """The winning register into each state at each coordinate, and the costs at the end."""
        winners = []
        for x in v:
            new, won = [], []
            for s in range(32):
                a = cost[s >> 1] + self.dist(x, s)[0]
                b = cost[(s + 32) >> 1] + self.dist(x, s + 32)[0]
                new.append(b if b < a else a)
                won.append(s + 32 if b < a else s)
            winners.append(won)
            cost = new
        return winners, cost

    @staticmethod
    def back(winners: list[list[int]], state: int) -> tuple[list[int], int]:
        path = []
        for won in reversed(winners):
            path.append(won[state])
            state = won[state] >> 1
        return path[::-1], state

    def encode(self, u: NDArray[np.float32]) -> tuple[list[int], list[int]]:
        """c and w of the best multiple."""
        best, found = None, ([], [])
        for m in (0.85214379, 0.92311635, 1, 1.08328707, 1.17351087):
            v = [x * F(m) for x in u]
            winners, cost = self.run(v[32:] + v[:32], [F(0)] * 32)
            _, seam = self.back(winners[32:], min(range(32), key=lambda s: (cost[s], s)))
            winners, _ = self.run(v, [F(0) if s == seam else F(np.inf) for s in range(32)])
            path, start = self.back(winners, seam)
            assert start == seam
            w = [self.dist(x, r)[1] for x, r in zip(v, path, strict=True)]
            q = np.array([self.table[self.labels[r] << self.free | k] for r, k in zip(path, w, strict=True)])
            quality = transform.tree_sum(u * q)[0] / np.sqrt(transform.tree_sum(q * q)[0])
            if best is None or quality > best:
                best, found = quality, ([r & 1 for r in path], w)
        return found


def normalized() -> NDArray[np.float32]:
    """Blocks of unit mean square, those with many ties among them."""
    rng = np.random.default_rng(5)
    u = rng.standard_normal((8, 64)).astype(np.float32)
    u[4] = 1
    u[5] = rng.integers(-1, 2, 64)
    u[6] = rng.choice(trellis.trellis(3).levels.ravel(), 64)
    u[7] = np.where(np.arange(64) < 40, u[7], 0)
    u *= 8 / np.sqrt(transform.tree_sum(u * u))
    return u


@TCQ
def test_encoder_is_the_specification_s(tq: TqType) -> None:
    u = normalized()
    code, q = trellis.encode(u, tq.bits)
    spec = Spec(tq.bits)
    for i, block in enumerate(u):
        c, w = spec.encode(block)
        np.testing.assert_array_equal(code[i] >> tq.bits - 1, c)
        np.testing.assert_array_equal(code[i] & (1 << tq.bits - 1) - 1, w)
    np.testing.assert_array_equal(trellis.decode(code, tq.bits), q)
    assert q.dtype == np.float32


@TCQ
def test_layout(tq: TqType) -> None:
    """Any bytes decode, plane by plane as the specification says it."""
    data = np.random.default_rng(6).integers(0, 256, tq.block_bytes, dtype=np.uint8)
    data[:2] = np.array([1.5], "<f2").view(np.uint8)
    *free, coded = (int(p) for p in np.ascontiguousarray(data[2:]).view("<u8"))
    spec = Spec(tq.bits)
    v = np.zeros(64, np.float32)
    for i in range(64):
        register = sum((coded >> (i - k) % 64 & 1) << k for k in range(6))
        w = sum((plane >> i & 1) << k for k, plane in enumerate(free))
        v[i] = spec.table[spec.labels[register] << spec.free | w]
    want = transform.rht_inverse(np.float32(1.5) * v, DEFAULT.rotation_signs)
    np.testing.assert_array_equal(codec.decode(data, tq), want)


@TCQ
def test_less_error_than_the_codebook(tq: TqType) -> None:
    """The bytes of ``_mse``, whose scale is the one of least error, and still less error."""
    x = np.random.default_rng(7).standard_normal((500, 64), dtype=np.float32)
    scalar = TYPES[f"tq{tq.bits}_mse"]
    error = {t.name: np.sum((codec.decode(codec.encode(x, t), t) - x) ** 2) for t in (tq, scalar)}
    assert error[tq.name] < 0.75 * error[scalar.name]
