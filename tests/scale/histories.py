"""Random histories of a registry and its followers over real sockets.

    python -m tests.scale.histories                       200 histories
    python -m tests.scale.histories --count 20 --first 7  20 others, from seed 7
    python -m tests.scale.histories --plant lost          must fail, as with order or backup

Each history has a registry on disk, its service on a real port, three followers with a disk
cache each, and before each follower a proxy that cuts, freezes, slows and refuses connections.
Meanwhile the registry publishes, deletes, rolls back, restarts, and is restored from a backup.
No follower may serve a revision that was never current. After a quiet time all followers must
agree with the registry and be able to fetch.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # before gRPC is imported

import grpc
from veneer_proto.v1 import replication_pb2_grpc
from veneer_registry.errors import VeneerError
from veneer_registry.registry import Registry
from veneer_server.config import load_config
from veneer_server.follower.follower import Follower
from veneer_server.follower.view import View
from veneer_server.replication.feed import Feed
from veneer_server.replication.replicas import Replicas, Wait
from veneer_server.rpc.replication_service import ReplicationService

from tests.scale.planted import PLANTED
from tests.scale.proxy import Proxy
from tests.unit.registry.kit import BASE, make_adapter, push

NAMES: Final = ("alpha", "beta", "gamma", "delta")
FOLLOWERS: Final = 3
CONTENTS: Final = 6
STEPS: Final = 40
HEARTBEAT_S: Final = 0.05
LEASE_S: Final = 0.5
QUIET_S: Final = 10.0
"""Seconds that agreement may take on a busy machine; it usually takes a tenth of a second."""


@dataclass
class Origin:
    """A registry, its service, and every revision that each of its names ever had."""

    folder: Path
    contents: list[Path]
    make_feed: type[Feed] = Feed
    registry: Registry = field(init=False)
    feed: Feed = field(init=False)
    replicas: Replicas = field(init=False)
    server: Any = None
    address: str = ""
    ever: set[tuple[str, str]] = field(default_factory=set)
    backed_up: bool = False

    async def start(self) -> None:
        self.registry = await asyncio.to_thread(Registry.open, self.folder / "data", BASE)
        self.feed, self.replicas = self.make_feed(kept=16), Replicas(lease_s=LEASE_S)
        self.feed.add("default", self.registry)
        service: Any = ReplicationService(
            self.feed,
            self.replicas,
            lambda name: self.registry if name == "default" else None,
            heartbeat_s=HEARTBEAT_S,
        )
        self.server = grpc.aio.server()
        replication_pb2_grpc.add_ReplicationServiceServicer_to_server(service, self.server)
        port = self.server.add_insecure_port("127.0.0.1:0")
        await self.server.start()
        self.address = f"127.0.0.1:{port}"

    async def stop(self) -> None:
        self.feed.close()
        await self.server.stop(0)
        await asyncio.to_thread(self.registry.close)

    async def publish(self, name: str, content: Path) -> None:
        # Note it first: a follower may have it before this process hears of the publication.
        self.ever.add((name, await asyncio.to_thread(self._revision, content)))
        await asyncio.to_thread(push, self.registry, name, content, allow_replace=True)

    _revisions: dict[Path, str] = field(default_factory=dict)

    def _revision(self, content: Path) -> str:
        if content not in self._revisions:
            push(self.registry, "scratch", content, allow_replace=True)
            self._revisions[content] = self.registry.resolve("scratch").revision
            self.registry.delete("scratch")
        return self._revisions[content]

    async def delete(self, name: str) -> None:
        with contextlib.suppress(VeneerError):
            await asyncio.to_thread(self.registry.delete, name)

    async def roll_back(self, name: str) -> None:
        with contextlib.suppress(VeneerError):
            older = await asyncio.to_thread(self.registry.revisions, name)
            spec = f"{name}@{older[-1].ref.revision}"
            await asyncio.to_thread(self.registry.update, spec, current=True)

    async def back_up(self) -> None:
        await asyncio.to_thread(self.registry.close)
        copy = self.folder / "backup"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.folder / "data", copy)
        self.backed_up = True
        await self.server.stop(0)

    def put_back(self) -> None:
        shutil.rmtree(self.folder / "data")
        shutil.copytree(self.folder / "backup", self.folder / "data")

    def meanings(self) -> dict[str, str]:
        found = {}
        for name in NAMES:
            with contextlib.suppress(VeneerError):
                found[name] = self.registry.resolve(name).revision
        return found


@dataclass
class Replica:
    """A follower behind its proxy."""

    follower: Follower
    proxy: Proxy
    registry: Any

    def meanings(self) -> dict[str, str]:
        found = {name: self.registry.entry(name) for name in NAMES}
        return {name: entry.current.revision for name, entry in found.items() if entry}


async def _started(folder: Path, proxy: Proxy, seed: int, view: type[View]) -> Replica:
    config = load_config(
        {
            "role": "engine",
            "registry": proxy.address,
            "data_dir": str(folder),
            "cache_dir": str(folder / "cache"),
            # Room for only some of the contents: others are evicted and fetched again.
            "adapter_cache_bytes": "64KiB" if seed % 2 else "1MiB",
        },
        {},
    )
    follower = Follower(config, BASE, view=view)
    registry = await asyncio.to_thread(follower.open, folder, None)

    async def applied(*_: object) -> None:
        pass

    follower.start(applied, lambda digest: False)
    return Replica(follower, proxy, registry)


class History:
    """One history; see the module docstring."""

    def __init__(
        self,
        seed: int,
        folder: Path,
        contents: list[Path],
        view: type[View] = View,
        feed: type[Feed] = Feed,
    ) -> None:
        self.view = view
        self.seed = seed
        self.random = random.Random(seed)
        self.folder = folder
        self.origin = Origin(folder, contents, feed)
        self.replicas: list[Replica] = []
        self.wrong = ""
        self.fetched = self.refused = 0
        self.converged_s = 0.0

    async def run(self) -> None:
        """Run the history; raises AssertionError if it fails."""
        await self.origin.start()
        async with contextlib.AsyncExitStack() as stack:
            for number in range(FOLLOWERS):
                proxy = await stack.enter_async_context(Proxy(self.origin.address))
                folder = self.folder / f"follower{number}"
                replica = await _started(folder, proxy, self.seed + number, self.view)
                stack.push_async_callback(replica.follower.stop)
                self.replicas.append(replica)
            watching = asyncio.ensure_future(self._watch())
            stack.callback(watching.cancel)
            stack.push_async_callback(self.origin.stop)
            for _ in range(STEPS):
                await self._step()
                assert not self.wrong, self.wrong
            await self._agree()
            assert not self.wrong, self.wrong

    async def _watch(self) -> None:
        """Check all the time what the followers serve."""
        while True:
            for number, replica in enumerate(self.replicas):
                for name, revision in replica.meanings().items():
                    if (name, revision) not in self.origin.ever:
                        self.wrong = (
                            f"follower {number} serves {name}@{revision[:12]}, which was "
                            "never current"
                        )
            await asyncio.sleep(0.002)

    async def _step(self) -> None:
        draw, origin = self.random.random(), self.origin
        name, replica = self.random.choice(NAMES), self.random.choice(self.replicas)
        if draw < 0.40:
            await origin.publish(name, self.random.choice(origin.contents))
        elif draw < 0.46:
            await origin.delete(name)
        elif draw < 0.52:
            await origin.roll_back(name)
        elif draw < 0.68:
            self._spoil(replica.proxy)
        elif draw < 0.80:
            replica.proxy.heal()
        elif draw < 0.92:
            await self._ask(replica, name)
        elif draw < 0.94:
            await origin.stop()
            await self._restart()
        elif draw < 0.96:
            origin.feed.close()
            await origin.back_up()
            await self._restart()
        elif draw < 0.98 and origin.backed_up:
            await origin.stop()
            origin.put_back()
            await self._restart()
        await asyncio.sleep(self.random.choice([0, 0, 0.01, 0.05]))

    def _spoil(self, proxy: Proxy) -> None:
        match self.random.choice(["cut", "freeze", "refuse", "slow", "later"]):
            case "cut":
                proxy.cut()
            case "freeze":
                proxy.freeze()
            case "refuse":
                proxy.refuse()
            case "slow":
                proxy.delay_s = 0.02
            case "later":
                proxy.cut_after(self.random.randrange(1, 20_000))

    async def _restart(self) -> None:
        await self.origin.start()
        for replica in self.replicas:
            replica.proxy.target = self.origin.address

    async def _ask(self, replica: Replica, name: str) -> None:
        """Do as a request does: take a lease and fetch the weights, which are verified."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                try:
                    with replica.registry.acquire(name) as lease:
                        await replica.registry.present(lease.ref)
                        assert replica.registry.weights_folder(lease.ref).is_dir()
                        self.fetched += 1
                except VeneerError:
                    self.refused += 1

    async def _agree(self) -> None:
        for replica in self.replicas:
            replica.proxy.heal()
        began = time.monotonic()
        wanted = self.origin.meanings()
        while any(replica.meanings() != wanted for replica in self.replicas):
            if time.monotonic() - began > QUIET_S:
                found = [replica.meanings() for replica in self.replicas]
                raise AssertionError(f"they do not agree: {found}, and not {wanted}")
            assert not self.wrong, self.wrong
            await asyncio.sleep(0.005)
        self.converged_s = time.monotonic() - began
        reached = await self.origin.replicas.reached(
            self.origin.feed.sequence, Wait("all", QUIET_S)
        )
        assert reached is not None
        assert reached.enough, f"not all have told that they have it: {reached}"
        for replica in self.replicas:
            for name in wanted:
                with replica.registry.acquire(name) as lease:
                    await replica.registry.present(lease.ref)


