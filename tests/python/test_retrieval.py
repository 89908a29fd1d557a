"""Needle in a haystack: what is asked, how it is scored, and what is recorded, on real servers."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command import Command
from conftest import Fork
from hypothesis import given
from hypothesis import strategies as st
from random_models import Llama

from ggml_tq.eval import haystack, retrieval, retrieval_report, runs
from ggml_tq.eval.haystack import Frame, Haystack, Task
from ggml_tq.eval.perplexity import Program
from ggml_tq.eval.retrieval import Client, Record
from ggml_tq.eval.runs import EvalError, Pair

RandomModel = Callable[[object], Path]
F16 = Pair("f16", "f16")
FRAME = Frame("<user> ", " <assistant> ")
POOL = [f"This is sentence number {i} of the pool of sentences." for i in range(400)]
WORDS: dict[str, int] = {}


def words(text: str) -> list[int]:
    """A tokenizer: a number for each word."""
    return [WORDS.setdefault(w, len(WORDS)) for w in text.split()]


def text(tokens: list[int]) -> str:
    names = list(WORDS)
    return " ".join(names[t] for t in tokens)


def build(task: Task, length: int, depths: tuple[float, ...], seed: str = "s") -> Haystack:
    return haystack.build(task, length, depths, seed, POOL, FRAME, words)


@given(
    task=st.sampled_from(haystack.TASKS),
    length=st.integers(150, 1200),
    depths=st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.8, 1.0]), min_size=1, max_size=4, unique=True),
    seed=st.text(max_size=5),
)
def test_every_fact_is_there_once_at_its_depth(task: Task, length: int, depths: list[float], seed: str) -> None:
    hay = build(task, length, tuple(sorted(depths)), seed)
    said = text(hay.prefix)
    longest = max(len(q.question) + len(q.answer) for q in hay.queries)
    slack = 16  # tokens of the longest item, and one
    assert length - slack <= len(hay.prefix) + longest <= length
    body = said[said.index("one of them.") + len("one of them.") :]
    for q in hay.queries:
        fact = haystack.FACT.format(key=q.key, value=q.value)
        assert body.count(fact) == 1
        assert body.count(q.value) == 1
        assert q.key in text(q.question)
        assert q.value not in text(q.question)
        assert text(q.answer) == q.value
        place = len(body[: body.index(fact)].split()) / len(body.split())
        assert place == pytest.approx(q.depth, abs=0.06 + 30 / len(body.split()))
    others = re.findall(r"The magic number of the (\w+ \w+) is (\d+)\.", body)
    assert len({k for k, _ in others}) == len({v for _, v in others}) == len(others)
    if task == "niah":
        assert len(others) == len(depths)
    else:
        assert len(others) * 9 == len(body.split())


def test_the_seed_decides() -> None:
    assert build("niah", 400, (0, 1)) == build("niah", 400, (0, 1))
    assert build("niah", 400, (0, 1)).digest() != build("niah", 400, (0, 1), "t").digest()
    assert build("multikey", 400, (0, 1)).digest() != build("multikey", 400, (0, 0.5)).digest()


def test_sizes_that_cannot_be_had() -> None:
    with pytest.raises(EvalError, match="no room for 5 facts"):
        build("niah", 60, (0, 0.25, 0.5, 0.75, 1))
    with pytest.raises(EvalError, match="the text is too short"):
        build("niah", 20_000, (0,))
    with pytest.raises(EvalError, match="the text is too short"):
        build("multikey", 100_000, (0,))
    with pytest.raises(EvalError, match="no sentences"):
        haystack.build("niah", 400, (0,), "s", [], FRAME, words)


def test_sentences() -> None:
    found = haystack.sentences(
        "Heading\n\nThe first sentence is long enough. The second one, too, is long enough! Short. 3\n"
    )
    assert found == ["The first sentence is long enough.", "The second one, too, is long enough!"]


@pytest.fixture(scope="module")
def program(fork: Fork) -> Program:
    return Program(fork.bin_dir, retrieval.PROGRAM)


@pytest.fixture(scope="module")
def served(program: Program, smollm2: Path) -> Iterator[tuple[Client, Haystack]]:
    """SmolLM2 with a tq4_mse cache that has read a haystack."""
    with retrieval.serve(program, smollm2, Pair.parse("tq4_mse"), 2, retrieval.options(512)) as (client, cache):
        assert (cache.k, cache.v, cache.parts[0].cells) == ("tq4_mse", "tq4_mse", 512)
        hay = haystack.build("multikey", 300, (0, 0.5, 1), "s", POOL, client.frame(), client.tokenize)
        client.read(hay.prefix)
        yield client, hay


def test_the_models_own_template_is_used(served: tuple[Client, Haystack]) -> None:
    frame = served[0].frame()
    assert frame.before.endswith("<|im_start|>user\n")
    assert frame.after == "<|im_end|>\n<|im_start|>assistant\n"
    assert len(served[0].tokenize(frame.after)) < 8  # special tokens, not their spelling


def complete(client: Client, prompt: list[int], **more: object) -> runs.Json:
    body = {"prompt": prompt, "n_predict": 1, "temperature": 0, "cache_prompt": True, "return_tokens": True}
    return client.post("/completion", body | more)


def test_forced_tokens_have_their_own_probability(served: tuple[Client, Haystack]) -> None:
    client, hay = served
    prompt = hay.prefix + hay.queries[0].question + hay.queries[0].answer[:1]
    answer = complete(client, prompt, n_probs=10)
    (first,) = answer["completion_probabilities"]
    likely = {t["id"]: t["logprob"] for t in first["top_logprobs"]}
    top = max(likely, key=likely.__getitem__)
    for token, logprob in likely.items():
        assert client.forced(prompt, token)[:2] == (pytest.approx(logprob, abs=1e-5), top)
    assert sum(map(math.exp, likely.values())) <= 1


def test_right_is_what_greedy_generation_says(served: tuple[Client, Haystack]) -> None:
    client, hay = served
    right = set()
    wrong = hay.queries[0].answer  # where it is not the answer
    for q in (*hay.queries, *(dataclasses.replace(q, answer=wrong) for q in hay.queries[1:])):
        said = complete(client, hay.prefix + q.question, n_predict=len(q.answer))
        answer = client.ask(hay.prefix, q)
        assert answer.correct == (said["tokens"] == q.answer)
        assert answer.correct == (answer.wrong == "")
        assert len(answer.logprobs) == len(q.answer)
        assert all(p <= 0 for p in answer.logprobs)
        assert said["timings"]["cache_n"] >= len(hay.prefix)  # the haystack is not read again
        right.add(answer.correct)
    assert right == {True, False}


class Search(Command):
    """`ggml-tq retrieval` on one model in a folder of its own."""

    def __init__(self, folder: Path, model: Path, prose: Path, bin_dir: Path) -> None:
        self.output, self.model, self.text, self.bin_dir = folder / "r.jsonl", model, prose, bin_dir

    def args(self, types: str, *more: object) -> list[str]:
        files = ("-m", self.model, "-f", self.text, "-o", self.output, "--bin", self.bin_dir, "-t", 2)
        sizes = ("--lengths", 256, "--depths", "0,1", "--trials", 1)
        return [str(x) for x in ("retrieval", *files, *sizes, "--types", types, *more)]

    def run(self, types: str, *more: object) -> list[Record]:
        self.succeed(types, *more)
        return self.records()

    def records(self) -> list[Record]:
        return retrieval.store(self.output).read()[0]


@pytest.fixture
def search(tmp_path: Path, random_model: RandomModel, prose: Path, fork: Fork) -> Search:
    return Search(tmp_path, random_model(Llama(64)), prose, fork.bin_dir)


@pytest.fixture(scope="module")
def real(
    tmp_path_factory: pytest.TempPathFactory, smollm2: Path, prose: Path, fork: Fork
) -> tuple[Search, list[Record]]:
    search = Search(tmp_path_factory.mktemp("real"), smollm2, prose, fork.bin_dir)
    return search, search.run("q8_0,tq2", "--build", "of today", "--tasks", "multikey", "--trials", 2, "--lengths", 200)


def test_damage_shows(real: tuple[Search, list[Record]]) -> None:
    (group,) = retrieval_report.groups(real[1])
    rows = {row.label: row for row in group.rows}
    assert list(rows) == ["f16 / f16", "q8_0 / q8_0", "tq2_qjl / tq2_mse"]
    assert rows["f16 / f16"].right().value >= 0.5  # of 4
    assert abs(rows["q8_0 / q8_0"].logprob_vs_f16().value) < 0.1
    assert rows["tq2_qjl / tq2_mse"].logprob_vs_f16().value < -0.5
    assert rows["f16 / f16"].logprob_vs_f16().value == 0


def test_a_record_says_what_was_measured(real: tuple[Search, list[Record]], smollm2: Path) -> None:
    search, records = real
    assert [(str(r.pair), r.trial) for r in records] == [(t, n) for t in ("f16", "q8_0", "tq2") for n in (0, 1)]
    s, r = records[-1].settings, records[-1]
    assert (s.task, s.length, s.depths, s.seed, s.threads) == ("multikey", 200, (0.0, 1.0), 0, 2)
    assert s.model_sha256 == runs.sha256(smollm2)
    assert s.text_sha256 == runs.sha256(search.text)
    assert s.binary_sha256 == Program(search.bin_dir, retrieval.PROGRAM).sha256()
    assert s.cpu
    assert (r.cache.k, r.cache.v) == ("tq2_qjl", "tq2_mse")
    assert r.source["build"] == "of today"
    assert r.source["upstream"]["commit"]
    assert r.haystack == records[1].haystack  # what f16 read
    assert [a.depth for a in r.answers] == [0, 1]
    assert all(a.value.isdigit() and len(a.value) == 5 for a in r.answers)


def test_table_and_heat_maps(real: tuple[Search, list[Record]]) -> None:
    search, records = real
    report = search.output.with_suffix(".md")
    before = {p: p.read_bytes() for p in report.parent.iterdir() if p != search.output}
    assert search.invoke("f16", "--report-only").exit_code == 0
    assert before == {p: p.read_bytes() for p in report.parent.iterdir() if p != search.output}
    said = report.read_text()
    (picture,) = re.findall(r"\]\((.*\.svg)\)", said)
    assert "tq2_mse" in (report.parent / picture).read_text()
    right = sum(a.correct for r in records if r.pair == F16 for a in r.answers if a.depth == 0)
    assert re.search(rf"\n\| f16 / f16 \| {right}/2 ± 0\.\d\d \|", said), said


def test_same_command_same_numbers(tmp_path: Path, random_model: RandomModel, prose: Path, fork: Fork) -> None:
    found = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        search = Search(tmp_path / folder, random_model(Llama(64)), prose, fork.bin_dir)
        found.append([(r.key, r.answers, r.haystack) for r in search.run("tq3", "--trials", 2)])
    assert len(found[0]) == 8
    assert found[0] == found[1]


def test_without_upstreams_rotation(search: Search) -> None:
    records = search.run("q4_0,q4_0-norot", "--tasks", "niah")
    (group,) = retrieval_report.groups(records)
    assert {row.label for row in group.rows} == {"f16 / f16", "q4_0 / q4_0", "q4_0-norot / q4_0-norot"}
    assert records[1].answers != records[2].answers


def test_a_report_that_cannot_be_written(search: Search) -> None:
    search.run("f16", "--tasks", "niah")
    report = search.output.with_suffix(".md")
    report.unlink()
    report.mkdir()
    search.refuses("Is a directory", "f16", "--report-only")


def test_recorded_haystacks_are_skipped(search: Search) -> None:
    search.run("f16", "--tasks", "niah")
    first = search.output.read_bytes()
    records = search.run("tq3", "--tasks", "niah", "--trials", 2)
    assert search.output.read_bytes().startswith(first)
    assert [(str(r.pair), r.trial) for r in records] == [("f16", 0), ("f16", 1), ("tq3", 0), ("tq3", 1)]
    second = search.output.read_bytes()
    search.run("tq3", "--tasks", "niah", "--trials", 2)
    assert search.output.read_bytes() == second


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_killed_run_is_lost_and_nothing_else(search: Search, how: signal.Signals) -> None:
    more = ("--trials", 20, "--tasks", "niah")
    command = [sys.executable, "-c", "from ggml_tq.cli import app; app()", *search.args("f16", *more)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and (not search.output.exists() or search.output.stat().st_size == 0):
        time.sleep(0.005)
    process.send_signal(how)
    assert process.communicate()[1].strip().endswith("error: interrupted; the haystacks so far are recorded")
    assert process.returncode == 1
    before = search.records()
    assert len(before) >= 1
    after = search.run("f16", *more)
    assert after[: len(before)] == before
    assert [r.trial for r in after] == list(range(20))


def test_what_cannot_be_measured_is_refused(search: Search, tmp_path: Path) -> None:
    search.refuses("Unsupported cache type: tq9", "tq4,tq9")
    search.refuses("no pair of cache types", "tq3/")
    search.refuses("task 'needle': want niah or multikey", "tq3", "--tasks", "needle")
    search.refuses("are no lengths", "tq3", "--lengths", "long")
    search.refuses("are no lengths", "tq3", "--lengths", "-5")
    search.refuses("different numbers from 0 to 1", "tq3", "--depths", "0,2")
    search.refuses("at least one trial", "tq3", "--trials", 0)
    search.refuses("digits", "tq3", "--digits", 1)
    search.refuses("invalid argument: --foo", "tq3", "--flags", "--foo")
    search.refuses("--parallel is set by the command", "tq3", "--flags", "--parallel 2")
    search.refuses("one thread", "tq3", "-t", 0)
    search.refuses("no room for 2 facts", "tq3", "--lengths", 64)
    search.refuses("is missing", "tq3", "--bin", tmp_path)
    search.model = tmp_path / "none.gguf"
    search.refuses("none.gguf is missing", "tq3")
    search.model = search.text
    search.refuses("llama-server failed", "tq3")
    assert not search.output.exists()


def test_another_type_than_the_one_asked_for_is_refused(search: Search, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / retrieval.PROGRAM
    script.write_text(f'#!/bin/bash\nexec {search.bin_dir / retrieval.PROGRAM} "${{@/tq3/q8_0}}"\n')
    script.chmod(0o755)
    search.bin_dir = script.parent
    search.refuses("K of type tq3 was asked for, the cache is q8_0", "tq3")
    assert {str(r.pair) for r in search.records()} == {"f16"}


def test_a_text_that_changes_meanwhile_is_refused(search: Search, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(search.text.read_bytes())
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / retrieval.PROGRAM
    real = search.bin_dir / retrieval.PROGRAM
    script.write_text(f'#!/bin/bash\ncase "$*" in *--port*) echo >> {text};; esac\nexec {real} "$@"\n')
    script.chmod(0o755)
    search.text, search.bin_dir = text, script.parent
    search.refuses("text.txt has changed meanwhile", "tq3")
    assert not search.records()


def test_a_damaged_line_is_said(search: Search) -> None:
    search.run("f16", "--tasks", "niah")
    whole = search.output.read_text()
    for damaged in (whole.replace('"schema": 1', '"schema": 99'), whole.replace('"answers"', '"a"')):
        search.output.write_text(damaged)
        search.refuses("line 1: ", "tq3")
    search.output.write_text(whole[:-2])
    assert "half-written" in search.invoke("f16", "--tasks", "niah").stderr
    assert search.output.read_text().count("\n") == 1


def test_results_that_cannot_be_compared(real: tuple[Search, list[Record]]) -> None:
    records = real[1]

    def other(r: Record, **changes: object) -> Record:
        return dataclasses.replace(r, settings=dataclasses.replace(r.settings, **changes))

    with pytest.raises(EvalError, match="cannot be compared: threads"):
        retrieval_report.groups([*records[:-1], other(records[-1], threads=1)])
    with pytest.raises(EvalError, match="two different haystacks"):
        retrieval_report.groups([*records[:-1], dataclasses.replace(records[-1], haystack="0")])
    with pytest.raises(EvalError, match="no f16"):
        retrieval_report.groups([r for r in records if r.pair != F16])
    with pytest.raises(EvalError, match="f16 was not measured on all"):
        retrieval_report.groups(records[1:])
    with pytest.raises(EvalError, match="no results"):
        retrieval_report.groups([])


def test_records_survive_the_file(real: tuple[Search, list[Record]], tmp_path: Path) -> None:
    store = retrieval.store(tmp_path / "x.jsonl")
    store.append(real[1][0])
    assert store.read() == ([real[1][0]], None)
    assert json.loads((tmp_path / "x.jsonl").read_text())["schema"] == runs.SCHEMA


def test_errors() -> None:
    share, mean = retrieval_report.share, retrieval_report.mean
    assert share([True] * 8).value == 1
    assert 0.05 < share([True] * 8).error < 0.12
    assert share([True, False] * 50) == retrieval_report.Estimate(0.5, pytest.approx(0.05))
    assert mean([1.0, 3.0]) == retrieval_report.Estimate(2.0, pytest.approx(1.0))
    assert math.isnan(mean([1.0]).error)
