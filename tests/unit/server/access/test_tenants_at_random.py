"""Three tenants publish, replace, share, use and delete adapters of the same names at once.

Whatever the order, a request gets weights that its own tenant had under the name, or that the
tenant which it names, or accepts, shared under it, and no list shows what was never shared. The
engine is FAKE.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
from veneer_server.serving import visible

from tests.planted import planted
from tests.unit.server.access.tenants_kit import Caller, Shared, shared
from tests.unit.server.rpc.front_harness import make_adapter

TENANTS: Final = ("a", "b", "c")
NAMES: Final = ("chat", "code", "sql")
ACCEPTS: Final = {"c": {"a", "b/code"}}
"""What a tenant knows by its plain name."""
WORKERS: Final = 6
CALLS: Final = 40
"""Of each worker."""
RIGHT: Final = "            for name in other.registry.shared():"
WRONG: Final = "            for name in [each.ref.name for each in other.registry.list()]:"
REFUSALS: Final = {"NOT_FOUND", "PERMISSION_DENIED", "ALREADY_EXISTS"}


class World:
    """Args:
    shares: whether tenants share adapters. If none does, whatever another one sees is wrong.
    """

    def __init__(self, server: Shared, folders: list[Path], *, shares: bool = True) -> None:
        self._shares = shares
        self._callers = {each: server.caller(each, "operator") for each in TENANTS}
        self._folders = folders
        self._had: dict[tuple[str, str], set[str]] = defaultdict(set)
        """Weights that a tenant has had under a name, or is about to have."""
        self._shared: set[tuple[str, str]] = set()
        self.wrong: list[object] = []
        self.done: Counter[str] = Counter()

    async def run(self, seed: int) -> None:
        await asyncio.gather(*(self._work(seed * WORKERS + n) for n in range(WORKERS)))

    async def clear(self) -> None:
        """Delete everything."""
        for caller in self._callers.values():
            for name in await caller.names():
                await caller.call("DeleteAdapter", name=name)

    async def _work(self, seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(CALLS):
            tenant, name = rng.choice(TENANTS), rng.choice(NAMES)
            act = rng.choice((self._push, self._use, self._use, self._look, self._change))
            try:
                await act(rng, self._callers[tenant], name)
                self.done[act.__name__] += 1
            except grpc.aio.AioRpcError as error:
                if error.code().name not in REFUSALS:
                    self.wrong.append((act.__name__, error.details()))

    async def _push(self, rng: random.Random, caller: Caller, name: str) -> None:
        folder = rng.choice(self._folders)
        options: dict[str, Any] = {"allow_replace": True}
        checked = await caller.push(folder, name, validate_only=True, **options)
        self._had[caller.tenant, name].add(checked.adapter.weights_digest)
        await caller.push(folder, name, activate=rng.random() < 0.5, **options)

    async def _use(self, rng: random.Random, caller: Caller, name: str) -> None:
        other = rng.choice(TENANTS)
        plain = rng.random() < 0.5
        answer = await caller.generate(adapter=name if plain else f"{other}/{name}")
        known = set(self._had[caller.tenant, name]) if plain else set[str]()
        for owner in TENANTS if plain else (other,):
            accepted = {owner, f"{owner}/{name}"} & ACCEPTS.get(caller.tenant, set())
            if (owner, name) in self._shared and (accepted or not plain):
                known |= self._had[owner, name]
        if answer.provenance.weights_digest not in known:
            self.wrong.append((caller.tenant, name, plain, "weights of nobody it may use"))

    async def _look(self, rng: random.Random, caller: Caller, name: str) -> None:
        listed = (await caller.call("ListAdapters")).adapters
        if len({each.name for each in listed}) < len(listed):
            self.wrong.append("a name twice in a list")
        for each in listed:
            theirs = each.name.removeprefix(f"{each.tenant}/")
            if each.tenant and (each.tenant, theirs) not in self._shared:
                self.wrong.append((caller.tenant, each.name, "was never shared"))

    async def _change(self, rng: random.Random, caller: Caller, name: str) -> None:
        match rng.randrange(4):
            case 0:
                await caller.call("DeleteAdapter", name=name)
            case 1:
                await caller.call("EvictAdapter", name=name)
            case 2 if self._shares:
                self._shared.add((caller.tenant, name))  # as soon as it is asked for
                await caller.call("UpdateAdapter", name=name, shared=True)
            case _:
                await caller.call("UpdateAdapter", name=name, shared=False)


@pytest.mark.push
async def test_whatever_the_order_each_gets_its_own_or_what_is_shared(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    folders = [make_adapter(tmp_path / str(n), seed=n) for n in range(4)]
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    async with shared(base_folder, front_cache, tmp_path / "front") as server:
        for tenant, listed in ACCEPTS.items():
            with server.keys.open("a") as keys:
                keys.write(f"[tenants.{tenant}]\naccepts = {json.dumps(sorted(listed))}\n")
        world = World(server, folders)
        await world.run(seed)
        assert world.wrong == []
        assert min(world.done.values()) > 5
        await world.clear()
        again = World(server, folders, shares=False)
        with planted(visible, RIGHT, WRONG):  # the same check must see a hole
            await again.run(seed)
        assert again.wrong
