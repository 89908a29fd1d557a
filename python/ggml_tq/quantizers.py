"""Names of quantizers, as the study bench takes them on a command line.

========================  =============================================================================================
``tq3_qjl``, ``tq3_mse``  the cache types, bit-exact (``ggml_tq.codec``); ``tq3`` is ``tq3_qjl`` for keys, ``tq3_mse``
                          for values, as in the programs
``q4_0``, ``q8_0``, ...   upstream's types after upstream's Hadamard rotation of the head; ``q4_0-norot`` without it
``f16``, ``bf16``         upstream's other types
``exact``                 no quantization
``Eden(b=3,scale=...)``   a class of ``ggml_tq.reference`` with its parameters; ``dim`` is the head's
``lm3``                   short for ``Eden(b=3,scale=unbiased)``: a Lloyd-Max codebook over the whole head
``tcq3``                  short for ``Trellis(b=3)``: a trellis code over blocks of 64
========================  =============================================================================================

A name of a key quantizer may end in ``+mean`` or ``+rope``: what is taken off the keys first (``ggml_tq.study``); or in
``+cal``: centered and scaled as a calibrated model's metadata say (``ggml_tq.calibrated``).
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any, Literal, cast

import gguf
import numpy as np
from numpy.typing import NDArray
from scipy.linalg import hadamard  # type: ignore[import-untyped]

import ggml_tq.reference
from ggml_tq import codec
from ggml_tq.cache_types import BLOCK, TYPES, TqType
from ggml_tq.reference.protocol import Quantizer

Floats = NDArray[np.float32]
Role = Literal["key", "value"]
Center = Literal["none", "mean", "rope", "cal"]

UPSTREAM = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")
CENTERS: tuple[Center, ...] = ("none", "mean", "rope", "cal")


class QuantizerError(ValueError):
    """A name that means no quantizer, or one that cannot store such vectors; one line for the user."""


@dataclass(frozen=True)
class CacheType:
    """A cache type of this project."""

    tq: TqType

    @property
    def name(self) -> str:
        return self.tq.name

    @property
    def bits(self) -> float:
        return self.tq.bits_per_value

    def reconstruct(self, x: Floats) -> Floats:
        if x.shape[-1] % BLOCK:
            raise ValueError(f"{BLOCK} must divide the head dim {x.shape[-1]}")
        return codec.decode(codec.encode(x, self.tq), self.tq)


@dataclass(frozen=True)
class UpstreamType:
    """A quantized type of upstream's, after a Hadamard matrix over every ``rotation`` coordinates (0: none)."""

    type: str
    rotation: int

    @property
    def name(self) -> str:
        return self.type if self.rotation else f"{self.type}-norot"

    @property
    def bits(self) -> float:
        block, size = gguf.GGML_QUANT_SIZES[self._gguf_type]
        return 8 * size / block

    @property
    def _gguf_type(self) -> gguf.GGMLQuantizationType:
        return gguf.GGMLQuantizationType[self.type.upper()]

    def _rotate(self, x: Floats) -> Floats:
        if not self.rotation:
            return x
        h = (hadamard(self.rotation) / self.rotation**0.5).astype(np.float32)  # symmetric, its own inverse
        return np.asarray((x.reshape(*x.shape[:-1], -1, self.rotation) @ h).reshape(x.shape), dtype=np.float32)

    def reconstruct(self, x: Floats) -> Floats:
        block, _ = gguf.GGML_QUANT_SIZES[self._gguf_type]
        if x.shape[-1] % block:
            raise ValueError(f"{block} must divide the head dim {x.shape[-1]}")
        data = gguf.quants.quantize(np.ascontiguousarray(self._rotate(x)), self._gguf_type)
        return self._rotate(gguf.quants.dequantize(data, self._gguf_type).reshape(x.shape))


def upstream_rotation(dim: int, role: Role) -> int:
    """The size of upstream's rotation of a head (llama-kv-cache.cpp, build_input_k_rot and build_input_v_rot).

    None unless 64 divides the head dim; keys: the largest power of two that divides it; values: 64.
    """
    if dim % 64:
        return 0
    return dim & -dim if role == "key" else 64


@dataclass(frozen=True)
class Float:
    """binary16 or bfloat16."""

    name: str
    bits: float = 16.0

    def reconstruct(self, x: Floats) -> Floats:
        if self.name == "f16":
            return x.astype(np.float16).astype(np.float32)
        bf16 = gguf.GGMLQuantizationType.BF16
        return cast(Floats, gguf.quants.dequantize(gguf.quants.quantize(x, bf16), bf16).reshape(x.shape))


@dataclass(frozen=True)
class Exact:
    name: str = "exact"
    bits: float = 32.0

    def reconstruct(self, x: Floats) -> Floats:
        return x


