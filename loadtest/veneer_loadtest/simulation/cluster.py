"""Simulate an ingress with a router and its replicas, from the first request to the last."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

from veneer_registry.errors import Unavailable
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

from veneer_loadtest.simulation.costs import Costs
from veneer_loadtest.simulation.events import Events
from veneer_loadtest.simulation.figures import EndedRequests, Figures
from veneer_loadtest.simulation.registry import Followers, SimulatedLink
from veneer_loadtest.simulation.replica import ITEMSIZE, Replica, ReplicaSize
from veneer_loadtest.simulation.scenario import (
    Drain,
    Happening,
    Lose,
    Partition,
    Publish,
    Routing,
    Scenario,
)
from veneer_loadtest.simulation.traffic import Asked, prompts, traffic

_INGRESS: Final = "ingress"
_STUCK_S: Final = 3600.0
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


@dataclass(slots=True)
class _Open:
    """A request that has not ended."""

    asked: Asked
    choice: RoutedTo
    started: bool = False


@dataclass(slots=True)
class _Site:
    """A replica and its disk.

    Attributes:
        disk: weights digests in its disk cache, least recently used first.
        fetching: requests that wait for a fetch, by weights digest.
        here: requests at its engine, by number.
    """

    replica: Replica
    disk: OrderedDict[str, None] = field(default_factory=OrderedDict)
    fetching: dict[str, list[_Open]] = field(default_factory=dict)
    here: dict[int, _Open] = field(default_factory=dict)


class SimulatedCluster:
    """One run of the simulation; call `run` once."""

    def __init__(self, scenario: Scenario, routing: Routing, costs: Costs) -> None:
        self._scenario = scenario
        self._routing = routing
        self._costs = costs
        self._events = Events()
        self._size = ReplicaSize(
            adapter_bytes=scenario.in_memory * scenario.adapter_bytes,
            kv_tokens=scenario.kv_tokens,
        )
        self._sites: dict[str, _Site] = {}
        self._lost_loads = 0, 0
        self.router = new_router(routing, scenario.seed)
        for number in range(scenario.replicas):
            self._start(replica_name(number), OrderedDict())
        self._link = SimulatedLink(costs, self._events)
        self._followers = Followers([_INGRESS, *self._sites], self._link, costs, self._events)
        self._sources: dict[tuple[int, int], AdapterSource] = {}
        self._prompts = prompts(scenario.seed, 2 * scenario.prompt_tokens)
        self._open = 0
        self.collected = EndedRequests(round(scenario.warm * scenario.requests))

    def run(self) -> Figures:
        """Simulate until every request has ended."""
        began = time.process_time()
        events = self._events
        for happening in self._scenario.happenings:
            events.at(happening.at_s, lambda happening=happening: self._happen(happening))  # type: ignore[misc]
        if isinstance(self.router, AdapterRouter):
            for place, name in enumerate(self._sites):
                share = (place + 1) / len(self._sites)
                events.at(share * self._scenario.report_s, lambda name=name: self._report(name))  # type: ignore[misc]
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
        self._settle()
        return self._figures(seconds, time.process_time() - began)

    def _settle(self) -> None:
        """Let publications arrive, and check that no replica leaked anything."""
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

    def _figures(self, seconds: float, cpu_s: float) -> Figures:
        loaders = [site.replica.loader for site in self._sites.values()]
        loads, size = self._lost_loads
        return self.collected.figures(
            len(self._sites),
            routing=self._routing,
            loads=loads + sum(loader.loaded for loader in loaders),
            loaded_bytes=size + sum(loader.loaded_bytes for loader in loaders),
            fetched_bytes=self._link.bytes,
            everywhere_s=[p.everywhere_s for p in self._followers.publications],
            seconds=seconds,
            cpu_s=cpu_s,
        )

    # ------------------------------------------------------------------ a request

    def _arrive(self, asked: Asked) -> None:
        digest = self._source(_INGRESS, asked.adapter).weights_digest
        work = float(asked.prompt_tokens + 2 * asked.answer_tokens)
        try:
            choice = self.router.choose(Wanted(digest, asked.session, work), self._events.now)
        except Unavailable:
            self.collected.failed["no_replica"] += 1
            return
        self._open += 1
        self.collected.sent(asked.number, choice.replica)
        opened = _Open(asked, choice)
        self._events.after(self._costs.front_s, lambda: self._reach(opened))

    def _reach(self, opened: _Open) -> None:
        """Handle a request that has reached the replica's front."""
        site = self._sites[opened.choice.replica]
        if site.replica.lost:
            self._fail(opened, "replica_lost")
            return
        source = self._source(site.replica.name, opened.asked.adapter)
        digest = source.weights_digest
        if not self._scenario.on_disk or digest in site.disk:
            if self._scenario.on_disk:
                site.disk.move_to_end(digest)
            self._submit(site, opened, source)
            return
        waiting = site.fetching.get(digest)
        if waiting is not None:
            waiting.append(opened)
        elif not self._link.up:
            self._fail(opened, "registry_away")
        else:
            site.fetching[digest] = [opened]
            done = self._link.fetch(self._scenario.adapter_bytes)
            self._events.at(done, lambda: self._fetched(site, source))

    def _fetched(self, site: _Site, source: AdapterSource) -> None:
        waiting = site.fetching.pop(source.weights_digest, [])
        if site.replica.lost:
            return
        site.disk[source.weights_digest] = None
        if len(site.disk) > self._scenario.on_disk:
            site.disk.popitem(last=False)
        for opened in waiting:
            self._submit(site, opened, source)

    def _submit(self, site: _Site, opened: _Open, source: AdapterSource) -> None:
        asked = opened.asked
        tenant = f"tenant-{asked.tenant}"
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
                cache_scope=tenant,
                tenant=tenant,
            ),
        )

    def _told(self, replica: Replica, messages: list[FromEngine]) -> None:
        """Handle messages from a replica's engine."""
        here = self._sites[replica.name].here
        for message in messages:
            if isinstance(message, SequenceOutput):
                opened = here[message.sequence]
                if message.tokens and not opened.started:
                    opened.started = True
                    self._started(opened.asked, message)
                if message.finish is not None:
                    del here[message.sequence]
                    self.collected.answered += 1
                    self._end(opened)
            elif isinstance(message, SequenceFailed):
                self._fail(here.pop(message.sequence), message.error.reason.lower())

    def _started(self, asked: Asked, message: SequenceOutput) -> None:
        self.collected.first_token(
            asked.number,
            asked.tenant,
            self._events.now + self._costs.back_s - asked.at_s,
            hit=message.tier != "disk",
            prompt=asked.prompt_tokens,
            cached=message.cached_tokens,
        )

    def _fail(self, opened: _Open, why: str) -> None:
        self.collected.failed[why] += 1
        self._end(opened)

    def _end(self, opened: _Open) -> None:
        self._open -= 1
        self.router.finished(opened.choice, self._events.now)

    # ------------------------------------------------------------------ names

    def _source(self, follower: str, adapter: int) -> AdapterSource:
        return self._source_of(adapter, self._followers.revision(follower, adapter))

    def _newest(self, adapter: int) -> AdapterSource:
        return self._source_of(adapter, self._followers.newest(adapter))

    def _source_of(self, adapter: int, revision: int) -> AdapterSource:
        source = self._sources.get((adapter, revision))
        if source is None:
            name = f"adapter-{adapter}"
            source = self._sources[adapter, revision] = AdapterSource(
                weights_digest=f"{name}@{revision}",
                folder="",
                parameters=self._scenario.adapter_bytes // ITEMSIZE,
                name=name,
            )
        return source

    # ------------------------------------------------------------------ replicas

    def _start(self, name: str, disk: OrderedDict[str, None]) -> None:
        seed = self._scenario.seed
        replica = Replica(name, self._size, self._costs, self._events, self._told, seed)
        self._sites[name] = _Site(replica, disk)
        self.router.join(name)

    def _report(self, name: str) -> None:
        replica, now = self._sites[name].replica, self._events.now
        if not replica.lost:
            scheduler = replica.scheduler
            requests = scheduler.running + scheduler.waiting
            self.router.report(name, ReplicaReport(replica.resident(), requests), now)
        self._events.after(self._scenario.report_s, lambda: self._report(name))

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
        site = self._sites[name]
        site.replica.lost = True
        loader = site.replica.loader
        loads, size = self._lost_loads
        self._lost_loads = loads + loader.loaded, size + loader.loaded_bytes
        loader.loaded = loader.loaded_bytes = 0
        waiting = [opened for each in site.fetching.values() for opened in each]
        for opened in [*site.here.values(), *waiting]:
            self._fail(opened, "replica_lost")
        site.here.clear()
        site.fetching.clear()
        self._followers.leave(name)
        self._events.after(self._costs.detect_s, lambda: self._noticed(name, site))
        if happening.back_s:
            self._events.after(happening.back_s, lambda: self._back(name, site))

    def _noticed(self, name: str, site: _Site) -> None:
        if self._sites[name] is site:
            self.router.leave(name)

    def _back(self, name: str, site: _Site) -> None:
        self.router.leave(name)
        self._followers.come(name)
        self._start(name, site.disk)
