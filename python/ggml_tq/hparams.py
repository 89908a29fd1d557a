"""The shapes of a model's keys, from the hyperparameters in its GGUF metadata, as upstream's loader reads them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ggml_tq.gguf_file import Entry, GgufError

LIMIT = 1 << 20  # no model has more layers, heads or dimensions


@dataclass(frozen=True)
class KeyShape:
    """One layer's keys; ``heads`` is 0 where the file says that it has none."""

    heads: int
    dim: int

    @property
    def size(self) -> int:
        return self.heads * self.dim


def key_shapes(entries: Iterable[Entry]) -> tuple[KeyShape, ...]:
    """Of each layer, those of multi-token prediction too. Raises GgufError if the metadata do not say it.

    Layers that are recurrent or use another layer's cache count like others if the file gives them heads.
    """
    found = {e.key: e for e in entries}
    architecture = found.get("general.architecture")
    arch = architecture.value if architecture else ""

    def numbers(name: str, default: int | list[int] | None = None) -> int | list[int]:
        key = f"{arch}.{name}"
        value = found[key].value if key in found else default
        if not all(isinstance(n, int) and 0 <= n < LIMIT for n in (value if isinstance(value, list) else [value])):
            raise GgufError(f"{key} is missing, or no count")
        return value  # type: ignore[return-value]  # checked

    def number(name: str, default: int | None = None) -> int:
        value = numbers(name, default)
        if isinstance(value, list):
            raise GgufError(f"{arch}.{name} is an array")
        return value

    def each(name: str, value: int | list[int]) -> list[int]:
        value = value if isinstance(value, list) else [value] * n_layer
        if len(value) < n_layer:
            raise GgufError(f"{arch}.{name} has {len(value)} numbers for {n_layer} layers")
        return value[:n_layer]

    n_layer = number("block_count")
    heads = each("attention.head_count", numbers("attention.head_count"))
    heads_kv = each("attention.head_count_kv", numbers("attention.head_count_kv", heads))
    full = number("attention.key_length", number("embedding_length") // heads[0] if heads and heads[0] else 0)
    sliding = number("attention.key_length_swa", full)
    swa = [0] * n_layer
    if sliding != full:
        name = "attention.sliding_window_pattern"
        pattern = numbers(name)
        if not isinstance(pattern, list):  # every so many layers, the last of them is full
            pattern = [int(pattern == 0 or i % pattern < pattern - 1) for i in range(n_layer)]
        swa = each(name, pattern)
    return tuple(KeyShape(n, sliding if s else full) for n, s in zip(heads_kv, swa, strict=True))
