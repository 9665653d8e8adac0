"""One base model, two adapters, one prompt answered three ways at the same time.

Starts a server of its own on free ports, publishes the example adapters, streams
three answers side by side, shows which weights answered and what a swap costs, and
stops the server. Run it by ``make demo``, or ``python examples/demo.py``.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from veneer_client import AsyncClient, Chat, GenerationEnd, VeneerError
from veneer_client.local import LocalServer

ADAPTERS = Path(__file__).parent / "adapters"
NAMES = ("chat", "code")
PROMPT = "Write a function that sorts words by length."
MAX_TOKENS = 64

console = Console(highlight=False)


@dataclass
class Answer:
    """One of the three answers, growing."""

    title: str
    adapter: str
    text: str = ""
    end: GenerationEnd | None = field(default=None)


def main() -> None:
    """The whole demonstration."""
    began = time.perf_counter()
    console.print("starting a server ...", style="dim")
    # Not in a thread beside the event loop: there Ctrl-C could not end it.
    server = LocalServer()
    try:
        console.print(escape(server.ready_line), style="dim", soft_wrap=True)
        asyncio.run(show(server.address))
    finally:
        status = server.stop()
    took = time.perf_counter() - began
    console.print(f"server stopped with status {status}; {took:.0f} s in all", style="dim")
    if status:
        raise SystemExit(f"the server should have stopped with status 0, not {status}")


async def show(address: str) -> None:
    """Publish the adapters, and let them answer."""
    async with AsyncClient(address) as client:
        for name in NAMES:
            pushed = await client.push(ADAPTERS / name, name)
            size = pushed.adapter.size / 2**20
            console.print(f"published {pushed.adapter.short} ({size:.1f} MiB)")
        await answer_side_by_side(client)
        await show_swaps(client)


async def answer_side_by_side(client: AsyncClient) -> None:
    """Stream base, chat and code in one batch, then say which weights answered."""
    console.print(f"\n[bold]prompt:[/bold] {PROMPT}\n")
    answers = [Answer("base model", ""), *(Answer(f"adapter {name}", name) for name in NAMES)]
    if console.is_terminal:
        with Live(console=console, refresh_per_second=12, get_renderable=lambda: side(answers)):
            await asyncio.gather(*(stream(client, answer) for answer in answers))
    else:
        await asyncio.gather(*(stream(client, answer) for answer in answers))
        for answer in answers:
            for line in answer.text.strip().splitlines():
                print(f"{answer.adapter or 'base':>5} | {line}")
            print()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("answered by", "revision", "weights digest", "found in", "first token"):
        table.add_column(column, no_wrap=True)
    for answer in answers:
        if answer.end is not None:
            place = answer.end.provenance
            table.add_row(
                place.adapter or place.base_model,
                place.revision[:12] or "-",
                place.weights_digest[:12] or "-",
                place.tier.value if place.tier else "-",
                f"{place.timings.time_to_first_token_s * 1e3:.0f} ms",
            )
    console.print(table)


async def stream(client: AsyncClient, answer: Answer) -> None:
    """Let one answer grow."""
    call = client.generate_stream(
        Chat.user(PROMPT), adapter=answer.adapter, temperature=0.0, max_tokens=MAX_TOKENS
    )
    async for chunk in call:
        answer.text += chunk.text
    answer.end = call.final


def side(answers: list[Answer]) -> Columns:
    """Three columns as wide as the terminal."""
    width = max(24, console.width // len(answers) - 1)
    return Columns(
        [
            Panel(escape(answer.text), title=answer.title, width=width, height=16)
            for answer in answers
        ],
        padding=(0, 0),
    )


async def show_swaps(client: AsyncClient) -> None:
    """For each adapter: the first token from disk, then from the device."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("swap to")
    for column in ("load from disk", "first token, cold", "first token, warm"):
        table.add_column(column, justify="right", no_wrap=True)
    for name in NAMES:
        await client.evict(name)
        cold, load = await first_token(client, name)
        warm, _ = await first_token(client, name)
        table.add_row(name, *(f"{seconds * 1e3:.0f} ms" for seconds in (load, cold, warm)))
    console.print()
    console.print(table)


async def first_token(client: AsyncClient, adapter: str) -> tuple[float, float]:
    """Seconds to the first token, and those of them spent loading the adapter."""
    answer = await client.generate(Chat.user(PROMPT), adapter=adapter, max_tokens=1)
    timings = answer.provenance.timings
    return timings.time_to_first_token_s, timings.adapter_load_s


def run() -> None:
    """Entry: errors are one line, and a SIGTERM stops the server too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    except VeneerError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    run()
