"""Options that ``run`` and ``find-max`` share, and how their texts are parsed."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from veneer_loadtest import workload
from veneer_loadtest.errors import BadOption
from veneer_loadtest.load.spec import (
    Arrivals,
    LoadSpec,
    parse_lengths,
    parse_popularity,
)

_MOST_NAMES: int = 1_000_000


class ApiChoice(Enum):
    """The OpenAI API to call."""

    COMPLETIONS = "completions"
    CHAT = "chat"


SpawnOne = Annotated[bool, typer.Option("--spawn", help="Start a Veneer server for this run.")]
ServerAddress = Annotated[
    str | None,
    typer.Option(
        "--server",
        metavar="HOST:PORT",
        help="A running Veneer server; adapters published there are deleted at the end.",
    ),
]
OpenAi = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="An OpenAI-compatible server, without /v1; OPENAI_API_KEY is sent if set.",
    ),
]
Model = Annotated[str, typer.Option(help="With --openai: the base; default: its first model.")]
Api = Annotated[ApiChoice, typer.Option(help="With --openai: API to call.")]
Metrics = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Metrics endpoint of --server, for its own counts and for adapter tiers over "
        "time.",
    ),
]
BaseFolderOfLoad = Annotated[
    Path | None,
    typer.Option(
        "--base-folder",
        help="Hugging Face folder of the base to serve; default: the bundled one. With "
        "--openai: for prompts of token ids.",
    ),
]
ThreadCount = Annotated[
    int, typer.Option("--threads", help="Threads of a spawned server; 0: one per core.")
]
Flags = Annotated[
    list[str] | None,
    typer.Option("--server-flag", help="A flag for the spawned server; repeatable."),
]
Generate = Annotated[
    str,
    typer.Option(
        metavar="N[,N...]",
        help="Number of synthetic adapters; several numbers: one load for each.",
    ),
]
GenerateOne = Annotated[
    int,
    typer.Option("--generate", help="Number of synthetic adapters; 0: the base model.", min=0),
]
AdaptersFolder = Annotated[
    Path | None, typer.Option("--adapters", help="Publish the adapter folders in this folder.")
]
Ranks = Annotated[
    str,
    typer.Option(
        "--rank", metavar="R[,R...]", help="Ranks of the synthetic adapters, in turn."
    ),
]
Targets = Annotated[
    str,
    typer.Option(help="Projections of the synthetic adapters: all, attention, or q_proj,..."),
]
Keep = Annotated[bool, typer.Option("--keep", help="Keep published adapters for a later run.")]
Names = Annotated[
    str,
    typer.Option(
        metavar="A,B", help="Adapters that the server has; load-{0..99} stands for 100."
    ),
]
First = Annotated[
    str,
    typer.Option(
        metavar="N[,N...]",
        help="Use the first N of --names or --adapters; several numbers: one load for each.",
    ),
]
PopularityText = Annotated[
    str,
    typer.Option(
        "--popularity",
        help="identical, uniform, zipf:S, powerlaw:A, distinct or roundrobin.",
    ),
]
PromptTokens = Annotated[
    str, typer.Option("--prompt-tokens", help="64, 16..64 or lognormal:MEAN:CV:MAX.")
]
Tokens = Annotated[
    str, typer.Option("--tokens", help="New tokens per request; same forms as --prompt-tokens.")
]
CancelShare = Annotated[
    float, typer.Option(help="Share of requests that the client cancels early.", min=0, max=1)
]
Text = Annotated[bool, typer.Option("--text", help="Send prompts as words, not token ids.")]
IgnoreEos = Annotated[
    bool,
    typer.Option(help="Ignore the end of sequence; OpenAI's own API does not support this."),
]
PrefixCache = Annotated[
    bool, typer.Option("--prefix-cache", help="Allow a Veneer server to use its prefix cache.")
]
Timeout = Annotated[
    str, typer.Option(help="Timeout per request; longer requests count as failed.")
]
Workers = Annotated[
    int,
    typer.Option(help="Number of sending processes; 0: chosen by rate.", min=0, max=64),
]


def load_spec(
    *,
    arrivals: Arrivals,
    popularity: str,
    prompt_tokens: str,
    tokens: str,
    cancel_share: float,
    ignore_eos: bool,
    duration_s: float,
    warmup_s: float,
    requests: int,
    seed: int,
) -> LoadSpec:
    """Build the load from these options; its adapters are set later.

    Raises:
        BadOption: a text cannot be parsed.
    """
    return LoadSpec(
        adapters=(),
        arrivals=arrivals,
        popularity=parse_popularity(popularity),
        prompt_tokens=parse_lengths("--prompt-tokens", prompt_tokens),
        tokens=parse_lengths("--tokens", tokens),
        duration_s=duration_s,
        warmup_s=warmup_s,
        requests=requests,
        cancel_share=cancel_share,
        ignore_eos=ignore_eos,
        seed=seed,
        vocab=0,
    )


def names_of(text: str) -> tuple[str, ...]:
    """Parse names such as ``a,b``; ``a-{0..9}`` stands for ten names. ``base`` is a name like
    any other, not the base model.

    Raises:
        BadOption: a range that counts down, or has more than a million names.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    return tuple(name for part in parts for name in _counted(part))


def _counted(part: str) -> tuple[str, ...]:
    found = re.fullmatch(r"([^{}]*)\{(\d{1,9})\.\.(\d{1,9})\}([^{}]*)", part)
    if found is None:
        return (part,)
    low, high = int(found[2]), int(found[3])
    if not low <= high < low + _MOST_NAMES:
        raise BadOption(
            f"--names {part!r}: give a range such as load-{{0..99}}",
            metadata={"field": "--names"},
        )
    return tuple(f"{found[1]}{number}{found[4]}" for number in range(low, high + 1))


def targets_of(text: str) -> tuple[str, ...]:
    """Parse ``all``, ``attention``, or names of projections.

    Raises:
        BadOption: anything else.
    """
    if text in ("all", "attention"):
        return workload.PROJECTIONS if text == "all" else workload.ATTENTION
    targets = tuple(part.strip() for part in text.split(","))
    if not set(targets) <= set(workload.PROJECTIONS):
        raise BadOption(
            f"--targets {text!r}: give all, attention, or some of "
            f"{', '.join(workload.PROJECTIONS)}",
            metadata={"field": "--targets"},
        )
    return targets


def numbers_of(option: str, text: str, *, least: int = 0) -> tuple[int, ...]:
    """Parse numbers such as ``1,8,32``; if ``least`` is 0, "" means none.

    Raises:
        BadOption: anything else, or a number below ``least``; names ``option``.
    """
    parts = [part.strip() for part in text.split(",")] if text or least else []
    if not all(part.isdecimal() and int(part) >= least for part in parts):
        above = f" of {least} or more" if least else ""
        raise BadOption(
            f"{option} {text!r}: give numbers{above} such as 8 or 1,8,32",
            metadata={"field": option},
        )
    return tuple(int(part) for part in parts)
