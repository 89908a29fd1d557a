"""Readable reference quantizers, one short file an algorithm, over NumPy arrays and torch tensors.

Every quantizer has ``name``, ``bits`` and ``reconstruct(x)``: see ``protocol.Quantizer``. ``catalogue`` makes
one of each kind.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ggml_tq.reference.eden import Drive, Eden
from ggml_tq.reference.polar import PolarQuant
from ggml_tq.reference.protocol import Array, Coder, Quantizer
from ggml_tq.reference.qjl import Qjl
from ggml_tq.reference.rotation import Rotated, Rotation
from ggml_tq.reference.scalar import Q4_0, Q8_0, Absmax
from ggml_tq.reference.trellis import Trellis
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
    "Entry",
    "PolarQuant",
    "Qjl",
    "Quantizer",
    "Rotated",
    "Rotation",
    "Trellis",
    "TurboQuantMse",
    "TurboQuantProd",
    "TurboQuantSplit",
    "catalogue",
]


class Entry(NamedTuple):
    family: str  # one algorithm over all widths
    width: int  # bits of its codes, 0 where the algorithm has one size only
    quantizer: Quantizer


def catalogue(dim: int, widths: Iterable[int] = range(1, 9)) -> Iterator[Entry]:
    """Every algorithm for vectors of ``dim``, a multiple of 32, at each of the given widths.

    Those without a rotation of their own have a Hadamard transform before them. PolarQuant has 2 bits more on level
    1, whose angles span four times as much (at width 2 the paper's setting), and ends at width 6. The outlier split
    has one bit more for a quarter of the channels (of 128 at widths 2 and 3 the paper's settings), and ends at 7.
    """
    for b in widths:
        yield Entry("TurboQuant mse", b, TurboQuantMse(dim, b))
        yield Entry("EDEN biased", b, Eden(dim, b, "biased"))
        yield Entry("EDEN matched", b, Eden(dim, b, "matched"))
        yield Entry("EDEN unbiased", b, Eden(dim, b, "unbiased"))
        yield Entry("TurboQuant prod, Gaussian S", b, TurboQuantProd(dim, b, "gaussian"))
        yield Entry("TurboQuant prod, orthogonal S", b, TurboQuantProd(dim, b, "orthogonal"))
        yield Entry("TurboQuant prod, Hadamard S", b, TurboQuantProd(dim, b, "hadamard"))
        yield Entry("TurboQuant prod, Hadamard S, least error", b, TurboQuantProd(dim, b, "hadamard", "least-error"))
        yield Entry("absmax of 32", b, Rotated(Absmax(b)))
        if b <= 6:
            yield Entry("PolarQuant", b, PolarQuant(dim, (b + 2, b, b, b)))
        if 2 <= b <= 4:
            yield Entry("trellis, 64 levels", b, Trellis(dim, b, f"64x{64 >> b}", block=min(dim & -dim, 64)))
            yield Entry("trellis, 32 levels", b, Trellis(dim, b, "32x32", block=min(dim & -dim, 64)))
        if b <= 7:
            yield Entry("outlier split", b, TurboQuantSplit(dim, dim // 4, b + 1, b))
    yield Entry("DRIVE biased", 0, Drive(dim, "biased"))
    yield Entry("DRIVE unbiased", 0, Drive(dim, "unbiased"))
    yield Entry("QJL Gaussian", 0, Qjl(dim))
    yield Entry("QJL Hadamard", 0, Qjl(dim, projection="hadamard"))
    yield Entry("QJL Hadamard, least error", 0, Qjl(dim, projection="hadamard", weight="least-error"))
    yield Entry("upstream's q4_0", 0, Rotated(Q4_0(), block=min(dim & -dim, 64)))
    yield Entry("upstream's q8_0", 0, Rotated(Q8_0(), block=min(dim & -dim, 64)))
