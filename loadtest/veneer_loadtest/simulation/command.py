"""The program ``veneer-sim``."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from veneer_client.cli.context import VersionFlag
from veneer_registry.command_line import Program, with_parameters

from veneer_loadtest.commands.common import OUT, Debug, check_writable, run, warn_if_busy
from veneer_loadtest.errors import BadOption, SloMissed
from veneer_loadtest.report import conditions
from veneer_loadtest.simulation.cluster import simulate
from veneer_loadtest.simulation.costs import Costs, read_costs, write_costs
from veneer_loadtest.simulation.figures import Figures, kinds_table, scaling_table, table
from veneer_loadtest.simulation.fit import Measurements, measure
from veneer_loadtest.simulation.fit import fit as fitted
from veneer_loadtest.simulation.options import (
    SCENARIO,
    SLO,
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
    parse_scaling,
    parse_slo,
    scenario_of,
)
from veneer_loadtest.simulation.real import run_real
from veneer_loadtest.simulation.scenario import ROUTINGS, Scaling, Scenario, Slo
from veneer_loadtest.simulation.search import SearchResult, Trial, heading, row, search, words
from veneer_loadtest.simulation.servers import Served, parse_cores, real_servers

_EXAMPLES = """
Examples:

  veneer-sim run                                two replicas, each routing policy

  veneer-sim fit --core 0 --out costs.json      measure this machine

  veneer-sim run --costs costs.json --replicas 100 --adapters 10000 --rate 1000

  veneer-sim search --slo ttft=200ms,itl=50ms   the replicas that an SLO needs

  veneer-sim run --trace azure.csv --speed 2    requests from a file

  veneer-sim run --autoscale ray --most 6 --slo ttft=500ms

  veneer-sim real --cores 0,1 --json real.json  the same load on real servers
"""

cli = Program(
    help="Simulate a cluster with the real scheduler, memory and router.", epilog=_EXAMPLES
)


@cli.callback()
def _top(version: VersionFlag = False) -> None:
    """Simulate a cluster with the real scheduler, memory and router."""


@cli.command("run")
@with_parameters(SCENARIO)
def _run(
    routing: Routings = "all",
    autoscale: Annotated[
        str | None,
        typer.Option(
            metavar="POLICY",
            help="Let the number of replicas follow the load, from --replicas up: ray (Ray "
            "Serve with Veneer's policy) or hpa (the Helm chart's).",
        ),
    ] = None,
    most: Annotated[int, typer.Option(help="With --autoscale: most replicas.")] = 8,
    cold_start: Annotated[
        float,
        typer.Option(
            help="With --autoscale: seconds until a new replica takes requests; it then has no "
            "adapter in memory."
        ),
    ] = 60.0,
    slo: Annotated[str | None, SLO] = None,
    costs: CostsFile = None,
    json_file: Json = None,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Simulate a load on a cluster, once per routing policy."""

    async def work() -> None:
        check_writable(json_file)
        scenario, known = scenario_of(**options), read_costs(costs)
        if autoscale is not None:
            limits = Slo() if slo is None else parse_slo(slo)
            scaling = Scaling(parse_scaling(autoscale), most, cold_start, limits)
            scenario = dataclasses.replace(scenario, scaling=scaling)
        elif slo is not None:
            raise BadOption(
                "--slo: give --autoscale, too, to count the requests that break it; or use "
                "`veneer-sim search`, which finds the replicas that keep it",
                metadata={"field": "slo"},
            )
        runs = [simulate(scenario, each, known) for each in parse_routings(routing)]
        _show(scenario, known, runs, json_file)
        for each in runs:
            if len(each.kinds) > 1:
                OUT.print(f"\n{each.routing}, by kind:\n{kinds_table(each)}", soft_wrap=True)
            if each.scaling is not None:
                OUT.print(f"\n{each.routing}, replicas over time:", soft_wrap=True)
                OUT.print(scaling_table(each.scaling), soft_wrap=True)

    run(work(), debug)


@cli.command("search")
@with_parameters(SCENARIO)
def _search(
    slo: Annotated[str, SLO],
    routing: Annotated[str, typer.Option(help=f"One of {', '.join(ROUTINGS)}.")] = "adapter",
    most: Annotated[int, typer.Option(help="Most replicas to try.")] = 64,
    seeds: Annotated[int, typer.Option(help="Seeds to try each number with.")] = 3,
    costs: CostsFile = None,
    json_file: Json = None,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Find the smallest number of replicas that keeps an SLO; of each --kind by itself."""

    async def work() -> None:
        check_writable(json_file)
        limits, scenario, known = parse_slo(slo), scenario_of(**options), read_costs(costs)
        policy, *others = parse_routings(routing)
        if others or most < 1 or seeds < 1:
            raise BadOption("give one --routing, and --most and --seeds of 1 or more")
        if scenario.happenings:
            raise BadOption(
                "a search varies the number of replicas: leave out --lose, --drain, "
                "--partition and --publish, and try them with `veneer-sim run` afterwards"
            )
        found, missed = list[SearchResult](), list[SloMissed]()
        for kind in scenario.fleet:
            OUT.print(f"{kind.name}:\n{heading(limits, kind.price)}", soft_wrap=True)

            def tell(trial: Trial, price: float = kind.price) -> None:
                OUT.print(row(limits, price, trial), soft_wrap=True)

            try:
                one = search(
                    scenario, kind, policy, known, limits, most=most, seeds=seeds, tell=tell
                )
            except SloMissed as error:
                missed.append(error)
                if len(scenario.fleet) > 1:
                    OUT.print(str(error), soft_wrap=True)
                continue
            found.append(one)
            OUT.print(words(limits, one), soft_wrap=True)
        if not found:
            raise missed[0]
        if len(found) > 1 and all(one.price for one in found):
            cheapest = min(found, key=lambda one: one.best.replicas * one.price)
            OUT.print(
                f"cheapest: {cheapest.best.replicas} of {cheapest.kind}, "
                f"{cheapest.best.replicas * cheapest.price:.4g} per hour"
            )
        if json_file is not None:
            _write(json_file, scenario, known, {"search": found})

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
            found = simulate(scenario, each, known)
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
        _write(json_file, scenario, costs, {"runs": runs})


def _write(path: Path, scenario: Scenario, costs: Costs, found: dict[str, Any]) -> None:
    result = {
        # The trace may be long, and is in its file.
        "scenario": dataclasses.replace(scenario, trace=()),
        "costs": costs,
        **found,
        "conditions": conditions(),
        "command": sys.argv[1:],
    }
    path.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1))


def main() -> None:
    """Entry point; everything that a run started is stopped on exit."""
    for kind in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(kind, lambda number, _: sys.exit(128 + number))
    cli()
