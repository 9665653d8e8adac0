"""Options: those that several commands share, and those of a simulated scenario."""

from __future__ import annotations

import inspect
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from veneer_loadtest.errors import BadOption
from veneer_loadtest.load.summary import parse_seconds
from veneer_loadtest.load.trace import read_trace
from veneer_loadtest.simulation.costs import read_costs
from veneer_loadtest.simulation.happenings import FORMS, parse_happenings
from veneer_loadtest.simulation.scenario import (
    ROUTINGS,
    SCALING,
    ReplicaKind,
    Routing,
    ScalingPolicy,
    Scenario,
    Slo,
)

InMemory = Annotated[int, typer.Option(help="Adapters that fit into a replica's memory.")]
ZipfExponent = Annotated[float, typer.Option("--zipf", help="Exponent of popularity.")]
Requests = Annotated[int, typer.Option(help="Number of requests.")]
Rate = Annotated[float, typer.Option(help="Requests per second in all, on average.")]
PromptTokens = Annotated[int, typer.Option(help="Mean length of a prompt.")]
AnswerTokens = Annotated[int, typer.Option(help="Mean length of an answer.")]
Sessions = Annotated[
    float, typer.Option("--sessions", help="Share of requests whose prompts share a prefix.")
]
Seed = Annotated[int, typer.Option(help="Random seed.")]
Routings = Annotated[
    str, typer.Option("--routing", help=f"all, or some of {', '.join(ROUTINGS)}.")
]
CostsFile = Annotated[
    Path | None,
    typer.Option("--costs", metavar="FILE", help="Costs measured by `veneer-sim fit`."),
]
Json = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the figures to this file.")
]

SLO: Final = typer.Option(
    "--slo",
    metavar="LIMITS",
    help="Limits such as ttft=500ms,itl=100ms,refused=1%: of p99 TTFT, of p99 time between "
    "tokens, and of the share of requests without an answer (0 if not given).",
)

_BY_NAME: Final[dict[str, Routing]] = {routing: routing for routing in ROUTINGS}


def parse_routings(text: str) -> tuple[Routing, ...]:
    """Parse ``all``, or routing policies separated by commas.

    Raises:
        BadOption: a name is unknown.
    """
    if text == "all":
        return ROUTINGS
    try:
        return tuple(_BY_NAME[name.strip()] for name in text.split(","))
    except KeyError as error:
        raise BadOption(
            f"--routing {text}: give all, or some of {', '.join(ROUTINGS)}",
            metadata={"field": "routing"},
        ) from error


def parse_slo(text: str) -> Slo:
    """Parse limits such as ``ttft=500ms,itl=100ms,refused=1%``; each is optional.

    Raises:
        BadOption: the text is something else, or has no limit of a time.
    """
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if name in ("ttft", "itl"):
            found[f"{name}_s"] = parse_seconds("--slo", value)
        elif name == "refused":
            found[name] = _share(text, value)
        else:
            raise _bad_slo(text)
    slo = Slo(**found)
    if slo.ttft_s is None and slo.itl_s is None:
        raise _bad_slo(text)
    return slo


def parse_scaling(text: str) -> ScalingPolicy:
    """Parse the name of an autoscaling policy.

    Raises:
        BadOption: the name is unknown.
    """
    for policy in SCALING:
        if text == policy:
            return policy
    raise BadOption(
        f"--autoscale {text}: give {' or '.join(SCALING)}", metadata={"field": "autoscale"}
    )


def _share(text: str, value: str) -> float:
    try:
        share = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
    except ValueError:
        raise _bad_slo(text) from None
    if not 0 <= share <= 1:
        raise _bad_slo(text)
    return share


def _bad_slo(text: str) -> BadOption:
    return BadOption(
        f"--slo {text!r}: give ttft or itl or both, and refused if you like, such as "
        "ttft=500ms,itl=100ms,refused=1%",
        metadata={"field": "slo"},
    )


def parse_ranks(text: str) -> tuple[tuple[int, float], ...]:
    """Parse ranks and their weights, such as ``8:6,16:3,64:1``.

    Raises:
        BadOption: the text is something else.
    """
    try:
        pairs = [part.split(":") for part in text.split(",")]
        return tuple((int(rank), float(weight)) for rank, weight in pairs)
    except ValueError as error:
        raise BadOption(
            f"--ranks {text!r}: give ranks and the weights of their shares, such as "
            "8:6,16:3,64:1",
            metadata={"field": "ranks"},
        ) from error


_KIND_KEYS: Final[dict[str, Any]] = {
    "replicas": int,
    "price": float,
    "costs": lambda text: read_costs(Path(text)),
    "in-memory": int,
    "kv-tokens": int,
}
_KIND_FORM: Final = "NAME,replicas=4,price=0.5,costs=FILE,in-memory=32,kv-tokens=65536"


def parse_kind(text: str) -> ReplicaKind:
    """Parse a kind of replicas, of the form `_KIND_FORM`; all but the name is optional.

    Raises:
        BadOption: the text is something else, or the file of costs cannot be read.
    """
    name, *parts = [part.strip() for part in text.split(",")]
    given: dict[str, Any] = {}
    for key, _, value in [part.partition("=") for part in parts]:
        try:
            given[key.replace("-", "_")] = _KIND_KEYS[key](value)
        except (KeyError, ValueError) as error:
            raise _bad_kind(text) from error
    if not name or "=" in name:
        raise _bad_kind(text)
    return ReplicaKind(name=name, **given)


