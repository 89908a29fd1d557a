"""What every reference quantizer must hold, whatever its algorithm."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from ref_arrays import BOTH, KINDS, unit

from ggml_tq.reference import PAPER_2_5, PAPER_3_5, Drive, PolarQuant, Qjl, Quantizer, TurboQuantProd, catalogue
from ggml_tq.reference import protocol as protocol_module

DIM = 96  # not a power of two
ALL = {q.name: q for *_, q in catalogue(DIM, (1, 4))}
EACH = pytest.mark.parametrize("q", ALL.values(), ids=ALL)

# With outliers, so that rounding does not decide which channels they are; float64, so that it decides no index.
X = unit(24, DIM).reshape(2, 3, 4, DIM).astype(np.float64) * (1 + 3 * (np.arange(DIM) % 4 == 1)) * 7


def test_names_are_distinct() -> None:
    names = [q.name for *_, q in catalogue(64)]
    assert len(names) == len(set(names))


@EACH
def test_is_a_quantizer(q: Quantizer) -> None:
    assert isinstance(q, Quantizer)
    assert isinstance(q.name, str)
    assert isinstance(q.bits, float)
    assert q in {q}
    field = dataclasses.fields(q)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(q, field, getattr(q, field))


@EACH
def test_numpy_and_torch_agree(q: Quantizer) -> None:
    """To the rounding of sums, which the two libraries order differently."""
    a, b = q.reconstruct(X), q.reconstruct(torch.asarray(X))
    assert isinstance(a, np.ndarray)
    assert isinstance(b, torch.Tensor)
    np.testing.assert_allclose(b.numpy(), a, atol=1e-12 * np.max(np.abs(a)))


@EACH
@BOTH
def test_shape_and_dtype_stay(q: Quantizer, to: object) -> None:
    for dtype in (np.float64, np.float32, np.float16):
        x = to(X.astype(dtype))
        got = q.reconstruct(x)
        assert (type(got), got.shape, got.dtype) == (type(x), x.shape, x.dtype)


@EACH
def test_bfloat16(q: Quantizer) -> None:
    x = torch.asarray(X).to(torch.bfloat16)
    got = q.reconstruct(x)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, q.reconstruct(x.float()).to(torch.bfloat16))


@EACH
@BOTH
def test_a_batch_is_its_vectors(q: Quantizer, to: object) -> None:
    """Heads at least: the outlier split chooses channels over the tokens of one."""
    whole = np.asarray(q.reconstruct(to(X)))
    for i in np.ndindex(X.shape[:2]):
        np.testing.assert_allclose(np.asarray(q.reconstruct(to(X[i]))), whole[i], atol=1e-12 * np.max(np.abs(whole)))


@EACH
def test_pieces_join(q: Quantizer, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = q.reconstruct(X)
    monkeypatch.setattr(protocol_module, "CHUNK", 5 * DIM)
    np.testing.assert_allclose(q.reconstruct(X), whole, atol=1e-12 * np.max(np.abs(whole)))


@EACH
@BOTH
def test_zeros_and_nothing(q: Quantizer, to: object) -> None:
    np.testing.assert_array_equal(np.asarray(q.reconstruct(to(np.zeros((3, DIM), np.float32)))), 0)
    assert q.reconstruct(to(np.zeros((0, DIM), np.float32))).shape == (0, DIM)


@EACH
def test_scale_equivariant(q: Quantizer) -> None:
    """Powers of two pass through, within the range of the binary16 scales of upstream's types."""
    for factor in (2.0**-3, 2.0**5):
        np.testing.assert_array_equal(q.reconstruct(X * factor), q.reconstruct(X) * factor)


@EACH
def test_damage_stays_visible(q: Quantizer) -> None:
    x = unit(4, DIM)
    for bad in (np.nan, np.inf):
        x[1, 5] = bad
        with np.errstate(invalid="ignore", over="ignore"):
            got = q.reconstruct(x)
        assert not np.all(np.isfinite(got[1]))


@EACH
@BOTH
def test_refuses(q: Quantizer, to: object) -> None:
    for bad in (np.ones((2, DIM), np.int32), np.array(1.0)):
        with pytest.raises(ValueError, match="want"):
            q.reconstruct(to(bad))
    with pytest.raises(ValueError, match=r"want|must divide|dimension"):
        q.reconstruct(to(np.ones((2, DIM - 1), np.float32)))


@pytest.mark.parametrize("to", KINDS.values(), ids=KINDS)
def test_codes_are_bytes(to: object) -> None:
    code = TurboQuantProd(64, 8).encode(to(unit(5, 64)))
    assert str(code.mse.codes.dtype).endswith("uint8")
    assert tuple(code.mse.codes.shape) == tuple(code.residual.sign.shape) == (5, 64)


def test_bits() -> None:
    got = {name: q.bits for name, q in ((q.name, q) for *_, q in catalogue(128, (3, 4)))}
    want = {
        "turboquant_mse-3b": 3 + 16 / 128,
        "eden_unbiased-4b": 4 + 16 / 128,
        "turboquant_prod_gaussian_paper-3b": 3 + 32 / 128,  # two norms
        "absmax-3b+hadamard": 3.5,
        "polarquant-5333": (8 * 5 + 4 * 3 + 2 * 3 + 3 + 16) / 16,
        "turboquant_split-32x4b+96x3b": 3.5,
        "q4_0+hadamard64": 4.5,
        "q8_0+hadamard64": 8.5,
    }
    assert {name: got[name] for name in want} == want
    assert (PAPER_2_5.bits, PAPER_3_5.bits) == (2.5, 3.5)
    assert PolarQuant(128).bits == 3.875  # the paper's setting
    assert Drive(128).bits == Qjl(128).bits == TurboQuantProd(128, 1).bits == 1.125
    assert Qjl(128, m=256).bits == 2.125
