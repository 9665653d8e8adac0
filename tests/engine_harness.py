"""Run the real engine inside the test process: the same loop, no socket."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from veneer_registry.format import read_adapter
from veneer_server.engine.execution.exact import ExactRunner
from veneer_server.engine.loop import StepLoop
from veneer_server.engine.process import build_engine
from veneer_server.engine.scheduling.block_manager import BlockManager
from veneer_server.step.inbox import Inbox
from veneer_server.step.plan import AheadRunner, Runner, SequenceResult, StepPlan
from veneer_server.wire.messages import (
    AdapterSource,
    Cancel,
    EngineConfig,
    FromEngine,
    Ping,
    Pong,
    SamplingParams,
    SequenceFailed,
    SequenceOutput,
    SequenceRequest,
    Stop,
    Submit,
    ToEngine,
)

LONGEST_S = 120.0
"""An engine that sends nothing for this long is considered hung."""
GREEDY = SamplingParams(temperature=0)


@dataclass
class Answer:
    """Everything that a sequence received."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    finish: str | None = None
    error: str | None = None
    outputs: list[SequenceOutput] = field(default_factory=list)


class _Either:
    """A backend that can switch between exact and normal from one step to the next."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.exact = False

    def execute(self, plan: StepPlan) -> tuple[SequenceResult, ...]:
        runner = ExactRunner(self._runner) if self.exact else self._runner
        return runner.execute(plan)


class EngineHarness:
    """Runs batches through one `StepLoop`; the requests of a batch arrive together."""

    def __init__(self, config: EngineConfig) -> None:
        self.inbox: Inbox = queue.SimpleQueue()
        self.out: queue.SimpleQueue[FromEngine] = queue.SimpleQueue()
        parts = build_engine(config, self.inbox)
        self.info, self.scheduler, self.residency, self.runner, self.memory, grammars = parts
        self.grammars = grammars
        self._either = _Either(self.runner)
        self._numbers = iter(range(1, 1_000_000))
        self._limits = self.scheduler.limits
        self._kv_blocks, self._block_size = self.scheduler.blocks.total, config.block_size
        self.loop = StepLoop(
            inbox=self.inbox,
            scheduler=self.scheduler,
            residency=self.residency,
            runner=self.runner if isinstance(self.runner, AheadRunner) else self._either,
            memory=self.memory,
            grammars=grammars,
            send=lambda messages: [self.out.put(m) for m in messages] and None,
        )
        self._thread = threading.Thread(target=self.loop.run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.inbox.put(Stop())
        self._thread.join()
        self.memory.close()
        if self.grammars is not None:
            self.grammars.close()
        self.loop.check_integrity()

    def tell(self, message: ToEngine) -> None:
        self.inbox.put(message)

    def reconfigure(
        self,
        *,
        kv_blocks: int | None = None,
        prefix_cache: bool = True,
        exact: bool = False,
        **limits: Any,
    ) -> None:
        """Act like a restart with these settings, but keep the loaded weights: other
        `SchedulerLimits`, fewer KV blocks, an empty cache. Call it between batches.
        """
        self.settle()
        scheduler = self.scheduler
        scheduler.limits = replace(self._limits, exact=exact, **limits)
        scheduler.blocks = BlockManager(
            min(kv_blocks or self._kv_blocks, self._kv_blocks) + 1,
            self._block_size,
            prefix_cache=prefix_cache and not exact,
        )
        self._either.exact = exact

    def settle(self) -> None:
        """Wait until the loop has handled all its messages."""
        number = next(self._numbers)
        self.inbox.put(Ping(number))
        while not (
            isinstance(m := self.out.get(timeout=LONGEST_S), Pong) and m.number == number
        ):
            pass

    def run(
        self, requests: list[dict[str, Any]], cancels: Mapping[int, int] | None = None
    ) -> list[Answer]:
        """Submit all requests (fields of `SequenceRequest`) and wait for all their ends.

        Args:
            cancels: requests to cancel, by place, and after how many tokens.
        """
        numbers = [next(self._numbers) for _ in requests]
        for number, request in zip(numbers, requests, strict=True):
            fields = {"max_tokens": 1, "sampling": GREEDY} | request
            self.inbox.put(Submit(number, SequenceRequest(**fields)))
        answers = {number: Answer() for number in numbers}
        open_ends = set(numbers)
        ends = {numbers[at]: tokens for at, tokens in (cancels or {}).items()}
        while open_ends:
            message = self.out.get(timeout=LONGEST_S)
            if isinstance(message, SequenceFailed):
                answers[message.sequence].error = message.error.reason
                open_ends.discard(message.sequence)
            elif isinstance(message, SequenceOutput):
                answer = answers[message.sequence]
                answer.outputs.append(message)
                answer.tokens += message.tokens
                answer.logprobs += message.logprobs or []
                answer.prompt_logprobs += message.prompt_logprobs or []
                if len(answer.tokens) >= ends.get(message.sequence, len(answer.tokens) + 1):
                    del ends[message.sequence]
                    self.inbox.put(Cancel(message.sequence))
                if message.finish is not None:
                    answer.finish = message.finish
                    open_ends.discard(message.sequence)
        return [answers[number] for number in numbers]


@contextmanager
def engine(config: EngineConfig) -> Iterator[EngineHarness]:
    """A harness that checks on exit that nothing leaked."""
    harness = EngineHarness(config)
    try:
        yield harness
    finally:
        harness.close()


def source(folder: Path, name: str = "") -> AdapterSource:
    """Return the source that the front would send for an adapter folder."""
    manifest = read_adapter(folder, None)
    return AdapterSource(
        weights_digest=manifest.weights_digest,
        folder=str(folder),
        parameters=manifest.parameters,
        name=name or folder.name,
    )