@cache
def reference_classes() -> dict[str, Callable[..., Quantizer]]:
    """The quantizers of ``ggml_tq.reference``, by class name."""
    found: dict[str, Callable[..., Quantizer]] = {}
    for module_info in pkgutil.iter_modules(ggml_tq.reference.__path__, "ggml_tq.reference."):
        module = importlib.import_module(module_info.name)
        for name, cls in inspect.getmembers(module, inspect.isclass):
            own = cls.__module__ == module.__name__ and is_dataclass(cls)
            if own and hasattr(cls, "reconstruct") and not inspect.isabstract(cls):
                found[name] = cls
    return found


def known() -> str:
    """What names there are, for an error message."""
    names = [*TYPES, *(f"tq{b}" for b in (2, 3, 4)), *(f"{t}[-norot]" for t in UPSTREAM), "f16", "bf16", "exact"]
    return ", ".join([*names, "lm1 ... lm8", "tcq2 ... tcq4", *(f"{c}(...)" for c in sorted(reference_classes()))])


def _arguments(text: str) -> dict[str, Any]:
    """``b=3,scale=unbiased`` as a dict; a value is a Python literal, or else a word."""
    out: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in re.split(r",(?![^(\[]*[)\]])", text))):
        key, eq, value = item.partition("=")
        if not eq:
            raise QuantizerError(f"'{item}': want NAME=VALUE")
        try:
            out[key.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            out[key.strip()] = value.strip()
    return out


def _reference(class_name: str, arguments: dict[str, Any], dim: int) -> Quantizer:
    cls = reference_classes()[class_name]
    takes = {f.name for f in fields(cast(Any, cls)) if f.init}
    if "dim" in takes:
        arguments = {"dim": dim, **arguments}
    return cls(**arguments)


@dataclass(frozen=True)
class Recipe:
    """A name from the command line: a quantizer for any role and head dim, and what keys are centred by."""

    quantizer: str  # without the centring
    center: Center = "none"

    @property
    def name(self) -> str:
        return self.quantizer if self.center == "none" else f"{self.quantizer}+{self.center}"

    def build(self, role: Role, dim: int) -> Quantizer:
        """Raises QuantizerError for an unknown name, wrong parameters, or an impossible head dim."""
        quantizer = self._build(role, dim)
        try:
            quantizer.reconstruct(np.ones((1, dim), dtype=np.float32))
        except Exception as e:
            raise QuantizerError(f"{self.name}: {e}") from e
        return quantizer

    def of_head(self, role: Role, dim: int, layer: int, head: int) -> Quantizer:
        """The quantizer of one KV head: the same for all, unless a recipe says otherwise."""
        return self.build(role, dim)

    def _build(self, role: Role, dim: int) -> Quantizer:
        name = self.quantizer
        if short := re.fullmatch(r"tq([234])", name):
            return CacheType(TYPES[f"tq{short[1]}_{'qjl' if role == 'key' else 'mse'}"])
        if name in TYPES:
            return CacheType(TYPES[name])
        base = name.removesuffix("-norot")
        if base in UPSTREAM:
            return UpstreamType(base, upstream_rotation(dim, role) if base == name else 0)
        if name in ("f16", "bf16"):
            return Float(name)
        if name == "exact":
            return Exact()
        if short := re.fullmatch(r"(lm|tcq)([1-8])", name):
            name = f"Eden(b={short[2]},scale=unbiased)" if short[1] == "lm" else f"Trellis(b={short[2]})"
        call = re.fullmatch(r"(\w+)(?:\((.*)\))?", name)
        if call and call[1] in reference_classes():
            try:
                return _reference(call[1], _arguments(call[2] or ""), dim)
            except (TypeError, ValueError) as e:
                raise QuantizerError(f"{self.quantizer}: {e}") from e
        raise QuantizerError(f"unknown quantizer '{self.quantizer}': known are {known()}")


def parse(text: str, center: Center = "none") -> list[Recipe]:
    """Names with commas between them; ``center`` goes for those that do not say.

    Raises QuantizerError for names that mean nothing.
    """
    recipes = []
    for item in re.findall(r"[^,(]+(?:\([^)]*\))?[^,(]*", text):
        name, plus, own = item.strip().rpartition("+")
        if not plus:
            name, own = item.strip(), center
        if own not in CENTERS:
            raise QuantizerError(f"'{item.strip()}': want one of {', '.join('+' + c for c in CENTERS)} after the name")
        recipe = Recipe(name, cast(Center, own))
        try:
            recipe._build("key", BLOCK)
        except QuantizerError:
            raise
        except Exception as e:
            raise QuantizerError(f"{name}: {e}") from e
        recipes.append(recipe)
    if not recipes:
        raise QuantizerError(f"no quantizer named: known are {known()}")
    return recipes
