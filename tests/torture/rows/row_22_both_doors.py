"""Row 22: random requests over gRPC and HTTP, whole and streamed.

All four answers must have the text, the usage, the finish reasons and the log-probabilities
that a plain reference computes from the tokens. Emoji and other characters are cut at every
token, by `max_tokens` and by stop strings; some bytes never become a character; tokens are
randomly split into outputs. There are prompts as text, prompts as ids that begin and end within
characters, several prompts at once, and chats; adapters, one with a template; several samples;
and echo. The real front process runs on real sockets, with a FAKE engine.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import AbstractAsyncContextManager
from types import ModuleType
from typing import Final

from veneer_server.models.source import import_bundled
from veneer_server.openai import chat, choices
from veneer_server.rpc import inference_service
from veneer_server.serving import generation, samples
from veneer_server.text import detokenizer

from tests.places import cache_dir
from tests.planted import planted
from tests.torture.doors.judge import Doors, Report, open_doors
from tests.torture.row import Control, Outcome, Scale

ROW = 22
TITLE = "both doors"
BAR: Final = "all four answers are what a plain reference says"

PLANTED: Final[tuple[tuple[str, ModuleType, str, str], ...]] = (
    (
        "a character that max_tokens cuts is dropped",
        detokenizer,
        'return self._decoder.decode(b"", final=True)',
        'return self._decoder.decode(b"", final=False)',
    ),
    (
        "text that looked like a stop string is lost at the end",
        samples,
        "text += stops.flush()",
        'text += ""',
    ),
    (
        "a stream over HTTP has no scores for a token without text",
        chat,
        "if not deltas and (tokens or (ids and piece.delta.tokens)):",
        "if not deltas and (ids and piece.delta.tokens):",
    ),
    (
        "a stream over gRPC repeats the prompt",
        inference_service,
        'prefixes[delta.index] = ""',
        'prefixes[delta.index] += ""',
    ),
    (
        "tokens past a stop string are counted",
        generation,
        "self._count(sample, output, len(delta.tokens), now)",
        "self._count(sample, output, len(output.tokens), now)",
    ),
    (
        "broken characters do not move the offsets of tokens",
        choices,
        "at = self._at + len(first) - 1",
        "at = self._at",
    ),
)


def run(scale: Scale) -> Outcome:
    """Send 10,000 requests, or 150."""
    report = asyncio.run(_asked(scale, scale.pick(150, 10_000)))
    return Outcome(
        figure=(
            f"{report.cases} requests, each four times: {report.choices} choices, "
            f"{report.tokens} tokens; {report.cut} end in a cut character, {report.stopped} "
            f"at a stop string"
        ),
        bar=BAR,
        failures=tuple(report.failures),
    )


def controls(scale: Scale) -> list[Control]:
    """Plant bugs; each must be noticed within 150 requests."""
    return asyncio.run(_controls(scale))


async def _asked(scale: Scale, count: int) -> Report:
    async with _doors(scale) as doors:
        return await doors.ask(scale.random("doors"), count)


async def _controls(scale: Scale) -> list[Control]:
    found = []
    async with _doors(scale) as doors:
        for name, module, old, new in PLANTED:
            with planted(module, old, new):
                report = await doors.ask(scale.random(name), 150, until_one=True)
            found.append(Control.of(name, Outcome("", BAR, failures=tuple(report.failures))))
    return found


def _doors(scale: Scale) -> AbstractAsyncContextManager[Doors]:
    logging.getLogger("veneer_server").addHandler(logging.NullHandler())
    base = import_bundled(cache_dir()).path
    return open_doors(base, scale.folder("doors"), scale.random("splits"))
