"""The command ``run``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from veneer_client import VeneerError

from veneer_loadtest import report
from veneer_loadtest.commands.common import (
    OUT,
    PACKAGES,
    Debug,
    JsonFile,
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
    CancelShare,
    First,
    Flags,
    Generate,
    IgnoreEos,
    Keep,
    Metrics,
    Model,
    Names,
    OpenAi,
    PopularityText,
    PrefixCache,
    PromptTokens,
    Ranks,
    ServerAddress,
    SpawnOne,
    Targets,
    Text,
    ThreadCount,
    Timeout,
    Tokens,
    Workers,
    load_spec,
    names_of,
    numbers_of,
    targets_of,
)
from veneer_loadtest.commands.output import FailIf, HtmlFile, Label, Outputs
from veneer_loadtest.errors import BadOption
from veneer_loadtest.html.words import count
from veneer_loadtest.load.csv_file import write_csv
from veneer_loadtest.load.opening import AdapterOptions, TargetOptions, opened
from veneer_loadtest.load.records import Record
from veneer_loadtest.load.session import Session, stop_on_signals, with_adapters
from veneer_loadtest.load.spec import Traced, parse_arrivals
from veneer_loadtest.load.summary import parse_limit, parse_seconds, parse_slo, summary
from veneer_loadtest.results import Level, RunResult
from veneer_loadtest.tables import levels_table, split_table

EXAMPLES = (
    "Examples:\n\n"
    "  veneer-loadtest run --spawn --streams 8 --duration 30s\n\n"
    "  veneer-loadtest run --server 127.0.0.1:50051 --rate 4 --arrivals gamma:4 "
    "--popularity zipf:1.2 --duration 1m --warmup 10s --slo ttft=1s,tpot=100ms "
    "--json a.json --html a.html\n\n"
    "  veneer-loadtest run --spawn --streams 8 --generate 1,8,32 --popularity distinct\n\n"
    "  veneer-loadtest run --spawn --server-flag=--data-dir=many --generate 2000 "
    "--rank 8,16,32,64 --targets attention --keep --streams 1 --requests 1\n\n"
    "  veneer-loadtest run --spawn --server-flag=--data-dir=many --names 'load-{0..1999}' "
    "--first 5,2000 --popularity powerlaw:0.5 --streams 32 --duration 2m\n\n"
    "  veneer-loadtest run --openai http://127.0.0.1:8000 --model base --names sql,chat "
    "--rate 2\n\n"
    "  veneer-loadtest run --server 127.0.0.1:50051 --trace requests.jsonl --speed 2 "
    "--fail-if 'error_share>0' --fail-if 'first_token_p99_ms>2000'"
)


def run(
    spawn: SpawnOne = False,
    server: ServerAddress = None,
    openai: OpenAi = None,
    model: Model = "",
    api: Api = ApiChoice.COMPLETIONS,
    rate: Annotated[
        float | None, typer.Option(help="Open loop: mean requests per second.")
    ] = None,
    arrivals: Annotated[
        str, typer.Option(help="Arrivals of the open loop: poisson, constant or gamma:CV.")
    ] = "poisson",
    streams: Annotated[
        int | None, typer.Option(help="Closed loop: number of requests in flight.")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="Replay the requests of a file, one JSON object per line."),
    ] = None,
    speed: Annotated[float, typer.Option(help="Replay speed; 2: twice as fast.")] = 1.0,
    duration: Annotated[
        str,
        typer.Option(help="Stop sending after this time; default: 30s, or the end of a trace."),
    ] = "",
    requests: Annotated[
        int, typer.Option(help="Maximum number of requests; 0: no limit.", min=0)
    ] = 0,
    warmup: Annotated[str, typer.Option(help="Time at the start that is not measured.")] = "0s",
    generate: Generate = "",
    adapters: AdaptersFolder = None,
    names: Names = "",
    first: First = "",
    popularity: PopularityText = "uniform",
    prompt_tokens: PromptTokens = "16..64",
    tokens: Tokens = "64",
    cancel_share: CancelShare = 0.0,
    text: Text = False,
    ignore_eos: IgnoreEos = True,
    prefix_cache: PrefixCache = False,
    timeout: Timeout = "120s",
    workers: Workers = 0,
    slo: Annotated[
        str, typer.Option(help="Limits for goodput, such as ttft=1s,tpot=100ms,e2e=20s.")
    ] = "",
    metrics: Metrics = None,
    rank: Ranks = "16",
    targets: Targets = "all",
    keep: Keep = False,
    base_folder: BaseFolderOfLoad = None,
    threads: ThreadCount = 0,
    server_flag: Flags = None,
    seed: Seed = 1,
    label: Label = "",
    json_file: JsonFile = None,
    csv_file: Annotated[
        Path | None,
        typer.Option("--csv", metavar="FILE", help="Write a CSV row per request."),
    ] = None,
    html_file: HtmlFile = None,
    fail_if: FailIf = None,
    debug: Debug = False,
) -> None:
    """Put a load on a server as its users would, and report what they would see."""

    async def work() -> None:
        kept: list[tuple[int, float, list[Record]]] = []
        outputs = Outputs(
            json_file,
            html_file,
            [parse_limit(each) for each in fail_if or ()],
            {csv_file: lambda file: write_csv(file, kept)} if csv_file else {},
        )
        outputs.check()
        goals = parse_slo(slo) if slo else None
        arriving = parse_arrivals(
            rate=rate,
            streams=streams,
            arrivals=arrivals,
            trace=None if trace is None else str(trace),
            speed=speed,
        )
        traced = arriving if isinstance(arriving, Traced) else None
        default = "0" if traced or requests else "30s"
        load = load_spec(
            arrivals=arriving,
            popularity=popularity,
            prompt_tokens=prompt_tokens,
            tokens=tokens,
            cancel_share=cancel_share,
            ignore_eos=ignore_eos,
            duration_s=parse_seconds("--duration", duration or default),
            warmup_s=parse_seconds("--warmup", warmup),
            requests=requests,
            seed=seed,
        )
        if load.duration_s and load.warmup_s >= load.duration_s:
            raise BadOption(
                f"--warmup {warmup} leaves nothing of --duration {duration or default}"
            )
        conditions = report.conditions()
        warn_if_busy()
        OUT.print(f"seed {seed}", style="dim")
        levels: list[Level] = []
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
                    first=numbers_of("--first", first),
                    generate=numbers_of("--generate", generate),
                    ranks=numbers_of("--rank", rank, least=1),
                    targets=targets_of(targets),
                    keep=keep,
                    seed=seed,
                ),
                traced,
                lambda told: OUT.print(told, style="dim"),
            ) as target:
                print_notes(target.notes)
                session = Session(
                    target, workers, parse_seconds("--timeout", timeout), goals, stop
                )
                for chosen in target.adapters:
                    if stop.event.is_set():
                        break
                    OUT.print(f"sending to {count(len(chosen), 'adapter')}", style="dim")
                    own = with_adapters(load, chosen, target.vocab)
                    try:
                        figures, loaded = await session.run(own, count(len(chosen), "adapter"))
                    except VeneerError as error:
                        if not levels:
                            raise
                        stop.stop(str(error))  # what was measured is kept
                        break
                    levels.append(figures)
                    kept.append((len(chosen), load.warmup_s, loaded.records))
        result = RunResult(
            label=label,
            conditions=conditions,
            versions=report.versions(PACKAGES),
            target=dict(target.facts),
            load=with_adapters(load, target.adapters[-1], target.vocab),
            partial=stop.event.is_set(),
            why=stop.why,
            levels=levels,
            summary=summary(levels[-1], levels[0]) if levels else {},
        )
        OUT.print(levels_table(levels))
        for each in levels:
            OUT.print(split_table(each))
        outputs.deliver(result)

    run_command(work(), debug)
