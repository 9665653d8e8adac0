"""Records of requests to a server whose adapters constantly change, and of its answers."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.tiny_llama import SHAPES

__all__ = ["Attempt", "Churn", "Content", "Ledger", "Span", "Traffic"]

FOREVER: Final = float("inf")


@dataclass(frozen=True, slots=True)
class Content:
    """The weights of one adapter: files that this side made, and their digest."""

    folder: Path
    digest: str


@dataclass(frozen=True, slots=True)
class Traffic:
    """What to send.

    Attributes:
        requests: how many, by ``workers`` at a time.
        names: adapters.
        each: requests for each change of an adapter.
        modules: what the adapters adapt.
        ranks: theirs, drawn at random.
        sampled: share of the requests with a temperature; the others are greedy.
        logprobs: ask for log-probabilities.
    """

    requests: int
    names: int = 50
    workers: int = 24
    each: int = 6
    modules: tuple[str, ...] = tuple(SHAPES)
    ranks: tuple[int, ...] = (1, 2, 4)
    most_tokens: int = 10
    cancelled: float = 0.25
    sampled: float = 0.0
    logprobs: bool = False


@dataclass(slots=True)
class Attempt:
    """One request and what came of it. Times are of `time.monotonic`.

    Attributes:
        asked: name, ``name@revision``, ``name/alias``, or "" for the base.
        cancel_at: tokens after which the caller leaves; 0 is before the first; None never.
        settled: when the first token had come, or the end: its revision was fixed before.
        outcome: ``finished``, ``cancelled``, or the reason of a refusal.
        revision, digest, adapter: of the provenance, where there was one.
    """

    number: int
    asked: str
    prompt: list[int]
    most: int
    temperature: float
    cancel_at: int | None
    began: float = 0.0
    settled: float = 0.0
    outcome: str = ""
    adapter: str = ""
    revision: str = ""
    digest: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.asked.partition("@")[0].partition("/")[0]


@dataclass(frozen=True, slots=True)
class Span:
    """A name or alias may have meant one of these revisions from one time to another."""

    revisions: tuple[str, ...]
    begin: float
    end: float = FOREVER


@dataclass(slots=True)
class Ledger:
    """What each name and alias may have meant when, as its only publisher knows it."""

    contents: dict[str, Content] = field(default_factory=dict)
    """By revision."""
    spans: dict[str, list[Span]] = field(default_factory=dict)
    aborted: list[tuple[str, float, float]] = field(default_factory=list)
    """Evictions with mode ABORT: weights digest, begin and end."""

    def now(self, name: str) -> str:
        """A revision that ``name`` was given last; "" for none."""
        spans = self.spans.get(name)
        return spans[-1].revisions[0] if spans and spans[-1].revisions else ""

    def before(self, name: str) -> str:
        """The revision that ``name`` had before that; "" for none."""
        revisions = self.spans[name][-2].revisions
        return revisions[0] if revisions else ""

    def change(self, name: str, revisions: tuple[str, ...], began: float) -> None:
        """A change that began at ``began`` is acknowledged now: until now the name may
        have meant the old, since ``began`` the new."""
        spans = self.spans.setdefault(name, [Span((), 0.0)])
        last = spans[-1]
        spans[-1] = Span(last.revisions, last.begin, time.monotonic())
        spans.append(Span(revisions, began))

    def between(self, name: str, begin: float, end: float) -> list[Span]:
        """All that ``name`` may have meant at some time between the two."""
        spans = self.spans.get(name, [Span((), 0.0)])
        return [s for s in spans if s.begin <= end and s.end >= begin]


@dataclass(slots=True)
class Churn:
    """The record of a run."""

    ledger: Ledger = field(default_factory=Ledger)
    attempts: list[Attempt] = field(default_factory=list)
    changes: Counter[str] = field(default_factory=Counter)
    """What was done to adapters; refusals as ``kind: reason``."""
