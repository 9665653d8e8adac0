"""Simulate an ingress with a router and its replicas, from the first request to the last."""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections import OrderedDict
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Final

from veneer_registry.errors import QueueFull, Unavailable, VeneerError
from veneer_server.engine_client.places import Places, Seat
from veneer_server.queues.fairness import Fairness
from veneer_server.routing.adapter_router import AdapterRouter
from veneer_server.routing.baselines import LeastLoaded, RandomChoice, RoundRobin
from veneer_server.routing.records import ReplicaReport, RoutedTo, Wanted
from veneer_server.routing.router import Router
from veneer_server.wire.messages import (
    AdapterSource,
    FromEngine,
    SamplingParams,
    SequenceFailed,
    SequenceOutput,
    SequenceRequest,
)

from veneer_loadtest.errors import BadOption
from veneer_loadtest.simulation.costs import Costs
from veneer_loadtest.simulation.events import Events
from veneer_loadtest.simulation.figures import (
    NEW_S,
    EndedRequests,
    Figures,
    FleetSize,
    KindFigures,
    ScalingFigures,
)
from veneer_loadtest.simulation.registry import Followers, SimulatedLink
from veneer_loadtest.simulation.replica import ITEMSIZE, Replica, ReplicaSize
from veneer_loadtest.simulation.scaling import Autoscaler, EngineLoad, new_autoscaler
from veneer_loadtest.simulation.scenario import (
    Drain,
    Happening,
    Lose,
    Partition,
    Publish,
    ReplicaKind,
    Routing,
    Scenario,
    Slo,
)
from veneer_loadtest.simulation.traffic import Asked, adapter_sizes, prompts, traffic

_INGRESS: Final = "ingress"
_STUCK_S: Final = 3600.0
_NOT_READY_S: Final = 1.0
"""Seconds after which a new replica tries again to reach the registry."""
_GREEDY: Final = SamplingParams(temperature=0.0)


def replica_name(number: int) -> str:
    """Return the name of replica ``number``, from 0."""
    return f"replica-{number}"


def new_router(routing: Routing, seed: int) -> Router:
    """Create the router for a routing policy."""
    match routing:
        case "adapter":
            return AdapterRouter()
        case "random":
            return RandomChoice(seed)
        case "round-robin":
            return RoundRobin()
        case "least-loaded":
            return LeastLoaded(seed)


@dataclass(slots=True, eq=False)
class _Open:
    """A request that has not ended.

    Attributes:
        site: the replica that it was sent to.
        hold: its place in the replica's queue, once it has one.
        last_s: when its last token left the engine; None before the first.
        late: whether it has broken the SLO.
        new: whether it was sent while its replica was new.
        scaled: whether it was sent while another replica was starting.
    """

    asked: Asked
    choice: RoutedTo
    site: _Site
    cluster: SimulatedCluster
    hold: ExitStack = field(default_factory=ExitStack)
    seat: Seat | None = None
    last_s: float | None = None
    late: bool = False
    new: bool = False
    scaled: bool = False

    def fail(self, error: VeneerError) -> None:
        """Handle that its place went to another tenant's request."""
        self.cluster.displaced(self)


@dataclass(slots=True)
class _Site:
    """A replica, its disk and its machine.

    Attributes:
        since: when it began to take requests.
        paid: when its machine was started, and when it ended.
        places: its queue; the server's own.
        disk: weights digests in its disk cache and their sizes, least recently used first.
        fetching: requests that wait for a fetch, by weights digest.
        here: requests at its engine, by number.
        open: number of requests that were sent to it and have not ended.
        draining: whether it gets no new requests.
    """

    replica: Replica
    kind: ReplicaKind
    places: Places
    machine: _Machine
    since: float = 0.0
    disk: OrderedDict[str, int] = field(default_factory=OrderedDict)
    fetching: dict[str, list[_Open]] = field(default_factory=dict)
    here: dict[int, _Open] = field(default_factory=dict)
    open: int = 0
    draining: bool = False


@dataclass(slots=True)
class _Machine:
    """What is paid for: a machine from its start to its end; None if it is still there."""

    kind: ReplicaKind
    begin: float
    end: float | None = None


