"""The evidence machine itself: what it records, what it refuses, and that it can be killed at any point.

Real runs of llama-perplexity throughout, most of them on a model with random weights that takes part of a second.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command import Command
from conftest import REPO, Fork
from random_models import Gemma3, Llama
from typer.testing import CliRunner

from ggml_tq.cli import app
from ggml_tq.eval import matrix, perplexity, report, runs
from ggml_tq.eval.runs import EvalError, Pair, Record, Store

RandomModel = Callable[[object], Path]


class Bench(Command):
    """`ggml-tq eval` on one model and text in a folder of its own."""

    def __init__(self, folder: Path, model: Path, text: Path, bin_dir: Path) -> None:
        self.output, self.cache = folder / "quality.jsonl", folder / "cache"
        self.model, self.text, self.bin_dir = model, text, bin_dir

    def args(self, types: str, *more: object) -> list[str]:
        if "-c" not in more:
            more = ("-c", 256, *more)
        files = ("-m", self.model, "-f", self.text, "-o", self.output, "--cache-dir", self.cache, "--bin", self.bin_dir)
        return [str(x) for x in ("eval", *files, "--types", types, "--chunks", 2, "-t", 2, *more)]

    def run(self, types: str, *more: object) -> list[Record]:
        self.succeed(types, *more)
        return self.records()

    def records(self) -> list[Record]:
        return Store(self.output).read()[0]

    def logits(self) -> Path:
        (path,) = self.cache.glob("*.logits")
        return path


@pytest.fixture
def bench(tmp_path: Path, random_model: RandomModel, prose: Path, fork: Fork) -> Bench:
    return Bench(tmp_path, random_model(Llama(64)), prose, fork.bin_dir)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory, random_model: RandomModel, prose: Path, fork: Fork) -> Record:
    """Some real result."""
    bench = Bench(tmp_path_factory.mktemp("record"), random_model(Llama(64)), prose, fork.bin_dir)
    return bench.run("tq3")[0]


def with_settings(record: Record, **changes: object) -> Record:
    return dataclasses.replace(record, settings=dataclasses.replace(record.settings, **changes))


def test_a_record_says_what_was_measured(tmp_path: Path, smollm2: Path, prose: Path, fork: Fork) -> None:
    (r,) = Bench(tmp_path, smollm2, prose, fork.bin_dir).run("q8_0/tq3", "--chunks", 1, "--build", "of today")
    s = r.settings
    assert (s.model, s.text, s.context, s.chunks, s.threads) == (smollm2.name, prose.name, 256, 1, 2)
    assert s.model_sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert s.text_sha256 == runs.sha256(prose)
    assert s.binary_sha256 == runs.sha256(fork.bin_dir / "llama-perplexity")
    assert s.cpu
    assert (r.cache.k, r.cache.v, r.cache.cells) == ("q8_0", "tq3_mse", 256)
    # from sizes that are printed to 0.01 MiB
    assert (r.cache.bits_k, r.cache.bits_v) == (pytest.approx(8.5, abs=0.05), pytest.approx(3.25, abs=0.05))
    assert r.cache.bits == pytest.approx(5.875, abs=0.05)
    lock = json.loads((REPO / "ggml-tq/fork/upstream.lock").read_text())
    assert r.source["upstream"]["sha256"] == lock["sha256"]
    assert r.source["build"] == "of today"
    assert set(r.figures) == set(perplexity.FIGURES)
    assert 0 < r.value("kld_median") < r.value("kld") < r.value("kld_99") < r.value("kld_99.9") <= r.value("kld_max")
    assert r.chunk_kld == (pytest.approx(r.value("kld"), abs=1e-5),)
    assert 80 < r.value("same_top") < 100
    assert r.value("ppl") / r.value("ppl_f16") == pytest.approx(r.value("ppl_ratio"), rel=1e-4)
    for name in ("ppl", "ppl_f16", "ppl_ratio", "kld", "same_top"):
        assert r.error(name) > 0


def test_same_command_same_numbers(tmp_path: Path, random_model: RandomModel, prose: Path, fork: Fork) -> None:
    options = ("--path", "batched", "--path", "decode")
    found = []
    for folder in ("a", "b"):  # each computes its own f16 logits
        (tmp_path / folder).mkdir()
        records = Bench(tmp_path / folder, random_model(Llama(128)), prose, fork.bin_dir).run("f16,q4_0,tq3", *options)
        found.append({r.key: (r.figures, r.cache, r.chunk_kld) for r in records})
    assert len(found[0]) == 6
    assert found[0] == found[1]


def test_f16_differs_from_itself_by_nothing(bench: Bench) -> None:
    (r,) = bench.run("f16")
    assert r.cache.bits == 16
    assert abs(r.value("kld")) < 1e-5  # logits are kept in 16 bits
    assert r.value("same_top") == 100


def test_a_sliding_windows_cells_depend_on_the_batch(
    tmp_path: Path, random_model: RandomModel, prose: Path, fork: Fork
) -> None:
    bench = Bench(tmp_path, random_model(Gemma3()), prose, fork.bin_dir)
    sizes = {
        r.path: (r.cache.mib_k, r.cache.bits)
        for r in bench.run("tq3", "--path", "batched", "--path", "decode", "-c", 512)
    }
    assert sizes["decode"][0] < sizes["batched"][0]
    assert all(bits == pytest.approx(3.25, rel=0.02) for _, bits in sizes.values())


def test_recorded_runs_are_skipped(bench: Bench) -> None:
    bench.run("tq4")
    first, logits = bench.output.read_bytes(), bench.logits().stat()
    bench.run("tq4,tq3")
    second = bench.output.read_bytes()
    assert second.startswith(first)
    assert [str(r.pair) for r in bench.records()] == ["tq4", "tq3"]
    assert bench.logits().stat() == logits
    bench.run("tq3,tq4")
    assert bench.output.read_bytes() == second
    bench.run("tq4", "-t", 1)  # other settings: another run
    assert len(bench.records()) == 3


def test_logits_can_be_deleted(bench: Bench) -> None:
    bench.run("tq4,tq3", "-c", 256, "-c", 512, "--no-keep-base")
    assert len(bench.records()) == 4
    assert not list(bench.cache.iterdir())
    bench.run("tq4", "--keep-base")
    assert not list(bench.cache.iterdir())  # nothing was to be done
    bench.run("tq2", "--keep-base")
    assert bench.logits().is_file()


def _flip(path: Path) -> None:
    with path.open("r+b") as f:
        f.seek(path.stat().st_size // 2)
        byte = f.read(1)[0]
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte ^ 1]))


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _empty_sidecar(path: Path) -> None:
    path.with_suffix(".json").write_text("")


@pytest.mark.parametrize("damage", [_flip, _cut, _empty_sidecar])
def test_damaged_logits_are_computed_again(bench: Bench, damage: Callable[[Path], None]) -> None:
    bench.run("tq4")
    whole = bench.logits().read_bytes()
    damage(bench.logits())
    result = bench.invoke("tq3")
    assert result.exit_code == 0
    assert "is damaged: computing it again" in result.stderr
    assert bench.logits().read_bytes() == whole
    assert bench.invoke("tq2").stderr.count("is damaged") == 0


def _script(folder: Path, text: str) -> Path:
    """A folder of programs with a llama-perplexity that a shell script stands for."""
    folder.mkdir()
    program = folder / "llama-perplexity"
    program.write_text(f"#!/bin/bash\n{text}\n")
    program.chmod(0o755)
    return folder


def test_a_full_disk_is_noticed(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the program does not notice that writing failed
    real = bench.bin_dir / "llama-perplexity"
    cut = 'while [ $# -gt 1 ]; do [ "$1" = --save-all-logits ] && truncate -s -100 "$2"; shift; done; exit 0'
    bench.bin_dir = _script(tmp_path / "bin", f'{real} "$@" || exit\n{cut}')
    bench.refuses("is the disk full?", "tq3")
    bench.bin_dir = real.parent
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    bench.refuses("GB free", "tq3")
    assert [p.suffix for p in bench.cache.iterdir()] == [".lock", ".lock"]
    assert not bench.output.exists()


def test_another_type_than_the_one_asked_for_is_refused(bench: Bench, tmp_path: Path) -> None:
    real = bench.bin_dir / "llama-perplexity"
    bench.bin_dir = _script(tmp_path / "bin", f'exec {real} "${{@/tq3/q8_0}}"')
    assert bench.run("tq4")
    bench.refuses("K of type tq3 was asked for, the cache is q8_0", "tq3")
    bench.refuses("V of type tq3 was asked for, the cache is q8_0", "tq4/tq3")
    assert len(bench.records()) == 1


def test_what_cannot_be_measured_is_refused(bench: Bench, tmp_path: Path) -> None:
    bench.refuses("the text has", "tq3", "--chunks", 99)
    bench.refuses("you need at least", "tq3", "-c", 2048, "--chunks", 1)
    bench.refuses("scored tokens", "tq3", "-c", 128, "--chunks", 1)
    bench.refuses("a context of at least one token", "tq3", "-c", 0)
    bench.refuses("a context of at least one token", "tq3", "-c", -512)
    bench.refuses("at least one thread", "tq3", "-t", 0)
    bench.refuses("no pair of cache types", "tq3/")
    bench.refuses("path 'fast'", "tq3", "--path", "fast")
    bench.refuses("Unsupported cache type: tq9", "tq4,tq9")
    bench.refuses("invalid argument: --foo", "tq4", "--flags", "--foo")
    assert not list(bench.cache.glob("*.logits"))
    bench.refuses("is missing", "tq3", "--bin", tmp_path)
    bench.model = tmp_path / "none.gguf"
    bench.refuses("none.gguf is missing", "tq3")
    bench.model = tmp_path
    bench.refuses(f"{tmp_path} is no file", "tq3")
    assert not bench.output.exists()


def test_flags_cannot_contradict_the_settings(bench: Bench) -> None:
    for flag in ("-m x", "--model=x", "-c 64", "--ctx-size 64", "--ctx_size 64", "-t 1", "--threads=1", "-hf a/b"):
        bench.refuses(f"--flags: {flag.replace('=', ' ').split()[0]} is set by the command", "tq3", "--flags", flag)
    for flag in ("-ctk f16", "--cache-type-v f16", "-f x", "--file x", "--chunks 1", "--save-all-logits x"):
        bench.refuses(f"--flags: {flag.split()[0]} is set by the command", "tq3", "--flags", flag)
    bench.refuses("No closing quotation", "tq3", "--flags", "'")
    assert (
        bench.run("tq3", "--flags", "--override-kv 'llama.context_length=int:1024'")[0].settings.flags[-1][-4:]
        == "1024"
    )


def test_a_text_that_is_too_short_is_found_at_once(bench: Bench, tmp_path: Path) -> None:
    """The program says how many chunks there are before it computes them."""
    said = "echo perplexity: calculating perplexity over 3 chunks; sleep 60"
    real = bench.bin_dir / "llama-perplexity"
    bench.bin_dir = _script(tmp_path / "bin", f'case "$*" in *--save*) {said};; esac; exec {real} "$@"')
    start = time.monotonic()
    bench.refuses("the text has 3 chunks, not 99", "tq3", "--chunks", 99)
    assert time.monotonic() - start < 30


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a killed command leaves its program")
def test_programs_end_with_a_killed_command(bench: Bench, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    real = bench.bin_dir / "llama-perplexity"
    bench.bin_dir = _script(
        tmp_path / "bin", f'case "$*" in *--save*) echo $$ > {pid}; exec sleep 60;; esac; exec {real} "$@"'
    )
    command = [sys.executable, "-c", "from ggml_tq.cli import app; app()", *bench.args("tq3")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (pid.exists() and pid.read_text()):
        time.sleep(0.005)
    program = Path("/proc") / pid.read_text().strip() / "cmdline"
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while program.exists() and program.read_bytes() and time.monotonic() < deadline:  # a zombie has no command line
        time.sleep(0.01)
    assert not program.exists() or not program.read_bytes()


def test_a_killed_run_is_lost_and_nothing_else(bench: Bench) -> None:
    types = "q8_0,tq4,tq4_mse,tq3,tq3_mse,tq2"
    command = [sys.executable, "-c", "from ggml_tq.cli import app; app()", *bench.args(types)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None and (not bench.output.exists() or bench.output.stat().st_size == 0):
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = bench.records()
    assert len(before) >= 1
    after = bench.run(types)
    assert after[: len(before)] == before
    assert [str(r.pair) for r in after] == types.split(",")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGHUP])
def test_interrupted_programs_end(bench: Bench, how: signal.Signals) -> None:
    """SIGTERM or SIGHUP ends the command, and the llama-perplexity that it runs, and leaves no partial logits."""
    command = [
        sys.executable,
        "-c",
        "from ggml_tq.cli import app; app()",
        *bench.args("tq4,tq3,tq2", "--path", "decode"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(bench.cache.glob("*.partial")):
        time.sleep(0.005)
    process.send_signal(how)
    _, err = process.communicate()
    assert process.returncode == 1
    assert err.strip().splitlines()[-1] == "error: interrupted; the results so far are recorded"
    assert not list(bench.cache.glob("*.partial"))


def test_a_half_written_line_is_dropped(bench: Bench) -> None:
    bench.run("tq4,tq3")
    whole = bench.output.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole) - 1):  # killed after any byte
        bench.output.write_bytes(whole[:end])
        records, half = Store(bench.output).read()
        assert [str(r.pair) for r in records] == ["tq4"]
        assert (half is not None) == (end > first)
    result = bench.invoke("tq4,tq3")
    assert "dropped a half-written last line" in result.stderr
    assert bench.output.read_bytes()[:first] == whole[:first]
    assert [str(r.pair) for r in bench.records()] == ["tq4", "tq3"]
    bench.output.write_bytes(bench.output.read_bytes()[:-1])  # whole, but for the newline
    assert [str(r.pair) for r in bench.run("tq4,tq3,tq2")] == ["tq4", "tq3", "tq2"]


def test_a_damaged_line_is_not_dropped(bench: Bench) -> None:
    bench.run("tq4,tq3")
    whole = bench.output.read_text()
    for damaged in ("x" + whole, whole.replace('"schema": 1', '"schema": 99', 1), whole.replace('"figures"', '"f"', 1)):
        bench.output.write_text(damaged)
        bench.refuses("line 1: ", "tq2")
        assert bench.output.read_text() == damaged


def test_what_is_no_record_is_said(tmp_path: Path, record: Record) -> None:
    store = Store(tmp_path / "x.jsonl")
    whole = record.to_json()

    def with_(name: str, value: object) -> str:
        return json.dumps({**whole, name: value})

    figures = whole["figures"]
    for damaged in (
        with_("figures", {k: v for k, v in figures.items() if k != "kld"}),
        with_("figures", {**figures, "kld": ["0.1", 0.1]}),
        with_("figures", {**figures, "kld": [0.1]}),
        with_("cache", {**whole["cache"], "bits": "4.5"}),
        with_("cache", {**whole["cache"], "more": 1}),
        with_("path", "fast"),
        with_("chunk_kld", 3),
        "1",
        "[" * 100_000,
    ):
        store.path.write_text(damaged + "\n")
        with pytest.raises(EvalError, match="line 1: "):
            store.read()


def test_two_writers(tmp_path: Path, record: Record) -> None:
    """Each takes the other's records as they are."""
    a, b = Store(tmp_path / "x.jsonl"), Store(tmp_path / "x.jsonl")
    for store, k in ((a, "tq4"), (b, "tq3"), (a, "tq2")):
        store.append(dataclasses.replace(record, pair=Pair(k, k)))
    assert [r.pair.k for r in a.read()[0]] == ["tq4", "tq3", "tq2"]


