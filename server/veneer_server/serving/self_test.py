"""The self-test: checks on the running server that each resident adapter answers correctly.

The same short text is run for the base and for each adapter, as normal requests submitted so
that they share a step. The engine also computes reference answers independently of the
serving path (`veneer_server.models.reference`), and `judge` compares them. Other requests
continue meanwhile, a little slower.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
from veneer_registry.errors import (
    AdapterBudgetExceeded,
    AdapterCorrupt,
    AdapterNotFound,
    BaseModelMismatch,
    InternalError,
    InvalidField,
    NonFiniteOutput,
    QueueFull,
    VeneerError,
)
from veneer_registry.lease import RevisionLease
from veneer_registry.registry import Registry

from veneer_server.engine_client.places import Place
from veneer_server.engine_client.tenant_engine import TenantEngine
from veneer_server.logs import get_logger
from veneer_server.serving.events import AdapterUse, source_of
from veneer_server.serving.spare_time import outlast, to_the_end
from veneer_server.text.prompts import Prompts, Room
from veneer_server.wire.messages import AdapterSource, SamplingParams, SequenceRequest

# -------------------- subjects
# Chooses the adapters for a self-test: the named ones, or else a few that can be loaded.

_DEFAULT_ADAPTERS: Final = 2
_CANDIDATES: Final = 16
"""Most adapters that are tried if none were named: each may need a load from disk."""
_PAGE: Final = 1000

_Unusable = AdapterNotFound, AdapterCorrupt, BaseModelMismatch, AdapterBudgetExceeded
"""Errors for which an unnamed candidate is skipped: it was just deleted, is in quarantine, is
for another base, or does not fit in memory."""


@dataclass(frozen=True, slots=True)
class Subject:
    """The base (no name, no source), or one leased revision."""

    name: str = ""
    source: AdapterSource | None = None


class Subjects:
    """Finds and leases subjects. Their files stay until the caller closes ``leases``."""

    def __init__(self, registry: Registry, engine: TenantEngine, use: AdapterUse) -> None:
        """Args: use: which adapters were requested most recently."""
        self._registry = registry
        self._engine = engine
        self._use = use

    async def named(self, names: Sequence[str], leases: ExitStack) -> list[Subject]:
        """Lease the adapters with these names, written as in requests. Raises AdapterNotFound,
        BaseModelMismatch or AdapterCorrupt."""
        return [
            await self._leased(self._registry.acquire(name), leases)
            for name in dict.fromkeys(names)
        ]

    async def chosen(self, most: int, leases: ExitStack) -> tuple[list[Subject], str]:
        """Choose and load at most ``most`` adapters. If there are none, the text says why."""
        if not len(self._registry):
            return [], "no adapters are registered: only the base was tested"
        if not most:
            return [], (
                f"this server runs and queues at most {self._engine.places.capacity} "
                "sequences, not enough for the base and one adapter: start it with a larger "
                "--max-running or --max-queue"
            )
        in_memory = (
            partial(self._registry.acquire_weights, digest)
            for digest in self._engine.resident()
        )
        found, _ = await self._take(in_memory, most, leases)
        if found:
            return found, ""
        asked = [f"{name}@{revision}" for name, revision in self._use.recent()]
        names = dict.fromkeys([*asked, *await to_the_end(self._servable)])
        found, why = await self._take(
            (partial(self._registry.acquire, name) for name in names), most, leases
        )
        why = why or "they are in quarantine or for another base"
        note = f"none of {len(self._registry)} adapters could be tested: {why}"
        return found, "" if found else note

    async def _leased(self, lease: RevisionLease, leases: ExitStack) -> Subject:
        """Make the subject of a lease, with its files on this machine until ``leases``
        closes."""
        leases.enter_context(lease)
        await self._registry.present(lease.ref)
        return Subject(lease.ref.short, source_of(self._registry, lease.record))

    async def _take(
        self, candidates: Iterable[Callable[[], RevisionLease]], most: int, leases: ExitStack
    ) -> tuple[list[Subject], str]:
        """Load the first candidates that can be loaded. Returns them, and why the last one that
        failed could not be loaded."""
        found: dict[str, Subject] = {}
        why, tried = "", 0
        for acquire in candidates:
            if len(found) == min(_DEFAULT_ADAPTERS, most) or tried == _CANDIDATES:
                break
            with ExitStack() as attempt:
                try:
                    subject = await self._leased(acquire(), attempt)
                    assert subject.source is not None, "only the base has no source"
                    digest = subject.source.weights_digest
                    if digest in found:
                        continue
                    tried += 1
                    await self._load(subject.source)
                except _Unusable as error:
                    why = str(error)
                    continue
                leases.enter_context(attempt.pop_all())
                found[digest] = subject
        return list(found.values()), why

    async def _load(self, source: AdapterSource) -> None:
        """Load an adapter. Raises AdapterBudgetExceeded. Damaged files raise nothing here: the
        test itself reports them."""
        with suppress(AdapterCorrupt):
            await self._engine.activate(source, tier="device", pin=False)

    def _servable(self) -> list[str]:
        """Up to `_CANDIDATES` names whose revision is neither in quarantine nor for another
        base."""
        found: list[str] = []
        after = ""
        while len(found) < _CANDIDATES:
            page = self._registry.list(after=after, limit=_PAGE)
            found += [r.ref.name for r in page if not r.foreign and r.quarantined is None]
            if len(page) < _PAGE:
                break
            after = page[-1].ref.name
        return found[:_CANDIDATES]


# -------------------- verdicts
# Judges a self-test: compares served answers with references. Pure functions.
#
# An adapter passes if each log-probability is within the bound of its own reference, and the
# answer is nearer to its own reference than to any other that the bound can distinguish from
# it.
#
# The bound is above the rounding error of serving in the dtype, and below the effect of another
# adapter's weights. Largest differences measured on SmolLM2-135M, 4-bit and unquantized, on
# four texts of 28 to 32 tokens, over the base and 24 adapters of ranks 1 to 64, on a CPU:
# 0.00005 in float32, 0.035 in float16, 0.29 in bfloat16; the two example adapters' references
# are 3.6 to 6.1 apart. So float32 reveals a single matrix scaled by 1.1; bfloat16 reveals a
# swapped, missing or doubled adapter, but possibly not a small error. With 8-bit activations
# the largest difference on 21 texts, over the base and the three example adapters, was 1.16;
# the bound of 2 only distinguishes adapters whose answers are more than 2 apart.

BOUNDS: Final[Mapping[str, float]] = {
    "float32": 1e-3,
    "float16": 0.1,
    "bfloat16": 0.5,
    "int8": 2.0,
}
"""Largest log-probability difference that passes, by the type of the activations that the
base's weights are multiplied by. The comment above explains the values."""


