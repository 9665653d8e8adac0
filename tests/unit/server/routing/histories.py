"""Random histories of a router, checked against a model that only counts. Plant a bug by
passing another router."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from veneer_server.routing.adapter_router import BOUND, AdapterRouter
from veneer_server.routing.records import ReplicaReport, RoutedTo, Wanted
from veneer_server.routing.router import Router

FREE = 2.0


@dataclass
class Model:
    """What a correct router must have in mind."""

    accepting: set[str] = field(default_factory=set)
    draining: set[str] = field(default_factory=set)
    open: list[RoutedTo] = field(default_factory=list)

    def load(self, replica: str) -> int:
        return sum(choice.replica == replica for choice in self.open)

    def most(self) -> float:
        total = sum(self.load(replica) for replica in self.accepting)
        return max(FREE, BOUND * total / len(self.accepting))


def bounded_router() -> AdapterRouter:
    return AdapterRouter(free=FREE)


def check_history(seed: int, make: Callable[[], Router] = bounded_router) -> int:
    """Raises AssertionError if a request goes to a replica that takes none or has more than
    the bound allows. Returns how many requests were routed."""
    random_ = random.Random(seed)
    router, model, now, routed = make(), Model(), 0.0, 0
    names = [f"replica-{number}" for number in range(random_.randint(1, 12))]
    for name in names[: random_.randint(1, len(names))]:
        router.join(name)
        model.accepting.add(name)
    digests = [f"digest {number}" for number in range(40)]
    weights = [1 / (number + 1) for number in range(40)]
    for _ in range(400):
        now += random_.expovariate(5)
        action = random_.random()
        if action < 0.6 and model.accepting:
            digest = random_.choices(["", *digests], [0.5, *weights])[0]
            session = random_.choice(["", "", "a", "b"])
            most = model.most()
            choice = router.choose(Wanted(digest, session, random_.uniform(1, 9)), now)
            assert choice.replica in model.accepting, f"seed {seed}: it takes no requests"
            has = model.load(choice.replica)
            assert has <= most, f"seed {seed}: {has} requests there, {most} are the most"
            model.open.append(choice)
            routed += 1
        elif action < 0.9 and model.open:
            choice = model.open.pop(random_.randrange(len(model.open)))
            router.finished(choice, now)
        elif action < 0.93 and model.accepting:
            name = random_.choice(sorted(model.accepting))
            requests = model.load(name)
            router.report(name, ReplicaReport(frozenset(digests[:3]), requests), now)
        elif action < 0.95 and model.accepting:
            name = random_.choice(sorted(model.accepting))
            router.drain(name)
            model.accepting.remove(name)
            model.draining.add(name)
        elif action < 0.97 and (known := model.accepting | model.draining):
            name = random_.choice(sorted(known))
            router.leave(name)
            model.accepting.discard(name)
            model.draining.discard(name)
            model.open = [choice for choice in model.open if choice.replica != name]
        else:
            name = random_.choice(names)
            router.join(name)
            model.accepting.add(name)
            model.draining.discard(name)
    return routed


def check_histories(seeds: Iterable[int]) -> None:
    """`check_history` of each."""
    for seed in seeds:
        check_history(seed)


def check_movement(
    homes: Callable[[list[str], list[str]], list[str]], replicas: int, adapters: int
) -> None:
    """Raises AssertionError if a replica that joins or leaves moves more adapters than it gets
    or had, or much more than its share.

    Args:
        homes: of each digest, with these replicas.
    """
    digests = [f"digest {number}" for number in range(adapters)]
    names = [f"replica-{number}" for number in range(replicas)]
    before, after = homes(names, digests), homes([*names, "new"], digests)
    moved = [to for old, to in zip(before, after, strict=True) if old != to]
    assert set(moved) == {"new"}, "an adapter moved between replicas that were there"
    share = adapters / (replicas + 1)
    assert len(moved) <= share + 4 * share**0.5, f"{len(moved)} moved, {share:.0f} is its share"
    assert len(moved) >= share - 4 * share**0.5, f"only {len(moved)} of {share:.0f} moved"
