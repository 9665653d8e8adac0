"""Parse a scenario's ``--lose``, ``--drain``, ``--partition`` and ``--publish`` options."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from veneer_loadtest.errors import BadOption
from veneer_loadtest.simulation.scenario import Drain, Happening, Lose, Partition, Publish

FORMS: Final = {
    "lose": "REPLICA@SECONDS, or REPLICA@SECONDS+SECONDS if it comes back",
    "drain": "REPLICA@SECONDS",
    "partition": "SECONDS+SECONDS",
    "publish": "ADAPTER@SECONDS",
}


def parse_happenings(kind: str, texts: Iterable[str] | None) -> list[Happening]:
    """Parse happenings of one kind, a key of `FORMS`.

    Raises:
        BadOption: a text is not of its form.
    """
    parse = _PARSERS[kind]
    found = []
    for text in texts or ():
        try:
            found.append(parse(text))
        except ValueError as error:
            raise BadOption(
                f"--{kind} {text}: give {FORMS[kind]}", metadata={"field": kind}
            ) from error
    return found


def _lose(text: str) -> Lose:
    number, when = text.split("@")
    at, _, back = when.partition("+")
    return Lose(_time(at), int(number), _time(back) if back else 0.0)


def _drain(text: str) -> Drain:
    number, at = text.split("@")
    return Drain(_time(at), int(number))


def _partition(text: str) -> Partition:
    at, seconds = text.split("+")
    return Partition(_time(at), _time(seconds))


def _publish(text: str) -> Publish:
    number, at = text.split("@")
    return Publish(_time(at), int(number))


def _time(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < 1e9:
        raise ValueError(text)
    return seconds


_PARSERS: Final[dict[str, Callable[[str], Happening]]] = {
    "lose": _lose,
    "drain": _drain,
    "partition": _partition,
    "publish": _publish,
}
