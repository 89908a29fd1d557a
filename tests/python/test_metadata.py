"""GGUF metadata: what `ggml-tq stamp`, `inspect` and `strip` write, refuse and leave alone."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from metadata_vectors import CENTERS, HPARAMS, SCALES, VECTORS
from typer.testing import CliRunner

from ggml_tq import gguf_file, metadata
from ggml_tq.calibrate import normalized, params_of
from ggml_tq.center import Centers
from ggml_tq.cli import app
from ggml_tq.codebook import from_samples, solve
from ggml_tq.gguf_file import GgufError, read_header
from ggml_tq.params import DEFAULT, Params, ParamsError


def run(*args: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == status, result.output
    if status:
        assert "Traceback" not in result.output
        assert len(result.output.strip().splitlines()) == 1, result.output
        assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.output


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small GGUF file with every kind of metadata and an odd alignment."""
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    writer.add_uint32("a.number", 7)
    writer.add_array("an.array", [1.5, -2.0, 3.0])
    writer.add_array("some.strings", ["å", "", "long " * 50])
    writer.add_bool("a.bool", True)
    rng = np.random.default_rng(1)
    writer.add_tensor("t.f32", rng.standard_normal((3, 5), dtype=np.float32))
    writer.add_tensor("t.f16", rng.standard_normal((7, 33)).astype(np.float16))
    writer.add_tensor("t.i8", rng.integers(-128, 128, 1000).astype(np.int8))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def files(path: Path) -> list[str]:
    return sorted(p.name for p in path.parent.iterdir())


