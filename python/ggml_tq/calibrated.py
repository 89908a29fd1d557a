"""What a calibrated model's metadata do to keys before they are rounded (docs/format.md, section 10)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ggml_tq.capture import ROPE_NEOX, Floats, Ints, Layer
from ggml_tq.center import Turn, make_table
from ggml_tq.gguf_file import GgufError
from ggml_tq.hparams import key_shapes
from ggml_tq.metadata import read
from ggml_tq.params import DEFAULT, ParamsError


class CalibratedError(Exception):
    """A file that brings no centers, or others than the bench can use; one line for the user."""


@dataclass(frozen=True)
class Calibrated:
    """Centers before RoPE, scales, and centers at position 0 by layer, (heads, dim) each."""

    key: Mapping[int, Floats]
    scale: Mapping[int, Floats]
    first: Mapping[int, Floats]

    def without_scales(self) -> Calibrated:
        return replace(self, scale={i: np.ones_like(s) for i, s in self.scale.items()})

    def check(self, layer: Layer) -> None:
        """Raises CalibratedError unless the layer's keys can have these centers."""
        want = (layer.n_head_kv, layer.head_dim_k)
        if layer.index not in self.key or self.key[layer.index].shape != want:
            raise CalibratedError(f"layer {layer.index} has keys of {want}, the calibrated model has not")
        if layer.rope is not None and (layer.rope.mode & ~ROPE_NEOX or layer.rope.offset):
            raise CalibratedError(f"layer {layer.index} has RoPE of mode {layer.rope.mode}: keys are not centered")

    def of_head(self, layer: Layer, head: int, positions: Ints) -> tuple[Floats, Floats]:
        """The centers of a head's keys (tokens, dim) at ``positions`` (tokens,), and their scales (dim,)."""
        m, scale = self.key[layer.index][head], self.scale[layer.index][head]
        if layer.rope is None:
            return np.broadcast_to(m, (len(positions), len(m))), scale
        freqs, magnitude = layer.rope.frequencies()
        gain = np.ones_like(m)
        gain[: layer.rope.n_dims] = magnitude
        turn = Turn(_table(tuple(freqs.tolist())), bool(layer.rope.mode & ROPE_NEOX))
        return turn.apply(m * gain, positions, self.first[layer.index][head] * gain), scale


@functools.lru_cache(maxsize=4)  # layers and heads share a few
def _table(freqs: tuple[float, ...]) -> Floats:
    return make_table(freqs)


def load(path: Path) -> Calibrated:
    """What `ggml-tq calibrate` wrote into a model. Raises CalibratedError where it has not."""
    try:
        header, found = read(path)
        shapes = key_shapes(header.entries)
    except (GgufError, ParamsError, OSError) as e:
        raise CalibratedError(f"{path}: {e}" if isinstance(e, ParamsError) else str(e)) from e
    centers = found.centers if found else None
    if found is None or centers is None or centers.key is None or centers.scale is None:
        raise CalibratedError(f"{path} has no calibrated centers: run ggml-tq calibrate")
    if found.params.hash != DEFAULT.hash:
        raise CalibratedError(f"{path} has codebooks or seeds of its own, which the bench does not use")
    ends = np.cumsum([s.size for s in shapes])[:-1]

    def by_layer(flat: Floats) -> dict[int, Floats]:
        return {i: x.reshape(s.heads, s.dim) for i, (x, s) in enumerate(zip(np.split(flat, ends), shapes, strict=True))}

    first = centers.key if centers.first is None else centers.first
    return Calibrated(by_layer(centers.key), by_layer(centers.scale), by_layer(first))