def test_logits_that_cannot_be_kept(bench: Bench, tmp_path: Path) -> None:
    bench.run("tq3", "--keep-base")
    logits = bench.logits()
    logits.unlink()
    logits.mkdir()
    bench.refuses(f"{logits} is a folder", "tq4")
    bench.cache = tmp_path / "file"
    bench.cache.touch()
    bench.refuses(f"{bench.cache}: File exists", "tq4")


def test_one_output_has_one_process(bench: Bench) -> None:
    store = Store(bench.output)
    with store.session():
        bench.refuses(f"{bench.output}: process {os.getpid()} is adding to it", "tq3")
    assert not list(bench.output.parent.glob("*.jsonl*"))
    assert bench.run("tq3")


def test_an_output_that_cannot_be_written_is_noticed_first(bench: Bench, tmp_path: Path) -> None:
    bench.output = tmp_path
    bench.refuses("Is a directory", "tq3")
    (tmp_path / "file").touch()
    bench.output = tmp_path / "file" / "x.jsonl"
    bench.refuses("Not a directory", "tq3")
    assert not list(bench.cache.glob("*"))


@pytest.mark.parametrize("what", ["model", "text", "binary"])
@pytest.mark.parametrize("when", ["base", "run"])
def test_a_file_that_changes_meanwhile_is_refused(bench: Bench, tmp_path: Path, what: str, when: str) -> None:
    """Neither its result nor its logits are kept."""
    real = bench.bin_dir / "llama-perplexity"
    files = {name: shutil.copy(getattr(bench, name), tmp_path / name) for name in ("model", "text")}
    bench.model, bench.text = files["model"], files["text"]
    file = files.get(what, '"$0"')
    option = {"base": "--save-all-logits", "run": "--kl-divergence"}[when]
    bench.bin_dir = _script(tmp_path / "bin", f'case "$*" in *" {option} "*) echo >> {file};; esac\nexec {real} "$@"')
    bench.refuses("has changed meanwhile", "tq3")
    assert not bench.records()
    assert bool(list(bench.cache.glob("*.logits"))) == (when == "run")


