"""The fork obeys the quantizer parameters in a model's metadata, in every path, and refuses what is not valid."""

from __future__ import annotations

import dataclasses
import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Divergence, Fork, free_port, listening, wait_until
from metadata_vectors import VECTORS
from random_models import Llama

from ggml_tq import codec, gguf_file, metadata
from ggml_tq.cache_types import TYPES
from ggml_tq.gguf_file import read_header, write_copy
from ggml_tq.params import DEFAULT, Params, Quantizer
from ggml_tq.state import read_state

TINY = Llama(head_dim=64)
Models = Callable[[object], Path]


def params_with(name: str, move: Callable[[np.ndarray], np.ndarray]) -> Params:
    """The built-in parameters but for one type's centroids."""
    q = DEFAULT.quantizers[name]
    moved = Quantizer(np.sort(move(q.centroids.copy())).astype(np.float32), q.kappa)
    return Params(quantizers={**DEFAULT.quantizers, name: moved})


SETS = {
    "another rotation": Params(rotation_seed=12345),
    "another sketch": Params(sketch_seed=0),
    "other codebooks": Params(
        quantizers={
            name: Quantizer((q.centroids * np.float32(1.1)).astype(np.float32), np.float32(q.kappa / 2))
            for name, q in DEFAULT.quantizers.items()
        }
    ),
    "not symmetric": params_with("tq3_mse", lambda c: np.concatenate([c[:-1], [np.float32(3)]])),
}


@pytest.mark.parametrize("name", VECTORS)
def test_vectors(fork: Fork, random_model: Models, tmp_path: Path, name: str) -> None:
    """As `ggml-tq inspect` accepts and refuses them, in test_metadata.py."""
    vector = VECTORS[name]
    header = read_header(random_model(TINY))
    model = tmp_path / "model.gguf"
    write_copy(header, [*header.entries, *vector.entries()], model)
    if vector.refused is None:
        fork.complete(model, n=1, cache=("tq3", "tq3"))
    else:
        message = re.escape(f"error loading model: {metadata.PREFIX}{vector.refused}: ")
        fork.refuses_completion(message, model, n=1, cache=("f16", "f16"))  # whatever the cache


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("cache", ["tq2", "tq3", "tq4"])
def test_the_cache_holds_what_the_reference_encodes(
    fork: Fork, smollm2: Path, tmp_path: Path, name: str, cache: str
) -> None:
    """Bit for bit, keys and values, in a real model's first layer, whose rows do not depend on the cache."""
    params = SETS[name]
    model = tmp_path / "model.gguf"
    metadata.stamp(smollm2, model, params)
    streams = []
    for kind in ("f32", cache):
        saved = tmp_path / f"{kind}.bin"
        result = fork.complete(model, "--prompt-cache", saved, n=1, cache=(kind, kind))
        (stream,) = read_state(saved).streams
        streams.append(stream)
    assert f"(hash {params.hash:016x})" in result.err
    exact, packed = streams
    for rows, want in ((packed.k[0], exact.k[0]), (packed.v[0], exact.v[0])):
        x = want.data.view(np.float32)
        np.testing.assert_array_equal(rows.data, codec.encode(x, TYPES[rows.type], params))
        assert rows.hash_bits == params.hash & 0xFFFFF
    changed = [
        rows.data.tobytes() != codec.encode(want.data.view(np.float32), TYPES[rows.type]).tobytes()
        for rows, want in ((packed.k[0], exact.k[0]), (packed.v[0], exact.v[0]))
    ]
    expected = {"another sketch": [True, False], "not symmetric": [False, cache == "tq3"]}
    assert changed == expected.get(name, [True, True])


def test_logits_change_as_predicted(fork: Fork, smollm2: Path, divergence: Divergence, tmp_path: Path) -> None:
    """Another seed is as good; centroids that fit no Gaussian are far worse, and only in the type that has them."""
    kld = {"built-in": divergence.measure(smollm2, ("tq4_mse", "tq4_mse"))}
    narrow = params_with("tq4_mse", lambda c: c / 3)
    for name, params in (("seeded", Params(99, 98)), ("narrow", narrow), ("stamped", DEFAULT)):
        model = tmp_path / f"{name}.gguf"
        metadata.stamp(smollm2, model, params)
        for path, options in (("batched", ()), ("decode", ("-ub", 1))):
            kld[f"{name}, {path}"] = divergence.measure(model, ("tq4_mse", "tq4_mse"), *options)
        if name == "narrow":
            kld["others"] = divergence.measure(model, ("tq4_qjl", "q8_0"))
    assert kld["stamped, batched"] == kld["built-in"]
    assert kld["seeded, batched"] != kld["built-in"]
    assert kld["seeded, batched"] == pytest.approx(kld["built-in"], rel=0.5)
    assert kld["narrow, batched"] > 5 * kld["built-in"]
    assert kld["others"] < 2 * kld["built-in"]
    for name in ("seeded", "narrow", "stamped"):
        assert kld[f"{name}, decode"] == pytest.approx(kld[f"{name}, batched"], rel=0.3)


