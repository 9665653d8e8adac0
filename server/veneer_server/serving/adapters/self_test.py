"""The self-test: checks on the running server that each resident adapter answers correctly.

The same short text is run for the base and for each adapter, as normal requests submitted so
that they share a step. The engine also computes reference answers independently of the
serving path (`veneer_server.models.reference`), and `judge` compares them. Other requests
continue meanwhile, a little slower.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Final

from veneer_proto.v1 import adapters_pb2
from veneer_registry.errors import (
    AdapterCorrupt,
    InternalError,
    InvalidField,
    NonFiniteOutput,
    QueueFull,
    VeneerError,
)

from veneer_server.engine_client.places import Place
from veneer_server.engine_client.tenant_engine import TenantEngine
from veneer_server.logs import get_logger
from veneer_server.serving.adapters.subjects import Subject, Subjects
from veneer_server.serving.adapters.use import AdapterUse
from veneer_server.serving.adapters.verdicts import BOUNDS, Answers, Verdict, judge
from veneer_server.serving.tenants.registry import AdapterRegistry
from veneer_server.serving.threads import outlast
from veneer_server.text.prompts import Prompts, Room
from veneer_server.wire.messages import AdapterSource, SamplingParams, SequenceRequest

__all__ = ["Report", "SelfTest"]

PROBE: Final = (
    "The quick brown fox jumps over the lazy dog. In the morning the farmer counts his "
    "sheep, and finds that two of them are missing."
)
PROBE_TOKENS: Final = 28
"""Upper limit, so that all sequences of a test fit into a step of the default size (512)."""
MAX_ADAPTERS: Final = 16
MAX_WAITING: Final = 4
"""Most tests that may wait for their turn."""
_TRIES: Final = 3
"""Times that the sequences are submitted until they share a step."""

_RETRY_S: Final = 5.0

_Findings = AdapterCorrupt, NonFiniteOutput
"""Errors of one adapter that are a result of the test and do not abort it."""

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Report:
    """See `SelfTestResponse`; the base's verdict is the first.

    Attributes:
        registered: number of registered adapters. If there are any, a test of none of them
            fails.
        note: why no adapter was tested.
    """

    verdicts: tuple[Verdict, ...]
    adapters_mixed: int
    registered: int
    note: str = ""

    @property
    def adapters_tested(self) -> int:
        return len(self.verdicts) - 1

    @property
    def passed(self) -> bool:
        proven = self.adapters_tested > 0 or not self.registered
        return proven and all(verdict.passed for verdict in self.verdicts)


@dataclass(frozen=True, slots=True)
class _Served:
    """Log-probabilities of the probe or the engine's error, and the step that computed them."""

    logprobs: list[float] | VeneerError
    step: int | None


