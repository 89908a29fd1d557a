"""`ggml-tq bench`: rounds, what is recorded of them, and what is made of them. No test asserts a speed."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command import Command
from conftest import REPO, Fork
from random_models import Gemma3, Llama
from typer.testing import CliRunner

from ggml_tq.cli import app
from ggml_tq.eval import bench, bench_report
from ggml_tq.eval.bench import Round
from ggml_tq.eval.perplexity import Program
from ggml_tq.eval.runs import EvalError, sha256

RandomModel = Callable[[object], Path]


@pytest.fixture(autouse=True, scope="module")
def share_cores() -> Iterator[None]:
    """Idle threads sleep: spinning ones take very long where other work shares the cores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_WAIT_POLICY", "passive")
        yield


class Stopwatch(Command):
    """`ggml-tq bench` on one model in a folder of its own."""

    def __init__(self, folder: Path, model: Path, bin_dir: Path) -> None:
        self.output, self.model, self.bin_dir = folder / "speed.jsonl", model, bin_dir

    def args(self, types: str, *more: object) -> list[str]:
        fixed = ("-m", self.model, "-o", self.output, "--bin", self.bin_dir, "-t", 2, "-p", 16, "-n", 4, "-r", 2)
        return [str(x) for x in ("bench", *fixed, "-d", "0,64", "--types", types, *more)]

    def run(self, types: str, *more: object) -> list[Round]:
        self.succeed(types, *more)
        return self.rounds()

    def rounds(self) -> list[Round]:
        return bench.store(self.output).read()[0]


@pytest.fixture
def watch(tmp_path: Path, random_model: RandomModel, fork: Fork) -> Stopwatch:
    return Stopwatch(tmp_path, random_model(Llama(64)), fork.bin_dir)


@pytest.fixture(scope="module")
def real(
    tmp_path_factory: pytest.TempPathFactory, smollm2: Path, fork: Fork, share_cores: None
) -> tuple[Stopwatch, list[Round]]:
    watch = Stopwatch(tmp_path_factory.mktemp("real"), smollm2, fork.bin_dir)
    return watch, watch.run("q8_0/tq4,tq3", "--build", "of today")


def test_types_take_turns(real: tuple[Stopwatch, list[Round]]) -> None:
    order = [(r.repetition, r.depth, [str(run.pair) for run in r.runs]) for r in real[1]]
    first, second = ["f16", "q8_0/tq4", "tq3"], ["q8_0/tq4", "tq3", "f16"]
    assert order == [(0, 0, first), (0, 64, first), (1, 0, second), (1, 64, second)]


def test_a_round_says_what_was_measured(real: tuple[Stopwatch, list[Round]], smollm2: Path) -> None:
    watch, rounds = real
    s, r = rounds[1].settings, rounds[1]
    assert (s.model, s.model_sha256, s.program, s.threads) == (smollm2.name, sha256(smollm2), bench.BENCH, 2)
    assert s.binary_sha256 == Program(watch.bin_dir, bench.BENCH).sha256()
    assert s.cpu
    assert "OMP_WAIT_POLICY=passive" in s.omp
    assert (r.source["build"], len(r.source["commit"])) == ("of today", 40)
    lock = json.loads((REPO / "ggml-tq/fork/upstream.lock").read_text())
    assert r.source["upstream"]["commit"] == lock["commit"]
    f16, mixed, tq3 = r.runs
    assert [(x.cache.k, x.cache.v) for x in r.runs] == [("f16", "f16"), ("q8_0", "tq4_mse"), ("tq3_qjl", "tq3_mse")]
    # 30 layers, 3 heads of 64, 256 cells; sizes are printed to 0.01 MiB
    values = 30 * 3 * 64 * 256 / 8 / 2**20
    for run, k, v in ((f16, 16, 16), (mixed, 8.5, 4.25), (tq3, 3.25, 3.25)):
        (part,) = run.cache.parts
        assert part.cells == 256
        assert (part.mib_k, part.mib_v) == (pytest.approx(k * values, abs=0.01), pytest.approx(v * values, abs=0.01))
        assert list(run.speeds) == ["pp16", "tg4"]
        assert min(run.speeds.values()) > 0
        assert run.backends == "CPU"
        assert run.command[:3] == (bench.BENCH, "-m", smollm2.name)
        assert run.load >= 0
    assert "/" not in "".join(f16.command)