def test_states_of_other_parameters_are_refused(fork: Fork, smollm2: Path, tmp_path: Path) -> None:
    models = {}
    for seed in (1, 2):
        models[seed] = tmp_path / f"{seed}.gguf"
        metadata.stamp(smollm2, models[seed], Params(seed))
    saved = tmp_path / "state.bin"
    cache = ("tq4", "tq4")
    expected = fork.complete(models[1], "--prompt-cache", saved, n=16, cache=cache).out
    assert fork.complete(models[1], n=16, cache=cache).out == expected
    before = saved.read_bytes()
    found = rf"parameters {Params(1).hash & 0xFFFFF:05x}; this context uses .*, parameters"
    fork.refuses_completion(found, models[2], "--prompt-cache", saved, cache=cache)
    fork.refuses_completion(found, smollm2, "--prompt-cache", saved, cache=cache)
    assert saved.read_bytes() == before
    assert fork.complete(models[1], "--prompt-cache", saved, n=16, cache=cache).out == expected


@pytest.fixture(scope="module")
def stamped(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("stamped")
    models = {seed: folder / f"{seed}.gguf" for seed in (1, 2)}
    for seed, path in models.items():
        metadata.stamp(smollm2, path, Params(seed))
    return models


SERVER = ("-c", 256, "-np", 1, "-ctk", "tq4", "-ctv", "tq4", "--spec-type", "draft-simple")


@pytest.mark.parametrize(
    ("target", "draft", "cache", "message"),
    [
        (1, 1, "tq4", "parameters: those of model"),
        (1, 0, "tq4", "which this model, as it brings none, shares"),
        (1, 2, "f16", "parameters: those of model"),  # a draft without a cache of these types: nothing to share
    ],
)
def test_models_that_share_a_process(
    fork: Fork,
    smollm2: Path,
    stamped: dict[int, Path],
    tmp_path: Path,
    target: int,
    draft: int,
    cache: str,
    message: str,
) -> None:
    """A target and a draft model; 0 stands for a model without metadata. The target's text is what it writes alone."""
    models = {0: smollm2, **stamped}
    options = ("-m", models[target], *SERVER, "-md", models[draft], "-ctkd", cache, "-ctvd", cache)
    with fork.server(tmp_path / "log", *options) as server:
        drafted = server.complete("Once upon a time there was", 16)
        assert message in server.log.read_text()
    assert drafted["timings"]["draft_n_accepted"] > 4
    assert drafted["content"] == fork.complete(models[target], n=16, cache=("tq4", "tq4")).out.rstrip("\n")


@pytest.mark.parametrize(
    ("target", "draft", "message"),
    [
        (1, 2, f"wants those of model .*{Params(2).hash:016x}.*in use are those of model .*{Params(1).hash:016x}"),
        (0, 1, f"wants those of model .*{Params(1).hash:016x}.*in use are the built-in ones"),
    ],
)
def test_another_set_in_one_process_is_refused(
    fork: Fork, smollm2: Path, stamped: dict[int, Path], target: int, draft: int, message: str
) -> None:
    models = {0: smollm2, **stamped}
    options = ("-m", models[target], *SERVER, "-md", models[draft], "-ctkd", "tq4", "-ctvd", "tq4")
    fork.refuses(message, "llama-server", "--host", "127.0.0.1", "--port", free_port(), *options)


def test_a_remote_device_refuses_a_model_s_parameters(fork: Fork, stamped: dict[int, Path], tmp_path: Path) -> None:
    """It would encode with its own."""
    port = free_port()
    log = tmp_path / "rpc.log"
    with fork.background(log, "ggml-rpc-server", "--host", "127.0.0.1", "--port", port) as process:
        wait_until(lambda: listening(port), process, log)
        options = ("--rpc", f"127.0.0.1:{port}", "-ngl", 99)
        fork.refuses_completion("cannot use a model's own", stamped[1], *options, cache=("tq3", "tq3"))
        assert fork.complete(stamped[1], *options, "--no-kv-offload", n=4, cache=("tq3", "tq3")).out
        assert process.poll() is None


@pytest.mark.parametrize(("type_id", "block_bytes"), [(121, 26), (125, 34), (127, 26), (129, 136)])
def test_weights_of_cache_types_are_refused(
    fork: Fork, random_model: Models, tmp_path: Path, type_id: int, block_bytes: int
) -> None:
    """Their values would depend on the parameters in use."""
    header = read_header(random_model(TINY))
    name = b"output.weight"
    info = struct.pack("<Q", len(name)) + name + struct.pack("<IQQIQ", 2, 64, 2, type_id, 0)
    one_tensor = dataclasses.replace(header, n_tensors=1, tensor_infos=info)
    model = tmp_path / "weights.gguf"
    model.write_bytes(gguf_file._pack_header(one_tensor, header.entries) + bytes(2 * block_bytes).ljust(512, b"\0"))
    fork.refuses_completion("weight 'output.weight' is of type tq.*, which is for caches only", model, n=1)