class SelfTest:
    """Runs one test at a time; a few further calls may wait for their turn."""

    def __init__(
        self,
        registry: AdapterRegistry,
        engine: TenantEngine,
        prompts: Prompts,
        use: AdapterUse,
        *,
        dtype: str,
        int8_activations: bool = False,
        exact: bool = False,
        turn: asyncio.Lock | None = None,
    ) -> None:
        """Args:
        use: which adapters were requested most recently.
        dtype: the serving dtype, which sets the bound unless activations are rounded to 8 bits.
        exact: the engine computes each sequence separately, so that none are mixed.
        turn: held while a test runs; None for one of its own.
        """
        self._registry = registry
        self._engine = engine
        self._prompts = prompts
        self._subjects = Subjects(registry, engine, use)
        self._bound = BOUNDS["int8" if int8_activations else dtype]
        self._exact = exact
        self._turn = turn or asyncio.Lock()
        self._waiting = 0

    async def answer(
        self, request: adapters_pb2.SelfTestRequest
    ) -> adapters_pb2.SelfTestResponse:
        """`run`, in protobuf."""
        report = await self.run(request.adapters)
        return adapters_pb2.SelfTestResponse(
            passed=report.passed,
            adapters_mixed=report.adapters_mixed,
            note=report.note,
            results=[
                adapters_pb2.SelfTestResult(
                    adapter=verdict.name,
                    passed=verdict.passed,
                    max_difference=verdict.max_difference,
                    bound=verdict.bound,
                    nearest_other=verdict.nearest_other,
                    detail=verdict.detail,
                )
                for verdict in report.verdicts
            ],
        )

    async def run(self, names: Sequence[str]) -> Report:
        """Test the base and these adapters, which are loaded if necessary but not pinned.

        An adapter fails if its files do not match their digest, its logits are not finite,
        or its answers differ from the reference. None of these raises an error.

        Args:
            names: adapters, as in requests. If empty, the test takes the two adapters in
                memory that were used last, or else loads two registered ones. If adapters
                are registered but none can be tested, the test fails, and the report's note
                says why.

        Raises:
            InvalidField: too many names.
            AdapterNotFound, BaseModelMismatch: raised for one of the names.
            AdapterCorrupt: an adapter was already known to be damaged.
            AdapterBudgetExceeded: an adapter cannot be loaded.
            QueueFull: the engine has no room, or `MAX_WAITING` tests are already waiting.
            ModelLoading, EngineFailed: the engine cannot run the test now.
        """
        if (count := len(set(names))) > self._most:
            raise InvalidField(
                f"adapters has {count} names: this server tests at most {self._most} at once",
                metadata={"field": "adapters", "limit": str(self._most)},
            )
        began = time.perf_counter()
        async with self._my_turn():
            with ExitStack() as leases:
                note = ""
                if names:
                    adapters = await self._subjects.named(names, leases)
                else:
                    adapters, note = await self._subjects.chosen(self._most, leases)
                # Two names may mean the same revision.
                subjects = list({each.name: each for each in (Subject(), *adapters)}.values())
                verdicts, mixed = await self._run(subjects)
        report = Report(tuple(verdicts), mixed, len(self._registry), note)
        _log.info(
            "self-test",
            passed=report.passed,
            failed=[v.name or "base" for v in report.verdicts if not v.passed],
            adapters=report.adapters_tested,
            mixed=report.adapters_mixed,
            note=note,
            seconds=round(time.perf_counter() - began, 3),
        )
        return report

    @asynccontextmanager
    async def _my_turn(self) -> AsyncIterator[None]:
        """Wait for earlier tests to end, then run alone. Raises QueueFull if too many wait."""
        if self._turn.locked() and self._waiting >= MAX_WAITING:
            raise QueueFull(
                f"{MAX_WAITING} self-tests are waiting already: retry when one has ended",
                metadata={"limit": str(MAX_WAITING)},
                retry_after_s=_RETRY_S,
            )
        self._waiting += 1
        try:
            await self._turn.acquire()
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._turn.release()

    @property
    def _most(self) -> int:
        """Most adapters per test; the base and one more sequence need places too."""
        return max(0, min(MAX_ADAPTERS, self._engine.places.capacity - 2))

    async def _run(self, subjects: Sequence[Subject]) -> tuple[list[Verdict], int]:
        """The verdicts, and how many adapters shared a step with the base."""
        tokens = await self._probe()
        damaged = await self._activate(subjects)
        served, mixed = await self._serve_mixed(
            tokens, [s for s in subjects if s.name not in damaged]
        )
        references = await self._references(
            tokens, [s for s in subjects if s.name not in damaged]
        )
        answers = []
        for subject in subjects:
            found = damaged.get(subject.name) or served[subject.name].logprobs
            reference = damaged.get(subject.name) or references[subject.name]
            answers.append(Answers(subject.name, found, reference))
        return judge(answers, self._bound), mixed

    async def _probe(self) -> list[int]:
        info = self._engine.info
        whole = Room(info.vocab_size, 2 * len(PROBE))  # truncated to the context below
        prompt = await self._prompts.from_text(PROBE, whole)
        return prompt.ids[: min(PROBE_TOKENS, info.context_length - 1)]

    async def _activate(self, subjects: Sequence[Subject]) -> dict[str, VeneerError]:
        """Load the adapters into DEVICE. Returns the error of each whose files are damaged."""
        damaged: dict[str, VeneerError] = {}
        for subject in subjects:
            if subject.source is None:
                continue
            try:
                await self._engine.activate(subject.source, tier="device", pin=False)
            except AdapterCorrupt as error:
                damaged[subject.name] = error
        return damaged

    async def _serve_mixed(
        self, tokens: list[int], subjects: Sequence[Subject]
    ) -> tuple[dict[str, _Served], int]:
        """The served results by name, and how many adapters shared the base's step."""
        best: dict[str, _Served] = {}
        most = -1
        for _ in range(_TRIES):
            served = await self._serve(tokens, subjects)
            step = served[""].step
            others = [served[s.name].step for s in subjects if s.source is not None]
            together = 0 if step is None else others.count(step)
            if together > most:
                best, most = served, together
            if together == len(others):
                break
        return best, 0 if self._exact else most

    async def _serve(
        self, tokens: list[int], subjects: Sequence[Subject]
    ) -> dict[str, _Served]:
        sources = [subject.source for subject in subjects]
        if len(sources) > 1 and not self._engine.in_flight:
            # An extra sequence first: while an idle engine computes it, the others arrive
            # and then start together.
            sources.insert(0, None)
        with self._engine.places.hold(len(sources), at_once=len(sources)) as place:
            results = await asyncio.gather(
                *(self._score(tokens, source, place) for source in sources),
                return_exceptions=True,
            )
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return {
            subject.name: result
            for subject, result in zip(subjects, results[-len(subjects) :], strict=True)
            if isinstance(result, _Served)
        }

    async def _score(
        self, tokens: list[int], source: AdapterSource | None, place: Place
    ) -> _Served:
        """Run the tokens as a request for prompt log-probabilities."""
        outputs = self._engine.generate(
            SequenceRequest(
                tokens,
                max_tokens=1,
                sampling=SamplingParams(temperature=0),
                adapter=source,
                prompt_logprobs=True,
                use_prefix_cache=False,
            ),
            place=place,
        )
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    if output.prompt_logprobs is not None:
                        return _Served(output.prompt_logprobs, output.step)
        except _Findings as error:
            return _Served(error, None)
        raise InternalError(
            "the engine gave no log-probabilities; the server's log may say why"
        )

    async def _references(
        self, tokens: list[int], subjects: Sequence[Subject]
    ) -> dict[str, list[float] | VeneerError]:
        """Compute all references together, in one pass over the base's files."""

        async def reference(subject: Subject) -> list[float]:
            # Must finish even if the caller leaves: the engine reads the leased files.
            return await outlast(self._engine.reference(tokens, subject.source))

        found = await asyncio.gather(*map(reference, subjects), return_exceptions=True)
        results: dict[str, list[float] | VeneerError] = {}
        for subject, result in zip(subjects, found, strict=True):
            if isinstance(result, BaseException) and not isinstance(result, AdapterCorrupt):
                raise result
            results[subject.name] = result
        return results
