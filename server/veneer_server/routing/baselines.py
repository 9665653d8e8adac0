"""The usual routers, which ignore adapters, for comparison with `AdapterRouter`."""

from __future__ import annotations

import random

from veneer_server.routing.records import Wanted
from veneer_server.routing.router import Router


class RandomChoice(Router):
    """Chooses a random replica, all with the same probability."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self._random = random.Random(seed)  # nosec B311 # not for secrets

    def _slot(self, wanted: Wanted, now: float) -> int:
        return self._random.randrange(len(self.fleet))


class RoundRobin(Router):
    """Chooses one replica after another."""

    def __init__(self) -> None:
        super().__init__()
        self._next = 0

    def _slot(self, wanted: Wanted, now: float) -> int:
        self._next += 1
        return self._next % len(self.fleet)


class LeastLoaded(Router):
    """Chooses the replica with the fewest requests; among equals, a random one."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self._random = random.Random(seed)  # nosec B311 # not for secrets

    def _slot(self, wanted: Wanted, now: float) -> int:
        load = self.fleet.load
        least = (load == load.min()).nonzero()[0]
        return int(least[self._random.randrange(len(least))])