def test_logits_that_another_uses_are_kept(bench: Bench) -> None:
    bench.run("tq4", "--keep-base")
    with runs.lock(bench.logits().with_suffix(".lock"), fcntl.LOCK_SH):
        assert "is kept: another process uses it" in bench.succeed("tq3", "--no-keep-base").stderr
        assert bench.logits().is_file()
    bench.run("tq2", "--no-keep-base")
    assert not list(bench.cache.iterdir())


def test_records_survive_the_file(tmp_path: Path, record: Record) -> None:
    store = Store(tmp_path / "x.jsonl")
    broken = dataclasses.replace(record, figures={**record.figures, "kld": (None, None)})
    store.append(record)
    store.append(broken)
    assert store.read() == ([record, broken], None)


def test_not_a_number_is_kept_as_such(record: Record) -> None:
    """What a broken type prints is a result: a table shows it."""
    log = "".join(
        f"{line}\n"
        for line in (
            "Mean PPL(Q)                   :        nan ±       -nan",
            "Mean PPL(base)                :  15.824268 ±   0.684622",
            "Mean PPL(Q)/PPL(base)         :        nan ±       -nan",
            "Mean    KLD:        inf ±       -nan",
            "Maximum KLD:        inf",
            "99.9%   KLD:  12.000000",
            "99.0%   KLD:  11.000000",
            "Median  KLD:   0.100000",
            "Same top p: 50.000 ± 1.000 %",
        )
    )
    figures = perplexity.figures(log)
    assert figures["kld"] == figures["ppl"] == figures["ppl_ratio"] == (None, None)
    assert figures["ppl_f16"] == (15.824268, 0.684622)
    assert "not finite" in report.tables([dataclasses.replace(record, figures=figures)])
    with pytest.raises(EvalError, match="no result"):
        perplexity.figures(log.replace("Median", "Modal"))


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("binary_sha256", "0" * 64),
        ("threads", 1),
        ("cpu", "another"),
        ("gpu", "another"),
        ("flags", ("-fa", "off")),
    ],
)
def test_results_of_other_settings_are_not_compared(tmp_path: Path, record: Record, name: str, other: object) -> None:
    store, output = Store(tmp_path / "x.jsonl"), tmp_path / "x.md"
    store.append(record)
    store.append(with_settings(dataclasses.replace(record, pair=Pair("q8_0", "q8_0")), **{name: other}))
    result = CliRunner().invoke(app, ["report", str(store.path), "-o", str(output)])
    assert result.exit_code == 1
    assert f"cannot be compared: {name} (" in result.stderr
    assert not output.exists()
    if name == "binary_sha256":
        arguments = ["report", str(store.path), "-o", str(output), "--binary", record.settings.binary_sha256[:8]]
        assert CliRunner().invoke(app, arguments).exit_code == 0
        assert "tq3_qjl / tq3_mse" in output.read_text()
        assert "q8_0" not in output.read_text().partition("| K / V")[2]


