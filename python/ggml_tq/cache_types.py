"""The cache types: names, ids and sizes (docs/format.md, section 1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ggml_tq.codebook import Codebook, solve

BLOCK = 64  # coordinates
FORMAT_VERSION = 1
QUERY_ID = 129
QUERY_BYTES = 8 + 2 * BLOCK


@dataclass(frozen=True)
class TqType:
    """One stored cache type: ``bits`` planes of 64 bits and a binary16 scale for each 64 values."""

    id: int  # ggml_type
    bits: int  # planes, the last a QJL sign if qjl
    qjl: bool

    @property
    def name(self) -> str:
        return f"tq{self.bits}_{'qjl' if self.qjl else 'mse'}"

    @property
    def code_bits(self) -> int:
        """Bits of the codebook."""
        return self.bits - self.qjl

    @property
    def block_bytes(self) -> int:
        return 2 + 8 * self.bits

    @property
    def bits_per_value(self) -> float:
        return 8 * self.block_bytes / BLOCK

    @property
    def codebook(self) -> Codebook:
        """The built-in codebook: exact for the dimension of a block."""
        return solve(self.code_bits, BLOCK)

    @property
    def distortion(self) -> float:
        """Expected squared error of a decoded row, relative to the row's own square, in theory.

        ``_mse``: the codebook's D. ``_qjl``: the residual's signs take 2/pi of its square away, which leaves
        D' = (1 - 2/pi) D, and the unbiased scale 1 / (1 - D') turns that into D' / (1 - D').
        """
        d = self.codebook.distortion
        if not self.qjl:
            return d
        d *= 1 - 2 / math.pi
        return d / (1 - d)


TYPES: dict[str, TqType] = {
    t.name: t for t in (TqType(120 + 3 * qjl + bits - 2, bits, qjl) for qjl in (False, True) for bits in (2, 3, 4))
}
