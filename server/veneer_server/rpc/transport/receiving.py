"""Bounds the memory of requests that have not arrived whole.

gRPC buffers a message until its last byte arrives, and gives the sender as long as it
likes. Only a stream that is being read may send more than its flow-control window
(`WINDOW`), so the number of streams being read bounds the total. A read cannot be paused.
This module decides which requests are read: each needs a place while its message arrives.

Most messages have arrived whole before they are read, and need a place for a millisecond.
One that is not whole after `BRIEF_S` is slow. Slow messages must not keep others waiting:

* While another connection waits, slow messages keep at most `SLOW` places. Any more are
  refused: those of late connections first, then those of the connection with the most places.
* The other slow messages keep their places for `PATIENCE_S` or `GREEDY_PATIENCE_S` while
  any request waits, and up to the time limit while none does.
* A connection whose message lost its place is late (see `Standings`): for some seconds it is
  read after the others, one message at a time, and loses its place first.

Hosts take turns, and so do the connections of each. Every other free place goes to a connection
that is not late, whose last message was whole when it was read, and that has few requests
waiting.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, TypeVar
from urllib.parse import unquote

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError
from veneer_registry.errors import (
    Aborted,
    InvalidField,
    MalformedMessage,
    QueueFull,
    VeneerError,
)

from veneer_server.queues.connection_places import host_of
from veneer_server.queues.fair_queue import FairQueue
from veneer_server.rpc.transport.connections import Standings

MAX_MESSAGE: Final = 4 << 20
"""Most bytes of a message."""

PLACES: Final = 8
"""Requests read at once; each may hold `MAX_MESSAGE` bytes."""

STRANGERS: Final = 2
"""Additional places on a server that asks for keys, for callers without one, who may check its
health: their requests never take the place of a caller with a key."""

SLOW: Final = 4
"""Places that slow messages may keep while another connection waits."""

WAITING: Final = 512
"""Most requests waiting to be read; each may hold `WINDOW` bytes."""

WINDOW: Final = 16 << 10
"""Bytes that a client may send on a stream before it is read."""

LIMIT_S: Final = 30.0
"""Longest time from a request's first byte to its last; the default of ``--reader-limit``."""

BRIEF_S: Final = 0.010
"""A message that takes longer than this to read counts as slow."""

PATIENCE_S: Final = 5.0
"""How long a message may take to arrive while others wait for its place."""

GREEDY_PATIENCE_S: Final = 1.0
"""The same if its connection has, or waits for, more than one place."""

FEW: Final = 8
"""Every other time, connections with at most this many requests go before those with more."""

_LOOK_S: Final = 0.005
"""Interval of the checks for slow messages, while any request waits."""

_SPREAD: Final = 0.1
"""Jitter of a call's longest wait for a place, as a share of the limit."""

_RETRY_S: Final = 1.0

_KNOWN_HOSTS: Final = 4096
"""Most connections whose host is remembered."""

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Place:
    """The place of a message being read. ``looks``: how many checks found the message slow."""

    peer: str
    since: float
    timeout: asyncio.Timeout | None = None
    looks: int = 0
    displaced: bool = False


