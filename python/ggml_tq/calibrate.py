"""What a model's metadata are made of.

Codebooks: exact for a block's dimension, the Gaussian limit, or from the model's own rows. Centers: the means of its
keys before RoPE, over a text; of those at position 0, the median over many beginnings. Scales: from what its queries
ask of them.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ggml_tq.cache_types import BLOCK, CODEBOOK_TYPES, TqType
from ggml_tq.capture import ROPE_MROPE, ROPE_NEOX, Capture, Layer, Request, capture
from ggml_tq.center import MAX_SCALE, Centers
from ggml_tq.codebook import Codebook, from_samples, solve
from ggml_tq.gguf_file import Header, read_vector, tensors
from ggml_tq.hparams import KeyShape, key_shapes
from ggml_tq.params import Params, Quantizer
from ggml_tq.signs import ROTATION_SEED, SKETCH_SEED
from ggml_tq.study import SINKS, ExactAttention, tiles
from ggml_tq.transform import rht

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
MAX_BLOCKS = 1 << 16  # for each of keys and values: 4 million coordinates
CHUNK = 1024  # tokens that a model reads at a time
BEGINNINGS = 64  # whose keys at position 0 are looked at
FEWEST = 16  # beginnings that a median is taken of
BEGINNING = 16  # tokens of each; the first is what counts
WORTH = 0.8  # the part of the error's power that scales must leave at most, to be used
FLOOR = 1e-6  # of a head's largest power: what counts for a coordinate with less
CHARACTERS = 32  # of the text for each token, at most: more than any tokenizer's mean


class CalibrationError(Exception):
    """A model or text that gives no centers; one line for the user."""


# ---- codebooks


def params_of(
    book: Callable[[TqType], Codebook], rotation_seed: int = ROTATION_SEED, sketch_seed: int = SKETCH_SEED
) -> Params:
    """Parameters with the codebook ``book(type)`` for each type, and kappa from its distortion (format, section 2)."""

    def quantizer(tq: TqType) -> Quantizer:
        b = book(tq)
        return Quantizer(b.centroids_f32, b.kappa if tq.qjl else np.float32(0))

    return Params(rotation_seed, sketch_seed, {name: quantizer(tq) for name, tq in CODEBOOK_TYPES.items()})


def sphere(tq: TqType) -> Codebook:
    """The built-in codebook: exact for a uniform direction in a block's 64 dimensions."""
    return solve(tq.code_bits, BLOCK)


def gaussian(tq: TqType) -> Codebook:
    """The limit of many dimensions, N(0, 1)."""
    return solve(tq.code_bits, None)


def normalized(rows: Floats, signs: Floats) -> Floats:
    """Rotated blocks of unit mean square, (blocks, 64), of rows (..., n) with 64 dividing n: what codes are chosen for.

    Blocks without a finite positive norm are left out.
    """
    y = rht(rows.reshape(-1, BLOCK), signs)
    norm = np.sqrt(np.mean(np.square(y, dtype=np.float64), axis=-1, keepdims=True))
    usable = np.isfinite(norm[:, 0]) & (norm[:, 0] > 0)
    unit: Floats = (y[usable] / norm[usable]).astype(np.float32)
    return unit


