"""Metadata that is valid, and metadata that is not: one list for `ggml-tq inspect` and the runtime.

An edit replaces the entry of a key in the metadata of the built-in parameters, or removes it (None).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from gguf import GGUFValueType as T

from ggml_tq.gguf_file import Entry, encode_entry
from ggml_tq.metadata import PREFIX, to_entries
from ggml_tq.params import DEFAULT, Params, Quantizer

HALVES = {n: np.linspace(-2, 2, n).astype(np.float32).tolist() for n in (4, 7, 8, 9, 16)}


@dataclass(frozen=True)
class Vector:
    refused: str | None  # the key that the refusal must name, without prefix
    edits: dict[str, Entry | None] = field(default_factory=dict)
    params: Params = DEFAULT

    def entries(self) -> list[Entry]:
        entries = {e.key: e for e in to_entries(self.params, {"tool": "test"})} | self.edits
        return [e for e in entries.values() if e is not None]


def bad(key: str, kind: T | None = None, value: object = None, item: T | None = None) -> Vector:
    """One entry replaced, or removed."""
    name = PREFIX + key
    return Vector(key, {name: None if kind is None else encode_entry(name, kind, value, item)})


def book(values: list[float], name: str = "tq3_mse") -> Vector:
    return bad(f"{name}.codebook", T.ARRAY, values, T.FLOAT32)


def good(name: str, centroids: list[float], kappa: float = 0.0) -> Vector:
    q = Quantizer(np.array(centroids, dtype=np.float32), np.float32(kappa))
    return Vector(None, params=Params(quantizers={**DEFAULT.quantizers, name: q}))


LEVELS = HALVES[8]
VECTORS: dict[str, Vector] = {
    # valid
    "built-in": Vector(None),
    "seeds at the ends": Vector(None, params=Params(0, 2**64 - 1)),
    "not symmetric": good("tq3_mse", [-1.0, 0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 8.0]),
    "no weight for the sketch": good("tq3_qjl", HALVES[4], 0.0),
    "greatest weight": good("tq3_qjl", HALVES[4], 2.0),
    "more provenance": Vector(
        None, {PREFIX + "provenance.text": encode_entry(PREFIX + "provenance.text", T.STRING, "wiki")}
    ),
    # version and rotation
    "no version": bad("version"),
    "next version": bad("version", T.UINT32, 1),
    "version of another type": bad("version", T.INT32, 0),
    "no rotation kind": bad("rotation.kind"),
    "unknown rotation": bad("rotation.kind", T.STRING, "dense"),
    "rotation kind as a number": bad("rotation.kind", T.UINT32, 64),
    "no rotation seed": bad("rotation.seed"),
    "signed seed": bad("rotation.seed", T.INT64, 5),
    "short seed": bad("sketch.seed", T.UINT32, 5),
    "no sketch seed": bad("sketch.seed"),
    # codebooks
    "no codebook": bad("tq2_mse.codebook"),
    "one centroid too few": book(HALVES[7]),
    "one centroid too many": book(HALVES[9]),
    "codebook of another type": book(HALVES[4]),
    "no centroids": book([]),
    "NaN": book([*LEVELS[:3], float("nan"), *LEVELS[4:]]),
    "infinite": book([*LEVELS[:7], float("inf")]),
    "huge": book([*LEVELS[:7], 1e30]),
    "just beyond 8": book([*LEVELS[:7], float(np.nextafter(np.float32(8), np.float32(9)))]),
    "unsorted": book([LEVELS[1], LEVELS[0], *LEVELS[2:]]),
    "equal centroids": book([LEVELS[1], LEVELS[1], *LEVELS[2:]]),
    "binary64 codebook": bad("tq4_mse.codebook", T.ARRAY, HALVES[16], T.FLOAT64),
    "codebook of integers": bad("tq2_mse.codebook", T.ARRAY, [-2, -1, 1, 2], T.INT32),
    "codebook as one number": bad("tq2_qjl.codebook", T.FLOAT32, 0.8),
    "codebook as a string": bad("tq2_qjl.codebook", T.STRING, "-0.8 0.8"),
    # kappa
    "no kappa": bad("tq4_qjl.kappa"),
    "NaN kappa": bad("tq4_qjl.kappa", T.FLOAT32, float("nan")),
    "negative kappa": bad("tq2_qjl.kappa", T.FLOAT32, -0.1),
    "great kappa": bad("tq2_qjl.kappa", T.FLOAT32, 2.1),
    "binary64 kappa": bad("tq3_qjl.kappa", T.FLOAT64, 0.2),
    "kappa of a type without a sketch": bad("tq3_mse.kappa", T.FLOAT32, 0.1),
    # the rest
    "unknown key": bad("tq5_mse.codebook", T.ARRAY, LEVELS, T.FLOAT32),
    "no hash": bad("hash"),
    "another hash": bad("hash", T.UINT64, DEFAULT.hash ^ 1),
    "edited value": Vector("hash", {PREFIX + "rotation.seed": encode_entry(PREFIX + "rotation.seed", T.UINT64, 1)}),
}
