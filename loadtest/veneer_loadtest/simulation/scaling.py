"""How many replicas autoscaling wants: by Ray Serve with our policy, or by the chart's HPA.

Both see the load late, as a mean over some time, and both wait before they remove a replica.
The policy on Ray is the product's own (`veneer_ray.scaling`). Ray's delays and Kubernetes'
rules are modelled here, with the settings of `veneer-ray` and of the Helm chart.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from veneer_ray.scaling import engines_wanted

from veneer_loadtest.simulation.scenario import Scaling


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """One replica's load.

    Attributes:
        waiting: number of sequences that have not started.
        kv: used share of its KV cache, 0 to 1.
    """

    waiting: float
    kv: float


class Autoscaler(ABC):
    """Decides the number of replicas.

    Attributes:
        sample_s: seconds between two samples of a replica's load.
        window_s: a replica's load is the mean of its samples of this many seconds.
        decide_s: seconds between two decisions.

    Args:
        least, most: bounds on the number of replicas; ``least`` run at the start.
    """

    sample_s: float
    window_s: float
    decide_s: float

    def __init__(self, least: int, most: int) -> None:
        self._least, self._most = least, most
        self._samples: dict[str, deque[tuple[float, EngineLoad]]] = {}

    def sample(self, replica: str, load: EngineLoad, now: float) -> None:
        """Take in a sample of a replica that takes requests."""
        samples = self._samples.setdefault(replica, deque())
        samples.append((now, load))
        while samples[0][0] <= now - self.window_s:
            samples.popleft()

    def forget(self, replica: str) -> None:
        """Forget a replica that takes no more requests."""
        self._samples.pop(replica, None)

    def decide(self, target: int, now: float) -> int:
        """Return the number of replicas to run.

        Args:
            target: the number decided last: those that take requests or start.
        """
        loads = [_mean(samples) for samples in self._samples.values()]
        return self._decide(loads, target, now)

    def _bounded(self, wanted: int) -> int:
        return min(max(wanted, self._least), self._most)

    @abstractmethod
    def _decide(self, loads: Sequence[EngineLoad], target: int, now: float) -> int:
        """See `decide`; ``loads`` are those of the replicas that take requests."""


class RayAutoscaler(Autoscaler):
    """Ray Serve 2.60 with our policy: replicas send their samples every 10 s, and a decision
    must be the same in direction for `_UP_S` or `_DOWN_S` before it is carried out."""

    sample_s = 2.0
    window_s = 30.0
    decide_s = 10.0

    _UP_S: Final = 10.0
    _DOWN_S: Final = 300.0

    def __init__(self, least: int, most: int) -> None:
        super().__init__(least, most)
        self._since: tuple[bool, float] | None = None
        """Whether more are wanted, and since when."""

    def _decide(self, loads: Sequence[EngineLoad], target: int, now: float) -> int:
        waiting, kv = sum(each.waiting for each in loads), sum(each.kv for each in loads)
        wanted = self._bounded(engines_wanted(len(loads), waiting, kv))
        if wanted == target:
            self._since = None
            return target
        more = wanted > target
        if self._since is None or self._since[0] != more:
            self._since = more, now
        if now - self._since[1] < (self._UP_S if more else self._DOWN_S):
            return target
        self._since = None
        return wanted


class HpaAutoscaler(Autoscaler):
    """The Helm chart's HorizontalPodAutoscaler with ``metric: queue``: the mean number of
    waiting sequences, scraped every 15 s and averaged over a minute, as docs/kubernetes.md has
    it."""

    sample_s = 15.0
    window_s = 60.0
    decide_s = 15.0

    _QUEUE: Final = 4.0
    """The chart's ``targetQueue``."""
    _TOLERANCE: Final = 0.1
    _DOWN_S: Final = 600.0
    """It removes replicas only if so few were enough for this long."""
    _MOST_AT_ONCE: Final = 4
    """At each decision it adds as many as there are, or this many if that is more."""

    def __init__(self, least: int, most: int) -> None:
        super().__init__(least, most)
        self._recent: deque[tuple[float, int]] = deque([(0.0, least)])

    def _decide(self, loads: Sequence[EngineLoad], target: int, now: float) -> int:
        wanted = self._bounded(self._wanted(loads, target))
        self._recent.append((now, wanted))
        while self._recent[0][0] <= now - self._DOWN_S:
            self._recent.popleft()
        if wanted < target:
            return min(target, max(each for _, each in self._recent))
        return min(wanted, target + max(target, self._MOST_AT_ONCE))

    def _wanted(self, loads: Sequence[EngineLoad], target: int) -> int:
        if not loads:
            return target
        ready, starting = len(loads), max(0, target - len(loads))
        waiting = sum(each.waiting for each in loads)
        ratio = waiting / ready / self._QUEUE
        counted = ready
        if starting and ratio > 1:  # those that start count as idle
            counted = ready + starting
            ratio = waiting / counted / self._QUEUE
            if ratio < 1:
                return target
        if abs(ratio - 1) <= self._TOLERANCE:
            return target
        return math.ceil(ratio * counted)


def new_autoscaler(scaling: Scaling, least: int) -> Autoscaler:
    """Create the autoscaler of a scenario; ``least`` replicas run at the start."""
    match scaling.policy:
        case "ray":
            return RayAutoscaler(least, scaling.most)
        case "hpa":
            return HpaAutoscaler(least, scaling.most)


def _mean(samples: Sequence[tuple[float, EngineLoad]]) -> EngineLoad:
    count = len(samples)
    return EngineLoad(
        sum(load.waiting for _, load in samples) / count,
        sum(load.kv for _, load in samples) / count,
    )
