"""The self-test: a proof on the running server that resident adapters are themselves.

The same short text goes through the engine as requests do, for the base and for each
adapter, submitted so that they meet in one step. The engine also computes, apart from
all that serves, what each must say (`veneer_server.models.reference`); then `judge`.
Requests go on meanwhile, a little slower.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, aclosing, suppress
from dataclasses import dataclass
from typing import Final

from veneer_proto.v1 import adapters_pb2
from veneer_registry.errors import (
    AdapterCorrupt,
    AdapterNotFound,
    BaseModelMismatch,
    InternalError,
    InvalidField,
    NonFiniteOutput,
    VeneerError,
)
from veneer_registry.registry import Registry, RevisionLease

from veneer_server.engine.client import EngineClient
from veneer_server.engine.messages import AdapterSource, SamplingParams
from veneer_server.logs import get_logger
from veneer_server.rpc.adapter_view import source_of
from veneer_server.rpc.threads import outlast
from veneer_server.rpc.verdicts import BOUNDS, Answers, Verdict, judge
from veneer_server.text.prompts import Prompts

__all__ = ["Report", "SelfTest"]

PROBE: Final = (
    "The quick brown fox jumps over the lazy dog. In the morning the farmer counts his "
    "sheep, and finds that two of them are missing."
)
PROBE_TOKENS: Final = 28
"""At most: those of all sequences of a test fit a step of the default size (512)."""
MAX_ADAPTERS: Final = 16
DEFAULT_ADAPTERS: Final = 2
_TRIES: Final = 3
"""Times that all are submitted until they have met in one step."""

_Findings = AdapterCorrupt, NonFiniteOutput
"""Errors of one adapter that are a result of the test, not its end."""

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Report:
    """See `SelfTestResponse`; the base's verdict is the first."""

    verdicts: tuple[Verdict, ...]
    adapters_mixed: int

    @property
    def passed(self) -> bool:
        return all(verdict.passed for verdict in self.verdicts)


@dataclass(frozen=True, slots=True)
class _Subject:
    """The base (no name, no source), or one leased revision."""

    name: str = ""
    source: AdapterSource | None = None


@dataclass(frozen=True, slots=True)
class _Served:
    """Log-probabilities of the probe, or what the engine said, and the step they are of."""

    logprobs: list[float] | VeneerError
    step: int | None