def test_table_and_plot(real: tuple[Stopwatch, list[Round]]) -> None:
    watch, rounds = real
    report = watch.output.with_suffix(".md")
    files = {p: p.read_bytes() for p in report.parent.iterdir()}
    assert sorted(p.name for p in files) == ["speed.jsonl", "speed.md", "speed.svg"]
    result = watch.invoke("q8_0/tq4,tq3")  # all is recorded
    assert result.exit_code == 0
    assert files == {p: p.read_bytes() for p in report.parent.iterdir()}
    said = report.read_text()
    assert result.stdout in said
    rows = [line.split(" | ") for line in said.splitlines() if re.match(r"\| (0|64) \|", line)]
    assert [row[1] for row in rows] == ["f16 / f16", "q8_0 / tq4_mse", "tq3_qjl / tq3_mse"] * 2
    tq3 = [next(run for run in r.runs if run.pair.k == "tq3") for r in rounds if r.depth == 64]
    low, high = sorted(run.speeds["tg4"] for run in tq3)
    assert f"{(low + high) / 2:.1f} ({low:.1f} to {high:.1f})" in rows[-1]
    ratios = [
        run.speeds["tg4"] / next(x for x in r.runs if x.pair == bench.F16).speeds["tg4"]
        for run, r in zip(tq3, (r for r in rounds if r.depth == 64), strict=True)
    ]
    assert f"({min(ratios):.2f} to {max(ratios):.2f})" in rows[-1][-1]
    picture = report.with_suffix(".svg").read_text()
    assert "tq3_mse" in picture
    assert "cache, MiB" in picture


def test_ratios_are_within_rounds(real: tuple[Stopwatch, list[Round]]) -> None:
    """A machine that slows down between rounds changes speeds, not ratios."""

    def slowed(r: Round, n: int) -> Round:
        speeds = {"f16": 100.0, "q8_0/tq4": 80.0, "tq3": 50.0}
        changed = [dataclasses.replace(run, speeds={"tg4": speeds[str(run.pair)] / 4**n}) for run in r.runs]
        return dataclasses.replace(r, runs=tuple(changed))

    (group,) = bench_report.groups(slowed(r, n) for n, r in enumerate(real[1]))
    for cell in group.cells():
        ratio = {"f16 / f16": 1.0, "q8_0 / tq4_mse": 0.8, "tq3_qjl / tq3_mse": 0.5}[cell.label]
        assert cell.ratios["tg4"] == bench_report.Spread(*[pytest.approx(ratio)] * 3)
        assert cell.speeds["tg4"].high == pytest.approx(16 * cell.speeds["tg4"].low)


def test_a_shared_machine_is_said(real: tuple[Stopwatch, list[Round]]) -> None:
    def loaded(load: float) -> str:
        runs = [dataclasses.replace(r, runs=tuple(dataclasses.replace(x, load=load) for x in r.runs)) for r in real[1]]
        return bench_report.table(bench_report.groups(runs)[0])

    assert "shared" in loaded(5)
    assert "shared" not in loaded(2.1)


def test_other_settings_get_a_table_of_their_own(watch: Stopwatch) -> None:
    watch.run("tq3", "-r", 1)
    watch.run("tq3,tq4", "-r", 1)
    watch.run("tq3", "-r", 1, "-n", 5)
    rounds = watch.rounds()
    assert len(bench_report.groups(rounds)) == 3
    assert len(list(watch.output.parent.glob("*.svg"))) == 3
    with pytest.raises(EvalError, match="recorded twice"):
        bench_report.groups([*rounds, rounds[0]])
    with pytest.raises(EvalError, match="no results"):
        bench_report.groups([])


def test_without_upstreams_rotation(watch: Stopwatch) -> None:
    (r,) = watch.run("q4_0,q4_0-norot", "-d", 0, "-r", 1)
    (group,) = bench_report.groups([r])
    assert [c.label for c in group.cells()] == ["f16 / f16", "q4_0 / q4_0", "q4_0-norot / q4_0-norot"]
    assert " to " not in bench_report.table(group).partition("| depth")[2]  # one round has no range


def test_parallel_sequences(watch: Stopwatch) -> None:
    rounds = watch.run("tq3", "--parallel", "1,3", "-d", "40,100", "-r", 1)
    assert [r.depth for r in rounds] == [40, 100]
    for r in rounds:
        assert r.settings.program == bench.BATCHED
        for run in r.runs:
            assert list(run.speeds) == ["pp x1", "tg4 x1", "pp x3", "tg4 x3"]
            # a cache for each sequence
            assert run.cache.parts[0].cells == 256
    assert "| tg4 x3, tokens/s |" in watch.output.with_suffix(".md").read_text()


def test_a_sliding_windows_cache_is_counted_in(tmp_path: Path, random_model: RandomModel, fork: Fork) -> None:
    watch = Stopwatch(tmp_path, random_model(Gemma3()), fork.bin_dir)
    (r,) = watch.run("f16", "-d", 1100, "-r", 1)
    full, window = r.runs[0].cache.parts
    assert full.cells > window.cells
    assert bench_report.mib(r.runs[0]) == pytest.approx(full.mib_k + full.mib_v + window.mib_k + window.mib_v)


