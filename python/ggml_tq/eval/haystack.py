"""Haystacks: a long text with facts in it at known depths, and a question for each fact.

Two tasks after RULER (Hsieh et al. 2024, arXiv 2404.06654), sized for small models. Every haystack holds one queried
fact for each depth, so that one long prompt answers a whole column of the depth x length grid:

- ``niah``: the facts are the only ones, between the sentences of a text (RULER's multi-key NIAH 1).
- ``multikey``: the haystack is nothing but facts of the same form; all but the queried ones distract (NIAH 2).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ggml_tq.eval.runs import EvalError

VERSION = 1  # of everything here that a result depends on
Task = Literal["niah", "multikey"]
TASKS: tuple[Task, ...] = ("niah", "multikey")

# a key is an adjective and a noun
_ADJECTIVES = """
amber ancient bitter blue brave bright brown calm clever cold curious distant early eager fancy fierce gentle golden
grand green happy hidden hollow honest humble icy jolly kind large lazy little lonely loud lucky merry misty modern
noble old orange pale patient plain polite proud purple quick quiet rapid red rough royal rusty salty sharp shiny
silent silver sleepy slow small smooth soft steady
"""
_NOUNS = """
anchor apple arrow barrel basket beacon bell bottle bridge bucket button cabin candle canyon carpet castle chair
circle cloud coin copper corner cottage cradle desert dolphin dragon engine falcon feather fiddle forest fountain
garden glacier hammer harbor island jacket kettle ladder lantern lemon magnet marble meadow mirror mountain needle
ocean orchard paddle pencil pepper pillow planet ribbon river saddle shadow shovel spider summit table
"""
KEYS = [f"{a} {n}" for a in _ADJECTIVES.split() for n in _NOUNS.split()]

INSTRUCTION = (
    "Some magic numbers are hidden in the following text. Memorize them. I will ask you about one of them.\n\n"
)
FACT = "The magic number of the {key} is {value}."
QUESTION = "\n\nWhat is the magic number of the {key} that the text mentions?"
ANSWER = "The magic number of the {key} is"

Tokens = list[int]
Tokenizer = Callable[[str], Tokens]  # without special tokens at the start


@dataclass(frozen=True)
class Frame:
    """A chat as the model wants it: what stands before and after a question, which ends the user's message."""

    before: str
    after: str


@dataclass(frozen=True)
class Query:
    """A question about the fact at `depth`, in tokens that continue the haystack's."""

    depth: float  # 0: the first fact or sentence, 1: the last
    key: str
    value: str
    question: Tokens  # to the point where the answer begins
    answer: Tokens


@dataclass(frozen=True)
class Haystack:
    """A prompt up to the question, and its questions; with any of them it is at most the wanted length."""

    prefix: Tokens
    queries: tuple[Query, ...]

    def digest(self) -> str:
        """Names all tokens in 16 hex digits: those whose digests agree are the same to the model."""
        tokens = [self.prefix, *([q.question, q.answer] for q in self.queries)]
        return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16]


def sentences(text: str) -> list[str]:
    """The sentences of a text, without headings and other short lines."""
    lines = (line.strip() for line in text.splitlines())
    found = itertools.chain.from_iterable(re.split(r"(?<=[.!?]) +(?=[A-Z\"'])", line) for line in lines)
    return [s for s in found if 30 < len(s) < 600 and s[-1] in ".!?"]


def _facts(rng: random.Random, n: int, digits: int) -> list[tuple[str, str]]:
    """n facts of different keys and values."""
    values = rng.sample(range(10 ** (digits - 1), 10**digits), n)
    return [(key, str(value)) for key, value in zip(rng.sample(KEYS, n), values, strict=True)]


def _place(items: Sequence[str], depths: Iterable[float], facts: Iterable[str]) -> str:
    """The items as one text with each fact put in at its depth."""
    places = [(round(depth * len(items)), fact) for depth, fact in zip(depths, facts, strict=True)]
    parts: list[str] = []
    for i in range(len(items) + 1):
        parts += [fact for place, fact in places if place == i]
        parts += items[i : i + 1]
    return " ".join(parts)


def build(
    task: Task,
    length: int,
    depths: Sequence[float],
    seed: str,
    pool: Sequence[str],
    frame: Frame,
    tokenize: Tokenizer,
    digits: int = 5,
) -> Haystack:
    """The haystack of a seed: as long as fits into `length` tokens with its longest question and answer.

    `pool` are the sentences for ``niah``: a stretch of them from a random place. Raises EvalError if `length` is too
    short for one item between the facts, or the pool for `length`.
    """
    rng = random.Random(seed)
    if task == "niah":
        if not pool:
            raise EvalError("the text has no sentences")
        facts = _facts(rng, len(depths), digits)
        start = rng.randrange(len(pool))
        items = [*pool[start:], *pool[:start]]
    else:
        all_facts = _facts(rng, min(len(depths) + length // 8, len(KEYS)), digits)
        facts = all_facts[: len(depths)]
        items = [FACT.format(key=key, value=value) for key, value in all_facts[len(depths) :]]
    queries = tuple(
        Query(
            depth,
            key,
            value,
            tokenize(QUESTION.format(key=key) + frame.after + ANSWER.format(key=key)),
            tokenize(f" {value}"),
        )
        for depth, (key, value) in zip(depths, facts, strict=True)
    )
    room = length - max(len(q.question) + len(q.answer) for q in queries)

    def prefix(n: int) -> Tokens:
        hidden = [FACT.format(key=key, value=value) for key, value in facts]
        return tokenize(frame.before + INSTRUCTION + _place(items[:n], depths, hidden))

    # bisection: each item takes at least one token
    fits, too_many = 0, min(len(items), length) + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if len(prefix(middle)) <= room:
            fits = middle
        else:
            too_many = middle
    if fits < len(depths) - 1 or fits == 0:
        raise EvalError(f"a haystack of {length} tokens has no room for {len(depths)} facts")
    if fits == len(items):
        raise EvalError(f"the text is too short for a haystack of {length} tokens")
    return Haystack(prefix(fits), queries)
