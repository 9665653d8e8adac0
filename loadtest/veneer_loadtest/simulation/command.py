"""The program ``veneer-sim``."""

from __future__ import annotations

import asyncio
import gc
import itertools
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from veneer_client.cli.context import VersionFlag
from veneer_registry.command_line import Program

from veneer_loadtest.commands.common import OUT, Debug, check_writable, run, warn_if_busy
from veneer_loadtest.report import conditions
from veneer_loadtest.simulation.cluster import SimulatedCluster
from veneer_loadtest.simulation.costs import Costs, read_costs, write_costs
from veneer_loadtest.simulation.figures import Figures, table
from veneer_loadtest.simulation.fit import Measurements, measure
from veneer_loadtest.simulation.fit import fit as fitted
from veneer_loadtest.simulation.happenings import FORMS, parse_happenings
from veneer_loadtest.simulation.options import (
    AnswerTokens,
    CostsFile,
    InMemory,
    Json,
    PromptTokens,
    Rate,
    Requests,
    Routings,
    Seed,
    Sessions,
    ZipfExponent,
    parse_routings,
)
from veneer_loadtest.simulation.real import run_real
from veneer_loadtest.simulation.scenario import Scenario
from veneer_loadtest.simulation.servers import Served, parse_cores, real_servers

_EXAMPLES = """
Examples:

  veneer-sim run                                two replicas, each routing policy

  veneer-sim fit --core 0 --out costs.json      measure this machine

  veneer-sim run --costs costs.json --replicas 100 --adapters 10000 --rate 1000

  veneer-sim real --cores 0,1 --json real.json  the same load on real servers
"""

cli = Program(
    help="Simulate a cluster with the real scheduler, memory and router.", epilog=_EXAMPLES
)


@cli.callback()
def _top(version: VersionFlag = False) -> None:
    """Simulate a cluster with the real scheduler, memory and router."""


def _form(kind: str, what: str) -> Any:
    return typer.Option(f"--{kind}", metavar="WHEN", help=f"{what}: {FORMS[kind]}; repeatable.")


@cli.command("run")
def _run(
    routing: Routings = "all",
    replicas: Annotated[int, typer.Option(help="Number of servers.")] = 2,
    adapters: Annotated[int, typer.Option(help="Number of adapters.")] = 64,
    in_memory: InMemory = 16,
    on_disk: Annotated[
        int,
        typer.Option(help="Adapters in a replica's disk cache; 0: all of them from the start."),
    ] = 0,
    adapter_bytes: Annotated[
        int, typer.Option(help="Size of an adapter in bytes.")
    ] = 4_884_480,
    zipf: ZipfExponent = 1.0,
    requests: Requests = 2000,
    rate: Rate = 6.0,
    bursts: Annotated[
        float, typer.Option(help="Share of the requests in bursts of single tenants.")
    ] = 0.0,
    tenants: Annotated[int, typer.Option(help="Tenants that the adapters belong to.")] = 8,
    prompt_tokens: PromptTokens = 48,
    answer_tokens: AnswerTokens = 16,
    sessions: Sessions = 0.0,
    warm: Annotated[
        float, typer.Option(help="Share of requests at the start that are not measured.")
    ] = 0.1,
    lose: Annotated[list[str] | None, _form("lose", "A replica is lost")] = None,
    drain: Annotated[list[str] | None, _form("drain", "A replica drains")] = None,
    partition: Annotated[list[str] | None, _form("partition", "The registry is away")] = None,
    publish: Annotated[list[str] | None, _form("publish", "An adapter is replaced")] = None,
    costs: CostsFile = None,
    seed: Seed = 1,
    json_file: Json = None,
    debug: Debug = False,
) -> None:
    """Simulate a load on a cluster, once per routing policy."""

    async def work() -> None:
        check_writable(json_file)
        happenings = (
            *parse_happenings("lose", lose),
            *parse_happenings("drain", drain),
            *parse_happenings("partition", partition),
            *parse_happenings("publish", publish),
        )
        scenario = Scenario(
            replicas=replicas,
            adapters=adapters,
            in_memory=in_memory,
            on_disk=on_disk,
            adapter_bytes=adapter_bytes,
            zipf=zipf,
            requests=requests,
            rate=rate,
            burst_share=bursts,
            tenants=tenants,
            prompt_tokens=prompt_tokens,
            answer_tokens=answer_tokens,
            session_share=sessions,
            warm=warm,
            seed=seed,
            happenings=happenings,
        )
        known = read_costs(costs)
        # Millions of short-lived records: a collection would only visit the replicas.
        gc.disable()
        runs = []
        for each in parse_routings(routing):
            runs.append(SimulatedCluster(scenario, each, known).run())
            gc.collect()
        _show(scenario, known, runs, json_file)

    run(work(), debug)


