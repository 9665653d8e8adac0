"""What a change of adapter costs: first tokens in a closed loop, one request at a time.

Each sample runs adapter A, then measures the first token of A again (resident, the
yardstick), of B resident, of B in HOST only, of B on DISK only, and of a new adapter
from the acknowledged upload on. Admin calls bring B to its tier before the clock
starts; each case follows a request to A, so that it is a swap.

A result file holds:

- ``kind``: ``"swap"``
- ``conditions``, ``versions``, ``device``, ``commands``, ``workload``: as in `compare`
- ``cases``: for ``same``, ``device``, ``host``, ``disk``, ``publish``: ``first_token_ms``
  and ``load_ms`` (waiting for the adapter, as the server says), {p50, p99, low, high},
  and ``samples_ms``
- ``summary`` (milliseconds): ``first_token_ms`` (A resident), ``device_delta_ms``,
  ``host_delta_ms``, ``disk_delta_ms`` (median of the case - median of ``same``),
  ``publish_to_first_token_ms`` (median). The churn keys of the contract come with
  churn load.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from veneer_client import AsyncClient, Tier, VeneerError

from veneer_loadtest.report import median, percentile
from veneer_loadtest.runner import StreamRun, run_stream
from veneer_loadtest.workload import BaseShape, make_adapter, make_streams

__all__ = ["Case", "SwapOptions", "SwapResult", "swap"]

Case = Literal["same", "device", "host", "disk", "publish"]

A, B = "swap-a", "swap-b"
NEW = "swap-new"


class WrongTier(VeneerError):
    """A request found its adapter elsewhere than the case is about."""

    code = "FAILED_PRECONDITION"
    reason = "WRONG_TIER"


@dataclass(frozen=True, slots=True)
class SwapOptions:
    """What `swap` measures: ``samples`` of each case, prompts of ``prompt_tokens``."""

    base: BaseShape
    rank: int
    prompt_tokens: int
    samples: int
    seed: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One first token; seconds."""

    first_token_s: float
    load_s: float


@dataclass(frozen=True, slots=True)
class SwapResult:
    """All samples by case."""

    cases: dict[Case, tuple[Sample, ...]]

    def summary(self) -> dict[str, float]:
        """Milliseconds; see the module's docstring."""
        middle = {
            case: median(s.first_token_s for s in got) for case, got in self.cases.items()
        }
        ms = {case: value * 1e3 for case, value in middle.items()}
        return {
            "first_token_ms": ms["same"],
            "device_delta_ms": ms["device"] - ms["same"],
            "host_delta_ms": ms["host"] - ms["same"],
            "disk_delta_ms": ms["disk"] - ms["same"],
            "publish_to_first_token_ms": ms["publish"],
        }

    def as_json(self) -> dict[str, object]:
        """The ``cases`` of a result file."""
        return {
            case: {
                "first_token_ms": _spread([s.first_token_s for s in samples]),
                "load_ms": _spread([s.load_s for s in samples]),
                "samples_ms": [s.first_token_s * 1e3 for s in samples],
            }
            for case, samples in self.cases.items()
        }


def _spread(seconds: list[float]) -> dict[str, float]:
    return {
        "p50": median(seconds) * 1e3,
        "p99": percentile(seconds, 0.99) * 1e3,
        "low": min(seconds) * 1e3,
        "high": max(seconds) * 1e3,
    }


async def swap(
    client: AsyncClient,
    options: SwapOptions,
    folder: Path,
    on_sample: Callable[[], None] = lambda: None,
) -> SwapResult:
    """Measure; adapters are made in ``folder``, published, and deleted at the end.

    Raises:
        WrongTier: the server found an adapter in another tier than expected.
    """
    bench = _Bench(client, options, folder)
    cases: dict[Case, list[Sample]] = {case: [] for case in get_args(Case)}
    async with AsyncExitStack() as new:
        for name in (A, B):
            await bench.publish(name)
            new.push_async_callback(client.delete, name)
        for warm in (A, B, A):
            await bench.run(warm)
        for _ in range(options.samples):
            for case in cases:
                cases[case].append(await bench.sample(case))
            on_sample()
    return SwapResult({case: tuple(samples) for case, samples in cases.items()})


class _Bench:
    def __init__(self, client: AsyncClient, options: SwapOptions, folder: Path) -> None:
        self._client = client
        self._options = options
        self._folder = folder
        self._made = 0
        self._asked = 0

    async def publish(self, name: str) -> None:
        self._made += 1
        # Its own seed each time: the same content would be a no-op.
        made = make_adapter(
            self._folder / f"{name}-{self._made}",
            self._options.base,
            rank=self._options.rank,
            seed=self._options.seed * 10_000 + self._made,
        )
        await self._client.push(made, name)

    async def run(self, adapter: str) -> StreamRun:
        # A new prompt each time, so that no cache of prefixes can help.
        self._asked += 1
        length = self._options.prompt_tokens
        (stream,) = make_streams(
            (adapter,),
            count=1,
            prompt_tokens=(length, length),
            vocab=self._options.base.vocab,
            seed=self._options.seed * 10_000 + self._asked,
        )
        return await run_stream(self._client, stream, 1)

    async def sample(self, case: Case) -> Sample:
        await self._prepare(case)
        await self.run(A)
        match case:
            case "publish":
                return await self._publish_and_run()
            case "same":
                return self._checked(await self.run(A), Tier.DEVICE)
            case "device":
                return self._checked(await self.run(B), Tier.DEVICE)
            case "host":
                return self._checked(await self.run(B), Tier.HOST)
            case "disk":
                return self._checked(await self.run(B), Tier.DISK)

    async def _prepare(self, case: Case) -> None:
        if case == "device":
            await self._client.activate(B)
        elif case in ("host", "disk"):
            await self._client.evict(B)
            if case == "host":
                await self._client.activate(B, tier=Tier.HOST)

    async def _publish_and_run(self) -> Sample:
        await self.publish(NEW)
        try:
            start = time.perf_counter()
            run = await self.run(NEW)
            first = time.perf_counter() - start
        finally:
            await self._client.delete(NEW)
        return Sample(first, run.end.provenance.timings.adapter_load_s)

    def _checked(self, run: StreamRun, tier: Tier) -> Sample:
        found = run.end.provenance.tier
        if found is not tier:
            raise WrongTier(
                f"{run.end.provenance.short} was found in {found}, not in {tier}: give the "
                "server larger adapter budgets, and let nothing else use it"
            )
        return Sample(run.arrival_s[0], run.end.provenance.timings.adapter_load_s)