def test_results_that_are_missing_or_too_many(real: tuple[Stopwatch, list[Round]]) -> None:
    settings = real[1][0].settings
    row = '{"build_commit": "x", "backends": "CUDA", "n_prompt": %d, "n_gen": %d, "avg_ts": %f}\n'
    pp, tg = row % (16, 0, 10.5), row % (0, 4, 2.5)
    assert bench.speeds(f"a log line\n....{pp}another\n{tg}", settings) == ({"pp16": 10.5, "tg4": 2.5}, "CUDA", 2)
    for log, got in (
        (pp, "pp16"),
        ("", "nothing"),
        (pp + tg + tg, "pp16, tg4, tg4"),
        (pp + row % (0, 5, 1), "pp16, tg5"),
    ):
        with pytest.raises(EvalError, match=f"gave results of {got}, not of pp16, tg4"):
            bench.speeds(log, settings)


def test_what_cannot_be_measured_is_refused(watch: Stopwatch, tmp_path: Path) -> None:
    watch.refuses("unsupported cache type: tq9", "tq4,tq9")
    watch.refuses("no pair of cache types", "tq3/")
    watch.refuses("are no depths", "tq3", "-d", "deep")
    watch.refuses("0 or more", "tq3", "-d", "-5")
    watch.refuses("0 or more", "tq3", "-d", 2**31)
    watch.refuses("want a prompt", "tq3", "-p", 0, "-n", 0)
    watch.refuses("at least one repetition", "tq3", "-r", 0)
    watch.refuses("of at least 1", "tq3", "--parallel", "1")
    watch.refuses("are no numbers of sequences", "tq3", "--parallel", "many")
    watch.refuses("--foo", "tq3", "--flags", "--foo")
    watch.refuses("gave results of pp16, tg4, pp16, tg4", "tq3", "--flags", "-ub 8,16")
    for flag in ("-m x", "--model x", "-fa off", "-p 1", "--n-gen=1", "-pg 1,1", "--cache-type-k f16", "-o md"):
        watch.refuses(f"{flag.replace('=', ' ').split()[0]} is set by the command", "tq3", "--flags", flag)
    for flag in ("-npp 1", "-c 1", "--output-format md"):
        said = f"{flag.split()[0]} is set by the command"
        watch.refuses(said, "tq3", "--flags", flag, "--parallel", "1", "-d", 64)
    watch.refuses("is missing", "tq3", "--bin", tmp_path)
    watch.model = tmp_path / "none.gguf"
    watch.refuses("none.gguf is missing", "tq3")
    watch.model = Path(__file__)
    watch.refuses("llama-bench failed", "tq3")
    assert not watch.output.exists()


def test_another_type_than_the_one_asked_for_is_refused(watch: Stopwatch, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / bench.BENCH
    script.write_text(f'#!/bin/bash\nexec {watch.bin_dir / bench.BENCH} "${{@/tq3/q8_0}}"\n')
    script.chmod(0o755)
    watch.bin_dir = script.parent
    watch.refuses("K of type tq3 was asked for, the cache is q8_0", "tq3")
    assert not watch.output.exists()


def test_a_program_that_changes_meanwhile_is_refused(watch: Stopwatch, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / bench.BENCH
    real = watch.bin_dir / bench.BENCH
    script.write_text(f'#!/bin/bash\ncase "$*" in *tq3*-d*) echo "# $$" >> "$0";; esac\nexec {real} "$@"\n')
    script.chmod(0o755)
    watch.bin_dir = script.parent
    watch.refuses("has changed meanwhile", "tq3")
    assert not watch.rounds()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_round_is_lost_and_nothing_else(watch: Stopwatch, how: signal.Signals) -> None:
    more = ("-r", 5, "-d", 0)
    command = [sys.executable, "-c", "from ggml_tq.cli import app; app()", *watch.args("tq3", *more)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and (not watch.output.exists() or watch.output.stat().st_size == 0):
        time.sleep(0.005)
    process.send_signal(how)
    said = process.communicate()[1]
    if how == signal.SIGTERM:
        assert process.returncode == 1
        assert said.strip().endswith("error: interrupted; the rounds so far are recorded")
    before = watch.rounds()
    assert len(before) >= 1
    after = watch.run("tq3", *more)
    assert after[: len(before)] == before
    assert [r.repetition for r in after] == list(range(5))


def test_a_damaged_line_is_said(watch: Stopwatch) -> None:
    watch.run("tq3", "-d", 0, "-r", 1)
    whole = watch.output.read_text()
    for damaged in (whole.replace('"schema": 1', '"schema": 99'), whole.replace('"runs"', '"r"')):
        watch.output.write_text(damaged)
        watch.refuses("line 1: ", "tq3")
    watch.output.write_text(whole[:-2])
    assert "half-written" in watch.invoke("tq3", "-d", 0, "-r", 1).stderr


def test_default_output(watch: Stopwatch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [a for a in watch.args("f16", "-d", 0, "-r", 1) if a not in ("-o", str(watch.output))]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    (found,) = (tmp_path / "results").glob("*.jsonl")
    assert re.fullmatch(rf"speed-{watch.model.stem}-[cg]pu\.jsonl", found.name)
