"""One base model, three adapters, two prompts answered five ways at the same time.

Starts a server of its own on free ports, publishes the example adapters, streams the answers of
base and adapters side by side, shows which weights answered, what each adapter gained over the
base on data it never saw, and what a swap costs, and stops the server. Run it by ``make demo``,
or ``python examples/demo.py``.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from veneer_client import AsyncClient, Chat, GenerationEnd, VeneerError
from veneer_client.local import LocalServer
from veneer_registry.screen import Screen

ADAPTERS = Path(__file__).parent / "adapters"
NAMES = ("chat", "code", "sql")
PROMPT = "Write a function that sorts words by length."
QUESTION = """\
CREATE TABLE theatres (id INTEGER PRIMARY KEY, name TEXT, city TEXT, seats INTEGER);
CREATE TABLE plays (id INTEGER PRIMARY KEY, title TEXT, genre TEXT, acts INTEGER, \
premiere TEXT, theatre_id INTEGER);

Show the title of the 3 plays with the highest number of acts."""
ASKED = ((PROMPT, ("", "chat", "code")), (QUESTION, ("", "sql")))
"""Each prompt with the names that answer it; "" is the base."""
MAX_TOKENS = 64

console = Screen(highlight=False)


@dataclass
class Answer:
    """One of the answers, growing."""

    prompt: str
    adapter: str
    text: str = ""
    end: GenerationEnd | None = field(default=None)

    @property
    def title(self) -> str:
        return f"adapter {self.adapter}" if self.adapter else "base model"


def main() -> None:
    """The whole demonstration."""
    began = time.perf_counter()
    console.print("starting a server ...", style="dim")
    # Not in a thread beside the event loop: there Ctrl-C could not end it.
    server = LocalServer(told=show_start)
    try:
        console.print(escape(server.ready_line), style="dim", soft_wrap=True)
        asyncio.run(show(server.address))
    finally:
        status = server.stop()
    took = time.perf_counter() - began
    console.print(f"server stopped with status {status}; {took:.0f} s in all", style="dim")
    if status:
        raise SystemExit(f"the server should have stopped with status 0, not {status}")


def show_start(line: str) -> None:
    """What takes long of a start, from the server's log."""
    if line.endswith(" so far") or " so far, " in line or ": done in " in line:
        console.print(escape(line), style="dim", soft_wrap=True)


async def show(address: str) -> None:
    """Publish the adapters, and let them answer."""
    async with AsyncClient(address) as client:
        for name in NAMES:
            pushed = await client.push(ADAPTERS / name, name)
            size = pushed.adapter.size / 2**20
            console.print(f"published {pushed.adapter.short} ({size:.1f} MiB)")
        await answer_side_by_side(client)
        show_gains()
        await show_swaps(client)


async def answer_side_by_side(client: AsyncClient) -> None:
    """Stream all answers in one batch, then say which weights gave them."""
    groups = [[Answer(prompt, name) for name in names] for prompt, names in ASKED]
    everyone = [answer for group in groups for answer in group]
    if console.is_terminal:
        with Live(console=console, refresh_per_second=12, get_renderable=lambda: side(groups)):
            await asyncio.gather(*(stream(client, answer) for answer in everyone))
    else:
        await asyncio.gather(*(stream(client, answer) for answer in everyone))
        for group in groups:
            print(f"\nprompt: {group[0].prompt}\n")
            for answer in group:
                for line in answer.text.strip().splitlines():
                    print(f"{answer.adapter or 'base':>5} | {line}")
                print()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("answered by", "revision", "weights digest", "found in", "first token"):
        table.add_column(column, no_wrap=True)
    for answer in everyone:
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


def show_gains() -> None:
    """What training changed, as each adapter's manifest tells it."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("on unseen data", no_wrap=True)
    for column in ("loss: base", "adapter", "right: base", "adapter"):
        table.add_column(column, justify="right", no_wrap=True)
    for name in NAMES:
        manifest = json.loads((ADAPTERS / name / "training_manifest.json").read_text("utf-8"))
        metrics = manifest["metrics"]
        (task,) = (
            key.removeprefix("val_").removesuffix("_after_low")
            for key in metrics
            if key.endswith("_after_low")
        )
        table.add_row(
            name,
            *(f"{metrics[f'val_loss_{when}']:.2f}" for when in ("before", "after")),
            *(f"{metrics[f'val_{task}_{when}']:.0%}" for when in ("before", "after")),
        )
    console.print()
    console.print(table)


async def stream(client: AsyncClient, answer: Answer) -> None:
    """Let one answer grow."""
    call = client.generate_stream(
        Chat.user(answer.prompt),
        adapter=answer.adapter,
        temperature=0.0,
        max_tokens=MAX_TOKENS,
    )
    async for chunk in call:
        answer.text += chunk.text
    answer.end = call.final


def side(groups: list[list[Answer]]) -> Group:
    """Each prompt, and beneath it its answers in columns as wide as the terminal."""
    parts: list[RenderableType] = []
    for group in groups:
        width = max(24, console.width // len(group) - 1)
        parts.append(f"\n[bold]prompt:[/bold] {escape(group[0].prompt)}\n")
        panels = [
            Panel(escape(answer.text), title=answer.title, width=width, height=12)
            for answer in group
        ]
        parts.append(Columns(panels, padding=(0, 0)))
    return Group(*parts)


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
