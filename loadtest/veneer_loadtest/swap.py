"""Measure the cost of swapping adapters: first tokens in a closed loop, one request at a time.

Each round runs adapter A, then measures the first token of A again (resident, the
reference), of B resident, of B in HOST only, of B on DISK only, and of a new adapter, timed
from its acknowledged upload. Admin calls bring B to its tier before each measurement; each case
follows a request to A, so that it is a swap. Figures are differences within a round. The result
is `results.SwapResult`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from veneer_client import AsyncClient, Tier, VeneerError
from veneer_registry.adapter import SHORT_REVISION

from veneer_loadtest import page_cache
from veneer_loadtest.errors import TargetFailed
from veneer_loadtest.load.plan import Planned
from veneer_loadtest.load.spec import AdapterMix, Closed, Lengths, LoadSpec
from veneer_loadtest.load.targets import Facts, VeneerSpec, VeneerTarget
from veneer_loadtest.report import spread
from veneer_loadtest.results import Case, CaseFigures, ChurnFigures
from veneer_loadtest.workload import BaseSizes, make_adapter

A, B = "swap-a", "swap-b"
NEW = "swap-new"


class WrongTier(VeneerError):
    """A request found its adapter in a tier other than the case needs."""

    code = "FAILED_PRECONDITION"
    reason = "WRONG_TIER"


@dataclass(frozen=True, slots=True)
class SwapOptions:
    """Options of `swap`: ``samples`` per case, prompts of ``prompt_tokens`` tokens.

    Attributes:
        data_dir: the server's data folder, if this process can see it. Otherwise files cannot
            be dropped from the page cache, and the case ``disk_cold`` is left out.
    """

    base: BaseSizes
    rank: int
    prompt_tokens: int
    samples: int
    seed: int
    data_dir: Path | None = None


@dataclass(frozen=True, slots=True)
class SwapSample:
    """Times of one first token, in seconds."""

    first_token_s: float
    load_s: float


def case_figures(cases: Mapping[Case, list[SwapSample]]) -> dict[str, CaseFigures]:
    """Compute the figures of each measured case; each of its samples has one in ``same``."""
    same = cases["same"]  # rounds are complete, so samples pair up
    return {
        case: CaseFigures(
            first_token_ms=spread(s.first_token_s for s in samples),
            delta_ms=spread(
                s.first_token_s - yardstick.first_token_s
                for s, yardstick in zip(samples, same, strict=True)
            ),
            load_ms=spread(s.load_s for s in samples),
            samples_ms=[s.first_token_s * 1e3 for s in samples],
        )
        for case, samples in cases.items()
        if samples
    }


def summary(cases: Mapping[str, CaseFigures], churn: ChurnFigures | None) -> dict[str, float]:
    """Return medians in milliseconds; see `results.SwapResult`."""
    if "same" not in cases:
        return {}
    found = {
        "first_token_ms": cases["same"].first_token_ms.p50,
        "device_delta_ms": cases["device"].delta_ms.p50,
        "host_delta_ms": cases["host"].delta_ms.p50,
        "disk_delta_ms": cases.get("disk_cold", cases["disk"]).delta_ms.p50,
        "disk_cached_delta_ms": cases["disk"].delta_ms.p50,
        "publish_to_first_token_ms": cases["publish"].first_token_ms.p50,
    }
    if churn is not None and churn.quiet_ms.p99 > 0:  # 0 where tokens arrive in bundles
        found["churn_itl_p99_ratio"] = churn.inside_ms.p99 / churn.quiet_ms.p99
    if churn is not None:
        found |= {
            "churn_added_p99_ms": churn.inside_ms.p99 - churn.quiet_ms.p99,
            "churn_max_stall_steps": churn.steps,
        }
    return found


async def swap(
    client: AsyncClient,
    options: SwapOptions,
    folder: Path,
    on_sample: Callable[[], None] = lambda: None,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[Case, list[SwapSample]]:
    """Run all cases; adapters are made in ``folder``, published, and deleted at the end.

    Args:
        stopped: called before each round; True ends the rounds.

    Returns:
        samples by case, in order of rounds; ``disk_cold`` is empty if files stay in the
        page cache.

    Raises:
        WrongTier: the server found an adapter in an unexpected tier.
    """
    bench = Bench(client, options, folder)
    cases: dict[Case, list[SwapSample]] = {case: [] for case in get_args(Case)}
    async with AsyncExitStack() as new:
        new.push_async_callback(bench.close)
        for name in (A, B):
            await bench.publish(name)
            new.push_async_callback(client.delete, name)
        for warm in (A, B, A):
            await bench.run(warm)
        left_out = () if bench.can_drop else ("disk_cold",)
        for _ in range(options.samples):
            if stopped():
                break
            for case in cases:
                if case not in left_out:
                    cases[case].append(await bench.sample(case))
            on_sample()
    return cases


@dataclass(frozen=True, slots=True)
class _Answer:
    """The first token of an answer, and the facts that the server reports about it."""

    adapter: str
    first_token_s: float
    facts: Facts

    @property
    def sample(self) -> SwapSample:
        return SwapSample(self.first_token_s, self.facts.load_s or 0.0)


def _load(options: SwapOptions) -> LoadSpec:
    """Build the load from which the requests are sampled."""
    return LoadSpec(
        adapters=(A, B, NEW),
        arrivals=Closed(1),
        popularity=AdapterMix("identical"),
        prompt_tokens=Lengths(options.prompt_tokens, options.prompt_tokens),
        tokens=Lengths(1, 1),
        duration_s=0.0,
        warmup_s=0.0,
        requests=0,
        cancel_share=0.0,
        seed=options.seed,
        vocab=options.base.vocab,
    )


class Bench:
    """The requests of one run, and the adapters that it publishes."""

    def __init__(self, client: AsyncClient, options: SwapOptions, folder: Path) -> None:
        self._client = client
        self._options = options
        self._folder = folder
        self._made = 0
        self._asked = 0
        self._target = VeneerTarget(_load(options), VeneerSpec(client.address))

    async def publish(self, name: str) -> None:
        self._made += 1
        # A new seed each time: publishing the same content would be a no-op.
        made = make_adapter(
            self._folder / f"{name}-{self._made}",
            self._options.base,
            rank=self._options.rank,
            seed=self._options.seed * 10_000 + self._made,
        )
        await self._client.push(made, name)

    async def run(self, adapter: str) -> _Answer:
        """Send one request from this process: starting a worker would take longer."""
        # A new prompt each time, so that no prefix cache can help.
        self._asked += 1
        request = Planned(self._asked, 0.0, adapter, self._options.prompt_tokens, 1)
        first_s = None
        start = time.perf_counter()
        async with self._target.send(request) as stream:
            async for _ in stream:
                first_s = first_s or time.perf_counter() - start
        if first_s is None:
            raise TargetFailed(f"an answer with {adapter} had no token")
        return _Answer(adapter, first_s, stream.facts)

    async def close(self) -> None:
        """Close the connection to the server."""
        await self._target.close()

    async def sample(self, case: Case) -> SwapSample:
        await self._prepare(case)
        await self.run(A)
        match case:
            case "publish":
                return await self.publish_and_run()
            case "same":
                return self._checked(await self.run(A), Tier.DEVICE)
            case "device":
                return self._checked(await self.run(B), Tier.DEVICE)
            case "host":
                return self._checked(await self.run(B), Tier.HOST)
            case "disk" | "disk_cold":
                return self._checked(await self.run(B), Tier.DISK)

    async def _prepare(self, case: Case) -> None:
        if case == "device":
            await self._client.activate(B)
        elif case in ("host", "disk", "disk_cold"):
            await self._client.evict(B)
            if case == "disk_cold":
                self._drop()
            if case == "host":
                await self._client.activate(B, tier=Tier.HOST)

    @property
    def can_drop(self) -> bool:
        """Whether the server's files can be dropped from the page cache; drops them."""
        return self._options.data_dir is not None and page_cache.drop(self._options.data_dir)

    def _drop(self) -> None:
        if not self.can_drop:
            raise WrongTier(
                "the adapter files stayed in the page cache: run it again",
                metadata={"cause": "page_cache"},
            )

    async def publish_and_run(self) -> SwapSample:
        await self.publish(NEW)
        try:
            run = await self.run(NEW)
        finally:
            await self._client.delete(NEW)
        return run.sample

    def _checked(self, run: _Answer, tier: Tier) -> SwapSample:
        if run.facts.tier != tier.name.lower():
            raise WrongTier(
                f"{run.adapter}@{run.facts.revision[:SHORT_REVISION]} was found in "
                f"{run.facts.tier.upper() or 'no tier'}, not in {tier}: give the server "
                "larger adapter budgets, and keep other clients off it",
                metadata={"tier": run.facts.tier, "wanted": tier.name.lower()},
            )
        return run.sample