class SelfTest:
    """Runs one test at a time; a call that comes meanwhile waits for its turn."""

    def __init__(
        self,
        registry: Registry,
        engine: EngineClient,
        prompts: Prompts,
        *,
        dtype: str,
        exact: bool = False,
    ) -> None:
        """Args:
        dtype: that is served in; sets the bound.
        exact: the engine computes each sequence by itself, so that none are mixed.
        """
        self._registry = registry
        self._engine = engine
        self._prompts = prompts
        self._bound = BOUNDS[dtype]
        self._exact = exact
        self._turn = asyncio.Lock()

    async def answer(
        self, request: adapters_pb2.SelfTestRequest
    ) -> adapters_pb2.SelfTestResponse:
        """`run` as the wire has it."""
        report = await self.run(request.adapters)
        return adapters_pb2.SelfTestResponse(
            passed=report.passed,
            adapters_mixed=report.adapters_mixed,
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
        """Test the base and these adapters, loaded if need be; they are not pinned.

        An adapter whose files lost their digest, or whose logits are not finite, has
        failed; so has one whose answers differ. None of that is an error.

        Args:
            names: of adapters, as requests name them. Empty for the two in memory that
                were used last; where there are none, the base alone is tested.

        Raises:
            InvalidField: too many names.
            AdapterNotFound, BaseModelMismatch: of the names.
            AdapterCorrupt: one was known to be damaged before.
            AdapterBudgetExceeded: one cannot be loaded.
            QueueFull, ModelLoading, EngineFailed: not now.
        """
        if (count := len(set(names))) > self._most:
            raise InvalidField(
                f"adapters has {count} names: this server tests at most {self._most} at once",
                metadata={"field": "adapters"},
            )
        began = time.perf_counter()
        async with self._turn:
            with ExitStack() as leases:
                subjects = self._subjects(names, leases)
                report = await self._run(subjects)
        _log.info(
            "self-test",
            passed=report.passed,
            failed=[v.name or "base" for v in report.verdicts if not v.passed],
            adapters=len(subjects) - 1,
            mixed=report.adapters_mixed,
            seconds=round(time.perf_counter() - began, 3),
        )
        return report

    def _subjects(self, names: Sequence[str], leases: ExitStack) -> list[_Subject]:
        """The base first; the leases keep the adapters' files to the end of the test."""
        subjects = {"": _Subject()}
        for lease in self._named(names) if names else self._last_used():
            leases.enter_context(lease)
            source = source_of(self._registry, lease.record)
            subjects[lease.ref.short] = _Subject(lease.ref.short, source)
        return list(subjects.values())

    @property
    def _most(self) -> int:
        """Adapters that can be tested at once: the base and one more sequence are beside."""
        return max(0, min(MAX_ADAPTERS, self._engine.capacity - 2))

    def _named(self, names: Sequence[str]) -> Iterator[RevisionLease]:
        for name in dict.fromkeys(names):
            yield self._registry.acquire(name)

    def _last_used(self) -> Iterator[RevisionLease]:
        left = min(DEFAULT_ADAPTERS, self._most)
        for digest in self._engine.resident():
            if not left:
                return
            # Deleted or damaged, and not out of memory yet.
            with suppress(AdapterNotFound, AdapterCorrupt, BaseModelMismatch):
                yield self._registry.acquire_weights(digest)
                left -= 1

    async def _run(self, subjects: Sequence[_Subject]) -> Report:
        tokens = await self._probe()
        damaged = await self._activate(subjects)
        served, mixed = await self._serve_mixed(
            tokens, [s for s in subjects if s.name not in damaged]
        )
        answers = []
        for subject in subjects:
            found = damaged.get(subject.name) or served[subject.name].logprobs
            reference = damaged.get(subject.name) or await self._reference(tokens, subject)
            answers.append(Answers(subject.name, found, reference))
        verdicts = judge(answers, self._bound)
        return Report(tuple(verdicts), mixed)

    async def _probe(self) -> list[int]:
        info = self._engine.info
        prompt = await self._prompts.from_text(PROBE, vocab_size=info.vocab_size)
        return prompt.ids[: min(PROBE_TOKENS, info.context_length - 1)]

    async def _activate(self, subjects: Sequence[_Subject]) -> dict[str, VeneerError]:
        """Bring them to DEVICE; those whose files are damaged, with the error."""
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
        self, tokens: list[int], subjects: Sequence[_Subject]
    ) -> tuple[dict[str, _Served], int]:
        """What serves gives, by name, and how many adapters were in the base's step."""
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
        self, tokens: list[int], subjects: Sequence[_Subject]
    ) -> dict[str, _Served]:
        sources = [subject.source for subject in subjects]
        if len(sources) > 1 and not self._engine.in_flight:
            # While an idle engine computes this one, the others arrive, and start together.
            sources.insert(0, None)
        with self._engine.places(len(sources)):
            results = await asyncio.gather(
                *(self._score(tokens, source) for source in sources), return_exceptions=True
            )
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return {
            subject.name: result
            for subject, result in zip(subjects, results[-len(subjects) :], strict=True)
            if isinstance(result, _Served)
        }

    async def _score(self, tokens: list[int], source: AdapterSource | None) -> _Served:
        """As a request that wants its prompt's log-probabilities."""
        outputs = self._engine.generate(
            tokens,
            max_tokens=1,
            sampling=SamplingParams(temperature=0),
            adapter=source,
            prompt_logprobs=True,
            use_prefix_cache=False,
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

    async def _reference(
        self, tokens: list[int], subject: _Subject
    ) -> list[float] | VeneerError:
        try:
            # To its end, though the caller has gone: the engine reads the leased files.
            return await outlast(self._engine.reference(tokens, subject.source))
        except AdapterCorrupt as error:
            return error
