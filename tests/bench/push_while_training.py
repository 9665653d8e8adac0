"""Measure how running streams are affected by checkpoints published during training:
``python -m tests.bench.push_while_training``.

It starts a server, trains on the sql recipe's data in a separate process and publishes every
few steps. Meanwhile one stream after another runs on the base, and one after another on the
newest revision. Each answer must be whole and name a published revision. ITL is reported
separately within publications (from the end of the training step's copy until the name is
updated, plus a second) and outside of them; training runs all the time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from veneer_client import AdapterEventKind, AsyncClient, Text
from veneer_client.local import LocalServer

_BEFORE_S = 1.0
_AFTER_S = 1.0
_PROMPT = Text("Once upon a time")


@dataclass
class _Seen:
    """What the streams received: arrival times of each answer, revisions, failures."""

    arrivals: list[list[float]] = field(default_factory=list)
    revisions: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


async def _stream(client: AsyncClient, adapter: str, seen: _Seen, stop: asyncio.Event) -> None:
    while not stop.is_set():
        times: list[float] = []
        stream = client.generate_stream(
            _PROMPT, adapter=adapter, max_tokens=64, temperature=0, ignore_eos=True
        )
        try:
            async for _ in stream:
                times.append(time.monotonic())
            seen.revisions.append(stream.final.provenance.revision)
            seen.arrivals.append(times)
        except Exception as error:
            seen.failures.append(f"{adapter or 'base'}: {error}")


async def _watch(
    client: AsyncClient, name: str, published: dict[str, float], first: asyncio.Event
) -> None:
    new = (AdapterEventKind.PUBLISHED, AdapterEventKind.REPLACED)
    async for event in client.watch():
        adapter = event.adapter
        if adapter is not None and adapter.name == name and event.kind in new:
            published.setdefault(adapter.revision, time.monotonic())
            first.set()


async def _train(scratch: Path, address: str, base: str, steps: int, every: int) -> None:
    tool = str(Path(sys.executable).with_name("veneer-train"))
    data = scratch / "data"
    for arguments in (
        ["data", "sql", "--out", str(data)],
        [
            "train",
            "--preset",
            "quick",
            "--base",
            base,
            "--push",
            address,
            *("--name", "growing", "--push-every", str(every)),
            *("--set", f"data.train={data / 'train.jsonl'}", "--set", "data.val_fraction=0"),
            *("--set", f"output.dir={scratch / 'growing'}", "--set", f"train.steps={steps}"),
            *("--set", "train.batch=2", "--set", "output.save_every=0"),
        ],
    ):
        process = await asyncio.create_subprocess_exec(tool, *arguments)
        if await process.wait():
            raise SystemExit(f"veneer-train {arguments[0]} failed")


async def _measure(server: LocalServer, scratch: Path, publishes: int, every: int) -> None:
    tool = str(Path(sys.executable).with_name("veneer-server"))
    path = await asyncio.create_subprocess_exec(
        tool, "model", "path", "smollm2-135m", stdout=asyncio.subprocess.PIPE
    )
    base = (await path.communicate())[0].decode().strip()
    on_base, on_newest, stop = _Seen(), _Seen(), asyncio.Event()
    published: dict[str, float] = {}
    any_published = asyncio.Event()
    async with AsyncClient(server.address) as client:
        watching = asyncio.create_task(_watch(client, "growing", published, any_published))
        training = asyncio.create_task(
            _train(scratch, server.address, base, publishes * every, every)
        )
        first = asyncio.create_task(_stream(client, "", on_base, stop))
        waiting = asyncio.create_task(any_published.wait())
        await asyncio.wait((training, waiting), return_when=asyncio.FIRST_COMPLETED)
        second = asyncio.create_task(_stream(client, "growing", on_newest, stop))
        await training
        stop.set()
        await asyncio.gather(first, second)
        watching.cancel()
    _report(on_base, on_newest, published)


def _report(on_base: _Seen, on_newest: _Seen, published: dict[str, float]) -> None:
    unknown = set(on_newest.revisions) - set(published)
    moments = sorted(published.values())
    gaps, inside = _gaps([*on_base.arrivals, *on_newest.arrivals], moments)
    during, outside = gaps[inside], gaps[~inside]
    found = {
        "published": len(published),
        "answers": len(on_base.arrivals) + len(on_newest.arrivals),
        "failures": len(on_base.failures) + len(on_newest.failures),
        "revisions that answered": len(set(on_newest.revisions)),
        "answers of unknown revisions": len(unknown),
        "between tokens, ms p50/p99/longest, training alone": _spread(outside),
        "beside a publication": _spread(during),
        "p99 ratio": round(float(np.quantile(during, 0.99) / np.quantile(outside, 0.99)), 3),
        "longest beside a publication, in median steps": round(
            float(during.max() / np.median(outside)), 2
        ),
        "longest else, in median steps": round(float(outside.max() / np.median(outside)), 2),
    }
    print(json.dumps(found, indent=2))
    for failure in (*on_base.failures, *on_newest.failures):
        print(failure)
    if unknown or found["failures"]:
        raise SystemExit(1)


def _gaps(
    arrivals: Sequence[Sequence[float]], moments: Sequence[float]
) -> tuple[
    np.ndarray[tuple[int], np.dtype[np.float64]], np.ndarray[tuple[int], np.dtype[np.bool_]]
]:
    gaps, inside = [], []
    for times in arrivals:
        for before, after in pairwise(times):
            gaps.append(after - before)
            inside.append(
                any(before <= m + _AFTER_S and after >= m - _BEFORE_S for m in moments)
            )
    return np.array(gaps), np.array(inside, dtype=np.bool_)


def _spread(gaps: np.ndarray[tuple[int], np.dtype[np.float64]]) -> str:
    p50, p99 = np.quantile(gaps, [0.5, 0.99])
    return f"{1e3 * p50:.1f} / {1e3 * p99:.1f} / {1e3 * gaps.max():.1f} ({len(gaps)})"


def main() -> None:
    """Measure, print, and fail if an answer is incomplete."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--publishes", type=int, default=20)
    parser.add_argument("--every", type=int, default=3, help="steps between publications")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="veneer-bench-") as scratch:
        server = LocalServer()
        try:
            asyncio.run(_measure(server, Path(scratch), given.publishes, given.every))
        finally:
            server.stop()


if __name__ == "__main__":
    main()
