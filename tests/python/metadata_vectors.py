"""Metadata that is valid, and metadata that is not: one list for `ggml-tq inspect` and the runtime.

An edit replaces the entry of a key in the metadata of the built-in parameters, or removes it (None). The model that
brings them has keys of ``HPARAMS``: those of random_models.Llama(head_dim=64).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gguf import GGUFValueType as T

from ggml_tq.center import Centers
from ggml_tq.gguf_file import Entry, encode_entry
from ggml_tq.metadata import PREFIX, to_entries
from ggml_tq.params import DEFAULT, Params, Quantizer, fnv1a

HPARAMS = [
    encode_entry("general.architecture", T.STRING, "llama"),
    encode_entry("llama.block_count", T.UINT32, 2),
    encode_entry("llama.embedding_length", T.UINT32, 128),
    encode_entry("llama.attention.head_count", T.UINT32, 4),
    encode_entry("llama.attention.head_count_kv", T.UINT32, 2),
    encode_entry("llama.attention.key_length", T.UINT32, 64),
]
N_CENTERS = 2 * 2 * 64  # layers, key heads, dimensions
NONE = Centers("none")
HALVES = {n: np.linspace(-2, 2, n).astype(np.float32).tolist() for n in (4, 7, 8, 9, 16)}


@dataclass(frozen=True)
class Vector:
    refused: str | None  # the key that the refusal must name, without prefix
    edits: dict[str, Entry | None] = field(default_factory=dict)
    params: Params = DEFAULT
    centers: Centers = NONE

    def entries(self) -> list[Entry]:
        entries = {e.key: e for e in to_entries(self.params, self.centers, {"tool": "test"})} | self.edits
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


def mean(
    values: np.ndarray,
    refused: str | None = None,
    key: str = "",
    *entry: Any,  # noqa: ANN401
    scales: np.ndarray | None = None,
    first: np.ndarray | None = None,
) -> Vector:
    """Centers and scales with their hash; ``key`` is replaced by an entry of (type, value, item type), or removed."""
    name = PREFIX + key
    edits = {name: encode_entry(name, *entry) if entry else None} if key else {}
    s = SCALES if scales is None else scales
    m, s, f = (None if v is None else v.astype(np.float32) for v in (values, s, first))
    return Vector(refused, edits, centers=Centers("mean", m, s, f))


def with_center(value: float) -> Vector:
    m = CENTERS.copy()
    m[77] = value
    return mean(m, None if abs(value) < 1e6 else "center.key")


def with_scale(value: float, refused: str | None = "center.scale") -> Vector:
    """Of the last pair of a head."""
    s = SCALES.copy()
    s[126:128] = value
    return mean(CENTERS, refused, scales=s)


LEVELS = HALVES[8]
CENTERS = np.random.default_rng(8).standard_normal(N_CENTERS).astype(np.float32) * np.float32(3)
SCALES = np.repeat(np.random.default_rng(9).lognormal(0, 0.7, N_CENTERS // 2), 2).astype(np.float32)  # adjacent pairs
FIRSTS = np.random.default_rng(10).standard_normal(N_CENTERS).astype(np.float32) * np.float32(9)
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
    "the draft's version": bad("version", T.UINT32, 0),
    "next version": bad("version", T.UINT32, 2),
    "version of another type": bad("version", T.INT32, 1),
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
    # centers
    "centered by biases": Vector(None, centers=Centers("bias")),
    "centered by means": mean(CENTERS),
    "means of zero": mean(np.zeros(N_CENTERS)),
    "a great center": with_center(999999.9375),
    "no kind of center": bad("center.kind"),
    "unknown kind of center": bad("center.kind", T.STRING, "median"),
    "empty kind of center": bad("center.kind", T.STRING, ""),
    "kind of center as a number": bad("center.kind", T.UINT32, 0),
    "kind mean and nothing else": Vector("center.key", bad("center.kind", T.STRING, "mean").edits),
    "means without centers": mean(CENTERS, "center.key", "center.key"),
    "means without a hash": mean(CENTERS, "center.hash", "center.hash"),
    "one center too few": mean(CENTERS[:-1], "center.key"),
    "one center too many": mean(np.append(CENTERS, 0), "center.key"),
    "centers of one layer": mean(CENTERS[: N_CENTERS // 2], "center.key"),
    "no centers at all": mean(CENTERS[:0], "center.key"),
    "NaN center": with_center(float("nan")),
    "infinite center": with_center(float("-inf")),
    "too great a center": with_center(-1e6),
    "centers in binary64": mean(CENTERS, "center.key", "center.key", T.ARRAY, CENTERS.tolist(), T.FLOAT64),
    "centers as one number": mean(CENTERS, "center.key", "center.key", T.FLOAT32, 0.0),
    "another hash of centers": mean(
        CENTERS, "center.hash", "center.hash", T.UINT64, Centers("mean", CENTERS, SCALES).hash ^ 1
    ),
    "signed hash of centers": mean(CENTERS, "center.hash", "center.hash", T.INT64, 1),
    "an edited center": mean(CENTERS, "center.hash", "center.key", T.ARRAY, (CENTERS + 1).tolist(), T.FLOAT32),
    "centers of kind none": mean(CENTERS, "center.key", "center.kind", T.STRING, "none"),
    "centers of kind bias": mean(CENTERS, "center.key", "center.kind", T.STRING, "bias"),
    "a hash of centers without them": bad("center.hash", T.UINT64, 0),
    # scales
    "all scales 1": mean(CENTERS, scales=np.ones(N_CENTERS)),
    "least scale": with_scale(1 / 1024, None),
    "greatest scale": with_scale(1024, None),
    "means without scales": mean(CENTERS, "center.scale", "center.scale"),
    "one scale too few": mean(CENTERS, "center.scale", scales=SCALES[:-1]),
    "one scale too many": mean(CENTERS, "center.scale", scales=np.append(SCALES, 1)),
    "no scales at all": mean(CENTERS, "center.scale", scales=SCALES[:0]),
    "NaN scale": with_scale(float("nan")),
    "infinite scale": with_scale(float("inf")),
    "a scale of zero": with_scale(0),
    "negative scale": with_scale(-1),
    "a scale of 1025": with_scale(1025),
    "just beyond the greatest scale": with_scale(float(np.nextafter(np.float32(1024), np.float32(1025)))),
    "just below the least scale": with_scale(float(np.nextafter(np.float32(1 / 1024), np.float32(0)))),
    "scales in binary64": mean(CENTERS, "center.scale", "center.scale", T.ARRAY, SCALES.tolist(), T.FLOAT64),
    "scales as one number": mean(CENTERS, "center.scale", "center.scale", T.FLOAT32, 1.0),
    "edited scales": mean(CENTERS, "center.hash", "center.scale", T.ARRAY, (2 * SCALES).tolist(), T.FLOAT32),
    "the hash of centers alone": mean(CENTERS, "center.hash", "center.hash", T.UINT64, fnv1a(CENTERS.tobytes())),
    "scales of kind none": bad("center.scale", T.ARRAY, SCALES.tolist(), T.FLOAT32),
    "scales of kind bias": Vector(
        "center.scale", bad("center.scale", T.ARRAY, SCALES.tolist(), T.FLOAT32).edits, centers=Centers("bias")
    ),
    # centers at position 0
    "a center for position 0": mean(CENTERS, first=FIRSTS),
    "one center for position 0 too few": mean(CENTERS, "center.first", first=FIRSTS[:-1]),
    "one center for position 0 too many": mean(CENTERS, "center.first", first=np.append(FIRSTS, 0)),
    "no numbers for position 0": mean(CENTERS, "center.first", first=FIRSTS[:0]),
    "NaN for position 0": mean(CENTERS, "center.first", first=np.where(np.arange(N_CENTERS) == 5, np.nan, FIRSTS)),
    "too great a center for position 0": mean(CENTERS, "center.first", first=np.full(N_CENTERS, 1e6)),
    "binary64 for position 0": mean(
        CENTERS, "center.first", "center.first", T.ARRAY, FIRSTS.tolist(), T.FLOAT64, first=FIRSTS
    ),
    "one number for position 0": mean(CENTERS, "center.first", "center.first", T.FLOAT32, 1.0, first=FIRSTS),
    "an edited center for position 0": mean(
        CENTERS, "center.hash", "center.first", T.ARRAY, (FIRSTS + 1).tolist(), T.FLOAT32, first=FIRSTS
    ),
    "a center for position 0 that the hash does not know": mean(
        CENTERS, "center.hash", "center.first", T.ARRAY, FIRSTS.tolist(), T.FLOAT32
    ),
    "a center for position 0 that was removed": mean(CENTERS, "center.hash", "center.first", first=FIRSTS),
    "a center for position 0 of kind none": bad("center.first", T.ARRAY, FIRSTS.tolist(), T.FLOAT32),
    "centers of values": bad("center.value", T.ARRAY, CENTERS.tolist(), T.FLOAT32),
    # the rest
    "unknown key": bad("tq5_mse.codebook", T.ARRAY, LEVELS, T.FLOAT32),
    "no hash": bad("hash"),
    "another hash": bad("hash", T.UINT64, DEFAULT.hash ^ 1),
    "edited value": Vector("hash", {PREFIX + "rotation.seed": encode_entry(PREFIX + "rotation.seed", T.UINT64, 1)}),
}