@dataclass(frozen=True, slots=True)
class ProbeAnswers:
    """The answers to compare for one adapter, or for the base.

    Attributes:
        name: ``name@revision``, or empty for the base.
        served, reference: log-probabilities of the same tokens, or the error that came instead.
    """

    name: str
    served: Sequence[float] | VeneerError
    reference: Sequence[float] | VeneerError


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result for one adapter or the base, see `SelfTestResult`. ``max_difference`` is NaN
    if there is nothing to compare."""

    name: str
    passed: bool
    max_difference: float
    bound: float
    nearest_other: float
    detail: str


def judge(answers: Sequence[ProbeAnswers], bound: float) -> list[Verdict]:
    """Return one verdict per answer, in order. Each answer is also compared with the references
    of the others."""
    return [_judge(one, [o for o in answers if o is not one], bound) for one in answers]


def _judge(one: ProbeAnswers, rest: Sequence[ProbeAnswers], bound: float) -> Verdict:
    for found in (one.served, one.reference):
        if isinstance(found, VeneerError):
            return Verdict(one.name, False, float("nan"), bound, 0.0, str(found))
    own = _farthest(one.served, one.reference)
    others = [o for o in rest if not isinstance(o.reference, VeneerError)]
    distances = {o.name: _farthest(one.served, o.reference) for o in others}
    alike = [o.name for o in others if _farthest(one.reference, o.reference) <= bound]
    nearer = [name for name, far in distances.items() if name not in alike and not own < far]
    nearest = min(distances, key=lambda name: distances[name], default=None)
    nearest_other = 0.0 if nearest is None else distances[nearest]
    passed = own <= bound and not nearer
    if passed:
        detail = _cannot_tell(alike)
    elif nearest is not None and nearest_other <= bound:
        detail = f"it answers as {_shown(nearest)} should: evict both, and test again"
    else:
        detail = "its answer does not match its files: evict it, and test again"
        if not one.name:
            detail = "the base's answer does not match its weights: restart the server"
    return Verdict(one.name, passed, own, bound, nearest_other, detail)


def _cannot_tell(alike: Sequence[str]) -> str:
    if not alike:
        return ""
    names = ", ".join(map(_shown, alike))
    return (
        f"this prompt cannot distinguish it from {names}: their references are within the bound"
    )


def _shown(name: str) -> str:
    return name or "the base"


def _farthest(one: object, other: object) -> float:
    """Largest difference; NaN if any difference is NaN, so that every comparison fails."""
    a, b = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
    if a.shape != b.shape:
        return float("nan")
    return float(np.abs(a - b).max())


PROBE: Final = (
    "The quick brown fox jumps over the lazy dog. In the morning the farmer counts his "
    "sheep, and finds that two of them are missing."
)
PROBE_TOKENS: Final = 28
"""Most tokens of the probe, so that all sequences of a test fit into a step of the default size
(512)."""
MAX_ADAPTERS: Final = 16
MAX_WAITING: Final = 4
"""Most tests that may wait for their turn."""
_TRIES: Final = 3
"""Most times that the sequences are submitted until each has shared a step with another."""

_RETRY_S: Final = 5.0

_Findings = AdapterCorrupt, NonFiniteOutput
"""Errors of one adapter that are a result of the test and do not abort it."""

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class SelfTestReport:
    """The result of a self-test, see `SelfTestResponse`. The base's verdict is the first.

    Attributes:
        adapters_mixed: adapters whose answer came out of a batch with others.
        registered: number of registered adapters. If there are any, but none was tested, the
            self-test fails.
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
    """Log-probabilities of the probe or the engine's error, and whether they were computed in a
    batch with another adapter or the base."""

    logprobs: list[float] | VeneerError
    mixed: bool


