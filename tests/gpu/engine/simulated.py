"""A FAKE card: `Device` on the CPU, whose streams execute later what was enqueued.

Nothing is executed when it is enqueued, only when the host waits, or by chance when it asks
whether an event is reached: so what a step reads too late, or the host too early, is wrong here
as it would be on a card. A graph keeps launches with the tensors, that is the addresses, of its
capture. ``syncs`` counts how often the host waited, by what it called.

Tensors of device memory know that they are (`Resident`): an operation that torch would execute
on the stream, outside `call`, first executes all before it; one that brings numbers to the host
counts as a wait.
"""

from __future__ import annotations

import copy
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from random import Random
from typing import Any, Final

import torch
import torch.distributed as dist
from veneer_server.backends.parallel.peers import GroupPeers

from tests.gpu.interpreter import allow

_VIEWS: Final = frozenset(
    [
        "view",
        "t",
        "as_strided",
        "transpose",
        "unsqueeze",
        "squeeze",
        "expand",
        "detach",
        "__getitem__",
        "__len__",
        "__get__",
        "stride",
        "size",
        "data_ptr",
        "numel",
        "dim",
        "is_contiguous",
        "element_size",
        "untyped_storage",
        "storage_offset",
        "split",
        "unbind",
        "__repr__",
        "__hash__",
        "__format__",
        "reshape",
        "chunk",
        "flatten",
        "is_floating_point",
        "as_subclass",
        "__set__",
        "new_empty",
        "set_",
        "__dlpack__",
    ]
)
"""What reads no numbers of the tensor."""
_WAITING: Final = frozenset(
    [
        "tolist",
        "item",
        "numpy",
        "cpu",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "nonzero",
        "__contains__",
        "equal",
        "__array__",
    ]
)


class Resident(torch.Tensor):
    """FAKE device memory."""

    owner: SimulatedDevice

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name not in _VIEWS and not _LOCAL.executing:
            SimulatedDevice.current.drained(name if name in _WAITING else "")
        return super().__torch_function__(func, types, args, kwargs or {})


class _Local(threading.local):
    executing = False
    copying = False


_LOCAL = _Local()


class _Event:
    def __init__(self) -> None:
        self.reached = False


class _Captured:
    """A graph: operations with their arguments as they were."""

    def __init__(self, device: SimulatedDevice, operations: list[Callable[[], None]]) -> None:
        self._device = device
        self.operations = operations

    def replay(self) -> None:
        for operation in self.operations:
            self._device.enqueue(operation)


class SimulatedDevice:
    """FAKE `Device`.

    Args:
        instead: what executes in place of a function.

    Attributes:
        syncs: how often the host waited, by what it called and its thread's name.
        stalls: how often it waited for the last thing that was enqueued, so that the device
            had nothing to do when the host went on.
        captures, replays, launches: numbers of each.
    """

    current: SimulatedDevice

    def __init__(
        self,
        random: Random,
        instead: Mapping[Callable[..., Any], Callable[..., Any]] | None = None,
    ) -> None:
        self._instead = instead or {}
        self.torch_device = torch.device("cpu")
        self.syncs: Counter[str] = Counter()
        self.captures = self.launches = self.stalls = 0
        self._random = random
        self._lock = threading.RLock()
        self._streams: tuple[deque[Any], deque[Any]] = deque(), deque()
        self._capturing: list[Callable[[], None]] | None = None
        self._ranges: list[tuple[int, int]] = []
        self.enter()

    def enter(self) -> None:
        """Of several cards, this is the one that is used from now on."""
        SimulatedDevice.current = self
        allow(self._ranges)

    def empty(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        made = torch.empty(shape, dtype=dtype)
        if dtype.is_floating_point:
            made.fill_(torch.nan)
        self.admit(made)
        return made.as_subclass(Resident)

    def keep(self, numbers: torch.Tensor) -> torch.Tensor:
        made = numbers.detach().clone()
        self.admit(made)
        return made.as_subclass(Resident)

    def admit(self, tensor: torch.Tensor) -> None:
        """Programs may access this memory."""
        start = tensor.data_ptr()
        self._ranges.append((start, start + tensor.untyped_storage().nbytes()))
        allow(self._ranges)

    def pinned(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        function = self._instead.get(function, function)
        # A launch has the addresses of the tensors that an object holds now.
        args = tuple(
            a if isinstance(a, torch.Tensor) else copy.copy(a) for a in map(_plain, args)
        )

        def operation() -> None:
            self.launches += 1
            function(*args, **{k: _plain(v) for k, v in kwargs.items()})

        if self._capturing is not None and not _LOCAL.copying:
            self._capturing.append(operation)
        else:
            self.enqueue(operation)

    def enqueue(self, operation: Any) -> None:
        """Add to the current stream."""
        with self._lock:
            self._streams[_LOCAL.copying].append(operation)

    @contextmanager
    def copying(self) -> Iterator[None]:
        _LOCAL.copying = True
        try:
            yield
        finally:
            _LOCAL.copying = False

    def record(self) -> _Event:
        event = _Event()
        self.enqueue(event)
        return event

    def wait(self, event: Any) -> None:
        self.enqueue(("wait", event))

    def done(self, event: Any) -> bool:
        with self._lock:
            for stream in self._random.sample((0, 1), 2):
                for _ in range(self._random.choice((0, 0, 1, 5, 200))):
                    self._advance(stream)
            return bool(event.reached)

    def sync(self, event: Any) -> None:
        with self._lock:
            if event.reached:
                return  # costs a card nothing
            self.syncs[f"sync in {threading.current_thread().name}"] += 1
            steps = self._streams[0]
            self.stalls += event not in steps or not any(
                callable(one) for one in list(steps)[steps.index(event) :]
            )
            while not event.reached:
                moved = [self._advance(stream) for stream in (0, 1)]
                assert any(moved), "the streams wait for each other"

    def capture(self, operations: Callable[[], None]) -> _Captured:
        self._capturing = []
        try:
            operations()
            self.captures += 1
            return _Captured(self, self._capturing)
        finally:
            self._capturing = None

    def join(self, file: str, index: int, count: int) -> GroupPeers:
        dist.init_process_group(
            "gloo", init_method=f"file://{file}", rank=index, world_size=count
        )
        return GroupPeers()

    def drained(self, why: str) -> None:
        """All is executed; counts as a wait if ``why`` is given."""
        with self._lock:
            if why:
                self.syncs[f"{why} in {threading.current_thread().name}"] += 1
                self.stalls += 1
            while self._advance(0) or self._advance(1):
                pass

    def _advance(self, stream: int) -> bool:
        """Execute the next operation of a stream, if it need not wait."""
        queue = self._streams[stream]
        if not queue:
            return False
        first = queue[0]
        if isinstance(first, tuple) and not first[1].reached:
            return False
        queue.popleft()
        if isinstance(first, _Event):
            first.reached = True
        elif not isinstance(first, tuple):
            before, _LOCAL.executing = _LOCAL.executing, True
            try:
                with torch.inference_mode():
                    first()
            finally:
                _LOCAL.executing = before
        return True


def _plain(value: Any) -> Any:
    return value.as_subclass(torch.Tensor) if isinstance(value, Resident) else value
