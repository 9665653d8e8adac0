"""A queue that is fair between keys: a key with many items delays only itself."""

from __future__ import annotations

import itertools
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator
from typing import Final, Generic, TypeVar

from veneer_server.queues.fairness import Sender
from veneer_server.queues.recent import Recent

_KNOWN: Final = 1000

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class FairQueue(Generic[K, T]):
    """Keys take turns; within a key, first come, first served."""

    def __init__(self) -> None:
        self._queues: OrderedDict[K, deque[T]] = OrderedDict()
        """Items by key, without empty queues; the first key's turn is next."""
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def waiting(self, key: K) -> int:
        """Number of waiting items of a key."""
        return len(self._queues.get(key, ()))

    def push(self, key: K, item: T) -> None:
        """Add an item behind the others of its key."""
        self._queues.setdefault(key, deque()).append(item)
        self._count += 1

    def push_first(self, key: K, item: T) -> None:
        """Add an item before the others of its key."""
        self._queues.setdefault(key, deque()).appendleft(item)
        self._count += 1

    def __iter__(self) -> Iterator[K]:
        """The keys that have items."""
        return iter(self._queues)

    def pop(self, rank: Callable[[K], tuple[float, ...] | None] = lambda key: ()) -> T | None:
        """Remove and return the next item: among the keys with the lowest rank, that of the key
        whose turn is next. Keys with rank None are left out. None if there is no item."""
        found = self.pop_with_key(rank)
        return None if found is None else found[1]

    def pop_with_key(
        self, rank: Callable[[K], tuple[float, ...] | None] = lambda key: ()
    ) -> tuple[K, T] | None:
        """As `pop`, with the item's key."""
        ranks = ((rank(key), key) for key in self._queues)
        ranked = [(found, key) for found, key in ranks if found is not None]
        if not ranked:
            return None
        _, key = min(ranked, key=lambda each: each[0])
        queue = self._queues.pop(key)
        item = queue.popleft()
        if queue:
            self._queues[key] = queue
        self._count -= 1
        return key, item

    def pop_last(self, key: K) -> T:
        """Remove and return the last item of a key; it must have one."""
        item = self._queues[key].pop()
        self._forget_if_empty(key)
        self._count -= 1
        return item

    def remove(self, key: K, item: T) -> None:
        """Remove an item, if it is still waiting."""
        queue = self._queues.get(key)
        if queue is not None and item in queue:
            queue.remove(item)
            self._forget_if_empty(key)
            self._count -= 1

    def drop(self, unwanted: Callable[[T], bool]) -> None:
        """Remove all unwanted items at once: with many, removing them one by one takes far
        longer."""
        for key, queue in list(self._queues.items()):
            kept = [item for item in queue if not unwanted(item)]
            if len(kept) < len(queue):
                self._count -= len(queue) - len(kept)
                queue.clear()
                queue.extend(kept)
                self._forget_if_empty(key)

    def _forget_if_empty(self, key: K) -> None:
        if not self._queues[key]:
            del self._queues[key]


class SenderQueue(Generic[T]):
    """Items of senders, who take turns by `Sender`: first the tenant whose last turn is longest
    ago, then the key within the tenant, and so on."""

    def __init__(self) -> None:
        self._queue: FairQueue[Sender, T] = FairQueue()
        self._turns = itertools.count(1)
        self._last: tuple[Recent[tuple[str, ...], int], ...] = tuple(
            Recent(_KNOWN) for _ in Sender._fields
        )
        """The last turn of each tenant, of each key, of each user and of each connection."""

    def __len__(self) -> int:
        return len(self._queue)

    def push(self, sender: Sender, item: T, *, first: bool = False) -> None:
        """Add an item behind the others of its sender, or before them."""
        (self._queue.push_first if first else self._queue.push)(sender, item)

    def remove(self, sender: Sender, item: T) -> None:
        """Remove an item, if it is still waiting."""
        self._queue.remove(sender, item)

    def drop(self, unwanted: Callable[[T], bool]) -> None:
        """Remove items, see `FairQueue.drop`."""
        self._queue.drop(unwanted)

    def pop(
        self, may: Callable[[Sender], bool] = lambda sender: True
    ) -> tuple[Sender, T] | None:
        """Remove and return the next item with its sender, using the sender's turn. None if
        there is no item.

        Args:
            may: whether a sender may have a turn.
        """
        *outer, connections = self._last
        parties: dict[tuple[str, ...], tuple[int, ...]] = {}

        def rank(sender: Sender) -> tuple[int, ...] | None:
            if not may(sender):
                return None
            party = sender.party
            if (turns := parties.get(party)) is None:
                turns = parties[party] = tuple(
                    last.get(sender[:depth], 0) for depth, last in enumerate(outer, start=1)
                )
            return (*turns, connections.get(sender, 0))

        found = self._queue.pop_with_key(rank)
        if found is not None:
            turn = next(self._turns)
            for depth, last in enumerate(self._last, start=1):
                last[found[0][:depth]] = turn
        return found