def test_contradicting_results_are_refused(record: Record) -> None:
    other = dataclasses.replace(record, figures={**record.figures, "kld": (1.0, 0.1)})
    assert len(report.groups([record, record])[0]) == 1
    with pytest.raises(EvalError, match="two different results"):
        report.groups([record, other])


def test_each_table_has_its_own_plot(record: Record, tmp_path: Path) -> None:
    pairs = [runs.Pair("q8_0", "q8_0"), runs.Pair("tq3", "tq3")]
    records = [
        dataclasses.replace(record, settings=dataclasses.replace(record.settings, chunks=chunks), pair=pair)
        for chunks in (3, 4)
        for pair in pairs
    ]
    report.write(records, tmp_path / "quality.md", [])
    plots = {p.name for p in tmp_path.glob("*.svg")}
    assert len(plots) == 2
    assert all((tmp_path / "quality.md").read_text().count(f"]({plot})") == 1 for plot in plots)


def test_models_of_one_short_name(tmp_path: Path, record: Record) -> None:
    """Each has its own plot and its own name in the README."""
    records = [
        with_settings(dataclasses.replace(record, pair=Pair(k, k)), model=model, model_sha256=digit * 64)
        for digit, model in zip("012", ("X.Q4_1.gguf", "X.Q4_1-tq.gguf", "Y 1-Q8_0.gguf"), strict=True)
        for k in ("tq3", "tq4")
    ]
    output = tmp_path / "a folder" / "x.md"
    report.write(records, output, [tmp_path / "in put.jsonl"])
    plots = {p.name for p in output.parent.glob("*.svg")}
    assert plots == {"x-X.Q4_1-256.svg", "x-X.Q4_1-tq-256.svg", "x-Y 1-256.svg"}
    assert "](x-Y%201-256.svg)" in output.read_text()
    assert "[in put.jsonl](../in%20put.jsonl)" in output.read_text()
    heads = report.compact(records).splitlines()[2]
    assert heads == "| K / V | bits a value | X.Q4_1-tq, 256 tokens | X.Q4_1, 256 tokens | Y 1, 256 tokens |"
    assert report.names({"a" * 64: "Z.gguf", "b" * 64: "Z.gguf"}) == {"a" * 64: "Z-aaaaaaaa", "b" * 64: "Z-bbbbbbbb"}


