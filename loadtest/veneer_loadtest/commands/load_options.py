"""Options that ``run`` and ``find-max`` share, and what their texts mean."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from veneer_loadtest.errors import BadOption
from veneer_loadtest.load.spec import (
    Arrivals,
    LoadSpec,
    parse_lengths,
    parse_popularity,
)

__all__ = [
    "AdaptersFolder",
    "Api",
    "ApiChoice",
    "BaseFolderOfLoad",
    "CancelShare",
    "Flags",
    "Generate",
    "GenerateOne",
    "IgnoreEos",
    "Metrics",
    "Model",
    "Names",
    "OpenAi",
    "PopularityText",
    "PrefixCache",
    "PromptTokens",
    "ServerAddress",
    "SpawnOne",
    "Text",
    "ThreadCount",
    "Timeout",
    "Tokens",
    "Workers",
    "load_spec",
    "names_of",
    "numbers_of",
]


class ApiChoice(Enum):
    """Which of OpenAI's calls."""

    COMPLETIONS = "completions"
    CHAT = "chat"


SpawnOne = Annotated[bool, typer.Option("--spawn", help="Start a Veneer server for this run.")]
ServerAddress = Annotated[
    str | None,
    typer.Option(
        "--server",
        metavar="HOST:PORT",
        help="A running Veneer server; what is published there is deleted at the end.",
    ),
]
OpenAi = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="An OpenAI-compatible server, without /v1; OPENAI_API_KEY is sent if set.",
    ),
]
Model = Annotated[str, typer.Option(help="Of --openai: the base; else its first model.")]
Api = Annotated[ApiChoice, typer.Option(help="Of --openai.")]
Metrics = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT", help="Metrics of --server, for its counts and tiers over time."
    ),
]
BaseFolderOfLoad = Annotated[
    Path | None,
    typer.Option(
        "--base-folder", help="Hugging Face folder of the base; else the bundled one's."
    ),
]
ThreadCount = Annotated[int, typer.Option("--threads", help="Of a spawned server; 0: all.")]
Flags = Annotated[
    list[str] | None,
    typer.Option("--server-flag", help="A flag for the spawned server; repeatable."),
]
Generate = Annotated[
    str,
    typer.Option(
        metavar="N[,N...]", help="Make so many synthetic adapters; several: a load for each."
    ),
]
GenerateOne = Annotated[
    int, typer.Option("--generate", help="Synthetic adapters to make; 0: the base.", min=0)
]
AdaptersFolder = Annotated[
    Path | None, typer.Option("--adapters", help="Publish the adapter folders in there.")
]
Names = Annotated[str, typer.Option(metavar="A,B", help="Adapters that the server has.")]
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
Tokens = Annotated[str, typer.Option("--tokens", help="New tokens; as --prompt-tokens.")]
CancelShare = Annotated[
    float, typer.Option(help="Of the requests whose caller leaves early.", min=0, max=1)
]
Text = Annotated[bool, typer.Option("--text", help="Prompts are words, not token ids.")]
IgnoreEos = Annotated[
    bool,
    typer.Option(
        help="Answers go on after an end of sequence; OpenAI's own API does not know it."
    ),
]
PrefixCache = Annotated[
    bool, typer.Option("--prefix-cache", help="Let a Veneer server use its prefix cache.")
]
Timeout = Annotated[str, typer.Option(help="A request that takes longer has failed.")]
Workers = Annotated[
    int, typer.Option(help="Processes that send; 0: as the rate needs.", min=0, max=64)
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
    """The load that these options mean, still without adapters.

    Raises:
        BadOption: a text means nothing.
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
    """``a,b``; ``base`` alone stays a name: the base model is no name at all."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def numbers_of(option: str, text: str) -> tuple[int, ...]:
    """``1,8,32``; 0 is the base alone.

    Raises:
        BadOption: anything else.
    """
    parts = [part.strip() for part in text.split(",")] if text else []
    if not all(part.isdecimal() for part in parts):
        raise BadOption(f"{option} {text!r}: give numbers such as 8 or 1,8,32")
    return tuple(int(part) for part in parts)
