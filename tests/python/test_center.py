"""Centers at positions: the NumPy reference against RoPE in binary64, and the C library against the reference."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ggml_tq import native
from ggml_tq.capture import ROPE_NEOX, Rope
from ggml_tq.center import Centers, Turn, make_table
from ggml_tq.params import fnv1a

POSITIONS = np.array([0, 1, 15, 255, 256, 257, 511, 4096, 65535, 65536, 70001, 131071, 2**20 + 3, 2**24 - 1])
NEOX = pytest.mark.parametrize("neox", [False, True], ids=["pairs", "neox"])
DIMS = pytest.mark.parametrize(("n_rot", "dim"), [(64, 64), (128, 128), (32, 80), (2, 64), (0, 64)])


def rope(n_rot: int, neox: bool, **changed: float) -> Rope:
    plain = {"freq_base": 1e4, "freq_scale": 1.0, "ext_factor": 0.0, "attn_factor": 1.0}
    return Rope(n_rot, ROPE_NEOX * neox, 4096, **(plain | changed), beta_fast=32.0, beta_slow=1.0)


def turn(n_rot: int, neox: bool) -> Turn:
    return Turn(make_table(rope(n_rot, neox).frequencies()[0]), neox)


@NEOX
@DIMS
def test_against_rope(n_rot: int, dim: int, neox: bool) -> None:
    m = np.random.default_rng(n_rot + dim).standard_normal((3, dim), dtype=np.float32)
    got = turn(n_rot, neox).apply(m, POSITIONS)
    assert got.dtype == np.float32
    assert got.shape == (len(POSITIONS), 3, dim)
    for head in range(3):
        want = rope(n_rot, neox).apply(m[head], POSITIONS)
        np.testing.assert_allclose(got[:, head], want, rtol=0, atol=2e-6)
    np.testing.assert_array_equal(got[..., n_rot:], np.broadcast_to(m[:, n_rot:], got[..., n_rot:].shape))
    np.testing.assert_array_equal(got[0], m)  # position 0


def test_with_yarn() -> None:
    """The frequencies are those of the layer; the magnitude is the center's."""
    yarn = rope(64, True, freq_scale=0.25, ext_factor=1.0)
    freqs, magnitude = yarn.frequencies()
    assert magnitude == pytest.approx(1 + 0.1 * math.log(4))
    m = np.random.default_rng(1).standard_normal(64, dtype=np.float32)
    got = Turn(make_table(freqs), True).apply(m * np.float32(magnitude), POSITIONS)
    np.testing.assert_allclose(got, yarn.apply(m, POSITIONS), rtol=0, atol=4e-6)


def test_positions_wrap_as_specified() -> None:
    t, m = turn(64, True), np.ones(64, np.float32)
    np.testing.assert_array_equal(t.apply(m, [2**24 + 5, -1, -(2**30)]), t.apply(m, [5, 0, 0]))


def test_table_by_hand() -> None:
    table = make_table([0.3, 1e-3])
    assert table.shape == (768, 4)
    for k in range(3):
        for j in (0, 1, 200, 255):
            p = 256**k * j
            want = [math.cos(p * 0.3), math.cos(p * 1e-3), math.sin(p * 0.3), math.sin(p * 1e-3)]
            np.testing.assert_array_equal(table[256 * k + j], np.array(want, np.float32))


@DIMS
def test_the_table_of_the_library(n_rot: int, dim: int) -> None:
    freqs = rope(n_rot, True).frequencies()[0]
    np.testing.assert_array_equal(native.center_table(freqs), make_table(freqs))


@NEOX
@DIMS
def test_the_library_adds_the_same_bits(n_rot: int, dim: int, neox: bool) -> None:
    rng = np.random.default_rng(dim)
    t = turn(n_rot, neox)
    positions = np.concatenate([POSITIONS, rng.integers(-5, 2**31, 300)])
    m = (rng.standard_normal(dim) * 2.0 ** rng.integers(-20, 20, dim)).astype(np.float32)
    x = rng.standard_normal((len(positions), dim), dtype=np.float32)
    for sign in (1, -1):
        y = x.copy()
        native.center_add(t, m, positions, sign, y)
        np.testing.assert_array_equal(y, x + np.float32(sign) * t.apply(m, positions))


def test_hash() -> None:
    assert fnv1a(b"") == 0xCBF29CE484222325
    assert fnv1a(b"foobar") == 0x85944171F73967E8  # as published with the function
    m, s = np.array([1.5], np.float32), np.array([0.5], np.float32)
    assert Centers("mean", m, s).hash == fnv1a(b"\0\0\xc0\x3f" + b"\0\0\0\x3f")
    assert Centers("mean", m).hash == fnv1a(b"\0\0\xc0\x3f" + b"\0\0\x80\x3f")  # scales of 1
    assert (Centers("none").hash, Centers("bias").hash) == (0, int.from_bytes(b"bias", "big"))
