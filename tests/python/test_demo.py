"""What `make run` shows at its end: an answer from llama-cli, then the table against f16."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_demo() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "demo.py", "--type", "tq3"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_WAIT_POLICY": "passive", "COLUMNS": "120"},
    )
    assert done.returncode == 0, done.stderr
    assert "cache      : K = tq3_qjl (3.25 bits per value), V = tq3_mse (3.25 bits per value)" in done.stdout
    rows = [line for line in done.stdout.splitlines() if line.count("│") > 3]
    assert any("tq3_qjl / tq3_mse" in row and "36.6" in row and "4.92x" in row for row in rows), done.stdout
    assert any("f16 / f16" in row and "180.0" in row and "1.00x" in row for row in rows), done.stdout


def test_a_missing_build_is_said(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "demo.py"],
        capture_output=True,
        text=True,
        env={**os.environ, "GGML_TQ_BUILD": str(tmp_path)},
    )
    assert done.returncode == 1
    assert "is missing; run `make run`" in done.stderr
