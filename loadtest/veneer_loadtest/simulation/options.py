"""Options of a scenario that ``run`` and ``real`` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from veneer_loadtest.errors import BadOption
from veneer_loadtest.simulation.scenario import ROUTINGS, Routing

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
