"""Send a scenario's requests to real servers, using the same router as the simulator."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from veneer_client import Tier, Tokens, VeneerError
from veneer_server.routing.records import ReplicaReport, Wanted
from veneer_server.routing.router import Router

from veneer_loadtest import workload
from veneer_loadtest.simulation.cluster import new_router, replica_name
from veneer_loadtest.simulation.figures import EndedRequests, Figures
from veneer_loadtest.simulation.scenario import Routing, Scenario
from veneer_loadtest.simulation.servers import Served
from veneer_loadtest.simulation.traffic import Asked, prompts, traffic


class Driver:
    """Sends one scenario's requests; belongs to one event loop."""

    def __init__(
        self, scenario: Scenario, router: Router, servers: Sequence[Served], run: int
    ) -> None:
        self._scenario = scenario
        self._router = router
        self._servers = {replica_name(n): server for n, server in enumerate(servers)}
        self._prompts = prompts(scenario.seed + 1000 * run, 2 * scenario.prompt_tokens)
        self.collected = EndedRequests(round(scenario.warm * scenario.requests))
        for name in self._servers:
            router.join(name)

    async def run(self) -> float:
        """Send all requests when they are due; return the seconds until the last has ended."""
        began = time.monotonic()
        reporting = asyncio.create_task(self._report())
        try:
            async with asyncio.TaskGroup() as tasks:
                for asked in traffic(self._scenario):
                    await asyncio.sleep(began + asked.at_s - time.monotonic())
                    tasks.create_task(self._send(asked))
        finally:
            reporting.cancel()
        return time.monotonic() - began

    async def _report(self) -> None:
        while True:
            for name, server in self._servers.items():
                asked = time.monotonic()
                resident = await server.resident()
                now = time.monotonic()
                # This is the only router, so it knows how many requests each replica has.
                self._router.report(name, ReplicaReport(resident, 0, now - asked), now)
            await asyncio.sleep(self._scenario.report_s)

    async def _send(self, asked: Asked) -> None:
        began = time.monotonic()
        any_server = next(iter(self._servers.values()))
        work = float(asked.prompt_tokens + 2 * asked.answer_tokens)
        assert asked.adapter is not None, "a real run has no trace"
        wanted = Wanted(any_server.digests[asked.adapter], asked.session, work)
        choice = self._router.choose(wanted, began)
        self.collected.sent(asked.number, choice.replica)
        first, last = None, 0.0
        try:
            async with self._servers[choice.replica].client.generate_stream(
                Tokens(tuple(self._prompts[asked.text : asked.text + asked.prompt_tokens])),
                adapter=workload.adapter_name(asked.adapter),
                max_tokens=asked.answer_tokens,
                temperature=0.0,
                ignore_eos=True,
            ) as stream:
                async for chunk in stream:
                    if not chunk.token_ids:
                        continue
                    now = time.monotonic()
                    if first is None:
                        first = now
                    else:
                        self.collected.next_token(asked.number, now - last)
                    last = now
                final = stream.final
        except VeneerError as error:
            self.collected.failed[error.reason.lower()] += 1
            return
        finally:
            self._router.finished(choice, time.monotonic())
        self.collected.has_answered(asked.prompt_tokens + asked.answer_tokens)
        assert first is not None, "an answer has at least one token"
        self.collected.first_token(
            asked.number,
            asked.tenant,
            first - began,
            hit=final.provenance.tier is not Tier.DISK,
            prompt=asked.prompt_tokens,
            cached=final.usage.cached_prompt_tokens,
        )


async def run_real(
    scenario: Scenario, routing: Routing, servers: Sequence[Served], run: int
) -> Figures:
    """Run a scenario on real servers, after evicting all adapters from their memory.

    Args:
        run: number of the run; each run has its own prompts, so that the prefix cache has
            none of them.
    """
    for server in servers:
        await server.empty()
    before = [await server.loads() for server in servers]
    cpu = time.process_time()
    driver = Driver(scenario, new_router(routing, scenario.seed), servers, run)
    seconds = await driver.run()
    loads = sum([await server.loads() for server in servers]) - sum(before)
    return driver.collected.figures(
        len(servers),
        routing=routing,
        loads=loads,
        loaded_bytes=loads * servers[0].adapter_bytes,
        fetched_bytes=0,
        everywhere_s=[],
        seconds=seconds,
        cpu_s=time.process_time() - cpu,
    )
