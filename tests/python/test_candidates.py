"""What was studied and not built."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from ggml_tq import codec
from ggml_tq.cache_types import TYPES
from ggml_tq.candidates import Native, OfHeads, Split, assign, booked, loudest
from ggml_tq.params import DEFAULT, Params
from ggml_tq.quantizers import CacheType, Recipe
from ggml_tq.reference import TurboQuantMse, TurboQuantSplit
from ggml_tq.transform import rht_inverse


def test_split_is_the_papers() -> None:
    """With the channels of most energy, the same as the reference that chooses them itself."""
    x = np.random.default_rng(0).standard_normal((500, 128)).astype(np.float32)
    x[:, [3, *range(40, 71)]] *= 5
    reference = TurboQuantSplit()
    own = Split(128, loudest(x, 32), TurboQuantMse(32, 3), TurboQuantMse(96, 2, seed=reference.seed + 1))
    assert own.channels == (3, *range(40, 71))
    assert own.bits == reference.bits == 2.5
    assert np.allclose(own.reconstruct(x), reference.reconstruct(x), atol=1e-5)


def test_pairs_are_split_off_together() -> None:
    x = np.ones((10, 8), dtype=np.float32)
    x[:, 1], x[:, 6], x[:, 2] = 3, 2, 2.5
    assert loudest(x, 2) == (1, 2)
    assert loudest(x, 2, (slice(0, 4), slice(4, 8))) == (2, 6)
    assert loudest(x, 4, (slice(0, 8, 2), slice(1, 8, 2))) == (0, 1, 2, 3)


def test_own_codebook() -> None:
    """Blocks of four values only: their own book has no error to speak of, the built-in one has."""
    values = np.repeat(np.array([-2, -0.1, 0.1, 2], dtype=np.float32), 16)
    x = np.random.default_rng(0).permuted(np.tile(values, (200, 1)), axis=1)
    tq = TYPES["tq2_mse"]
    y = rht_inverse(x, DEFAULT.rotation_signs)
    own = booked(tq, x)
    for quantizer, low, high in ((own, 0, 1e-5), (CacheType(tq), 0.01, 1)):
        assert low <= np.mean((quantizer.reconstruct(y) - y) ** 2) < high
    assert own.bits == 2.25
    with pytest.raises(ValueError, match="want an _mse type"):
        booked(TYPES["tq3_tcq"], x)


@pytest.mark.parametrize("name", ["tq3_tcq", "tq2_mse"])
def test_native(name: str) -> None:
    """As the readable codec, with another rotation too."""
    x = np.random.default_rng(1).standard_normal((20, 128)).astype(np.float32)
    for params in (DEFAULT, Params(rotation_seed=5)):
        want = codec.decode(codec.encode(x, TYPES[name], params), TYPES[name], params)
        assert np.array_equal(Native(TYPES[name], params).reconstruct(x), want)


def test_of_heads() -> None:
    own = {(3, h): CacheType(TYPES[name]) for h, name in enumerate(("tq2_mse", "tq4_mse"))}
    recipe = OfHeads("own", "cal", own)
    assert (recipe.name, recipe) == ("own+cal", OfHeads("own", "cal", {}))
    assert [recipe.of_head("key", 64, 3, h).bits for h in (0, 1)] == [2.25, 4.25]
    assert Recipe("tq3").of_head("value", 64, 3, 1).name == "tq3_mse"


def test_assignment_is_the_best() -> None:
    """Against all assignments."""
    rng = np.random.default_rng(2)
    widths = (2, 3, 4)
    for total in (10, 13, 15, 20):
        costs = -np.sort(-rng.exponential(size=(5, 3)), axis=1)
        every = [w for w in product(range(3), repeat=5) if sum(widths[i] for i in w) == total]
        best = min(sum(costs[n, i] for n, i in enumerate(w)) for w in every)
        got = assign(costs, widths, total)
        assert got.sum() == total
        assert sum(costs[n, widths.index(w)] for n, w in enumerate(got)) == pytest.approx(best)
    with pytest.raises(ValueError, match="no assignment of 5 layers"):
        assign(costs, widths, 9)