class Receiving:
    """Decides which requests are read. Belongs to one event loop.

    Attributes:
        limit_s: seconds from a request's first byte to its last.
    """

    def __init__(
        self,
        *,
        places: int = PLACES,
        slow: int = SLOW,
        waiting: int = WAITING,
        limit_s: float = LIMIT_S,
    ) -> None:
        self._places = places
        self._slow = slow
        self._most_waiting = waiting
        self.limit_s = limit_s
        self._held: set[_Place] = set()
        self._queue: FairQueue[str, tuple[str, asyncio.Future[_Place]]] = FairQueue()
        """By connection."""
        self._standings = Standings(lambda: asyncio.get_running_loop().time())
        self._by_standing = True
        self._timer: asyncio.TimerHandle | None = None

    @property
    def held(self) -> int:
        """Requests being read now."""
        return len(self._held)

    @property
    def waiting(self) -> int:
        """Requests waiting to be read."""
        return len(self._queue)

    async def message(
        self,
        read: Callable[[], Awaitable[T]],
        peer: str,
        finish: Callable[[T], Awaitable[T]] | None = None,
    ) -> T:
        """Wait for a place, then return the message that ``read`` returns.

        Args:
            peer: the connection.
            finish: processes the whole message before its place is released. Meanwhile the
                message can no longer lose the place.

        Raises:
            QueueFull: too many requests are arriving.
            Aborted: the message was not whole within the limit.
        """
        place = await self._take(peer)
        try:
            async with asyncio.timeout(self.limit_s) as place.timeout:
                message = await read()
            place.timeout = None
            if asyncio.get_running_loop().time() - place.since < BRIEF_S:
                self._standings.was_prompt(peer)
            return message if finish is None else await finish(message)
        except TimeoutError as error:
            self._standings.was_late(peer, displaced=place.displaced)
            if place.displaced:
                raise QueueFull(
                    "the request arrived too slowly while others waited to be read: send it "
                    "again, on a separate connection",
                    retry_after_s=_RETRY_S,
                ) from error
            raise Aborted(
                f"the request was not complete after {self.limit_s:g} s: send all of it at "
                "once, or start the server with a larger --reader-limit",
                metadata={"cause": "request_incomplete"},
            ) from error
        finally:
            self._held.discard(place)
            if self._queue:
                self._grant()

    async def _take(self, peer: str) -> _Place:
        if len(self._held) < self._places and not self._queue:
            mine = sum(peer == place.peer for place in self._held)
            if self._standings.may_be_read(peer, mine):
                return self._hold(peer)
        waiter: asyncio.Future[_Place] = asyncio.get_running_loop().create_future()
        self._join(peer, waiter)
        self._grant()
        try:
            # With jitter, because refusing hundreds at once would stall the event loop.
            async with asyncio.timeout(self.limit_s * (1 + random.random() * _SPREAD)):  # nosec B311 # not for secrets
                return await waiter
        except BaseException as error:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self._held.discard(waiter.result())  # granted, but the caller has left
                self._grant()
            else:
                self._queue.remove(peer, (peer, waiter))
            if isinstance(error, TimeoutError):
                raise _too_many() from error
            raise

    def _hold(self, peer: str) -> _Place:
        place = _Place(peer, asyncio.get_running_loop().time())
        self._held.add(place)
        return place

    # --------------------------------------------------------------------- waiting

    def _join(self, peer: str, waiter: asyncio.Future[_Place]) -> None:
        """Append the request to its connection's queue. If too many wait, the last one of the
        longest queue is refused."""
        if len(self._queue) >= self._most_waiting:
            hosts: Counter[str] = Counter()
            for each in self._queue:
                hosts[_host(each)] += self._queue.waiting(each)

            def size(each: str) -> tuple[int, int]:
                return hosts[_host(each)], self._queue.waiting(each)

            longest = max(self._queue, key=size)
            if size(peer) >= size(longest):
                raise _too_many()
            _, last = self._queue.pop_last(longest)
            if not last.done():
                last.set_exception(_too_many())
        self._queue.push(peer, (peer, waiter))

    def _grant(self) -> None:
        """Give free places to waiting requests."""
        while self._queue and len(self._held) < self._places:
            found = self._queue.pop(self._rank())
            if found is None:
                break
            peer, waiter = found
            self._by_standing = not self._by_standing
            if not waiter.done():
                waiter.set_result(self._hold(peer))
        if self._queue and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_LOOK_S, self._look)

    def _rank(self) -> Callable[[str], tuple[int, ...] | None]:
        """A sort key of connections for the next place; None for one that may not be read."""
        held = Counter(place.peer for place in self._held)
        hosts = Counter(_host(place.peer) for place in self._held)

        def rank(peer: str) -> tuple[int, ...] | None:
            if not self._standings.may_be_read(peer, held[peer]):
                return None
            late = self._standings.late(peer)
            if not self._by_standing:
                return (late, hosts[_host(peer)], held[peer])
            wanted = held[peer] + self._queue.waiting(peer)
            unknown = not self._standings.prompt(peer)
            return (late, unknown, hosts[_host(peer)], wanted > FEW, held[peer])

        return rank

    # ---------------------------------------------------------------- displacement

    def _look(self) -> None:
        """Take places away from slow messages, and give free ones to waiting requests."""
        self._timer = None
        now = asyncio.get_running_loop().time()
        for place in self._held:
            # Only a second look makes a message slow: if the event loop was late, data may
            # have arrived that it will have processed by then.
            place.looks += now - place.since >= BRIEF_S
        while self._queue and (slow := self._to_displace(now)) is not None:
            slow.displaced = True
            assert slow.timeout is not None, "only a message being read is displaced"
            slow.timeout.reschedule(now)
        self._grant()

    def _to_displace(self, now: float) -> _Place | None:
        """The next place to take from a slow message, if any."""
        staying = [place for place in self._held if not place.displaced]
        if len(staying) < self._places:
            return None  # one is free, or about to be
        slow = [place for place in staying if place.looks > 1 and place.timeout is not None]
        crowded = len(slow) > self._slow
        waiting = {peer for peer in self._queue if not self._standings.late(peer)}
        count = Counter(place.peer for place in staying)
        hosts = Counter(_host(place.peer) for place in staying)

        def order(place: _Place) -> tuple[float, ...] | None:
            age = now - place.since
            wanted = count[place.peer] + self._queue.waiting(place.peer)
            worn = age >= (GREEDY_PATIENCE_S if wanted > 1 else PATIENCE_S)
            if not worn and not (crowded and waiting - {place.peer}):
                return None
            late = self._standings.late(place.peer)
            return (
                late,
                hosts[_host(place.peer)],
                count[place.peer],
                worn,
                age if worn else -age,
            )

        orders = [(found, place) for place in slow if (found := order(place)) is not None]
        return max(orders, key=lambda each: each[0])[1] if orders else None


