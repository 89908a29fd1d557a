"""The cache types: names, ids and sizes (docs/format.md, section 1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ggml_tq.codebook import Codebook, solve
from ggml_tq.trellis import trellis

BLOCK = 64  # coordinates
FORMAT_VERSION = 1
QUERY_ID = 129
QUERY_BYTES = 8 + 2 * BLOCK


Kind = Literal["mse", "qjl", "tcq"]


@dataclass(frozen=True)
class TqType:
    """One stored cache type: ``bits`` planes of 64 bits and a binary16 scale for each 64 values."""

    id: int  # ggml_type
    bits: int  # planes, the last a QJL sign or a trellis' coded bit
    kind: Kind

    @property
    def name(self) -> str:
        return f"tq{self.bits}_{self.kind}"

    @property
    def qjl(self) -> bool:
        return self.kind == "qjl"

    @property
    def code_bits(self) -> int:
        """Bits of the codebook; 0 for a trellis code, which has none."""
        return {"mse": self.bits, "qjl": self.bits - 1, "tcq": 0}[self.kind]

    @property
    def block_bytes(self) -> int:
        return 2 + 8 * self.bits

    @property
    def bits_per_value(self) -> float:
        return 8 * self.block_bytes / BLOCK

    @property
    def codebook(self) -> Codebook:
        """The built-in codebook: exact for the dimension of a block. Raises ValueError for a trellis code."""
        if self.kind == "tcq":
            raise ValueError(f"{self.name} has no codebook")
        return solve(self.code_bits, BLOCK)

    @property
    def distortion(self) -> float:
        """Expected squared error of a decoded row, relative to the row's own square.

        ``_mse``: the codebook's D, in theory. ``_qjl``: the residual's signs take 2/pi of its square away, which leaves
        D' = (1 - 2/pi) D, and the unbiased scale 1 / (1 - D') turns that into D' / (1 - D'). ``_tcq``: the same with
        D' as it was measured on uniform directions when the tables were trained; no theory says it.
        """
        if self.kind == "mse":
            return self.codebook.distortion
        d = trellis(self.bits).distortion if self.kind == "tcq" else (1 - 2 / math.pi) * self.codebook.distortion
        return d / (1 - d)


_KINDS: tuple[Kind, ...] = ("mse", "qjl", "tcq")
_ALL = (TqType(120 + 3 * i + bits - 2, bits, kind) for i, kind in enumerate(_KINDS) for bits in (2, 3, 4))
TYPES: dict[str, TqType] = {t.name: t for t in _ALL}
CODEBOOK_TYPES = {name: t for name, t in TYPES.items() if t.kind != "tcq"}  # those that a model's parameters are of
