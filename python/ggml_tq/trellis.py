"""The trellis codes of the ``_tcq`` types (docs/format.md, section 9), in binary32, bit for bit.

``ggml_tq.reference.trellis`` has the algorithm in general, and the training of the tables; here are the three codes of
the format, with every operation in the specified order.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

MEMORY = 5  # past coded bits in a register
STATES = 1 << MEMORY
_TABLES = "trellis_tables.json"  # of ggml_tq.reference, which trains them


@dataclass(frozen=True)
class TrellisCode:
    """The code of ``bits`` bits a coordinate: one coded bit and ``bits`` - 1 free ones."""

    bits: int
    taps: tuple[int, ...]  # label bit k is the parity of taps[k] & register
    levels: Floats  # (32,): label * 2^(bits - 1) + free bits
    distortion: float  # measured on uniform directions in 64 dimensions, with the format's levels and encoder

    @property
    def free(self) -> int:
        """Levels under one label."""
        return 1 << (self.bits - 1)


@cache
def code(bits: int) -> TrellisCode:
    """The format's code of 2, 3 or 4 bits."""
    data = json.loads(resources.files("ggml_tq.reference").joinpath(_TABLES).read_text())
    t = data["tables"][f"32x{STATES}-{bits}b"]
    levels = np.array(t["int8"], dtype=np.float32) * np.float32(t["unit"])  # binary32, each product rounded once
    levels.flags.writeable = False
    return TrellisCode(bits, tuple(t["taps"]), levels, float(t["distortion"]["search5_int8"]))
