"""Measure how soon followers have a change: ``python -m tests.bench.publish_to_live``.

A registry and two followers as whole front processes over real sockets (FAKE: their engines
compute nothing). Prints milliseconds, median and range: from the answer of a push until both
followers have it, the same for a label change, and from the end of a partition of two seconds,
during which something was pushed, until both have that.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

import grpc
from veneer_proto.v1 import adapters_pb2
from veneer_server.models.source import import_bundled

from tests.places import cache_dir
from tests.scale.proxy import Proxy
from tests.unit.server.rpc.front_harness import Front, make_adapter, running

_AWAY_S: Final = 2.0


async def _has(follower: Front, revision: str, labels: dict[str, str]) -> None:
    """Wait until a follower's record has these."""
    while True:
        asked = adapters_pb2.GetAdapterRequest(name="one")
        try:
            found = (await follower.adapters.GetAdapter(asked)).adapter
        except grpc.aio.AioRpcError:  # it does not know the name yet, or is away
            await asyncio.sleep(0.001)
            continue
        if found.revision == revision and dict(found.labels) == labels:
            return


async def _both(followers: list[Front], revision: str, labels: dict[str, str]) -> float:
    began = time.monotonic()
    await asyncio.gather(*(_has(each, revision, labels) for each in followers))
    return 1000 * (time.monotonic() - began)


async def bench(rounds: int) -> None:
    """Measure and print."""
    found: dict[str, list[float]] = {"push": [], "label": [], "heal": []}
    async with AsyncExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="veneer-live-")))
        base = import_bundled(cache_dir()).path
        registry = await stack.enter_async_context(
            running(base, cache_dir(), work / "registry", role="registry")
        )
        proxies, followers = [], []
        for name in ("a", "b"):
            proxy = await stack.enter_async_context(Proxy(registry.addresses["grpc"]))
            following: dict[str, Any] = {"role": "engine", "registry": proxy.address}
            proxies.append(proxy)
            followers.append(
                await stack.enter_async_context(
                    running(base, cache_dir(), work / name, **following)
                )
            )
        for at in range(rounds):
            adapter = make_adapter(work / str(at), seed=at)
            pushed = await registry.push(adapter, "one", allow_replace=True)
            revision = pushed.adapter.revision
            found["push"].append(await _both(followers, revision, {}))
            labels = {"n": str(at)}
            change = adapters_pb2.UpdateAdapterRequest(name="one", labels=labels)
            await registry.adapters.UpdateAdapter(change)
            found["label"].append(await _both(followers, revision, labels))
        for at in range(rounds // 4):
            for proxy in proxies:
                proxy.refuse()
            adapter = make_adapter(work / f"away-{at}", seed=1000 + at)
            pushed = await registry.push(adapter, "one", allow_replace=True)
            await asyncio.sleep(_AWAY_S)
            for proxy in proxies:
                proxy.heal()
            found["heal"].append(await _both(followers, pushed.adapter.revision, {}))
    for what, values in found.items():
        print(
            f"{what:6} {statistics.median(values):7.1f} ms "
            f"({min(values):.1f} to {max(values):.1f}), {len(values)} times"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.publish_to_live", description=__doc__
    )
    parser.add_argument("--rounds", type=int, default=40)
    asyncio.run(bench(parser.parse_args().rounds))
