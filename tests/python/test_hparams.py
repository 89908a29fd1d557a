"""How many centers a model takes, from its hyperparameters."""

from __future__ import annotations

import pytest
from gguf import GGUFValueType as T

from ggml_tq.gguf_file import Entry, GgufError, encode_entry
from ggml_tq.hparams import key_shapes


def entries(**values: int | list[int] | list[bool]) -> list[Entry]:
    def entry(name: str, value: int | list[int] | list[bool]) -> Entry:
        key = "x." + name.replace("__", ".")
        if not isinstance(value, list):
            return encode_entry(key, T.UINT32, value)
        return encode_entry(key, T.ARRAY, value, T.BOOL if isinstance(value[0], bool) else T.INT32)

    found = [entry(name, value) for name, value in values.items()]
    return [encode_entry("general.architecture", T.STRING, "x"), *found]


PLAIN = {"block_count": 3, "embedding_length": 256, "attention__head_count": 4}


@pytest.mark.parametrize(
    ("values", "want"),
    [
        (PLAIN, [(4, 64)] * 3),
        ({**PLAIN, "attention__head_count_kv": 2}, [(2, 64)] * 3),
        ({**PLAIN, "attention__head_count_kv": 2, "attention__key_length": 128}, [(2, 128)] * 3),
        ({**PLAIN, "attention__head_count_kv": [2, 0, 1]}, [(2, 64), (0, 64), (1, 64)]),
        ({**PLAIN, "attention__head_count_kv": [2, 0, 1, 4], "nextn_predict_layers": 1}, [(2, 64), (0, 64), (1, 64)]),
        ({**PLAIN, "attention__head_count": [4, 8, 2]}, [(4, 64), (8, 64), (2, 64)]),
        (
            {**PLAIN, "attention__key_length_swa": 32, "attention__sliding_window_pattern": [True, False, True]},
            [(4, 32), (4, 64), (4, 32)],
        ),
        (
            {**PLAIN, "attention__key_length_swa": 32, "attention__sliding_window_pattern": 3},
            [(4, 32), (4, 32), (4, 64)],
        ),
        ({**PLAIN, "attention__key_length_swa": 32, "attention__sliding_window_pattern": 0}, [(4, 32)] * 3),
        ({**PLAIN, "attention__key_length_swa": 64}, [(4, 64)] * 3),
        ({"block_count": 2, "embedding_length": 9, "attention__head_count": 0}, [(0, 0)] * 2),
    ],
)
def test_shapes(values: dict[str, int], want: list[tuple[int, int]]) -> None:
    assert [(s.heads, s.dim) for s in key_shapes(entries(**values))] == want


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({}, "block_count is missing"),
        ({"block_count": 3}, "head_count is missing"),
        ({"block_count": 3, "attention__head_count": 4}, "embedding_length is missing"),
        ({**PLAIN, "block_count": [3, 3]}, "block_count is an array"),
        ({**PLAIN, "attention__head_count_kv": [1, 2]}, "2 numbers for 3 layers"),
        ({**PLAIN, "attention__head_count_kv": [1, -2, 1]}, "head_count_kv is missing, or no count"),
        ({**PLAIN, "attention__key_length_swa": 32}, "sliding_window_pattern is missing"),
    ],
)
def test_what_is_not_said(values: dict[str, int], problem: str) -> None:
    with pytest.raises(GgufError, match=problem):
        key_shapes(entries(**values))