@lru_cache(_KNOWN_HOSTS)
def _host(peer: str) -> str:
    """The host in gRPC's name of a connection; see `host_of`."""
    return host_of(unquote(peer.partition(":")[2]))


def _too_many() -> QueueFull:
    return QueueFull(
        "too many requests are arriving at once: retry, with fewer at a time on one connection",
        retry_after_s=_RETRY_S,
    )


# -------------------- decoding
# Decodes requests; one that is malformed or holds too much is the caller's error.
#
# If a deserializer raises, gRPC answers UNKNOWN, logs a traceback and counts no metric. So a
# deserializer here never raises: it returns the error in the request's place, and the
# interceptor raises it inside the call, where every error is handled.

MAX_FIELDS: Final = 32_768
"""Most fields of one message on the wire, including those of nested messages. Parsing holds the
GIL: 4 MiB of empty messages take 65 ms and 90 MB."""

MAX_STREAM_FIELDS: Final = 512
"""The same for each message of a stream. These are counted and parsed on the event loop, which
takes less than a millisecond. An upload's first message has 300 at most, a chunk has 4."""

COUNTED_FROM: Final = 2 * MAX_FIELDS
"""From this size in bytes on, a message's fields are counted, in a thread, before it is
parsed. A smaller message cannot have too many: a field takes at least two bytes."""

_NOT_LAST: Final = bytes(range(128, 256))
"""Bytes of a varint that are not its last."""

_Parse = Callable[[bytes], Any]


