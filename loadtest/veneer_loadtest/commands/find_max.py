"""The command ``find-max``."""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer
from veneer_client import VeneerError

from veneer_loadtest import report
from veneer_loadtest.commands.common import (
    OUT,
    PACKAGES,
    Debug,
    JsonFile,
    Rank,
    Seed,
    print_notes,
    warn_if_busy,
)
from veneer_loadtest.commands.common import run as run_command
from veneer_loadtest.commands.load_options import (
    AdaptersFolder,
    Api,
    ApiChoice,
    BaseFolderOfLoad,
    Flags,
    GenerateOne,
    IgnoreEos,
    Metrics,
    Model,
    Names,
    OpenAi,
    PopularityText,
    PrefixCache,
    PromptTokens,
    ServerAddress,
    SpawnOne,
    Text,
    ThreadCount,
    Timeout,
    Tokens,
    Workers,
    load_spec,
    names_of,
)
from veneer_loadtest.commands.output import FailIf, HtmlFile, Label, Outputs
from veneer_loadtest.errors import BadOption
from veneer_loadtest.load.find_max import find_max as search
from veneer_loadtest.load.find_max import keeps
from veneer_loadtest.load.opening import AdapterOptions, TargetOptions, opened
from veneer_loadtest.load.session import Session, stop_on_signals, with_adapters
from veneer_loadtest.load.spec import Open, parse_arrivals
from veneer_loadtest.load.summary import parse_limit, parse_seconds, parse_slo, summary
from veneer_loadtest.results import FindMaxResult, Level
from veneer_loadtest.tables import probes_table

EXAMPLES = (
    "Examples:\n\n"
    "  veneer-loadtest find-max --spawn --slo ttft=1s,tpot=150ms\n\n"
    "  veneer-loadtest find-max --server 127.0.0.1:50051 --names sql,chat --slo ttft=500ms "
    "--share 0.95 --duration 1m --json max.json"
)

KEYS = ("max_rate", "tokens_per_s", "first_token_p50_ms", "first_token_p99_ms")
"""Keys of the summary; all but the first are figures at ``max_rate``."""


def find_max(
    slo: Annotated[str, typer.Option(help="Limits, such as ttft=1s,tpot=100ms,e2e=20s.")],
    spawn: SpawnOne = False,
    server: ServerAddress = None,
    openai: OpenAi = None,
    model: Model = "",
    api: Api = ApiChoice.COMPLETIONS,
    share: Annotated[
        float,
        typer.Option(help="Share of requests that must meet the limits.", min=0.01, max=1),
    ] = 0.99,
    begin: Annotated[float, typer.Option(help="First rate to try, requests per second.")] = 1.0,
    precision: Annotated[
        float,
        typer.Option(
            help="Stop when the highest rate that met the limits and the lowest that broke "
            "them are this close.",
            min=0.01,
        ),
    ] = 0.1,
    arrivals: Annotated[str, typer.Option(help="poisson, constant or gamma:CV.")] = "poisson",
    duration: Annotated[str, typer.Option(help="Length of the load at each rate.")] = "20s",
    warmup: Annotated[str, typer.Option(help="Unmeasured part of --duration.")] = "5s",
    generate: GenerateOne = 8,
    adapters: AdaptersFolder = None,
    names: Names = "",
    popularity: PopularityText = "uniform",
    prompt_tokens: PromptTokens = "16..64",
    tokens: Tokens = "64",
    text: Text = False,
    ignore_eos: IgnoreEos = True,
    prefix_cache: PrefixCache = False,
    timeout: Timeout = "120s",
    workers: Workers = 0,
    metrics: Metrics = None,
    rank: Rank = 16,
    base_folder: BaseFolderOfLoad = None,
    threads: ThreadCount = 0,
    server_flag: Flags = None,
    seed: Seed = 1,
    label: Label = "",
    json_file: JsonFile = None,
    html_file: HtmlFile = None,
    fail_if: FailIf = None,
    debug: Debug = False,
) -> None:
    """Find the highest request rate that a server sustains within latency limits."""

    async def work() -> None:
        limits = [parse_limit(each, KEYS) for each in fail_if or ()]
        outputs = Outputs(json_file, html_file, limits, {})
        outputs.check()
        goals = parse_slo(slo)
        seconds = parse_seconds("--duration", duration)
        ahead = parse_seconds("--warmup", warmup)
        if ahead >= seconds:
            raise BadOption(f"--warmup {warmup} leaves nothing of --duration {duration}")
        load = load_spec(
            arrivals=parse_arrivals(
                rate=begin, streams=None, arrivals=arrivals, trace=None, speed=1.0
            ),
            popularity=popularity,
            prompt_tokens=prompt_tokens,
            tokens=tokens,
            cancel_share=0.0,
            ignore_eos=ignore_eos,
            duration_s=seconds,
            warmup_s=ahead,
            requests=0,
            seed=seed,
        )
        conditions = report.conditions()
        warn_if_busy()
        OUT.print(f"seed {seed}", style="dim")
        with stop_on_signals() as stop:
            async with opened(
                TargetOptions(
                    spawn=spawn,
                    server=server,
                    openai=openai,
                    model=model,
                    api=api.value,
                    metrics=metrics,
                    base_folder=base_folder,
                    threads=threads,
                    flags=server_flag or (),
                    text=text,
                    prefix_cache=prefix_cache,
                ),
                AdapterOptions(
                    names=names_of(names),
                    folder=adapters,
                    generate=() if names or adapters or openai else (generate,),
                    ranks=(rank,),
                    seed=seed,
                ),
                None,
            ) as target:
                print_notes(target.notes)
                own = with_adapters(load, target.adapters[-1], target.vocab)
                session = Session(
                    target, workers, parse_seconds("--timeout", timeout), goals, stop
                )
                tried: list[float] = []

                async def attempt(rate: float) -> Level | None:
                    assert isinstance(own.arrivals, Open)
                    arriving = Open(rate, own.arrivals.cv)
                    at_rate = msgspec.structs.replace(own, arrivals=arriving)
                    try:
                        level, _ = await session.run(at_rate, f"{rate:.2f} requests/s")
                    except VeneerError as error:
                        if not tried:
                            raise
                        stop.stop(str(error))  # what was measured is kept
                        return None
                    if stop.event.is_set():
                        return None
                    tried.append(rate)
                    told = f"met by {level.slo.share:.1%}" if level.slo else ""
                    sign = "ok" if keeps(level, share) else "broken"
                    OUT.print(f"{rate:.2f} requests/s: {sign}, {told}", style="dim")
                    return level

                probes, highest, bounded = await search(
                    attempt, begin=begin, share=share, precision=precision
                )
        best = [probe for probe in probes if probe.kept and probe.rate == highest]
        of_best = summary(best[0].level) if best else {}
        result = FindMaxResult(
            label=label,
            conditions=conditions,
            versions=report.versions(PACKAGES),
            target=dict(target.facts),
            load=own,
            limits=goals,
            share=share,
            partial=stop.event.is_set(),
            why=stop.why,
            probes=probes,
            max_rate=highest,
            bounded=bounded,
            summary={"max_rate": highest, **{k: of_best[k] for k in KEYS[1:] if k in of_best}},
        )
        OUT.print(probes_table(probes))
        outputs.deliver(result)

    run_command(work(), debug)
