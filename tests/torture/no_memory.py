"""Run out of memory while an adapter loads: the second part of row 5.

First this tests a load alone: each call into C that allocates memory fails once with
`MemoryError`. Then it tests the whole engine: each allocation of the worker that takes over the
loader's result fails once, while the base and another adapter are served in the same batch.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import torch
from veneer_server.adapters import pages
from veneer_server.adapters.loaders import HostCopy
from veneer_server.wire.messages import AdapterSource

from tests.engine_harness import EngineHarness, source
from tests.tiny_llama import LAYERS, SHAPES, make_lora
from tests.torture.loading import load_here
from tests.torture.row import Control, Outcome, Scale
from tests.torture.tiny_engine import ask, tiny_engine

Load = Callable[[AdapterSource], HostCopy]
WORKERS = ("adapter-load", "adapter-map")
"""Names of the engine's loading threads."""
GIVE_BACK = ("close", "__exit__", "release", "seek", "fileno", "len", "setprofile")
"""Calls that do not fail: they allocate no memory, or (the last one) end the fault."""


def load_copy(wanted: AdapterSource) -> HostCopy:
    """Load an adapter for the tiny base."""
    shapes: Any = {module.rpartition(".")[2]: shape for module, shape in SHAPES.items()}
    return load_here(wanted, shapes, LAYERS)


def with_fault(load: Load, wanted: AdapterSource, number: int) -> tuple[HostCopy | None, int]:
    """Load with the ``number``-th C call failing (0: none); return the copy, or None, and the
    number of calls."""
    seen = 0

    def fail(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal seen
        if event == "c_call" and argument.__name__ not in GIVE_BACK:
            seen += 1
            if seen == number:
                raise MemoryError("planted")

    sys.setprofile(fail)
    try:
        copy: HostCopy | None = load(wanted)
    except MemoryError:
        copy = None
    except RuntimeError as error:
        # How `threading` reports a MemoryError while it waits for a thread to start.
        if "release unlocked lock" not in str(error):
            raise
        copy = None
    finally:
        sys.setprofile(None)
    return copy, seen


def torture_reading(load: Load, folder: Path, most: int, scale: Scale) -> Outcome:
    """Make up to ``most`` of the C calls of `load` fail, one at a time."""
    wanted = source(folder)
    good, calls = with_fault(load, wanted, 0)
    assert good is not None
    chosen = sorted(scale.random("memory").sample(range(1, calls + 1), min(most, calls)))
    failures = []
    gc.collect()
    files = len(os.listdir("/proc/self/fd"))
    for number in chosen:
        copy, _ = with_fault(load, wanted, number)
        if copy is not None and not torch.equal(copy.run, good.run):
            failures.append(f"C call {number} of {calls} failed: other weights were loaded")
        again, _ = with_fault(load, wanted, 0)
        if again is None or not torch.equal(again.run, good.run):
            failures.append(f"C call {number} of {calls} failed: the next try too")
    copy = again = None
    gc.collect()
    left = len(os.listdir("/proc/self/fd")) - files
    if left > 0:
        failures.append(f"{left} files stay open after {len(chosen)} failed loads")
    return Outcome(
        f"{len(chosen)} of {calls} calls of a load without memory", "", tuple(failures)
    )


class Scarcity:
    """Makes one allocation of the load workers fail while `armed`."""

    def __init__(self) -> None:
        self.left = 0
        self.struck = False
        self._lock = threading.Lock()

    def arm(self, number: int) -> None:
        """Make the ``number``-th allocation from now on fail."""
        with self._lock:
            self.left, self.struck = number, False

    def take(self) -> None:
        """Fail if this allocation is the armed one; call this before each allocation."""
        if not threading.current_thread().name.startswith(WORKERS):
            return
        with self._lock:
            self.left -= 1
            if self.left == 0:
                self.struck = True
                raise MemoryError("planted")

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        """Patch all functions with which a load allocates, so that they call `take`."""
        places: list[tuple[Any, str]] = [(pages, "_map"), (torch, "frombuffer")]
        places += [(socket, "recv_fds"), (msgspec.msgpack, "decode")]
        real = [getattr(module, name) for module, name in places]
        for (module, name), function in zip(places, real, strict=True):
            setattr(module, name, self._guarded(function))
        try:
            yield
        finally:
            for (module, name), function in zip(places, real, strict=True):
                setattr(module, name, function)

    def _guarded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self.take()
            return function(*arguments, **named)

        return call


def torture_engine(work: Path, most: int) -> Outcome:
    """Let each allocation fail in turn, each time for an adapter that was never loaded."""
    good = source(make_lora(work / "good", seed=1))
    mates = [ask(1), ask(2, adapter=good)]
    failures: list[str] = []
    answers: Counter[str] = Counter()
    scarcity = Scarcity()
    # Each failed load is rightly logged with its traceback, which we do not want here.
    logging.disable(logging.CRITICAL)
    with tiny_engine(work) as harness, scarcity.patched():
        expected = [answer.tokens for answer in harness.run(mates)]
        for number in range(1, most + 1):
            folder = make_lora(
                work / str(number), seed=number, modules=("self_attn.q_proj", "mlp.down_proj")
            )
            scarcity.arm(number)
            wrong, said = _load_and_serve(harness, mates, expected, source(folder), scarcity)
            failures += [f"allocation {number} of a load: {what}" for what in wrong]
            if not scarcity.struck:
                break
            answers[said] += 1
    logging.disable(logging.NOTSET)
    if not answers:
        failures.append(f"no allocation was seen in threads called {WORKERS}*")
    said = ", ".join(f"{reason} x{count}" for reason, count in answers.items())
    figure = f"{sum(answers.values())} loads in the engine without memory"
    return Outcome(figure, "", tuple(failures), (f"answers without memory: {said}",))


def _load_and_serve(
    harness: EngineHarness,
    mates: list[dict[str, Any]],
    expected: list[list[int]],
    wanted: AdapterSource,
    scarcity: Scarcity,
) -> tuple[list[str], str]:
    *others, answer = harness.run([*mates, ask(3, adapter=wanted)])
    wrong = []
    if [other.tokens for other in others] != expected:
        wrong.append("others in the batch were answered otherwise")
    if scarcity.struck and answer.error is None:
        wrong.append("the request was answered without its adapter")
    if scarcity.struck and harness.run([ask(3, adapter=wanted)])[0].error is not None:
        wrong.append("the next try failed too")
    return wrong, str(answer.error)


def torture(scale: Scale) -> Outcome:
    """Run both parts."""
    work = scale.folder("memory")
    adapter = make_lora(work / "adapter", seed=1)
    reading = torture_reading(load_copy, adapter, scale.pick(60, 100_000), scale)
    engine = torture_engine(work, scale.pick(6, 10_000))
    return Outcome(
        f"{reading.figure}, {engine.figure}",
        "",
        reading.failures + engine.failures,
        engine.notes,
    )


def control(scale: Scale) -> Control:
    """A planted bug: a load that continues after a failed allocation."""

    def careless(wanted: AdapterSource) -> HostCopy:
        try:
            return load_copy(wanted)
        except MemoryError:
            good = load_copy(wanted)
            return HostCopy(good.layout, torch.zeros_like(good.run))

    folder = make_lora(scale.folder("memory") / "adapter", seed=1)
    found = torture_reading(careless, folder, 5, scale)
    return Control.of("a load without memory gives zeros", found)
