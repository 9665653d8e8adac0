"""A queue that is fair by key: whoever has many in it waits behind itself alone."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

__all__ = ["FairQueue"]

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class FairQueue(Generic[K, T]):
    """Keys take turns; within a key, first come, first served."""

    def __init__(self) -> None:
        self._queues: OrderedDict[K, deque[T]] = OrderedDict()
        """None is empty; the next turn is the first one's."""
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def waiting(self, key: K) -> int:
        """How many of a key wait."""
        return len(self._queues.get(key, ()))

    def push(self, key: K, item: T) -> None:
        """Add an item behind those of its key."""
        self._queues.setdefault(key, deque()).append(item)
        self._count += 1

    def __iter__(self) -> Iterator[K]:
        """The keys that have something in it."""
        return iter(self._queues)

    def pop(self, rank: Callable[[K], tuple[float, ...] | None] = lambda key: ()) -> T | None:
        """The next item: of the keys with the lowest rank, the one whose turn it is; those
        whose rank is None are left out. None where there is no item."""
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
        return item

    def pop_longest(self) -> tuple[K, T]:
        """The last item of the key that has the most. Raises ValueError where there is none."""
        key = max(self._queues, key=self.waiting)
        item = self._queues[key].pop()
        self._forget_if_empty(key)
        self._count -= 1
        return key, item

    def longest(self) -> int:
        """Most items of one key."""
        return max(map(len, self._queues.values()), default=0)

    def remove(self, key: K, item: T) -> None:
        """Take an item out, if it still waits."""
        queue = self._queues.get(key)
        if queue is not None and item in queue:
            queue.remove(item)
            self._forget_if_empty(key)
            self._count -= 1

    def _forget_if_empty(self, key: K) -> None:
        if not self._queues[key]:
            del self._queues[key]
