"""The gguf package knows the cache types once they are registered; state files are read with them."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from conftest import Fork

from ggml_tq import codec
from ggml_tq.cache_types import TYPES
from ggml_tq.gguf_types import register
from ggml_tq.params import DEFAULT, Params
from ggml_tq.state import StateError, read_state


def test_names_sizes_codec() -> None:
    register()
    register()
    x = np.random.default_rng(3).standard_normal((5, 192)).astype(np.float32)
    for name, tq in TYPES.items():
        member = gguf.GGMLQuantizationType(tq.id)
        assert member is gguf.GGMLQuantizationType[name.upper()] is getattr(gguf.GGMLQuantizationType, name.upper())
        assert (member.name, int(member)) == (name.upper(), tq.id)
        assert gguf.GGML_QUANT_SIZES[member] == (64, tq.block_bytes)
        data = gguf.quants.quantize(x, member)
        np.testing.assert_array_equal(data, codec.encode(x, tq))
        np.testing.assert_array_equal(gguf.quants.dequantize(data, member), codec.decode(data, tq))
    assert len(list(gguf.GGMLQuantizationType)) == len(gguf.GGMLQuantizationType._member_map_)
    assert gguf.GGMLQuantizationType(8).name == "Q8_0"


def test_state_files(fork: Fork, smollm2: Path, tmp_path: Path) -> None:
    """Keys and values of every type, as near to the f16 cache's as the type's error says."""
    saved = {}
    for cache in (("f16", "f16"), ("tq4", "tq4"), ("q8_0", "tq3")):
        path = tmp_path / f"{cache[0]}.bin"
        fork.complete(smollm2, "--prompt-cache", path, n=1, cache=cache)
        state = read_state(path)
        (saved[cache],) = state.streams
        assert len(state.tokens) == len(saved[cache].positions) + 1  # the last token is evaluated again
        assert saved[cache].sequences[0] == (0,)
    exact = saved["f16", "f16"]
    for cache, names in ((("tq4", "tq4"), ("tq4_qjl", "tq4_mse")), (("q8_0", "tq3"), ("q8_0", "tq3_mse"))):
        stream = saved[cache]
        assert (len(stream.k), len(stream.v)) == (30, 30)
        for rows, want, name in zip((stream.k, stream.v), (exact.k, exact.v), names, strict=True):
            assert {r.type for r in rows} == {name}
            x, y = want[0].decode(), rows[0].decode()  # the first layer's rows do not depend on the cache
            if name in TYPES:
                assert np.sum((x - y) ** 2) / np.sum(x * x) < 1.3 * TYPES[name].distortion
            else:  # upstream rotates in the graph what it caches as q8_0
                np.testing.assert_allclose(np.linalg.norm(y, axis=1), np.linalg.norm(x, axis=1), rtol=0.01)
    with pytest.raises(StateError, match="parameters"):
        saved["tq4", "tq4"].k[0].decode(Params(1))


def test_bad_state_files(fork: Fork, smollm2: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    fork.complete(smollm2, "--prompt-cache", path, n=1, cache=("tq4", "tq4"))
    data = path.read_bytes()
    for damaged, message in (
        (b"", "truncated"),
        (b"GGUF" + data[4:], "not a state file"),
        (data[:4] + b"\x09" + data[5:], "version 9"),
        (data[: len(data) // 2], "truncated"),
        (data[:-1], "truncated"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(StateError, match=message):
            read_state(path)
    assert DEFAULT.hash & 0xFFFFF  # a tag of zero bits would look like another program's