def test_columns_that_were_measured_differently_say_so(record: Record) -> None:
    other = with_settings(record, model_sha256="0" * 64, cpu="another", flags=("-ngl", "99"))
    assert "differently" not in report.compact([record])
    said = report.compact([record, other]).splitlines()[0]
    assert f"Columns were measured differently: cpu ({record.settings.cpu} / another); flags (" in said


def test_bits_are_those_of_the_types(record: Record) -> None:
    def bits(k: str, v: str, mib_k: float, mib_v: float, recorded: float) -> float:
        cache = dataclasses.replace(record.cache, k=k, v=v, cells=256, mib_k=mib_k, mib_v=mib_v, bits=recorded)
        return report.bits(cache)

    values = 30 * 3 * 64 * 256 / 8 / 2**20
    sizes = {name: round(b * values, 2) for name, b in (("tq2_mse", 2.25), ("q8_0", 8.5))}
    assert bits("tq2_mse", "tq2_mse", *[sizes["tq2_mse"]] * 2, 2.24) == 2.25
    assert bits("q8_0", "q8_0", *[sizes["q8_0"]] * 2, 8.49) == 8.5
    assert bits("q8_0", "tq2_mse", sizes["q8_0"], sizes["tq2_mse"], 5.37) == 5.375
    larger = bits("q8_0", "tq2_mse", 2 * sizes["q8_0"], sizes["tq2_mse"], 6.4)
    assert larger == pytest.approx((2 * 8.5 + 2.25) / 3, abs=0.03)  # as far as printed sizes say
    assert bits("new", "new", 1, 1, 3.2) == 3.2