def _bad_kind(text: str) -> BadOption:
    return BadOption(f"--kind {text!r}: give {_KIND_FORM}", metadata={"field": "kind"})


def _form(kind: str, what: str) -> Any:
    return typer.Option(f"--{kind}", metavar="WHEN", help=f"{what}: {FORMS[kind]}; repeatable.")


def scenario_of(
    *,
    replicas: Annotated[int | None, typer.Option(help="Number of servers; default: 2.")] = None,
    price: Annotated[float, typer.Option(help="What a server costs per hour.")] = 0.0,
    kind: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND",
            help="Instead of --replicas and --price: a kind of servers, such as "
            f"{_KIND_FORM}; repeatable.",
        ),
    ] = None,
    adapters: Annotated[int, typer.Option(help="Number of adapters.")] = 64,
    in_memory: InMemory = 16,
    on_disk: Annotated[
        int,
        typer.Option(help="Adapters in a replica's disk cache; 0: all of them from the start."),
    ] = 0,
    adapter_bytes: Annotated[
        int, typer.Option(help="Size of an adapter in bytes.")
    ] = 4_884_480,
    ranks: Annotated[
        str | None,
        typer.Option(
            metavar="RANK:WEIGHT,...",
            help="Instead of --adapter-bytes: ranks of the adapters and weights of their "
            "shares, such as 8:6,16:3,64:1.",
        ),
    ] = None,
    rank_bytes: Annotated[
        int, typer.Option(help="With --ranks: bytes of an adapter of rank 1.")
    ] = 610_560,
    zipf: ZipfExponent = 1.0,
    requests: Requests = 2000,
    rate: Rate = 6.0,
    bursts: Annotated[
        float, typer.Option(help="Share of the requests in bursts of single tenants.")
    ] = 0.0,
    tenants: Annotated[int, typer.Option(help="Tenants that the adapters belong to.")] = 8,
    prompt_tokens: PromptTokens = 48,
    answer_tokens: AnswerTokens = 16,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Replay these requests: JSON lines, or CSV with the columns "
            "at_s,adapter,prompt_tokens,tokens or those of Azure's traces "
            "(TIMESTAMP,ContextTokens,GeneratedTokens).",
        ),
    ] = None,
    speed: Annotated[
        float, typer.Option(help="With --trace: how many times as fast to replay it.")
    ] = 1.0,
    sessions: Sessions = 0.0,
    context_length: Annotated[
        int, typer.Option(help="Most tokens of a request, prompt and answer.")
    ] = 2048,
    kv_tokens: Annotated[
        int, typer.Option(help="Size of a replica's KV cache, in tokens.")
    ] = 16_384,
    max_queue: Annotated[
        int, typer.Option(help="Most requests that wait at a replica; others are refused.")
    ] = 256,
    warm: Annotated[
        float, typer.Option(help="Share of requests at the start that are not measured.")
    ] = 0.1,
    lose: Annotated[list[str] | None, _form("lose", "A replica is lost")] = None,
    drain: Annotated[list[str] | None, _form("drain", "A replica drains")] = None,
    partition: Annotated[list[str] | None, _form("partition", "The registry is away")] = None,
    publish: Annotated[list[str] | None, _form("publish", "An adapter is replaced")] = None,
    seed: Seed = 1,
) -> Scenario:
    """Build a scenario from a command's options; see `SCENARIO`.

    Raises:
        BadOption: an option is invalid, or does not go with another.
        BadTrace: the trace cannot be read.
    """
    if kind and (replicas is not None or price):
        raise BadOption(
            "--kind: give each kind's number and price in it, not --replicas or --price",
            metadata={"field": "kind"},
        )
    lines = read_trace(trace) if trace else ()
    names = Counter(line.adapter for line in lines if line.adapter)
    return Scenario(
        replicas=2 if replicas is None else replicas,
        price=price,
        kinds=tuple(map(parse_kind, kind or ())),
        adapters=len(names) or adapters,
        in_memory=in_memory,
        on_disk=on_disk,
        adapter_bytes=adapter_bytes,
        ranks=parse_ranks(ranks) if ranks else (),
        rank_bytes=rank_bytes,
        zipf=zipf,
        requests=len(lines) or requests,
        rate=rate,
        burst_share=bursts,
        tenants=tenants,
        prompt_tokens=prompt_tokens,
        answer_tokens=answer_tokens,
        trace=lines,
        speed=speed,
        session_share=sessions,
        context_length=context_length,
        kv_tokens=kv_tokens,
        max_queue=max_queue,
        warm=warm,
        seed=seed,
        happenings=(
            *parse_happenings("lose", lose),
            *parse_happenings("drain", drain),
            *parse_happenings("partition", partition),
            *parse_happenings("publish", publish),
        ),
    )


SCENARIO: Final = tuple(inspect.signature(scenario_of, eval_str=True).parameters.values())
"""The options of `scenario_of`, for `with_parameters`."""