def calibrated(capture: Capture, rotation_seed: int = ROTATION_SEED) -> Callable[[TqType], Codebook]:
    """Codebooks from a capture of the model's rows: ``_qjl`` types from keys, ``_mse`` types from keys and values.

    Evenly spaced blocks of all layers, at most MAX_BLOCKS of keys and of values. Raises ValueError where 64 does not
    divide the head dimensions.
    """
    signs = Params(rotation_seed=rotation_seed).rotation_signs

    def sample(rows: Callable[[int], Floats]) -> Floats:
        parts = []
        for layer in capture.layers:
            x = rows(layer)
            if x.shape[-1] % BLOCK:
                raise ValueError(f"layer {layer} has heads of {x.shape[-1]} coordinates, which {BLOCK} does not divide")
            blocks = x.reshape(-1, BLOCK)
            step = max(1, len(blocks) * len(capture.layers) // MAX_BLOCKS)
            parts.append(normalized(blocks[::step], signs))
        return np.concatenate(parts)

    keys = sample(capture.k)
    both = np.concatenate([keys, sample(capture.v)])
    return lambda tq: from_samples(keys if tq.qjl else both, tq.code_bits)


# ---- centers


@dataclass
class KeySums:
    """Of one layer, over tokens: keys before RoPE and their squares, (heads, dim), and what scales are made of."""

    layer: Layer
    tokens: int  # counted, that is not among the first SINKS of a chunk
    key: Doubles
    square: float
    queries: Doubles  # squares, of the query heads that read the key head
    weight: Doubles  # (heads, 1): of all keys, by what attention loses with them
    weighted: Doubles  # keys
    weighted_squares: Doubles
    first: Doubles | None = None  # median of the keys at position 0
    first_left: float = 1.0  # their squared distance from it over that from `mean`, medians of both

    @property
    def mean(self) -> Doubles:
        return self.key / self.tokens

    def share(self, center: Doubles) -> float:
        """The part of the keys' energy that ``center`` (heads, dim) takes away; negative if it adds some."""
        gone = float(np.sum(center * (2 * self.mean - center)))
        return gone * self.tokens / self.square if self.square > 0 else 0.0

    @property
    def _powers(self) -> tuple[Doubles, Doubles]:
        """Squares of queries and weighted ones of centered keys, (heads, dim), alike for both coordinates of a pair."""
        q, m = self.queries.copy(), self.mean
        k = np.maximum(self.weighted_squares - 2 * m * self.weighted + m**2 * self.weight, 0)
        a, b = pairs(self.layer)
        for power in (q, k):
            power[:, a] = power[:, b] = (power[:, a] + power[:, b]) / 2
        q, k = (np.maximum(p, FLOOR * p.max(axis=-1, keepdims=True) + 1e-30) for p in (q, k))
        return q, k

    @property
    def scale(self) -> Doubles:
        """What to multiply centered keys by, (heads, dim), and divide queries: least error of scores.

        Rounding leaves an error of c |s k|^2 in all coordinates alike, of which a query sees sum(q^2 / s^2). Their
        product is least for s^2 = |q| / |k|, coordinate by coordinate. Keys count by the variance that their error
        gives a distribution, p(1 - p), so that the few which most queries look at do not pay for the others. Of
        geometric mean 1 over a head; ones for heads that would gain less than what one text can tell (WORTH).
        """
        q, k = self._powers
        log = (np.log(q) - np.log(k)) / 4
        log -= log.mean(axis=-1, keepdims=True)
        log[self._gains > WORTH] = 0
        s: Doubles = np.exp(np.clip(log, -math.log(float(MAX_SCALE)), math.log(float(MAX_SCALE))))
        return s

    @property
    def _gains(self) -> Doubles:
        """The power of the scores' error with the best scales, over that without, of each head."""
        q, k = self._powers
        gains: Doubles = np.sum(np.sqrt(q * k), axis=-1) ** 2 / (q.sum(axis=-1) * k.sum(axis=-1))
        return gains

    @property
    def gain(self) -> float:
        """The same with the scales as they are, mean over heads."""
        return float(np.mean(np.where(self._gains > WORTH, 1.0, self._gains)))


def pairs(layer: Layer) -> tuple[slice, slice]:
    """The two coordinates of all pairs that RoPE turns."""
    if layer.rope is None:
        return slice(0, 0), slice(0, 0)
    n = layer.rope.n_dims
    return (slice(0, n // 2), slice(n // 2, n)) if layer.rope.mode & ROPE_NEOX else (slice(0, n, 2), slice(1, n, 2))


def pieces(text: str, n: int) -> Iterator[str]:
    """``n`` pieces of a text, evenly spaced, that begin with a word; each long enough for a chunk if the text is."""
    for i in range(n):
        piece = text[i * len(text) // n : (i + 1) * len(text) // n]
        if i:
            piece = re.sub(r"^\S*\s+", "", piece)
        yield piece[: CHUNK * CHARACTERS]


def _readers(kv: Capture, layer: Layer, head: int) -> tuple[Doubles, Doubles]:
    """Of the queries that read a key head: squares (dim,), and p(1 - p) of each key (tokens,), summed over them."""
    k, v = kv.k(layer.index, head), kv.v(layer.index, head)
    squares, weight = np.zeros(layer.head_dim_k), np.zeros(len(k))
    sinks = kv.sinks(layer.index)
    for reader in range(head * layer.group, (head + 1) * layer.group):
        q = kv.q(layer.index, reader)
        squares += np.sum(q[SINKS:].astype(np.float64) ** 2, axis=0)
        sink = None if sinks is None else float(sinks[reader])
        for tile in tiles(slice(0, len(k)), SINKS, max(layer.window, 0)):
            p = ExactAttention(layer, q, k, v, tile, sink).p
            weight[tile.keys] += np.sum(p * (1 - p), axis=0, dtype=np.float64)
    return squares, weight


def _add(sums: dict[int, KeySums], kv: Capture, shapes: Sequence[KeyShape]) -> None:
    """Adds the keys of a capture."""
    counts = kv.positions >= SINKS
    for index, layer in kv.layers.items():
        if layer.v_in_k:
            raise CalibrationError("the keys of MLA models are not centered")
        if not kv.has_k_pre(index):
            continue
        rope = layer.rope
        if rope is not None and (rope.mode & ROPE_MROPE or rope.offset):
            raise CalibrationError(f"layer {index} has RoPE of mode {rope.mode}, offset {rope.offset}: not supported")
        shape = KeyShape(layer.n_head_kv, layer.head_dim_k)
        if index >= len(shapes) or shapes[index] != shape:
            raise CalibrationError(f"layer {index} has keys of {shape}, which the model's metadata does not say")
        key, q, wk, wkk = (np.zeros((shape.heads, shape.dim)) for _ in range(4))
        of_layer = sums.setdefault(index, KeySums(layer, 0, key, 0.0, q, np.zeros((shape.heads, 1)), wk, wkk))
        of_layer.tokens += int(counts.sum())
        for head in range(shape.heads):
            kv.check_rope(index, head)
            every = kv.k_pre(index, head).astype(np.float64)
            if not np.isfinite(every).all():
                raise CalibrationError(f"layer {index} has keys that are not finite")
            k = every[counts]
            of_layer.key[head] += k.sum(axis=0)
            of_layer.square += float(np.sum(k * k))
            squares, weight = _readers(kv, layer, head)
            weight[kv.positions == 0] = 0  # `first` leaves next to nothing of these
            of_layer.queries[head] += squares
            of_layer.weight[head] += weight.sum()
            of_layer.weighted[head] += weight @ every
            of_layer.weighted_squares[head] += weight @ every**2


def _add_beginnings(sums: dict[int, KeySums], kv: Capture) -> None:
    """Sets ``first``, from a capture of many beginnings; not if there are fewer than FEWEST."""
    counts = kv.positions == 0
    if counts.sum() < FEWEST:
        return
    for index, of_layer in sums.items():
        heads = [kv.k_pre(index, head)[counts] for head in range(len(of_layer.key))]
        k = np.stack(heads, axis=1, dtype=np.float64)
        if not np.isfinite(k).all():
            raise CalibrationError(f"layer {index} has keys that are not finite")
        # not the mean: a few tokens make no sink where they are the first, and have a key of another kind
        of_layer.first = np.median(k, axis=0)
        of_mean, of_first = (np.sum((k - center) ** 2, axis=(1, 2)) for center in (of_layer.mean, of_layer.first))
        of_layer.first_left = float(np.median(of_first) / np.median(of_mean)) if np.any(of_mean) else 1.0


def key_sums(
    header: Header,
    text: Path,
    tokens: int,
    folder: Path,
    directory: Path | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[int, KeySums]:
    """What a model's keys are over ``tokens`` tokens of a text, in chunks of at most CHUNK, by layer.

    The first SINKS tokens of a chunk do not count. Then come BEGINNINGS, for the keys at position 0. Layers without
    keys before RoPE are left out. ``folder``: where one chunk's capture lies for a while; ``directory``: of the
    program, see ``find_program``; ``progress`` is told how many tokens are done. Raises CalibrationError,
    CaptureError, GgufError or OSError.
    """
    shapes, sums, done = key_shapes(header.entries), dict[int, KeySums](), 0
    n = -(-tokens // CHUNK)
    content = text.read_text(encoding="utf-8", errors="replace")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".calibrate-") as name:
        piece, output = Path(name) / text.name, Path(name) / "kv.safetensors"
        for i, words in enumerate(pieces(content, n)):
            piece.write_text(words, encoding="utf-8")
            wanted = min(CHUNK, tokens - i * CHUNK)
            request = Request(header.path, piece, output, context=CHUNK, max_tokens=wanted, force=True)
            with capture(request, lambda now, _: progress(done + now), directory=directory) as kv:  # noqa: B023
                _add(sums, kv, shapes)
                done += len(kv.tokens)
        if not sums:
            raise CalibrationError("no layer of this model turns its keys by RoPE as the last step: nothing to center")
        if not all(of_layer.tokens for of_layer in sums.values()):
            raise CalibrationError(f"{text}: {done} tokens, of which none is after the first {SINKS} of its chunk")
        piece.write_text(content[: BEGINNINGS * BEGINNING * CHARACTERS], encoding="utf-8")
        request = Request(header.path, piece, output, context=BEGINNING, max_tokens=BEGINNINGS * BEGINNING, force=True)
        with capture(request, lambda now, _: progress(done + now), directory=directory) as kv:
            _add_beginnings(sums, kv)
    return sums


def mean_centers(header: Header, sums: Mapping[int, KeySums]) -> Centers:
    """The centers of kind ``mean`` and their scales; zeros and ones for layers that have no sums."""

    def of_layers(values: Callable[[KeySums], Doubles], default: float) -> Floats:
        shapes = enumerate(key_shapes(header.entries))
        parts = [values(sums[i]).ravel() if i in sums else np.full(shape.size, default) for i, shape in shapes]
        return np.concatenate(parts).astype(np.float32)

    firsts = {i: s.first for i, s in sums.items() if s.first is not None}
    first = of_layers(lambda s: firsts[s.layer.index], 0) if firsts else None
    return Centers("mean", of_layers(lambda s: s.mean, 0), of_layers(lambda s: s.scale, 1), first)


def key_biases(header: Header, sums: Mapping[int, KeySums]) -> dict[int, Doubles]:
    """The biases (heads, dim) of key projections, alone or with queries and values, of layers that have one."""
    found, biases = {t.name: t for t in tensors(header)}, {}
    for index, of_layer in sums.items():
        layer, shape = of_layer.layer, of_layer.key.shape
        alone, fused = (found.get(f"blk.{index}.{name}.bias") for name in ("attn_k", "attn_qkv"))
        if alone is not None:
            biases[index] = read_vector(header, alone).astype(np.float64).reshape(shape)
        elif fused is not None:
            first = layer.n_head * layer.head_dim_k
            biases[index] = (
                read_vector(header, fused)[first : first + math.prod(shape)].astype(np.float64).reshape(shape)
            )
    return biases
