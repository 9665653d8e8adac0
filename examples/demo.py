"""Demo of one base with three adapters: side by side, judged by running answers, swapped.

Starts a server of its own on free ports, publishes the example adapters, streams answers of
base and adapters in one batch, shows which weights gave them, counts right answers to tasks
that no training saw (SQL is executed, code is run against tests), shows what a swap costs, and
stops the server. The exit status is 0 if all of that worked, and the ``sql`` adapter was right
more often than its base. Run it by ``make demo``, or ``python examples/demo.py``.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from veneer_client import AsyncClient, Chat, GenerationEnd, VeneerError
from veneer_client.local import LocalServer
from veneer_registry.errors import Unimplemented
from veneer_registry.screen import Screen
from veneer_train.labs.answers import (
    ChatTask,
    NotHeldOut,
    TaskSet,
    ask_all,
    chat_form,
    code_tasks,
    prompt_for,
    sql_tasks,
    telling,
    verdicts,
)
from veneer_train.sandbox import DESCRIPTION

ADAPTERS = Path(__file__).parent / "adapters"
NAMES = ("chat", "code", "sql")
TOY = """\
The bundled base is a toy of 135 M parameters (SmolLM2-135M-Instruct): it shows what the server
does, not what a model can do."""
REAL_BASE = "veneer-server --base Qwen/Qwen3-1.7B --kv-cache-bytes 4G"
NEXT = f"""\
A real base (4 GB, downloaded from the Hugging Face hub at the first start):
  .venv/bin/{REAL_BASE}
All tasks, not only the first ones: make claims"""
SHOWN = {"sql": 2, "chat": 1}
"""How many tasks of each adapter are answered side by side: the first ones, not chosen."""
COUNTS = {"sql": 12, "code": 6, "chat": 4}
"""How many tasks of each adapter are counted: the first ones, not chosen."""
LONGEST = 128
"""Most tokens of a counted answer."""

console = Screen(highlight=False)


@dataclass
class Answer:
    """One answer, filled in as it streams."""

    asked: TaskSet
    number: int
    adapter: str
    text: str = ""
    end: GenerationEnd | None = field(default=None)

    @property
    def task(self) -> ChatTask:
        return self.asked.tasks[self.number]

    @property
    def verdict(self) -> str:
        """The verdict on the whole answer, in words."""
        try:
            right = self.task.right(self.text)
        except Unimplemented:
            return "not run"
        if self.asked.form:
            return "right form" if right else "wrong form"
        return "right" if right else "wrong"

    @property
    def title(self) -> str:
        return f"adapter {self.adapter}" if self.adapter else "base model"


def main() -> None:
    """The whole demonstration."""
    began = time.perf_counter()
    console.print(TOY, markup=False, soft_wrap=True)
    console.print("starting a server ...", style="dim")
    # Not in a thread of the event loop, where Ctrl-C could not end it.
    server = LocalServer(told=show_start)
    try:
        console.print(escape(server.ready_line), style="dim", soft_wrap=True)
        sets = first_tasks()
        won = asyncio.run(show(server.address, sets))
    finally:
        status = server.stop()
    took = time.perf_counter() - began
    console.print(f"server stopped with status {status} after {took:.0f} s", style="dim")
    if status:
        raise SystemExit(f"the server exited with status {status} instead of 0")
    console.print(NEXT, markup=False, soft_wrap=True)
    if not won:
        raise SystemExit("the sql adapter did not solve more tasks than its base")


def first_tasks() -> list[TaskSet]:
    """The first tasks of each set.

    Raises:
        NotHeldOut: an adapter was trained with other data than its recipe makes.
    """
    found = (sql_tasks(ADAPTERS), code_tasks(), chat_form(ADAPTERS))
    return [
        replace(each.first(COUNTS[each.adapter]), max_tokens=min(each.max_tokens, LONGEST))
        for each in found
    ]


def show_start(line: str) -> None:
    """Print a line of the server's log if it is about a slow step of the start."""
    if line.endswith(" so far") or " so far, " in line or ": done in " in line:
        console.print(escape(line), style="dim", soft_wrap=True)


async def show(address: str, sets: Sequence[TaskSet]) -> bool:
    """Publish the adapters and let them answer; return whether ``sql`` beats its base."""
    async with AsyncClient(address) as client:
        for name in NAMES:
            pushed = await client.push(ADAPTERS / name, name)
            size = pushed.adapter.size / 2**20
            console.print(f"published {pushed.adapter.short} ({size:.1f} MiB)")
        await answer_side_by_side(client, sets)
        won = await show_counts(client, sets)
        await show_swaps(client)
    return won


