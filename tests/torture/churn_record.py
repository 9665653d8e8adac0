"""Records of requests to a server whose adapters constantly change, and of its answers."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.tiny_llama import SHAPES

FOREVER: Final = float("inf")


@dataclass(frozen=True, slots=True)
class Content:
    """The weights of one adapter: files made by the test, and their digest."""

    folder: Path
    digest: str


@dataclass(frozen=True, slots=True)
class Traffic:
    """The traffic to send.

    Attributes:
        requests: number of requests; ``workers`` run at a time.
        names: number of adapters.
        each: number of requests per change of an adapter.
        modules: modules that the adapters target.
        ranks: ranks to choose from at random.
        sampled: share of requests with a temperature; all others are greedy.
        logprobs: whether to request log-probabilities.
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
    """One request and its outcome. Times are from `time.monotonic`.

    Attributes:
        asked: name, ``name@revision``, ``name/alias``, or "" for the base.
        cancel_at: number of tokens after which the caller cancels; 0: before the first; None:
            never.
        settled: time of the first token, or of the end; its revision was fixed by then.
        outcome: ``finished``, ``cancelled``, or the reason of an error.
        revision, digest, adapter: from the answer's provenance, if it had one.
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
    """A name or alias may have meant one of these revisions during an interval."""

    revisions: tuple[str, ...]
    begin: float
    end: float = FOREVER


@dataclass(slots=True)
class Ledger:
    """What each name and alias may have meant at any time, as recorded by the only
    publisher."""

    contents: dict[str, Content] = field(default_factory=dict)
    """Contents by revision."""
    spans: dict[str, list[Span]] = field(default_factory=dict)
    aborted: list[tuple[str, float, float]] = field(default_factory=list)
    """Evictions with mode ABORT: weights digest, start and end."""

    def now(self, name: str) -> str:
        """Return the latest revision of ``name``; "" for none."""
        spans = self.spans.get(name)
        return spans[-1].revisions[0] if spans and spans[-1].revisions else ""

    def before(self, name: str) -> str:
        """Return the revision that ``name`` had before its latest one; "" for none."""
        revisions = self.spans[name][-2].revisions
        return revisions[0] if revisions else ""

    def change(self, name: str, revisions: tuple[str, ...], began: float) -> None:
        """Record that a change which began at ``began`` is acknowledged now: the name may have
        meant the old revisions until now, and the new ones since ``began``."""
        spans = self.spans.setdefault(name, [Span((), 0.0)])
        last = spans[-1]
        spans[-1] = Span(last.revisions, last.begin, time.monotonic())
        spans.append(Span(revisions, began))

    def between(self, name: str, begin: float, end: float) -> list[Span]:
        """Return all spans of ``name`` that overlap the interval."""
        spans = self.spans.get(name, [Span((), 0.0)])
        return [s for s in spans if s.begin <= end and s.end >= begin]


@dataclass(slots=True)
class Churn:
    """The record of a run."""

    ledger: Ledger = field(default_factory=Ledger)
    attempts: list[Attempt] = field(default_factory=list)
    changes: Counter[str] = field(default_factory=Counter)
    """Counts of changes by kind; refused changes as ``kind: reason``."""
