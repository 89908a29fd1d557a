"""Readable reference quantizers, one short file an algorithm, over NumPy arrays and torch tensors.

Every quantizer has ``name``, ``bits`` and ``reconstruct(x)``: see ``protocol.Quantizer``. ``catalogue`` makes
one of each kind.
"""

from collections.abc import Iterator

from ggml_tq.reference.eden import Drive, Eden
from ggml_tq.reference.polar import PolarQuant
from ggml_tq.reference.protocol import Array, Coder, Quantizer
from ggml_tq.reference.qjl import Qjl
from ggml_tq.reference.rotation import Rotated, Rotation
from ggml_tq.reference.scalar import Q4_0, Q8_0, Absmax
from ggml_tq.reference.turboquant import PAPER_2_5, PAPER_3_5, TurboQuantMse, TurboQuantProd, TurboQuantSplit

__all__ = [
    "PAPER_2_5",
    "PAPER_3_5",
    "Q4_0",
    "Q8_0",
    "Absmax",
    "Array",
    "Coder",
    "Drive",
    "Eden",
    "PolarQuant",
    "Qjl",
    "Quantizer",
    "Rotated",
    "Rotation",
    "TurboQuantMse",
    "TurboQuantProd",
    "TurboQuantSplit",
    "catalogue",
]


def catalogue(dim: int, widths: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)) -> Iterator[tuple[str, Quantizer]]:
    """Every algorithm for vectors of ``dim``, a multiple of 32, at the given widths, as (family, quantizer).

    A family is one algorithm over all widths. Those without a rotation of their own have a Hadamard transform before
    them. PolarQuant has 2 bits more on level 1, whose angles span four times as much: at width 2 the paper's setting.
    """
    for b in widths:
        yield "TurboQuant mse", TurboQuantMse(dim, b)
        yield "EDEN biased", Eden(dim, b, "biased")
        yield "EDEN matched", Eden(dim, b, "matched")
        yield "EDEN unbiased", Eden(dim, b, "unbiased")
        yield "TurboQuant prod, Gaussian S", TurboQuantProd(dim, b, "gaussian")
        yield "TurboQuant prod, orthogonal S", TurboQuantProd(dim, b, "orthogonal")
        yield "TurboQuant prod, Hadamard S", TurboQuantProd(dim, b, "hadamard")
        yield "TurboQuant prod, Hadamard S, least error", TurboQuantProd(dim, b, "hadamard", "least-error")
        yield "absmax by 32", Rotated(Absmax(b))
    if 1 in widths:
        yield "DRIVE biased", Drive(dim, "biased")
        yield "DRIVE unbiased", Drive(dim, "unbiased")
        yield "QJL Gaussian", Qjl(dim)
        yield "QJL Hadamard", Qjl(dim, projection="hadamard")
        yield "QJL Hadamard, least error", Qjl(dim, projection="hadamard", weight="least-error")
    for b in widths:
        if b <= 6:
            yield "PolarQuant", PolarQuant(dim, (b + 2, b, b, b))
    for b in widths[:-1]:
        yield "outlier split", TurboQuantSplit(dim, dim // 4, b + 1, b)
    yield "q4_0", Rotated(Q4_0(), block=min(dim & -dim, 64))
    yield "q8_0", Rotated(Q8_0(), block=min(dim & -dim, 64))