def test_stamp_keeps_all_else(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    run("stamp", model, "-o", out, "--seed", "0x10", "--sketch-seed", "17")
    old, new = gguf.GGUFReader(model), gguf.GGUFReader(out)
    ours = [key for key in new.fields if key.startswith("turboquant.")]
    assert len(ours) == 5 + 6 + 3 + 1 + 3
    counts = ("GGUF.kv_count",)
    for key, f in old.fields.items():
        if key not in counts:
            assert f.contents() == new.fields[key].contents()
    assert [t.name for t in new.tensors] == [t.name for t in old.tensors]
    for a, b in zip(old.tensors, new.tensors, strict=True):
        assert a.data.tobytes() == b.data.tobytes()
    assert (new.data_offset % 64, new.alignment) == (0, 64)
    assert model.read_bytes()[old.data_offset :] == out.read_bytes()[new.data_offset :]
    assert metadata.read(out)[1].params.hash == Params(0x10, 17).hash
    assert new.fields["turboquant.rotation.seed"].contents() == 0x10
    np.testing.assert_array_equal(
        np.array(new.fields["turboquant.tq3_mse.codebook"].contents(), np.float32), solve(3, 64).centroids_f32
    )


def test_strip_gives_the_file_back(model: Path, tmp_path: Path) -> None:
    stamped, stripped = tmp_path / "stamped.gguf", tmp_path / "stripped.gguf"
    run("stamp", model, "-o", stamped)
    run("strip", stamped, "-o", stripped)
    assert stripped.read_bytes() == model.read_bytes()
    run("strip", stripped, "-o", tmp_path / "again.gguf", status=1)


def test_a_second_stamp_replaces_the_first_in_place(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    run("stamp", model, "-o", out, "--seed", "1")
    inode = out.stat().st_ino
    run("stamp", out, "--in-place", "--seed", "2", "--codebooks", "gaussian")
    assert out.stat().st_ino == inode
    assert metadata.read(out)[1].params.rotation_seed == 2
    assert model.read_bytes()[read_header(model).data_start :] == out.read_bytes()[read_header(out).data_start :]
    # no room for the whole set in a fresh file's padding, nor may the data move up
    before = model.read_bytes()
    assert "would have to move" in run("stamp", model, "--in-place", status=1)
    assert model.read_bytes() == before
    before = out.read_bytes()
    assert "would have to move" in run("strip", out, "--in-place", status=1)
    assert out.read_bytes() == before
    assert files(out) == ["model.gguf", "out.gguf"]


def test_an_interrupted_change_in_place_is_undone(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.gguf"
    run("stamp", model, "-o", out, "--seed", "1")
    before = out.read_bytes()

    def half(f: object, header: bytes) -> None:
        f.seek(0)
        f.write(header[: len(header) // 2])
        f.flush()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gguf_file, "_overwrite", half)
        with pytest.raises(KeyboardInterrupt):
            metadata.stamp(out, None, Params(5))
    assert out.read_bytes() != before
    assert "interrupted" in run("inspect", out, status=1)
    run("stamp", out, "--in-place", "--seed", "3")
    assert metadata.read(out)[1].params.rotation_seed == 3
    assert files(out) == ["model.gguf", "out.gguf"]
    data_start = read_header(out).data_start
    assert out.read_bytes()[data_start:] == before[data_start:]


def test_calibrated_codebooks(tmp_path: Path) -> None:
    """Normalization forgets scale and drops blocks without one; Gaussian rows give nearly the built-in books."""
    rng = np.random.default_rng(2)
    rows = rng.standard_normal((4000, 128)).astype(np.float32) * np.float32(100)
    rows[0] = 0
    rows[1, 0] = np.nan
    u = normalized(rows, DEFAULT.rotation_signs)
    assert u.shape == (2 * 4000 - 3, 64)
    np.testing.assert_allclose(np.mean(u * u, axis=1), 1, rtol=1e-5)
    params = params_of(lambda tq: from_samples(u, tq.code_bits))
    for name, q in DEFAULT.quantizers.items():
        np.testing.assert_allclose(params.quantizers[name].centroids, q.centroids, rtol=0.03)
        assert params.quantizers[name].kappa == pytest.approx(q.kappa, rel=0.03)


def with_key_bias(path: Path, name: str = "blk.1.attn_k.bias") -> Path:
    """A file with the hyperparameters of the vectors, and a tensor ``name``."""
    writer = gguf.GGUFWriter(path, "llama")
    for e in HPARAMS[1:]:
        writer.add_uint32(e.key, e.value)
    writer.add_tensor("token_embd.weight", np.zeros(64, np.float32))
    writer.add_tensor(name, np.arange(128, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("blk.1.attn_k.bias", "bias"),
        ("blk.0.attn_qkv.bias", "bias"),
        ("blk.0.attn_q.bias", "none"),
        ("blk.0.attn_k_norm.bias", "none"),
        ("v.blk.0.attn_k.bias", "none"),
    ],
)
def test_centers_are_the_bias_where_there_is_one(tmp_path: Path, name: str, kind: str) -> None:
    path, out = with_key_bias(tmp_path / "model.gguf", name), tmp_path / "out.gguf"
    assert f"centered by: {kind}" in run("inspect", path)
    assert f"center {kind}" in run("stamp", path, "-o", out)
    assert metadata.read(out)[1].centers == Centers(kind)
    assert f"centered by: {kind}" in run("inspect", out)
    (bias,) = [t for t in gguf_file.tensors(read_header(out)) if t.name == name]
    np.testing.assert_array_equal(gguf_file.read_vector(read_header(out), bias), np.arange(128))


def test_a_stamp_keeps_centers(tmp_path: Path) -> None:
    path = with_key_bias(tmp_path / "model.gguf")
    mean, again, other = (tmp_path / f"{name}.gguf" for name in ("mean", "again", "other"))
    origin = {"center.text": "a text", "codebooks": "sphere"}
    metadata.stamp(path, mean, DEFAULT, origin, centers=Centers("mean", CENTERS, SCALES))
    shown = json.loads(run("inspect", mean, "--json"))["parameters"]
    assert shown["center"]["kind"] == "mean"
    assert shown["center"]["rms"] == pytest.approx([np.sqrt(np.mean(m**2)) for m in np.split(CENTERS, 2)], rel=1e-6)
    assert "centers of 2 layers" in run("inspect", mean)

    run("stamp", mean, "-o", again, "--seed", "3", "--codebooks", "gaussian")
    found = metadata.read(again)[1]
    assert found.params.rotation_seed == 3
    np.testing.assert_array_equal(found.centers.key, CENTERS)
    np.testing.assert_array_equal(found.centers.scale, SCALES)
    kept = metadata.provenance_of(read_header(again))
    assert (kept["center.text"], kept["codebooks"]) == ("a text", "gaussian")

    run("stamp", again, "-o", other, "--center", "none")
    assert metadata.read(other)[1].centers == Centers("none")
    assert "center.text" not in metadata.provenance_of(read_header(other))
    run("stamp", other, "--in-place", "--seed", "4")
    assert metadata.read(other)[1].centers == Centers("none")  # not the default, which is the bias

    header = read_header(path)
    damaged = tmp_path / "damaged.gguf"
    gguf_file.write_copy(header, [*header.entries, *VECTORS["an edited center"].entries()], damaged)
    assert "turboquant.center.hash" in run("stamp", damaged, "-o", tmp_path / "x.gguf", status=1)
    run("stamp", damaged, "-o", tmp_path / "y.gguf", "--center", "bias")


@pytest.mark.parametrize("name", VECTORS)
def test_vectors(name: str) -> None:
    """The runtime gets the same vectors in test_fork_metadata.py."""
    vector = VECTORS[name]
    entries = [*HPARAMS, *vector.entries()]
    if vector.refused is None:
        found = metadata.from_entries(entries)
        assert found is not None
        assert found.params.hash == vector.params.hash
        assert (found.centers.kind, found.centers.hash) == (vector.centers.kind, vector.centers.hash)
    else:
        with pytest.raises(ParamsError) as e:
            metadata.from_entries(entries)
        assert e.value.key == metadata.PREFIX + vector.refused


def test_inspect(model: Path, tmp_path: Path) -> None:
    assert "the built-in parameters apply" in run("inspect", model)
    assert json.loads(run("inspect", model, "--json"))["parameters"] is None
    out = tmp_path / "out.gguf"
    run("stamp", model, "-o", out, "--codebooks", "gaussian")
    found = json.loads(run("inspect", out, "--json"))
    assert found["valid"]
    assert found["parameters"]["provenance"]["codebooks"] == "gaussian"
    assert found["parameters"]["hash"] == f"{metadata.read(out)[1].params.hash:016x}"
    assert found["parameters"]["types"]["tq2_mse"]["centroids"] == solve(2, None).centroids_f32.tolist()
    assert found["parameters"]["center"] == {"kind": "none", "hash": None, "rms": []}
    assert "1.5104" in run("inspect", out)

    header = read_header(model)
    broken = tmp_path / "broken.gguf"
    gguf_file.write_copy(header, [*header.entries, *VECTORS["unsorted"].entries()], broken)
    assert "turboquant.tq3_mse.codebook: centroids are not ascending" in run("inspect", broken, status=1)
    assert json.loads(run("inspect", broken, "--json", status=1))["valid"] is False


BAD_FILES: dict[str, tuple[str, object]] = {
    "empty": ("not a GGUF file", lambda d: b""),
    "text": ("not a GGUF file", lambda d: b"hello, this is no model at all"),
    "only the magic": ("not a GGUF file", lambda d: d[:4]),
    "big-endian": ("big-endian", lambda d: b"GGUF" + struct.pack(">IQQ", 3, 1, 1) + bytes(100)),
    "version 1": ("version 1", lambda d: b"GGUF" + struct.pack("<I", 1) + d[8:]),
    "cut in the header": ("truncated", lambda d: d[:150]),
    "cut in the tensor infos": ("truncated", lambda d: d[: d.index(b"t.f16") + 3]),
    "cut in the data": ("truncated", lambda d: d[:-200]),
    "counts of more entries": ("truncated", lambda d: d[:16] + struct.pack("<Q", 2**60) + d[24:]),
    "huge string": ("truncated", lambda d: d[:24] + struct.pack("<Q", 2**63) + d[32:]),
    "unknown value type": ("unknown type 99", lambda d: d.replace(b"a.bool\x07", b"a.bool\x63")),
    "key twice": ("twice", lambda d: d.replace(b"a.number", b"an.array")),
    "bad alignment": (
        "alignment",
        lambda d: d.replace(b"general.alignment\x04\0\0\0\x40", b"general.alignment\x04\0\0\0\x41"),
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(model: Path, tmp_path: Path, name: str) -> None:
    message, damage = BAD_FILES[name]
    good = model.read_bytes()
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(damage(good))
    assert bad.read_bytes() != good
    before = bad.read_bytes()
    out = tmp_path / "out.gguf"
    for command in (
        ("inspect", bad),
        ("stamp", bad, "-o", out),
        ("stamp", bad, "--in-place"),
        ("strip", bad, "-o", out),
        ("strip", bad, "--in-place"),
    ):
        assert message in run(*command, status=1)
    assert bad.read_bytes() == before
    assert files(bad) == ["bad.gguf", "model.gguf"]


def test_other_bad_input(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    assert "No such file" in run("inspect", tmp_path / "none.gguf", status=1)
    assert "No such file" in run("stamp", tmp_path / "none.gguf", "-o", out, status=1)
    assert "directory" in run("inspect", tmp_path, status=1)
    assert "either" in run("stamp", model, status=1)
    assert "either" in run("stamp", model, "-o", out, "--in-place", status=1)
    assert "seed" in run("stamp", model, "-o", out, "--seed", "-1", status=1)
    assert "seed" in run("stamp", model, "-o", out, "--seed", str(2**64), status=1)
    assert "calibration" in run("stamp", model, "-o", out, "--codebooks", "calibrated", status=1)
    assert "calibration" in run("stamp", model, "-o", out, "--calibration", model, status=1)
    assert run("stamp", model, "-o", out, "--codebooks", "calibrated", "--calibration", model, status=1)
    assert "No such file" in run("stamp", model, "-o", tmp_path / "no" / "out.gguf", status=1)
    assert not out.exists()
    for target in (model, tmp_path):
        assert "exists" in run("stamp", model, "-o", target, status=1)
    assert files(model) == ["model.gguf"]


def test_read_only(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening for writing fails as on a read-only file system (a mode would not stop root)."""
    out = tmp_path / "out.gguf"
    run("stamp", model, "-o", out)
    before = out.read_bytes()
    real = Path.open

    def refuse(self: Path, mode: str = "r", *args: object, **kwargs: object) -> object:
        if mode != "r" and mode != "rb":
            raise OSError(30, "Read-only file system", str(self))
        return real(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    assert "Read-only file system" in run("stamp", out, "--in-place", "--seed", "4", status=1)
    assert out.read_bytes() == before


def test_a_full_disk_leaves_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left" in run("stamp", model, "-o", tmp_path / "out.gguf", status=1)
    assert files(model) == ["model.gguf"]


def test_parts_of_split_and_models_without_tensors(tmp_path: Path) -> None:
    for name, key, value in (("part.gguf", "split.no", 1), ("vocab.gguf", "general.x", 1)):
        writer = gguf.GGUFWriter(tmp_path / name, "llama")
        writer.add_uint16(key, value)
        if name == "part.gguf":
            writer.add_tensor("t", np.zeros(32, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    out = tmp_path / "out.gguf"
    assert "first part" in run("stamp", tmp_path / "part.gguf", "-o", out, status=1)
    assert "no tensors" in run("stamp", tmp_path / "vocab.gguf", "-o", out, status=1)
    assert "the built-in parameters apply" in run("inspect", tmp_path / "vocab.gguf")


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_random_damage_is_an_error_or_harmless(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    entries = [
        *HPARAMS,
        *VECTORS["centered by means"].entries(),
        gguf_file.encode_entry("x", gguf.GGUFValueType.STRING, "y" * 9),
    ]
    raw = struct.pack("<4sIQQ", b"GGUF", 3, 0, len(entries)) + b"".join(e.raw for e in entries)
    at = data.draw(st.integers(0, len(raw) - 1))
    damaged = raw[:at] + bytes([data.draw(st.integers(0, 255))]) + raw[at + 1 :]
    damaged = damaged[: data.draw(st.integers(0, len(damaged)) | st.just(len(damaged)))]
    path = tmp_path_factory.mktemp("damage") / "x.gguf"
    path.write_bytes(damaged)
    try:
        _, found = metadata.read(path)
    except (GgufError, ParamsError):
        return
    hashes = DEFAULT.hash, Centers("mean", CENTERS, SCALES).hash
    assert found is None or (found.params.hash, found.centers.hash) == hashes
