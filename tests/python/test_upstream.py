"""scripts/upstream.py and check_upstream.py: a wrong archive stops the build, hooks are found or named, and a second
run writes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEADER = "enum type {\n    A = 0,\n    B = 1,\n    COUNT = 2,\n};\n"
PATCH = """Subject: one hook

diff --git a/ggml/include/ggml.h b/ggml/include/ggml.h
--- a/ggml/include/ggml.h
+++ b/ggml/include/ggml.h
@@ -2,4 +2,5 @@ enum type {
     A = 0,
     B = 1,
-    COUNT = 2,
+    TQ = 9,
+    COUNT = 10,
 };
"""


def script(name: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, ROOT / "scripts" / name, *args], capture_output=True, text=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    file = tmp_path / "checkout" / "ggml" / "include" / "ggml.h"
    file.parent.mkdir(parents=True)
    file.write_text("// moved down\n\n" + HEADER)
    (tmp_path / "patches").mkdir()
    (tmp_path / "patches" / "0001-hook.patch").write_text(PATCH)
    return tmp_path / "checkout"


def prepare(checkout: Path) -> subprocess.CompletedProcess[str]:
    top = checkout.parent
    return script(
        "upstream.py",
        "prepare",
        "--out",
        top / "out",
        "--cache",
        top / "cache",
        "--llama-cpp",
        checkout,
        "--patches",
        top / "patches",
    )


def test_hooks_follow_moved_lines_and_a_second_run_writes_nothing(checkout: Path) -> None:
    done = prepare(checkout)
    assert done.returncode == 0, done.stderr
    patched = checkout.parent / "out" / "ggml" / "include" / "ggml.h"
    assert patched.read_text() == "// moved down\n\n" + HEADER.replace("COUNT = 2", "TQ = 9,\n    COUNT = 10")
    before = patched.stat().st_mtime_ns
    assert prepare(checkout).returncode == 0
    assert patched.stat().st_mtime_ns == before
    # a file that upstream dropped does not linger
    stale = checkout.parent / "out" / "old.c"
    stale.write_text("x")
    assert prepare(checkout).returncode == 0
    assert not stale.exists()


def test_a_hook_that_is_not_found_is_named(checkout: Path) -> None:
    file = checkout / "ggml" / "include" / "ggml.h"
    file.write_text(file.read_text().replace("B = 1", "B = 7"))
    done = prepare(checkout)
    assert done.returncode == 1
    assert "0001-hook.patch: ggml/include/ggml.h, near line 2" in done.stderr
    assert "Traceback" not in done.stderr
    checked = script("check_upstream.py", "--llama-cpp", checkout, "--patches", checkout.parent / "patches")
    assert checked.returncode == 1
    assert "NOT FOUND" in checked.stdout


def test_check_reports_every_hook(checkout: Path) -> None:
    done = script("check_upstream.py", "--llama-cpp", checkout, "--patches", checkout.parent / "patches")
    assert done.returncode == 0
    assert "ok, moved +2 lines" in done.stdout
    assert "1 hooks in 1 files, 2 added lines, 0 do not apply" in done.stdout


@pytest.mark.parametrize("content", [b"", b"not the archive"], ids=["truncated", "changed"])
def test_a_wrong_archive_stops_with_a_message(tmp_path: Path, content: bytes) -> None:
    lock = json.loads((ROOT / "ggml-tq" / "fork" / "upstream.lock").read_text())
    (tmp_path / lock["archive"]).write_bytes(content)
    done = script("upstream.py", "prepare", "--out", tmp_path / "out", "--cache", tmp_path)
    assert done.returncode == 1
    assert "is not the pinned upstream" in done.stderr
    assert lock["sha256"] in done.stderr
    assert not (tmp_path / "out").exists()


def test_not_a_checkout(tmp_path: Path) -> None:
    done = script("upstream.py", "prepare", "--out", tmp_path / "o", "--cache", tmp_path, "--llama-cpp", tmp_path)
    assert done.returncode == 1
    assert "not a llama.cpp checkout" in done.stderr


def test_the_series_applies_and_stays_thin() -> None:
    """The real patches: hooks only (under 350 added lines), each patch with a header that says why."""
    patches = sorted((ROOT / "ggml-tq" / "fork" / "patches").glob("*.patch"))
    added = 0
    for patch in patches:
        text = patch.read_text()
        header = text[: text.index("diff --git")]
        assert header.startswith("Subject: ")
        assert len(header) > 100, f"{patch.name} does not say why"
        added += sum(line.startswith("+") and not line.startswith("+++") for line in text.splitlines())
    assert 0 < added < 350