def test_a_report_that_cannot_be_written(tmp_path: Path, record: Record) -> None:
    store, output, readme = Store(tmp_path / "x.jsonl"), tmp_path / "x.md", tmp_path / "readme.md"
    store.append(dataclasses.replace(record, path="decode"))
    store.append(dataclasses.replace(record, path="decode", pair=Pair("tq4", "tq4")))

    def refuses(message: str, *more: object) -> None:
        result = CliRunner().invoke(app, ["report", str(store.path), *map(str, more)])
        assert result.exit_code == 1
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        assert message in result.stderr
        assert not output.exists()

    refuses("no batched results", "-o", output, "--readme", readme)
    store.append(record)
    refuses("readme.md: No such file", "-o", output, "--readme", readme)
    readme.write_text("no marked lines")
    refuses("has no <!-- quality -->", "-o", output, "--readme", readme)
    readme.write_bytes(b"<!-- quality -->\n\xff<!-- /quality -->")
    refuses("is not UTF-8", "-o", output, "--readme", readme)
    refuses("File exists", "-o", store.path / "x.md")
    store.path.unlink()
    store.append(dataclasses.replace(record, path="decode"))
    assert CliRunner().invoke(app, ["report", str(store.path), "-o", str(output)]).exit_code == 0


def test_report(bench: Bench, tmp_path: Path) -> None:
    bench.run("f16,q8_0,q4_0,tq3,q8_0/tq3", "--path", "batched", "--path", "decode")
    bench.run("f16,q8_0,q4_0,tq3,q8_0/tq3", "--chunks", 1, "-c", 512)
    output, readme = tmp_path / "docs" / "quality.md", tmp_path / "README.md"
    readme.write_text("before\n<!-- quality -->\nold\n<!-- /quality -->\nafter\n")
    command = ["report", str(bench.output), "-o", str(output), "--readme", str(readme)]
    seen = []
    for _ in range(2):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        seen.append({p.name: p.read_bytes() for p in (*output.parent.iterdir(), readme)})
    assert seen[0] == seen[1]
    name = bench.model.stem
    plots = [f"quality-{name}-256.svg", f"quality-{name}-512.svg", f"quality-{name}-context.svg"]
    assert sorted(seen[0]) == sorted(["README.md", "quality.md", *plots])
    text = output.read_text()
    assert all(f"]({plot})" in text for plot in plots)
    for r in bench.records():
        assert f"| {r.cache.k} / {r.cache.v} | {r.path} | {report.bits(r.cache):.2f} | {r.value('ppl'):.3f} |" in text
        assert report.plus_minus(r, "kld", 5) in text
    compact = readme.read_text()
    assert compact.startswith("before\n<!-- quality -->\nMean KL divergence")
    assert compact.endswith("(docs/quality.md).\n<!-- /quality -->\nafter\n")
    assert compact.count("\n| ") == 1 + 4  # heading, and one row a pair but f16
    (output.parent / "retrieval-x.svg").touch()
    assert CliRunner().invoke(app, command).exit_code == 0
    assert output.read_text().endswith("\n\n## Retrieval\n\n![retrieval-x](retrieval-x.svg)\n")
    readme.write_text("nothing marked\n")
    assert CliRunner().invoke(app, command).exit_code == 1
    assert readme.read_text() == "nothing marked\n"


