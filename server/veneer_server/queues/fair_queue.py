"""A queue that is fair between keys: a key with many items delays only itself."""

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
        """None of the queues is empty; the first key's turn is next."""
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

    def __iter__(self) -> Iterator[K]:
        """The keys that have items."""
        return iter(self._queues)

    def pop(self, rank: Callable[[K], tuple[float, ...] | None] = lambda key: ()) -> T | None:
        """The next item: of the keys with the lowest rank, that of the key whose turn is next;
        keys with rank None are left out. None if there is no item."""
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

    def pop_last(self, key: K) -> T:
        """The last item of a key that has some."""
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

    def _forget_if_empty(self, key: K) -> None:
        if not self._queues[key]:
            del self._queues[key]