class SelfTest:
    """Runs one test at a time; a few further calls may wait for their turn."""

    def __init__(
        self,
        registry: Registry,
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
        exact: the engine computes each sequence separately, so none are mixed.
        turn: lock that is held while a test runs; None for a lock of its own.
        """
        self._registry = registry
        self._engine = engine
        self._prompts = prompts
        self._subjects = Subjects(registry, engine, use)
        self._bound = BOUNDS["int8" if int8_activations else dtype]
        self._exact = exact
        self._turn = turn or asyncio.Lock()
        self._waiting = 0

    async def run(self, names: Sequence[str]) -> SelfTestReport:
        """Test the base and these adapters, which are loaded if necessary but not pinned.

        An adapter fails if its files do not match their digest, its logits are not finite,
        or its answers differ from the reference. None of these raises an error.

        Args:
            names: adapters, written as in requests. If empty, the test takes the two adapters
                in memory that were used last, or else loads two registered ones, recently
                requested ones first. If adapters are registered but none can be tested, the
                test fails, and the report's note says why.

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
        report = SelfTestReport(tuple(verdicts), mixed, len(self._registry), note)
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
        """Return the verdicts, and how many adapters were mixed with others in a step."""
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
            answers.append(ProbeAnswers(subject.name, found, reference))
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
        """Return the served results by name, and how many adapters were mixed with others in a
        step.

        Tried several times: the sequences may not all fit into one step, particularly while
        streams run.
        """
        best: dict[str, _Served] = {}
        most = -1
        for _ in range(_TRIES):
            served = await self._serve(tokens, subjects)
            mixed = sum(each.mixed for each in served.values())
            if mixed > most:
                best, most = served, mixed
            if mixed == len(subjects):
                break
        adapters = sum(best[s.name].mixed for s in subjects if s.source is not None)
        return best, 0 if self._exact else adapters

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
        """Get the log-probabilities of the tokens, as a request for prompt
        log-probabilities."""
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
                        return _Served(output.prompt_logprobs, output.mixed)
        except _Findings as error:
            return _Served(error, mixed=False)
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
