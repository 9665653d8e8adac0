"""The replicas that a picker chooses from: found by name, and judged by their own metrics."""

from __future__ import annotations

import asyncio
import http.client
import socket
import ssl
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from prometheus_client.parser import text_string_to_metric_families
from veneer_registry.errors import Unavailable

from veneer_server.logs import get_logger
from veneer_server.routing.adapter_router import AdapterRouter
from veneer_server.routing.records import ReplicaReport, RoutedTo, Wanted

EVERY_S: Final = 1.0
_TIMEOUT_S: Final = 2.0
_LARGEST_PAGE: Final = 16 << 20
_LOAD: Final = ("vllm:num_requests_running", "vllm:num_requests_waiting")
_LISTS: Final = "vllm:lora_requests_info"
_LOADED: Final = "vllm:lora_adapter_loaded"
_READY: Final = "veneer_ready"

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """What a metrics page says of its server.

    Attributes:
        ready: whether it takes requests.
        requests: number of running and waiting ones.
        adapters: names, as callers write them, of adapters in memory or about to be.
        base: the base's name.
    """

    ready: bool
    requests: int
    adapters: frozenset[str]
    base: str


def read_state(page: str) -> ReplicaState:
    """Raises ValueError if the page lacks the series of ``--metrics-names vllm``."""
    wanted = (*_LOAD, _LISTS, _LOADED, _READY)
    lines = [line for line in page.splitlines() if line.startswith(wanted)]
    ready, base, load, adapters = True, "", dict[str, float](), set[str]()
    for family in text_string_to_metric_families("\n".join(lines) + "\n"):
        for sample in family.samples:
            if sample.name in _LOAD:
                load[sample.name], base = sample.value, sample.labels.get("model_name", "")
            elif sample.name == _LOADED:
                adapters.add(sample.labels["adapter_name"])
            elif sample.name == _LISTS:
                for key in ("running_lora_adapters", "waiting_lora_adapters"):
                    adapters |= set(filter(None, sample.labels.get(key, "").split(",")))
            elif sample.name == _READY:
                ready = sample.value == 1
    if len(load) < len(_LOAD):
        raise ValueError(f"no {_LOAD[0]} on its page: start it with --metrics-names vllm")
    return ReplicaState(ready, int(sum(load.values())), frozenset(adapters), base)


@dataclass(frozen=True, slots=True)
class Source:
    """Where replicas are.

    Attributes:
        names: ``HOST:PORT`` of HTTP ports; each address of a host is a replica.
        key_file: an API key with the role metrics, read for each page.
        tls: verifies the replicas' certificates; None for plain text.
    """

    names: tuple[str, ...]
    key_file: Path | None = None
    tls: ssl.SSLContext | None = None

    def page(self, replica: str) -> str:
        """A replica's metrics page. Raises OSError, HTTPException or ValueError."""
        headers = {"host": "localhost"}  # a name that every server accepts
        if self.key_file is not None:
            headers["authorization"] = f"Bearer {self.key_file.read_text('utf-8').strip()}"
        connection = (
            http.client.HTTPConnection(replica, timeout=_TIMEOUT_S)
            if self.tls is None
            else http.client.HTTPSConnection(replica, timeout=_TIMEOUT_S, context=self.tls)
        )
        try:
            connection.request("GET", "/metrics", headers=headers)
            answer = connection.getresponse()
            if answer.status != 200:
                raise ValueError(f"/metrics answers {answer.status} {answer.reason}")
            return answer.read(_LARGEST_PAGE).decode()
        finally:
            connection.close()


class Pool:
    """Keeps an `AdapterRouter` up to date. Belongs to one event loop.

    A replica gets requests while its last page could be read and says that it is ready. So one
    that drains, fails or hangs gets none after `EVERY_S` and a page's timeout.

    Attributes:
        looked: whether all replicas that there are have been looked at once.
    """

    def __init__(self, source: Source) -> None:
        self.looked = False
        self._source = source
        self._router = AdapterRouter()
        self._found: dict[str, list[str]] = {}
        """Addresses of each name, as last heard."""
        self._faults: dict[str, str] = {}
        """By address: why it gets no requests; "" if it does."""
        self._base = ""

    async def watch(self) -> None:
        """Look at all replicas again and again; never returns."""
        while True:
            await self.look()
            await asyncio.sleep(EVERY_S)

    async def look(self) -> None:
        """Find the replicas, and read each one's page."""
        await asyncio.gather(*map(self._find, self._source.names))
        there = {each for found in self._found.values() for each in found}
        for gone in self._faults.keys() - there:
            self._router.leave(gone)
            del self._faults[gone]
            _log.info("replica gone", replica=gone)
        await asyncio.gather(*map(self._look_at, there))
        self.looked = True

    def choose(
        self, model: str, session: str, work: float, among: Collection[str] | None = None
    ) -> RoutedTo:
        """Choose a replica.

        Args:
            model: name of an adapter or of the base; "" if unknown.
            among: addresses that it must be one of; None: any.

        Raises:
            Unavailable: none of them takes requests.
        """
        name, now = "" if model == self._base else model, time.monotonic()
        fleet = self._router.fleet
        if among is None or set(fleet.names) <= set(among):
            return self._router.choose(Wanted(name, session, work), now)
        # The gateway has reasons of its own: take the less loaded of the first two that it
        # allows in the model's order.
        order = self._router.homes(name or session, len(fleet))
        slots = [fleet.slot(each) for each in order if each in among][:2]
        if not slots:
            raise Unavailable("no replica that the gateway allows takes requests now: retry")
        slot = min((s for s in slots if s is not None), key=lambda s: float(fleet.load[s]))
        return fleet.send(slot, work, now)

    def finished(self, choice: RoutedTo) -> None:
        """Note that a request has ended."""
        self._router.finished(choice, time.monotonic())

    async def _find(self, name: str) -> None:
        host, _, port = name.rpartition(":")
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
        except OSError as error:
            # A name server that is away must not empty the list. Replicas that are gone do not
            # answer either.
            _log.warning("name not resolved", name=name, why=str(error))
            return
        addresses = [str(at[0]) for _, _, _, _, at in found]
        self._found[name] = [f"[{a}]:{port}" if ":" in a else f"{a}:{port}" for a in addresses]

    async def _look_at(self, replica: str) -> None:
        began = time.monotonic()
        try:
            page = await asyncio.to_thread(self._source.page, replica)
            state = read_state(page)
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._judge(replica, str(error) or type(error).__name__)
            return
        self._judge(replica, "" if state.ready else "it says that it is not ready")
        self._base = state.base
        now = time.monotonic()
        report = ReplicaReport(state.adapters, state.requests, now - began)
        self._router.report(replica, report, now)

    def _judge(self, replica: str, fault: str) -> None:
        if fault:
            self._router.drain(replica)
        else:
            self._router.join(replica)
        if self._faults.get(replica) != fault:
            self._faults[replica] = fault
            if fault:
                _log.warning("replica gets no requests", replica=replica, why=fault)
            else:
                _log.info("replica gets requests", replica=replica)
