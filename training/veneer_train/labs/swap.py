"""The lab on swapping: one 4-bit base and several adapters on a running server."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from matplotlib.figure import Figure
from veneer_client import AsyncClient, Text
from veneer_client.local import LocalServer

from veneer_train.labs.output import Lab, Row

PROMPT: Final = Text("Write one sentence about the sea.")
_TOKENS: Final = 24


def swap(
    adapters: Mapping[str, Path], *, server: str | None, repeats: int, seed: int, command: str
) -> Lab:
    """Measure the TTFT of the same adapter again, of another one in memory and of another one
    on disk; compare the answers of A, B and A again; measure the speed of all in one batch.

    Args:
        adapters: name -> folder; two or more.
        server: host:port; None: start one.
    """
    if server is not None:
        return asyncio.run(_swap(server, adapters, repeats, seed, command))
    with LocalServer() as own:
        return asyncio.run(_swap(own.address, adapters, repeats, seed, command))


async def _swap(
    address: str, adapters: Mapping[str, Path], repeats: int, seed: int, command: str
) -> Lab:
    async with AsyncClient(address) as client, _published(client, adapters) as names:
        a, b = names[:2]
        first, _ = await _ask(client, a)
        texts = [first, (await _ask(client, b))[0], (await _ask(client, a))[0]]
        rows: list[Row] = []
        for case in ("the same again", "another, in memory", "another, on disk"):
            times = [await _case(client, case, a, b) for _ in range(repeats)]
            rows.append(
                {
                    "case": case,
                    "first token, ms (median)": 1e3 * statistics.median(times),
                    "least": 1e3 * min(times),
                    "most": 1e3 * max(times),
                }
            )
        alone = await _speed(client, [a] * 4)
        mixed = await _speed(client, ["", *names, *names][:4])
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axis = figure.subplots()
    axis.bar(
        [r["case"] for r in rows],
        [r["first token, ms (median)"] for r in rows],
        color="#2563eb",
    )
    axis.set_ylabel("first token, ms")
    axis.grid(axis="y", alpha=0.3)
    same = "the same text" if texts[0] == texts[2] else "ANOTHER TEXT"
    return Lab(
        name="swap",
        title="Swapping adapters on one base",
        question=(
            "What does it cost to change the adapter of one resident base, and do answers stay "
            "their own? Asked one at a time, then all in one batch."
        ),
        rows=rows,
        plot=figure,
        says=[
            f"{a}, {b}, {a} again, greedily: {same} the second time, and {b} answers "
            f"{'otherwise' if texts[1] != texts[0] else 'the same'}.",
            f"Four streams of {a}: {alone:.1f} tokens/s; the base and {', '.join(names)} "
            f"mixed: {mixed:.1f}, {mixed / alone:.2f} times.",
        ],
        limits=[
            "One request at a time, few of them: `veneer-loadtest swap` measures pairs, "
            "separates a warm disk from a cold one, and measures the effect on running "
            "streams.",
        ],
        command=command,
        seed=seed,
        setting={"adapters": ", ".join(names), "repeats": repeats},
    )


@asynccontextmanager
async def _published(
    client: AsyncClient, adapters: Mapping[str, Path]
) -> AsyncIterator[Sequence[str]]:
    names = []
    try:
        for name, folder in adapters.items():
            await client.push(folder, f"lab-{name}", allow_replace=True)
            names.append(f"lab-{name}")
        yield names
    finally:
        for name in names:
            await client.delete(name)


async def _case(client: AsyncClient, case: str, a: str, b: str) -> float:
    await client.activate(b)
    if case == "another, on disk":
        await client.evict(b)
    await _ask(client, a)
    _, seconds = await _ask(client, a if case == "the same again" else b)
    return seconds


async def _ask(client: AsyncClient, adapter: str) -> tuple[str, float]:
    """Return the text, and the TTFT in seconds."""
    began, first, text = time.perf_counter(), None, ""
    stream = client.generate_stream(
        PROMPT,
        adapter=adapter,
        max_tokens=_TOKENS,
        temperature=0,
        # A cached prompt would shorten the TTFT.
        use_prefix_cache=False,
    )
    async for chunk in stream:
        if first is None:
            first = time.perf_counter() - began
        text += chunk.text
    assert first is not None, "an answer has a first token or is an error"
    return text, first


async def _speed(client: AsyncClient, adapters: Sequence[str]) -> float:
    """Tokens per second of concurrent streams."""
    began = time.perf_counter()
    counts = await asyncio.gather(*(_count(client, adapter) for adapter in adapters))
    return sum(counts) / (time.perf_counter() - began)


async def _count(client: AsyncClient, adapter: str) -> int:
    answer = await client.generate(
        PROMPT, adapter=adapter, max_tokens=48, temperature=0, ignore_eos=True
    )
    return answer.usage.completion_tokens
