#!/usr/bin/env python3
"""Write tests/data/golden.npz: rows and centers, and what docs/format.md makes of them.

The file is frozen: these are the bits of format version 1. Only another version, or something that the file lacks, is
a reason to run this again.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ggml_tq import codec
from ggml_tq.cache_types import TYPES
from ggml_tq.center import Turn, make_table
from ggml_tq.params import DEFAULT, Params

TARGET = Path(__file__).resolve().parent.parent / "tests" / "data" / "golden.npz"
SEEDS = np.array([0x0123456789ABCDEF, 0xFEDCBA9876543210], dtype=np.uint64)


def rows() -> np.ndarray:
    """Every kind of row that the specification has a sentence about: (rows, 128)."""
    rng = np.random.default_rng(20261124)
    normal = rng.standard_normal((8, 128)).astype(np.float32)
    special = np.zeros((12, 128), dtype=np.float32)
    special[1] = 1e-40  # subnormal
    special[2] = 3.0  # constant
    special[3, 5] = -2.5  # one coordinate
    special[4, 64:] = 1e-3
    special[5] = normal[0] * np.float32(1e37)  # saturates
    special[6] = normal[1] * np.float32(2e-8)  # a subnormal scale
    special[7] = normal[2] * np.float32(1e-30)  # a scale that rounds to 0
    special[8] = normal[3]
    special[8, 70] = np.nan
    special[9] = normal[4]
    special[9, 3] = -np.inf
    special[10] = np.finfo(np.float32).max
    special[11] = rng.integers(-2, 3, 128)
    return np.concatenate([normal, special])


def centers() -> dict[str, np.ndarray]:
    """Centers of 80 coordinates at positions, 64 of the coordinates turned."""
    freqs = 1e4 ** (-np.arange(32) / 32)
    m = np.random.default_rng(20261125).standard_normal((4, 80)).astype(np.float32)
    positions = np.array([0, 1, 100, 255, 256, 1000, 65535, 65536, 131071, 2**24 - 1, 2**24 + 7, -1], dtype=np.int32)
    table = make_table(freqs)
    at = {f"center/{'neox' if neox else 'pairs'}": Turn(table, neox).apply(m, positions) for neox in (False, True)}
    return {"center/freqs": freqs, "center/m": m, "center/positions": positions, **at}


def main() -> None:
    arrays: dict[str, np.ndarray] = {"x": rows(), "seeds": SEEDS}
    for params, name in ((DEFAULT, "default"), (Params(*(int(s) for s in SEEDS)), "seeded")):
        for tq in TYPES.values():
            data = codec.encode(arrays["x"], tq, params)
            arrays[f"{name}/{tq.name}"] = data
            arrays[f"{name}/{tq.name}/decoded"] = codec.decode(data, tq, params)
    arrays |= centers()
    TARGET.parent.mkdir(exist_ok=True)
    np.savez_compressed(TARGET, **arrays)


if __name__ == "__main__":
    main()