async def answer_side_by_side(client: AsyncClient, sets: Sequence[TaskSet]) -> None:
    """Stream some answers in one batch; show which weights gave each, and its verdict."""
    groups = [
        [Answer(asked, number, name) for name in ("", asked.adapter)]
        for asked in sets
        for number in range(SHOWN.get(asked.adapter, 0))
    ]
    everyone = [answer for group in groups for answer in group]
    if console.is_terminal:
        with Live(console=console, refresh_per_second=12, get_renderable=lambda: side(groups)):
            await asyncio.gather(*(stream(client, answer) for answer in everyone))
    else:
        async with telling("answering side by side", len(everyone)) as one:
            await asyncio.gather(*(stream(client, answer, one) for answer in everyone))
        for group in groups:
            print(f"\nprompt: {group[0].task.text}\n")
            for answer in group:
                for line in answer.text.strip().splitlines():
                    print(f"{answer.adapter or 'base':>5} | {line}")
                print()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in (
        "answered by",
        "revision",
        "weights digest",
        "found in",
        "first token",
        "verdict",
    ):
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
                answer.verdict,
            )
    console.print(table)


async def show_counts(client: AsyncClient, sets: Sequence[TaskSet]) -> bool:
    """Count right answers to tasks that no training saw; return whether ``sql`` beats its
    base."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("counted")
    for column in ("base", "adapter"):
        table.add_column(column, justify="right", no_wrap=True)
    notes = []
    won = False
    console.print()
    for asked in sets:
        many = len(asked.tasks)
        async with telling(f"counting {asked.adapter}", 2 * many) as one:
            answers = await ask_all(client, asked, one)
            try:
                base, own = [
                    sum(await asyncio.to_thread(verdicts, asked, texts))
                    for texts in (answers.base, answers.adapter)
                ]
                cells = (f"{base} of {many}", f"{own} of {many}")
            except Unimplemented as refused:
                base, own = 0, 0
                cells = ("not run", "not run")
                notes.append(refused.message)
        if asked.adapter == "sql":
            won = own > base
        hint = f' The base is also told: "{asked.hint}"' if asked.hint else ""
        table.add_row(f"{asked.adapter}: {asked.counted}", *cells)
        notes.append(f"{asked.adapter}: {asked.about}.{hint}")
    console.print(table)
    for note in notes:
        console.print(escape(note), style="dim", soft_wrap=True)
    console.print(escape(f"sandbox for code: {DESCRIPTION}"), style="dim", soft_wrap=True)
    return won


async def stream(
    client: AsyncClient, answer: Answer, done: Callable[[], object] = lambda: None
) -> None:
    """Stream one answer."""
    call = client.generate_stream(
        prompt_for(answer.asked, answer.task, answer.adapter),
        adapter=answer.adapter,
        temperature=0.0,
        max_tokens=answer.asked.max_tokens,
    )
    async for chunk in call:
        answer.text += chunk.text
    answer.end = call.final
    done()


def side(groups: list[list[Answer]]) -> Group:
    """Show each prompt, and beneath it its answers in columns across the terminal."""
    parts: list[RenderableType] = []
    for group in groups:
        width = max(24, console.width // len(group) - 1)
        parts.append(f"\n[bold]prompt:[/bold] {escape(group[0].task.text)}\n")
        panels = [
            Panel(escape(answer.text), title=answer.title, width=width, height=8)
            for answer in group
        ]
        parts.append(Columns(panels, padding=(0, 0)))
    return Group(*parts)


async def show_swaps(client: AsyncClient) -> None:
    """Show each adapter's TTFT: first loaded from disk, then found on the device."""
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
    """Return the seconds to the first token, and how many of them loaded the adapter."""
    answer = await client.generate(Chat.user("Ahoy!"), adapter=adapter, max_tokens=1)
    timings = answer.provenance.timings
    return timings.time_to_first_token_s, timings.adapter_load_s


def run() -> None:
    """Entry point: an error is one line, and a SIGTERM stops the server, too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    except (VeneerError, NotHeldOut) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        print(
            "\nstopped: the server and its adapters are removed. The packages in .venv, "
            "the imported base and the compiled kernels are kept; `make demo` resumes from "
            "there.",
            file=sys.stderr,
        )
        raise SystemExit(130) from None


if __name__ == "__main__":
    run()