def decoder(
    parse: _Parse,
    check: Callable[[bytes], None] | None = None,
    *,
    most: int = MAX_FIELDS,
) -> _Parse:
    """A deserializer that returns a VeneerError where ``parse`` would raise.

    Args:
        parse: a generated message's ``FromString``.
        check: runs before a message of `COUNTED_FROM` bytes or more is parsed; raises
            VeneerError.
        most: fields that a message may have, including those of nested messages.
    """
    kind: type[Any] = parse.__self__  # type: ignore[attr-defined]  # a class method
    descriptor: Descriptor = kind.DESCRIPTOR

    def decode(data: bytes) -> Any:
        try:
            # A field takes at least two bytes.
            if len(data) > 2 * most and count_fields(data, descriptor, most) > most:
                return InvalidField(
                    f"the {descriptor.name} has more than {most} fields and entries: send "
                    "fewer, and token ids packed",
                    metadata={"field": descriptor.name},
                )
            if check is not None and len(data) >= COUNTED_FROM:
                check(data)
            return parse(data)
        except VeneerError as error:
            return error
        except (DecodeError, RecursionError, ValueError) as error:
            return _malformed(descriptor, error)

    return decode


def _malformed(descriptor: Descriptor, error: Exception) -> VeneerError:
    why = " ".join(str(error).split())[:200]
    return MalformedMessage(
        f"the request is not a valid {descriptor.full_name}: {why}; use this server's "
        ".proto files, and UTF-8 in strings",
        metadata={"message": descriptor.full_name},
    )


def last_value(data: bytes, field: int) -> bytes:
    """The last of a field's `values`, which is the one that parsing keeps; empty if none."""
    found = values(data, field)
    return found[-1] if found else b""


def values(data: bytes, field: int) -> list[bytes]:
    """Contents (text, messages or packed numbers) of the top-level fields with this number,
    as far as the message is well-formed. For messages with few fields."""
    at, found = 0, []
    try:
        while at < len(data):
            number, at = _varint(data, at)
            wire_type = number & 7
            if wire_type == 0:
                _, at = _varint(data, at)
            elif wire_type == 1:
                at += 8
            elif wire_type == 2:
                size, at = _varint(data, at)
                if number >> 3 == field:
                    found.append(data[at : at + size])
                at += size
            elif wire_type == 5:
                at += 4
    except IndexError:
        pass
    return found


def holds(data: bytes, field: int) -> bool:
    """Whether a message has a top-level varint field with this number, as far as the message is
    well-formed. For messages with few fields."""
    at, found = 0, False
    try:
        while at < len(data):
            number, at = _varint(data, at)
            wire_type = number & 7
            if wire_type == 0:
                found = found or number >> 3 == field
                _, at = _varint(data, at)
            elif wire_type == 2:
                size, at = _varint(data, at)
                at += size
            else:
                at += {1: 8, 5: 4}.get(wire_type, 0)
    except IndexError:
        pass
    return found


def count_numbers(packed: bytes) -> int:
    """How many numbers a packed field holds, without parsing them."""
    return len(packed.translate(None, _NOT_LAST))


def count_fields(data: bytes, kind: Descriptor, most: int = MAX_FIELDS) -> int:
    """Fields of a message and of its nested messages, or ``most`` + 1 if there are more.

    Reads only tags and lengths and leaves malformed data to the parser. A packed field
    counts as one.
    """
    count = 0
    todo = [(0, len(data), kind)]
    try:
        while todo:
            at, end, kind = todo.pop()
            inside = kind.fields_by_number
            while at < end:
                count += 1
                if count > most:
                    return count
                number, at = _varint(data, at)
                wire_type = number & 7
                if wire_type == 0:
                    while data[at] & 128:
                        at += 1
                    at += 1
                elif wire_type == 1:
                    at += 8
                elif wire_type == 2:
                    size, at = _varint(data, at)
                    field = inside.get(number >> 3)
                    if size and field is not None and field.message_type is not None:
                        todo.append((at, min(at + size, end), field.message_type))
                    at += size
                elif wire_type == 5:
                    at += 4
    except IndexError:  # cut short
        pass
    return count


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number, and the offset just after it."""
    byte = data[at]
    at += 1
    if byte < 128:
        return byte, at
    number, shift = byte & 127, 7
    while shift < 70:
        byte = data[at]
        at += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, at
        shift += 7
    raise IndexError("a varint of more than ten bytes")