@cli.command("real")
def _real(
    routing: Routings = "adapter,round-robin",
    cores: Annotated[str, typer.Option(help="One core per server.")] = "0,1",
    adapters: Annotated[int, typer.Option(help="Number of adapters.")] = 64,
    in_memory: InMemory = 16,
    rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 8,
    zipf: ZipfExponent = 1.0,
    requests: Requests = 600,
    rate: Rate = 6.0,
    prompt_tokens: PromptTokens = 48,
    answer_tokens: AnswerTokens = 16,
    sessions: Sessions = 0.0,
    costs: CostsFile = None,
    fit_rounds: Annotated[
        int,
        typer.Option(
            help="Instead of --costs: fit costs to these servers in this many rounds "
            "before, between and after the runs, for a machine shared with others."
        ),
    ] = 0,
    repeat: Annotated[int, typer.Option(help="Number of alternating repetitions.")] = 1,
    seed: Seed = 1,
    json_file: Json = None,
    debug: Debug = False,
) -> None:
    """Send a scenario's requests to real servers, one per core, and simulate the same."""

    async def work() -> None:
        check_writable(json_file)
        known, routings, on = read_costs(costs), parse_routings(routing), parse_cores(cores)
        warn_if_busy()
        runs: list[Figures] = []
        async with real_servers(
            on, adapters=adapters, in_memory=in_memory, rank=rank, seed=seed
        ) as servers:
            scenario = Scenario(
                replicas=len(on),
                adapters=adapters,
                in_memory=in_memory,
                adapter_bytes=servers[0].adapter_bytes,
                zipf=zipf,
                requests=requests,
                rate=rate,
                prompt_tokens=prompt_tokens,
                answer_tokens=answer_tokens,
                session_share=sessions,
                seed=seed,
            )
            measured = Measurements()
            for _ in range(repeat):
                for each in routings:
                    await _measure_all(servers, fit_rounds, len(runs), measured)
                    real = await run_real(scenario, each, servers, len(runs))
                    runs.append(msgspec.structs.replace(real, routing=f"{each}, real"))
            if fit_rounds:
                await _measure_all(servers, fit_rounds, len(runs), measured)
                known = fitted(measured, scenario.adapter_bytes, "veneer-sim real", known)
                for line in measured.lines():
                    OUT.print(line, style="dim")
        for each in routings:
            found = SimulatedCluster(scenario, each, known).run()
            runs.append(msgspec.structs.replace(found, routing=f"{each}, simulated"))
        _show(scenario, known, sorted(runs, key=lambda each: each.routing), json_file)

    run(work(), debug)


@cli.command("fit")
def _fit(
    out: Annotated[Path, typer.Option(metavar="FILE", help="Output file of the costs.")],
    core: Annotated[int, typer.Option(help="Core of the server.")] = 0,
    rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 8,
    rounds: Annotated[int, typer.Option(help="Number of rounds of all measurements.")] = 15,
    seed: Seed = 1,
    debug: Debug = False,
) -> None:
    """Measure the cost of each operation on a real server with the bundled base."""

    async def work() -> None:
        check_writable(out)
        warn_if_busy()
        async with real_servers([core], adapters=8, in_memory=16, rank=rank, seed=seed) as (
            server,
        ):
            measured = Measurements()
            await measure(server, rounds, seed, measured)
            how = f"veneer-sim fit --rank {rank} --rounds {rounds} --seed {seed}"
            costs = fitted(measured, server.adapter_bytes, how, Costs())
        write_costs(out, costs)
        OUT.print(out.read_text("utf-8"))
        for line in measured.lines():
            OUT.print(line, style="dim")

    run(work(), debug)


async def _measure_all(
    servers: Sequence[Served], rounds: int, number: int, measured: Measurements
) -> None:
    """Measure all servers at once, since they share the machine in a run too."""
    if rounds:
        seeds = itertools.count(100_000 + 100 * number)
        await asyncio.gather(*(measure(s, rounds, next(seeds), measured) for s in servers))


def _show(
    scenario: Scenario, costs: Costs, runs: list[Figures], json_file: Path | None
) -> None:
    OUT.print(table(runs), soft_wrap=True)
    if json_file is not None:
        result = {
            "scenario": scenario,
            "costs": costs,
            "runs": runs,
            "conditions": conditions(),
            "command": sys.argv[1:],
        }
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1))


def main() -> None:
    """Entry point; everything that a run started is stopped on exit."""
    for kind in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(kind, lambda number, _: sys.exit(128 + number))
    cli()