def test_error_a_layer(tmp_path: Path, record: Record) -> None:
    store, output, study = Store(tmp_path / "x.jsonl"), tmp_path / "docs" / "x.md", tmp_path / "study.json"
    store.append(record)
    layers = [
        {"layer": n, "keys": {"q4_0": {"kl": 0.1 + n}, "tq3_tcq+cal": {"kl": None if n == 3 else 0.01 * n}}}
        for n in (0, 3, 6)
    ]
    meta = {"model": "Some-Q4_1.gguf", "text": "wiki.txt"}
    study.write_text(json.dumps({"metadata": meta, "n_tokens": 1024, "n_queries": 768, "skip": 256, "layers": layers}))
    # 0 has no logarithm, None is not finite
    assert report.layer_errors(study).kl == {"q4_0": {0: 0.1, 3: 3.1, 6: 6.1}, "tq3_tcq+cal": {6: 0.06}}
    command = ["report", str(store.path), "-o", str(output), "--study", str(study)]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert "## Error a layer\n\n![KL of attention a layer](x-Some-layers.svg)\n" in output.read_text()
    assert "Captured keys of Some-Q4_1.gguf, 1024 tokens of wiki.txt, 768 queries a head" in output.read_text()
    assert "[study.json](../study.json)" in output.read_text()
    plot = (output.parent / "x-Some-layers.svg").read_text()
    assert all(f">{name}<" in plot for name in ("q4_0", "tq3_tcq+cal", "Some, keys quantized"))

    before = output.read_bytes()
    for broken in ("", "{}", "[" * 100_000, '{"metadata": {}, "layers": [{"layer": 1, "keys": {"q4_0": 1}}]}'):
        study.write_text(broken)
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 1
        assert result.stderr.startswith(f"error: {study} is no study that ggml-tq study wrote")
        assert result.stderr.count("\n") == 1
        assert output.read_bytes() == before


