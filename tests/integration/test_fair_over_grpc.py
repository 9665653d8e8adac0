"""A hog beside light tenants over real gRPC, in steps of the engine, not in seconds.

The whole server runs in this process with a FAKE decoder (`tests.torture.hash_backend`); front,
keys, queue and scheduler are the real ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from veneer_proto.v1 import inference_pb2 as pb
from veneer_server.access import authenticate
from veneer_server.engine.execution import backend_choice
from veneer_server.engine.scheduling.scheduler import Scheduler
from veneer_server.engine.scheduling.sequence import Sequence
from veneer_server.queues import fairness
from veneer_server.step.plan import StepPlan

from tests.tiny_llama import make_tiny_llama
from tests.torture.hash_backend import HashBackend
from tests.torture.in_process import InProcess, in_process
from tests.torture.tenants import Call, call, make_keys

pytestmark = pytest.mark.push

RUNNING, NEW = 4, 16
LIGHT = ("light-1", "light-2")
HOG = 60 * len(LIGHT)
EACH = 15
MOST = NEW + 2 * len(LIGHT) + 3
"""Steps: until a running answer has ended, until it is the tenant's turn, and its prompt's."""


@dataclass
class Counted:
    """Attributes:
    arrived: by sequence, the step at which it arrived in the engine.
    waits: by tenant, how many steps each sequence waited for its first token since then.
    """

    arrived: dict[int, int] = field(default_factory=dict)
    waits: dict[str, list[int]] = field(default_factory=dict)


@contextmanager
def counted() -> Iterator[Counted]:
    """What the engine does. It begins when the hog's calls and a light tenant's first one have
    arrived, so that the hog's are ahead however slow this machine is."""
    counts = Counted()
    arrived, waits = counts.arrived, counts.waits
    steps = 0
    add, schedule, update = Scheduler.add, Scheduler.schedule, Scheduler.update

    def adding(self: Scheduler, sequence: Sequence) -> None:
        arrived[sequence.id] = steps
        add(self, sequence)

    def scheduling(self: Scheduler, now: float) -> StepPlan | None:
        return schedule(self, now) if len(arrived) > HOG else None

    def updating(self: Scheduler, *given: Any) -> Any:
        nonlocal steps
        steps += 1
        updates, actions = update(self, *given)
        for each in updates:
            if each.first:
                tenant = each.sequence.request.tenant
                waits.setdefault(tenant, []).append(steps - arrived[each.sequence.id])
        return updates, actions

    with patch.multiple(Scheduler, add=adding, schedule=scheduling, update=updating):
        yield counts


def request(number: int) -> pb.GenerateRequest:
    ids = [3 + (number * 37 + at * 11) % 500 for at in range(8)]
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=ids),
        sampling=pb.SamplingOptions(temperature=0),
        stopping=pb.StoppingOptions(max_tokens=NEW, ignore_eos=True),
    )


async def beside_a_hog(
    server: InProcess, keys: dict[str, Any], counts: Counted, each: int
) -> list[Call]:
    """The light tenants' calls, one after another, while the hog keeps many open."""
    stop, hog = asyncio.Event(), list[Call]()

    async def keep(number: int) -> None:
        while not stop.is_set():
            hog.append(await call(server.inference, keys["hog"], request(number)))

    async def one(name: str) -> list[Call]:
        return [await call(server.inference, keys[name], request(i)) for i in range(each)]

    keeping = [asyncio.create_task(keep(number)) for number in range(HOG)]
    while len(counts.arrived) < HOG:  # noqa: ASYNC110 - another thread counts
        await asyncio.sleep(0.005)
    light = [call for calls in await asyncio.gather(*map(one, LIGHT)) for call in calls]
    stop.set()
    await asyncio.gather(*keeping)
    return [*light, *hog]


async def worst_wait(folder: Path, each: int = EACH) -> int:
    """Most steps that one of a light tenant's requests waited."""
    base = make_tiny_llama(folder / "base")
    keys = make_keys(folder / "keys.toml", "hog", *LIGHT)
    flags = {"max_running": str(RUNNING), "keys_file": str(folder / "keys.toml")}
    with patch.object(backend_choice, "Decoder", HashBackend), counted() as counts:
        async with in_process(base, folder, **flags) as server:
            calls = await beside_a_hog(server, keys, counts, each)
            assert server.engine_error is None
    assert all(one.tokens == NEW and one.ends == 1 for one in calls)
    waits = counts.waits
    light = [steps for name in LIGHT for steps in waits.get(name, waits.get("", []))]
    assert len(light) >= len(LIGHT) * each
    return max(light)


async def test_a_hog_delays_light_tenants_by_a_turn(tmp_path: Path) -> None:
    assert await worst_wait(tmp_path) <= MOST


async def test_without_tenants_they_wait_behind_its_queue(tmp_path: Path) -> None:
    """A planted bug, which shows that the bound says something."""
    nobodys = patch.object(authenticate, "fairness_of", lambda *given: fairness.Fairness())
    with nobodys:
        assert await worst_wait(tmp_path, each=2) > 2 * MOST
