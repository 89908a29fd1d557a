"""The package as it is distributed: a wheel with the native library, and a source distribution that makes one."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from conftest import REPO

CHECK = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "ScikitBuild" not in type(f).__name__]  # the editable install's
import numpy as np
from ggml_tq import codec, native
from ggml_tq.cache_types import TYPES
x = np.random.default_rng(0).standard_normal((9, 128))
for tq in TYPES.values():
    np.testing.assert_array_equal(native.encode(x, tq), codec.encode(x, tq))
print(native.library_path())
"""


def build(source: Path, target: Path, kind: str) -> Path:
    """A distribution of ``source``, made with the build backend that is installed here."""
    command = [sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "-o", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = target.iterdir()
    return made


def test_the_source_distribution_makes_a_working_wheel(tmp_path: Path) -> None:
    sdist = build(REPO / "python", tmp_path / "sdist", "sdist")
    with tarfile.open(sdist) as tar:
        assert not [m.name for m in tar if m.issym()]
        tar.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    wheel = build(source, tmp_path / "wheel", "wheel")
    assert "-py3-none-" in wheel.name
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    assert (site / "ggml_tq" / "py.typed").is_file()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GGML_TQ")}
    done = subprocess.run(
        [sys.executable, "-c", CHECK],
        env=environment | {"PYTHONPATH": str(site)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).parent == site / "ggml_tq"


def test_its_sources_are_the_project_s() -> None:
    links = list((REPO / "python" / "native").iterdir())
    assert {"tq.c", "ggml-tq.h"} < {link.name for link in links}
    for link in links:
        assert link.is_symlink()
        assert link.resolve().is_relative_to(REPO / "ggml-tq")