class SimulatedCluster:
    """One run of the simulation; call `run` once."""

    def __init__(self, scenario: Scenario, routing: Routing, costs: Costs) -> None:
        self._scenario = scenario
        self._routing = routing
        self._costs = costs
        self._events = Events()
        self._sizes = adapter_sizes(scenario)
        self._mean_size = sum(self._sizes) / len(self._sizes)
        self._check_sizes()
        self._sites: dict[str, _Site] = {}
        self._replicas: list[Replica] = []
        """All that there ever were."""
        self._machines: list[_Machine] = []
        self.router = new_router(routing, scenario.seed)
        self._link = SimulatedLink(costs, self._events)
        self._numbers = itertools.count()
        for kind in scenario.fleet:
            for _ in range(kind.replicas):
                machine = self._new_machine(kind)
                self._start(replica_name(next(self._numbers)), machine, OrderedDict())
        self._followers = Followers([_INGRESS, *self._sites], self._link, costs, self._events)
        self._sources: dict[tuple[int, int], AdapterSource] = {}
        longest = max(
            (line.prompt_tokens for line in scenario.trace), default=2 * scenario.prompt_tokens
        )
        self._prompts = prompts(scenario.seed, longest)
        self._open = 0
        self.collected = EndedRequests(round(scenario.warm * scenario.count))
        self._slo = Slo()
        self._scaler: Autoscaler | None = None
        self._target = len(self._sites)
        self._starting: list[_Machine] = []
        self._fleet_sizes: list[FleetSize] = []
        self._broken = self._broken_starting = self._broken_new = 0
        if scenario.scaling is not None:
            self._scaler = new_autoscaler(scenario.scaling, self._target)
            self._slo = scenario.scaling.slo

    def _check_sizes(self) -> None:
        largest, mean = max(self._sizes), self._mean_size
        for kind in self._scenario.fleet:
            if largest > (room := self._room(kind)):
                raise BadOption(
                    f"--in-memory: memory for adapters is {room:,} bytes on {kind.name}, so "
                    f"many times the mean of {mean:,.0f}, but the largest adapter takes "
                    f"{largest:,}: give {math.ceil(largest / mean)} or more",
                    metadata={"field": "in_memory"},
                )

    def _room(self, kind: ReplicaKind) -> int:
        return round((kind.in_memory or self._scenario.in_memory) * self._mean_size)

    def run(self) -> Figures:
        """Simulate until every request has ended."""
        began = time.process_time()
        events = self._events
        for happening in self._scenario.happenings:
            events.at(happening.at_s, lambda happening=happening: self._happen(happening))  # type: ignore[misc]
        for place, name in enumerate(self._sites):
            self._report_later(name, (place + 1) / len(self._sites))
        if self._scaler is not None:
            self._resized()
            events.after(self._scaler.sample_s, self._sample)
            events.after(self._scaler.decide_s, self._decide)
        requests = traffic(self._scenario)
        asked, last = next(requests, None), 0.0
        while asked is not None or self._open:
            due = events.next
            if asked is not None and (due is None or asked.at_s <= due):
                events.now = last = asked.at_s
                self._arrive(asked)
                asked = next(requests, None)
                continue
            assert due is not None, f"{self._open} requests can never end"
            assert asked is not None or due < last + _STUCK_S, (
                f"{self._open} requests are stuck"
            )
            events.step()
        seconds = events.now
        kinds = [self._paid(kind, seconds) for kind in self._scenario.fleet]
        self._settle()
        return self._figures(seconds, kinds, time.process_time() - began)

    def _settle(self) -> None:
        """Let publications arrive, and check that no replica leaked anything."""
        self._scaler = None
        end = self._events.now + 60 * max(1.0, self._costs.reconnect_s)
        pending = [p for p in self._followers.publications if p.everywhere_s is None]
        while any(p.everywhere_s is None for p in pending):
            due = self._events.next
            if due is None or due > end:
                break
            self._events.step()
        for site in self._sites.values():
            if not site.replica.lost:
                site.replica.loop.check_integrity()
                assert not site.places.taken, "a request that has ended holds a place"

    def _figures(self, seconds: float, kinds: list[KindFigures], cpu_s: float) -> Figures:
        loaders = [replica.loader for replica in self._replicas]
        return self.collected.figures(
            len({replica.name for replica in self._replicas}),
            routing=self._routing,
            loads=sum(loader.loaded for loader in loaders),
            loaded_bytes=sum(loader.loaded_bytes for loader in loaders),
            fetched_bytes=self._link.bytes,
            everywhere_s=[p.everywhere_s for p in self._followers.publications],
            seconds=seconds,
            kinds=kinds,
            scaling=None
            if self._scenario.scaling is None
            else ScalingFigures(
                sizes=self._fleet_sizes,
                broken=self._broken,
                broken_starting=self._broken_starting,
                broken_new=self._broken_new,
            ),
            cpu_s=cpu_s,
        )

    def _paid(self, kind: ReplicaKind, until: float) -> KindFigures:
        hours = 0.0
        for machine in self._machines:
            if machine.kind.name == kind.name:
                end = until if machine.end is None else machine.end
                hours += (end - machine.begin) / 3600
        return self.collected.of_kind(kind.name, hours, kind.price)

    # ------------------------------------------------------------------ a request

    def _arrive(self, asked: Asked) -> None:
        source = self._source(_INGRESS, asked.adapter)
        digest = source.weights_digest if source else ""
        work = float(asked.prompt_tokens + 2 * asked.answer_tokens)
        now = self._events.now
        try:
            choice = self.router.choose(Wanted(digest, asked.session, work), now)
        except Unavailable:
            self.collected.failed["no_replica"] += 1
            self._count_broken(asked, scaled=bool(self._starting), new=False)
            return
        site = self._sites[choice.replica]
        self._open += 1
        site.open += 1
        self.collected.sent(asked.number, choice.replica)
        opened = _Open(asked, choice, site, self)
        opened.new = site.since > 0.0 and now < site.since + NEW_S
        opened.scaled = bool(self._starting)
        self._events.after(self._costs.front_s, lambda: self._reach(opened))

    def _reach(self, opened: _Open) -> None:
        """Handle a request that has reached the replica's front."""
        site, asked = opened.site, opened.asked
        if site.replica.lost:
            self._fail(opened, "replica_lost")
            return
        tenant = Fairness(_tenant(asked))
        try:
            place = opened.hold.enter_context(site.places.hold(1, tenant))
        except QueueFull:
            self._fail(opened, "queue_full")
            return
        opened.seat = site.places.take(place)
        assert opened.seat is not None, "its first sample has a place"
        opened.seat.stream = opened
        source = self._source(site.replica.name, asked.adapter)
        if source is None or not self._scenario.on_disk or source.weights_digest in site.disk:
            if source is not None and self._scenario.on_disk:
                site.disk.move_to_end(source.weights_digest)
            self._submit(opened, source)
            return
        digest = source.weights_digest
        waiting = site.fetching.get(digest)
        if waiting is not None:
            waiting.append(opened)
        elif not self._link.up:
            self._fail(opened, "registry_away")
        else:
            site.fetching[digest] = [opened]
            done = self._link.fetch(source.parameters * ITEMSIZE)
            self._events.at(done, lambda: self._fetched(site, source))

    def _fetched(self, site: _Site, source: AdapterSource) -> None:
        waiting = site.fetching.pop(source.weights_digest, [])
        if site.replica.lost:
            return
        site.disk[source.weights_digest] = source.parameters * ITEMSIZE
        while sum(site.disk.values()) > self._scenario.on_disk * self._mean_size:
            site.disk.popitem(last=False)
        for opened in waiting:
            self._submit(opened, source)

    def _submit(self, opened: _Open, source: AdapterSource | None) -> None:
        asked, site = opened.asked, opened.site
        site.here[asked.number] = opened
        if source is not self._newest(asked.adapter):
            self.collected.old_revision += 1
        site.replica.submit(
            asked.number,
            SequenceRequest(
                prompt=self._prompts[asked.text : asked.text + asked.prompt_tokens],
                max_tokens=asked.answer_tokens,
                sampling=_GREEDY,
                adapter=source,
                ignore_eos=True,
                cache_scope=_tenant(asked),
                tenant=_tenant(asked),
            ),
        )

    def _told(self, replica: Replica, messages: list[FromEngine]) -> None:
        """Handle messages from a replica's engine."""
        site = self._sites[replica.name]
        for message in messages:
            if isinstance(message, SequenceOutput):
                opened = site.here.get(message.sequence)
                if opened is None:  # it was displaced
                    continue
                if message.tokens:
                    self._token(opened, message)
                if message.finish is not None:
                    del site.here[message.sequence]
                    asked = opened.asked
                    tokens = asked.prompt_tokens + asked.answer_tokens
                    self.collected.has_answered(tokens, site.kind.name)
                    self._end(opened, broken=opened.late)
            elif isinstance(message, SequenceFailed):
                self._fail(site.here.pop(message.sequence), message.error.reason.lower())

    def _token(self, opened: _Open, message: SequenceOutput) -> None:
        asked, now = opened.asked, self._events.now
        if opened.last_s is None:
            assert opened.seat is not None, "its engine answers"
            opened.site.places.started(opened.seat)
            seconds = now + self._costs.back_s - asked.at_s
            most = self._slo.ttft_s
            self.collected.first_token(
                asked.number,
                asked.tenant,
                seconds,
                hit=None if asked.adapter is None else message.tier != "disk",
                prompt=asked.prompt_tokens,
                cached=message.cached_tokens,
                kind=opened.site.kind.name,
            )
        else:
            seconds, most = now - opened.last_s, self._slo.itl_s
            self.collected.next_token(asked.number, seconds)
        opened.last_s = now
        opened.late |= most is not None and seconds > most

    def displaced(self, opened: _Open) -> None:
        """Fail a request that had a place, which another tenant's request got."""
        site, asked = opened.site, opened.asked
        if site.here.pop(asked.number, None) is not None:
            site.replica.cancel(asked.number)
        for waiting in site.fetching.values():
            if opened in waiting:
                waiting.remove(opened)
        self._fail(opened, "displaced")

    def _fail(self, opened: _Open, why: str) -> None:
        self.collected.failed[why] += 1
        self._end(opened, broken=True)

    def _end(self, opened: _Open, *, broken: bool) -> None:
        self._open -= 1
        opened.hold.close()
        self.router.finished(opened.choice, self._events.now)
        if broken:
            self._count_broken(opened.asked, scaled=opened.scaled, new=opened.new)
        site = opened.site
        site.open -= 1
        if site.draining and not site.open:
            self._events.after(0.0, lambda: self._remove(site))

    def _count_broken(self, asked: Asked, *, scaled: bool, new: bool) -> None:
        if self.collected.measures(asked.number):
            self._broken += 1
            self._broken_starting += scaled
            self._broken_new += new

    # ------------------------------------------------------------------ names

    def _source(self, follower: str, adapter: int | None) -> AdapterSource | None:
        if adapter is None:
            return None
        return self._source_of(adapter, self._followers.revision(follower, adapter))

    def _newest(self, adapter: int | None) -> AdapterSource | None:
        if adapter is None:
            return None
        return self._source_of(adapter, self._followers.newest(adapter))

    def _source_of(self, adapter: int, revision: int) -> AdapterSource:
        source = self._sources.get((adapter, revision))
        if source is None:
            name = f"adapter-{adapter}"
            source = self._sources[adapter, revision] = AdapterSource(
                weights_digest=f"{name}@{revision}",
                folder="",
                parameters=self._sizes[adapter] // ITEMSIZE,
                name=name,
            )
        return source

    # ------------------------------------------------------------------ replicas

    def _new_machine(self, kind: ReplicaKind) -> _Machine:
        machine = _Machine(kind, self._events.now)
        self._machines.append(machine)
        return machine

    def _start(self, name: str, machine: _Machine, disk: OrderedDict[str, int]) -> None:
        scenario, kind = self._scenario, machine.kind
        size = ReplicaSize(
            adapter_bytes=self._room(kind),
            kv_tokens=kind.kv_tokens or scenario.kv_tokens,
            context_length=scenario.context_length,
        )
        replica = Replica(
            name, size, kind.costs or self._costs, self._events, self._told, scenario.seed
        )
        places = Places(size.max_running, scenario.max_queue)
        self._replicas.append(replica)
        self._sites[name] = _Site(replica, kind, places, machine, self._events.now, disk)
        self.router.join(name)

    def _report_later(self, name: str, share: float = 1.0) -> None:
        if isinstance(self.router, AdapterRouter):
            self._events.after(share * self._scenario.report_s, lambda: self._report(name))

    def _report(self, name: str) -> None:
        site = self._sites.get(name)
        if site is None:  # it was removed
            return
        replica, now = site.replica, self._events.now
        if not replica.lost:
            scheduler = replica.scheduler
            requests = scheduler.running + scheduler.waiting
            self.router.report(name, ReplicaReport(replica.resident(), requests), now)
        self._report_later(name)

    def _happen(self, happening: Happening) -> None:
        match happening:
            case Publish(adapter=adapter):
                self._followers.published(adapter)
            case Partition(seconds=seconds):
                self._link.up = False
                self._events.after(seconds, self._registry_back)
            case Drain(replica=number):
                self.router.drain(replica_name(number))
            case Lose():
                self._lose(happening)

    def _registry_back(self) -> None:
        self._link.up = True
        self._followers.reconnect()

    def _lose(self, happening: Lose) -> None:
        name = replica_name(happening.replica)
        site = self._sites.get(name)
        if site is None:  # autoscaling has removed it
            return
        site.replica.lost = True
        waiting = [opened for each in site.fetching.values() for opened in each]
        for opened in [*site.here.values(), *waiting]:
            self._fail(opened, "replica_lost")
        site.here.clear()
        site.fetching.clear()
        self._followers.leave(name)
        if self._scaler is not None:
            self._scaler.forget(name)
        self._events.after(self._costs.detect_s, lambda: self._noticed(name, site))
        if happening.back_s:
            self._events.after(happening.back_s, lambda: self._back(name, site))

    def _noticed(self, name: str, site: _Site) -> None:
        if self._sites.get(name) is site:
            self.router.leave(name)

    def _back(self, name: str, site: _Site) -> None:
        if self._sites.get(name) is not site:
            return
        self.router.leave(name)
        self._followers.come(name)
        self._start(name, site.machine, site.disk)

    # ------------------------------------------------------------------ autoscaling

    def _sample(self) -> None:
        """Take each replica's load, as its metrics say it."""
        if self._scaler is None:  # the run is over
            return
        for name, site in self._sites.items():
            if not (site.draining or site.replica.lost):
                load = EngineLoad(site.replica.scheduler.waiting, site.replica.kv_used)
                self._scaler.sample(name, load, self._events.now)
        self._events.after(self._scaler.sample_s, self._sample)

    def _decide(self) -> None:
        if self._scaler is None:
            return
        target = self._scaler.decide(self._target, self._events.now)
        for _ in range(target - self._target):
            self._begin()
        for _ in range(self._target - target):
            self._give_up_one()
        if target != self._target:
            self._target = target
            self._resized()
        self._events.after(self._scaler.decide_s, self._decide)

    def _begin(self) -> None:
        """Start a machine for one more replica."""
        assert self._scenario.scaling is not None, "it decided that"
        machine = self._new_machine(self._scenario.fleet[0])
        self._starting.append(machine)
        self._events.after(self._scenario.scaling.cold_start_s, lambda: self._ready(machine))

    def _ready(self, machine: _Machine) -> None:
        """Let a new replica take requests, once it has all names from the registry."""
        if self._scaler is None or machine not in self._starting:  # it was given up
            return
        if not self._link.up:
            self._events.after(_NOT_READY_S, lambda: self._ready(machine))
            return
        self._starting.remove(machine)
        name = replica_name(next(self._numbers))
        self._followers.add(name)
        self._start(name, machine, OrderedDict())
        self._report_later(name)
        self._resized()

    def _give_up_one(self) -> None:
        """Remove a replica: one that is not ready yet, or else the newest, once its requests
        have ended."""
        assert self._scaler is not None, "it decided that"
        if self._starting:
            self._starting.pop().end = self._events.now
            return
        newest = next(s for s in reversed(self._sites.values()) if not s.draining)
        newest.draining = True
        self._scaler.forget(newest.replica.name)
        self.router.drain(newest.replica.name)
        if not newest.open:
            self._remove(newest)

    def _remove(self, site: _Site) -> None:
        name = site.replica.name
        site.machine.end = self._events.now
        if not site.replica.lost:
            site.replica.loop.check_integrity()
            site.replica.lost = True
        self.router.leave(name)
        self._followers.leave(name)
        del self._sites[name]
        self._resized()

    def _resized(self) -> None:
        draining = sum(site.draining for site in self._sites.values())
        ready = len(self._sites) - draining
        found = FleetSize(self._events.now, ready, len(self._starting), draining)
        if self._fleet_sizes and self._fleet_sizes[-1].at_s == found.at_s:
            self._fleet_sizes.pop()
        self._fleet_sizes.append(found)


def simulate(scenario: Scenario, routing: Routing, costs: Costs) -> Figures:
    """Simulate a scenario with one routing policy.

    Raises:
        BadOption: an adapter does not fit into a replica's memory.
    """
    enabled = gc.isenabled()
    # Millions of short-lived records: a collection would only visit the replicas.
    gc.disable()
    try:
        return SimulatedCluster(scenario, routing, costs).run()
    finally:
        gc.collect(0)  # what the run has made is all in the youngest generation
        if enabled:
            gc.enable()


def _tenant(asked: Asked) -> str:
    return f"tenant-{asked.tenant}"
