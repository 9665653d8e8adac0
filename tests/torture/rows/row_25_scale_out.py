"""Row 25: what scale-out promises, one after the other, on real servers.

    elsewhere   engines have weights that their registry has not: pushed at the other one, or
                after its folder was lost; with the store away they say UNAVAILABLE, not
                NOT_FOUND
    tenants     a tenant that one registry made is known to the other's engines, also after a
                restart
    recorded    a registry that is paused with the catalog's lock holds others up at most 30 s;
                what an engine has acknowledged is known after kill -9, without its registry

`tests.scale` has the servers, faults and bugs. All at once, at random, is
`tests.scale.two_registries`.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc

from tests.places import cache_dir
from tests.scale.cluster import Cluster, cluster
from tests.scale.nemesis import Step
from tests.scale.planted_servers import BUGS, program
from tests.scale.promises import judge
from tests.scale.two_registries import PROMPT, Failure, record
from tests.server_harness import read_files, request, upload_messages
from tests.tiny_llama import make_lora
from tests.torture.row import Control, Outcome, Scale

ROW = 25
TITLE = "promises of scale-out"
BAR = "0 broken; a paused registry holds others up at most 30 s"
_FORGETS = "what was acknowledged is not on the disk"
PLANTED = (
    ("elsewhere", "weights are looked for on the registry's own disk"),
    ("tenants", "tenants are looked for in the registry's own folder"),
    ("recorded", "a paused registry keeps the lock"),
    ("recorded", _FORGETS),
)
CHECKS = tuple(dict.fromkeys(check for check, _ in PLANTED))
_SOON_S = 15.0


class Round:
    """One cluster, and the checks on it."""

    def __init__(self, servers: Cluster, seed: int) -> None:
        self.servers, self.seed = servers, seed
        self.failures: list[str] = []
        self._pushed = 0

    async def run(self, checks: tuple[str, ...]) -> None:
        for check in checks:
            found = await getattr(self, check)()
            self.failures += [f"{check}: {each}" for each in found]

    async def _push(self, at: str, **metadata: str) -> str:
        """Push an adapter that nothing else has, under a name of its own, which is returned."""
        self._pushed += 1
        name = f"adapter-{self._pushed}"
        folder = self.servers.work / name
        files = read_files(make_lora(folder, seed=100 + self._pushed))
        server = self.servers.nodes[at].server
        assert server is not None
        pairs = tuple((key.replace("_", "-"), value) for key, value in metadata.items())
        await server.adapters.UploadAdapter(upload_messages(files, name), metadata=pairs)
        return name

    async def _ask(self, engine: str, name: str, **metadata: str) -> str:
        """ "" if the engine generates with an adapter, otherwise why not."""
        server = self.servers.nodes[engine].server
        assert server is not None
        pairs = tuple((key.replace("_", "-"), value) for key, value in metadata.items())
        wanted = request(prompt=PROMPT, adapter=name, stopping={"max_tokens": 1})
        try:
            await server.inference.Generate(wanted, timeout=10, metadata=pairs)
        except grpc.aio.AioRpcError as error:
            return str(Failure.of(error))
        return ""

    async def _soon(self, engine: str, name: str, **metadata: str) -> str:
        """As `_ask`, again and again for a while: a view may be behind."""
        end = time.monotonic() + _SOON_S
        why = await self._ask(engine, name, **metadata)
        while why and time.monotonic() < end:
            await asyncio.sleep(0.1)
            why = await self._ask(engine, name, **metadata)
        return why

    async def _lose(self, registry: str) -> None:
        node = self.servers.nodes[registry]
        await node.kill()
        await asyncio.to_thread(shutil.rmtree, node.folder)
        await self.servers.restart(registry)

    async def elsewhere(self) -> list[str]:
        """Engine 3 has no store of its own, and follows a."""
        found = []
        names = [await self._push("b") for _ in range(3)]
        if why := await self._soon("3", names[0]):
            found.append(f"pushed at the other registry: {why}")
        await self._lose("a")
        if why := await self._soon("3", names[1]):
            found.append(f"after the registry lost its folder: {why}")
        await asyncio.to_thread(self.servers.s3.fail, kind="refuse")
        why = await self._ask("3", names[2])
        if not why.startswith(("UNAVAILABLE", "DEADLINE_EXCEEDED")):
            found.append(f"while the store is away: {why or 'answered'}")
        await asyncio.to_thread(self.servers.s3.fail)
        if why := await self._soon("3", names[2]):
            found.append(f"after the store was away: {why}")
        return found

    async def tenants(self) -> list[str]:
        """Engine 4 follows b."""
        found = []
        name = await self._push("a", veneer_tenant="far")
        if why := await self._soon("4", name, veneer_tenant="far"):
            found.append(f"made at the other registry: {why}")
        await self._lose("b")
        await self.servers.nodes["4"].kill()
        await self.servers.nodes["4"].start()
        if why := await self._soon("4", name, veneer_tenant="far"):
            found.append(f"after both were started again: {why}")
        return found

    async def recorded(self) -> list[str]:
        """A pause in a transaction, and kills, beside readers and writers."""
        steps = [Step(2, "SIGSTOP in a transaction", "a", 40), *BUGS[_FORGETS].steps]
        history, _ = await record(
            self.servers, self.seed, iter([steps]), lambda _: True, aside=False
        )
        return [f"{each.rule}: {each.text}" for each in judge(history).violations]


async def _round(work: Path, seed: int, checks: tuple[str, ...], bug: str) -> list[str]:
    async with cluster(work, cache_dir()) as servers:
        await servers.start(program(bug, work) if bug else None)
        one = Round(servers, seed)
        await one.run(checks)
        return one.failures


def _rounds(
    scale: Scale, name: str, count: int, checks: Any = CHECKS, bug: str = ""
) -> Outcome:
    failures: list[str] = []
    for number in range(count):
        work = scale.folder(f"{name}-{number}")
        found = asyncio.run(_round(work, scale.seed + number, checks, bug))
        failures += [f"{each} (round {number}, seed {scale.seed})" for each in found]
        if bug and failures:
            break
    return Outcome(f"{count} rounds of {', '.join(checks)}", BAR, tuple(failures))


def run(scale: Scale) -> Outcome:
    """Make each check once, or ten times."""
    return _rounds(scale, "run", scale.pick(1, 10))


def controls(scale: Scale) -> Iterator[Control]:
    """Each check against servers that lack what it is about."""
    for number, (check, bug) in enumerate(PLANTED):
        yield Control.of(bug, _rounds(scale, f"planted-{number}", 3, (check,), bug))