def test_the_frontier_is_what_nothing_beats() -> None:
    points = [(8.5, 0.004), (4.5, 0.04), (4.25, 0.03), (3.25, 0.2), (3.5, 0.3)]
    assert report._frontier(points) == [(3.25, 0.2), (4.25, 0.03), (8.5, 0.004)]


def test_pairs() -> None:
    assert str(Pair.parse("tq3")) == "tq3"
    assert Pair.parse(" q8_0/tq3 ") == Pair("q8_0", "tq3")
    for wrong in ("", "/tq3", "tq3/", "a/b/c"):
        with pytest.raises(EvalError, match="no pair"):
            Pair.parse(wrong)
    unrotated = Pair.parse("q4_0-norot")
    assert unrotated.types == ("q4_0", "q4_0")
    assert unrotated.environment
    assert not Pair.parse("q4_0").environment
    with pytest.raises(EvalError, match="for both"):
        Pair.parse("q4_0-norot/q8_0")


def test_the_long_matrix_is_complete(tmp_path: Path) -> None:
    plans = matrix.long_matrix(tmp_path)
    models = {p.model for p in plans}
    assert len(models) == 4
    wanted = ("bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl", "q4_0-norot")
    wanted += ("tq4", "tq3", "tq2", "tq4_tcq", "tq3_tcq", "tq2_tcq", "q8_0/tq3_tcq", "tq4_tcq/tq3_tcq")
    for model in models:
        of = {
            (str(k), c, path)
            for p in plans
            if p.model == model
            for k in p.pairs
            for c in p.contexts
            for path in p.paths
        }
        assert {(t, 2048, "batched") for t in wanted} <= of
        assert {("q8_0", 8192, "batched"), ("tq3_tcq", 8192, "batched"), ("tq3_tcq", 2048, "decode")} <= of
    assert all(p.chunks(c) * c >= 20_000 for p in plans for c in p.contexts)
