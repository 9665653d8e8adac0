"""WatchAdapters: each watcher's position in the event buffer, and the messages it receives.

The messages of an event are built and serialised once for all watchers. A watcher that falls
behind the oldest event in the buffer, or stops reading, is closed with an error.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Final

from veneer_proto.v1 import adapters_pb2
from veneer_registry.errors import Aborted, AdapterNotFound
from veneer_registry.records import AdapterRecord

from veneer_server.rpc import convert
from veneer_server.rpc.adapter_view import AdapterView
from veneer_server.serving.adapters.events import AdapterEvents, Happened, Kind, Weights
from veneer_server.serving.calls import READER_LIMIT_S
from veneer_server.serving.tenants.registry import AdapterRegistry
from veneer_server.serving.threads import to_the_end

__all__ = ["AdapterWatch"]

_PAGE: Final = 100

KEPT_EVENTS: Final = 64
"""Events whose messages are cached for watchers slightly behind the fastest one."""

Message = adapters_pb2.WatchAdaptersResponse
Write = Callable[[bytes], Awaitable[None]]
"""Sends a serialised `Message`."""


class AdapterWatch:
    """Serves WatchAdapters calls from the event buffer."""

    def __init__(
        self,
        registry: AdapterRegistry,
        view: AdapterView,
        events: AdapterEvents,
        *,
        reader_limit_s: float = READER_LIMIT_S,
    ) -> None:
        self._registry = registry
        self._view = view
        self._events = events
        self._reader_limit_s = reader_limit_s
        self._built: OrderedDict[int, asyncio.Task[list[bytes]]] = OrderedDict()

    async def serve(self, since: int, write: Write) -> None:
        """Send the events after ``since``, then new ones until the caller leaves.

        Raises:
            Aborted: the watcher reads too slowly.
            Draining: the server is shutting down.
        """
        place, synced = since, False
        if self._events.after(since) is None:
            place = self._events.last
            await self._snapshot(write)
        while True:
            happened = self._events.after(place)
            if happened is None:
                raise Aborted(
                    "the watcher fell behind the server's event buffer: read faster, and "
                    "watch again from the last sequence number",
                    metadata={"cause": "fell_behind"},
                )
            for event in happened:
                for message in await self._once(event):
                    await self._send(write, message)
                place = event.sequence
            if not synced and not self._events.after(place):
                synced = True
                kind = adapters_pb2.ADAPTER_EVENT_SYNCED
                last = self._message(kind, sequence=place)
                await self._send(write, last.SerializeToString())
            await self._events.beyond(place)

    async def _snapshot(self, write: Write) -> None:
        reset = self._message(adapters_pb2.ADAPTER_EVENT_RESET)
        await self._send(write, reset.SerializeToString())
        name = ""
        while True:
            page = await to_the_end(
                lambda after=name: self._registry.list(after=after, limit=_PAGE)  # type: ignore[misc]
            )
            for record in page:
                message = self._message(adapters_pb2.ADAPTER_EVENT_PRESENT)
                message.adapter.CopyFrom(self._view.adapter(record))
                await self._send(write, message.SerializeToString())
            if len(page) < _PAGE:
                return
            name = page[-1].ref.name

    async def _once(self, event: Happened) -> list[bytes]:
        """`_messages`, built for the first watcher that needs them and shared with the rest."""
        built = self._built.get(event.sequence)
        if built is None:
            built = asyncio.get_running_loop().create_task(self._messages(event))
            self._built[event.sequence] = built
            while len(self._built) > KEPT_EVENTS:
                self._built.popitem(last=False)
        try:
            # Shielded: other watchers may await the same task when this one leaves.
            return await asyncio.shield(built)
        except Exception:
            self._built.pop(event.sequence, None)  # the next watcher tries again
            raise

    async def _messages(self, event: Happened) -> list[bytes]:
        """A message for each revision the event is about; the last has the sequence number."""
        if isinstance(event.subject, AdapterRecord):
            adapters = [await self._registered(event, event.subject)]
        else:
            adapters = await self._sharing(event.subject)
        messages = [
            Message(
                event=event.kind,
                adapter=adapter,
                time=convert.timestamp(event.time),
                detail=event.detail,
            )
            for adapter in adapters
        ]
        if messages:
            messages[-1].sequence = event.sequence
        return [message.SerializeToString() for message in messages]

    async def _registered(self, event: Happened, record: AdapterRecord) -> adapters_pb2.Adapter:
        gone = replace(record, current=False)
        if event.kind == adapters_pb2.ADAPTER_EVENT_DELETED:
            return self._view.adapter(gone)
        # It may be superseded or deleted by now: `current` must not claim otherwise.
        full = f"{record.ref.name}@{record.ref.revision}"
        try:
            return self._view.adapter(await to_the_end(lambda: self._registry.get(full)))
        except AdapterNotFound:
            return self._view.adapter(gone)

    async def _sharing(self, weights: Weights) -> list[adapters_pb2.Adapter]:
        records = await to_the_end(lambda: self._registry.holding(weights.digest))
        if weights.names is not None:
            records = tuple(r for r in records if r.ref.name in weights.names)
        adapters = [self._view.adapter(record) for record in records]
        for adapter in adapters:
            adapter.tier = convert.tier_to_proto(weights.tier)
            adapter.pinned = weights.pinned
        return adapters

    def _message(self, kind: Kind, *, sequence: int = 0) -> Message:
        return Message(event=kind, sequence=sequence, time=convert.timestamp(time.time()))

    async def _send(self, write: Write, message: bytes) -> None:
        try:
            async with asyncio.timeout(self._reader_limit_s):
                await write(message)
        except TimeoutError as error:
            raise Aborted(
                f"the watcher read nothing for {self._reader_limit_s:g} s: read events as "
                "they come",
                metadata={"cause": "reader_limit"},
            ) from error
