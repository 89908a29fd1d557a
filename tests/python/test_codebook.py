"""The Lloyd-Max solver against published digits and its own optimality conditions; the generated header."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import integrate

from ggml_tq.codebook import marginal, solve

ROOT = Path(__file__).resolve().parents[2]
GENERATE = ROOT / "scripts" / "generate_codebooks.py"
HEADER = ROOT / "ggml-tq" / "src" / "tq-codebooks.h"


@pytest.mark.parametrize(
    ("bits", "dim", "positive"),
    [
        # N(0, 1): J. Max, Quantizing for minimum distortion, 1960, Table I.
        (1, None, [0.7980]),
        (2, None, [0.4528, 1.510]),
        (3, None, [0.2451, 0.7560, 1.344, 2.152]),
        (4, None, [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733]),
        # The sphere: TurboQuant, section 3.1, gives sqrt(2/pi) at 1 bit and {0.453, 1.51} at 2 for large d.
        (1, 10**5, [np.sqrt(2 / np.pi)]),
        (2, 10**5, [0.453, 1.51]),
        # d = 64 by an independent fixed-point iteration with adaptive quadrature.
        (1, 64, [0.801007]),
        (2, 64, [0.452119, 1.499975]),
        (3, 64, [0.2437534, 0.7506581, 1.3293429, 2.1113114]),
    ],
)
def test_published_centroids(bits: int, dim: int | None, positive: list[float]) -> None:
    got = solve(bits, dim).centroids[2 ** (bits - 1) :]
    np.testing.assert_allclose(got, positive, rtol=1e-6 if dim == 64 else 5e-4)


@pytest.mark.parametrize(
    ("bits", "dim", "distortion"),
    [
        (1, None, 0.36338),
        (2, None, 0.117482),
        (3, None, 0.0345478),
        (4, None, 0.00950101),
        (8, None, 4.11851e-5),
        (1, 64, 0.358387),
        (2, 64, 0.114526),
        (3, 64, 0.0333908),
        (4, 64, 0.00913152),
        (2, 128, 0.116),
        (5, 256, 0.00247794),
    ],
)
def test_published_distortion(bits: int, dim: int | None, distortion: float) -> None:
    assert solve(bits, dim).distortion == pytest.approx(distortion, rel=3e-6)


@pytest.mark.parametrize("dim", [4, 64, 576, None])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_symmetric_and_sorted(bits: int, dim: int | None) -> None:
    book = solve(bits, dim)
    assert len(book.centroids) == 2**bits
    np.testing.assert_array_equal(book.centroids, -book.centroids[::-1])
    np.testing.assert_array_equal(book.thresholds_f32, -book.thresholds_f32[::-1])
    assert np.all(np.diff(book.centroids) > 0)


@pytest.mark.parametrize("dim", [64, None])
def test_fixed_point(dim: int | None) -> None:
    """Each centroid is the mean of its cell, and D is the error, both by adaptive quadrature."""
    book, law = solve(3, dim), marginal(dim)
    edges = np.concatenate([[0.0], book.thresholds[4:], [law.edge]])
    error = 0.0
    for low, high, c in zip(edges[:-1], edges[1:], book.centroids[4:], strict=True):

        def integral(weight: object, low: float = low, high: float = high) -> float:
            return integrate.quad(lambda u: weight(u) * law.density(u), low, high, epsabs=1e-13)[0]

        assert integral(lambda u: u) / integral(lambda u: 1) == pytest.approx(c, abs=1e-10)
        error += 2 * integral(lambda u, c=c: (u - c) ** 2)
    assert book.distortion == pytest.approx(error, abs=1e-11)


@pytest.mark.parametrize(("bits", "dim"), [(0, 64), (9, 64), (2, 3)])
def test_refuses(bits: int, dim: int) -> None:
    with pytest.raises(ValueError, match="want"):
        solve(bits, dim)


def test_header_is_up_to_date() -> None:
    done = subprocess.run([sys.executable, GENERATE, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_header_literals_are_exact() -> None:
    text = HEADER.read_text()
    for bits in (1, 2, 3, 4):
        body = re.search(rf"tq_centroids_{bits}b\[{2**bits}\] = {{(.*?)}}", text, re.DOTALL)[1]
        got = np.array([np.float32(x) for x in re.findall(r"[-+.e\d]+(?=f)", body)])
        np.testing.assert_array_equal(got, solve(bits).centroids_f32)
