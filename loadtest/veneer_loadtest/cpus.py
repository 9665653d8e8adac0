"""Pinning of the spawned server and of the client to CPUs. If the client has CPUs of its own,
its work is not measured as the server's."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from veneer_loadtest.errors import BadOption


@dataclass(frozen=True, slots=True)
class Cpus:
    """CPUs of the server and of the client."""

    server: frozenset[int]
    client: frozenset[int]


def parse_cpus(text: str) -> Cpus | None:
    """Parse ``SERVER/CLIENT``, such as ``0/1`` or ``0-2,4/3``; return None for "".

    Raises:
        BadOption: the text is not of that form, or names CPUs that this process may not use.
    """
    if not text:
        return None
    server, slash, client = text.partition("/")
    if not slash:
        raise _wrong(text, "give the server's CPUs and the client's, such as 0/1 or 0-2/3")
    found = Cpus(_numbers(text, server), _numbers(text, client))
    if missing := (found.server | found.client) - os.sched_getaffinity(0):
        raise _wrong(text, f"this process may not use CPU {min(missing)}")
    return found


@contextmanager
def during(cpus: frozenset[int]) -> Iterator[None]:
    """Pin all threads of this process, and processes that it starts, to these CPUs."""
    before = {task: os.sched_getaffinity(task) for task in _tasks()}
    usual = os.sched_getaffinity(0)
    for task in before:
        _keep(task, cpus)
    try:
        yield
    finally:
        for task in _tasks():
            _keep(task, before.get(task, usual))


def _keep(task: int, cpus: Iterable[int]) -> None:
    with suppress(ProcessLookupError):  # a thread that has ended meanwhile
        os.sched_setaffinity(task, cpus)


def _tasks() -> list[int]:
    return [int(entry.name) for entry in Path("/proc/self/task").iterdir()]


def _numbers(text: str, part: str) -> frozenset[int]:
    numbers: set[int] = set()
    for each in part.split(","):
        match = re.fullmatch(r"\s*(\d{1,4})(?:-(\d{1,4}))?\s*", each)
        if match is None:
            raise _wrong(text, f"{each!r} is not a CPU or a range of them")
        first, last = int(match[1]), int(match[2] or match[1])
        numbers.update(range(first, last + 1))
    if not numbers:
        raise _wrong(text, "a range ends before it begins")
    return frozenset(numbers)


def _wrong(text: str, why: str) -> BadOption:
    return BadOption(f"--cpus {text}: {why}", metadata={"field": "cpus"})