def _quiet() -> None:
    """Disable logging: gRPC and the followers report every cut connection on standard error."""
    logging.disable(logging.CRITICAL)


async def _all(seeds: range, scratch: Path, view: type[View], feed: type[Feed]) -> int:
    contents = [make_adapter(scratch / f"content{n}", seed=n) for n in range(CONTENTS)]
    failed, slowest = 0, 0.0
    fetched = refused = 0
    for seed in seeds:
        folder = scratch / f"history{seed}"
        folder.mkdir()
        history = History(seed, folder, contents, view, feed)
        try:
            await history.run()
        except AssertionError as error:
            failed += 1
            print(f"seed {seed}: {error}", flush=True)
        slowest = max(slowest, history.converged_s)
        fetched, refused = fetched + history.fetched, refused + history.refused
        shutil.rmtree(folder, ignore_errors=True)
    print(
        f"{len(seeds)} histories, {failed} failed; {fetched} requests had their weights, "
        f"{refused} were refused; agreement took at most {slowest:.2f} s"
    )
    return failed


def main(arguments: list[str] | None = None) -> int:
    """Run histories; return 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="seed of the first one")
    parser.add_argument("--plant", choices=["lost", "order", "backup"])
    given = parser.parse_args(arguments)
    _quiet()
    view, feed = PLANTED.get(given.plant, (View, Feed))
    with tempfile.TemporaryDirectory(prefix="histories-") as scratch:
        seeds = range(given.first, given.first + given.count)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            return int(asyncio.run(_all(seeds, Path(scratch), view, feed)) > 0)


if __name__ == "__main__":
    sys.exit(main())
