"""The only module that needs a card: streams, events, pinned memory, captured graphs.

The rest of the backend goes through `Device`, which tests replace by a simulated one that
executes on the CPU what was enqueued (``tests/gpu/engine/simulated.py``). So of this module no
line but the protocol is checked without a card; docs/gpu.md lists what it does.

An operation is a function with its arguments: one of the kernels' Python functions, or one of
torch's that writes to a given tensor. Neither allocates device memory or waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist

from veneer_server.backends.parallel.peers import GroupPeers, Peers


class Event(Protocol):
    """A point in a stream: after all that was enqueued before it was recorded."""


class Graph(Protocol):
    """Operations that were captured: their launches with the addresses they had then."""

    def replay(self) -> None:
        """Enqueue all of them on the stream of steps."""


class Device(Protocol):
    """Two streams that execute operations in their own order, later.

    Attributes:
        torch_device: where its tensors are.
    """

    torch_device: torch.device

    def empty(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Device memory. Its address stays the same as long as the tensor lives."""

    def keep(self, numbers: torch.Tensor) -> torch.Tensor:
        """Numbers that never change, in device memory; the same tensor if they are there. Not
        while serving: it may wait."""

    def pinned(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Host memory that the device copies from or to while the host does something else."""

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Enqueue an operation on the current stream: that of steps, or see `copying`."""

    def copying(self) -> AbstractContextManager[None]:
        """Within it, the current stream of this thread is that of copies."""

    def record(self) -> Event:
        """An event in the current stream."""

    def wait(self, event: Event) -> None:
        """What the current stream gets from now on begins after the event. The host goes on."""

    def done(self, event: Event) -> bool:
        """Whether the device has reached the event. The host goes on."""

    def sync(self, event: Event) -> None:
        """The host waits until the device has reached the event."""

    def capture(self, operations: Callable[[], None]) -> Graph:
        """A graph of what a function enqueues, which is not executed now. It must have been
        called before: kernels are compiled when they are first launched."""

    def join(self, file: str, index: int, count: int) -> Peers:
        """Process ``index`` of ``count``, each with a card of its own, meets the others by a
        new file."""


def matmul(device: Device, x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor) -> None:
    """Enqueue ``y`` = ``x`` times the transposed weight, by cuBLAS. [rows, in], [out, in],
    [rows, out], one dtype."""
    device.call(torch.mm, x, weight.t(), out=y)


class CudaDevice:
    """`Device` on a card. No test executes it without one."""

    def __init__(self, index: int) -> None:
        self.torch_device = torch.device("cuda", index)
        # cuBLAS and Triton may use TF32 or reduced sums where torch allows it.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        with torch.cuda.device(index):
            # Not the default stream: that one waits for others, and cannot be captured.
            self._steps = torch.cuda.Stream()
            self._copies = torch.cuda.Stream()
        torch.cuda.set_stream(self._steps)

    def empty(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """See `Device.empty`."""
        return torch.empty(shape, dtype=dtype, device=self.torch_device)

    def keep(self, numbers: torch.Tensor) -> torch.Tensor:
        """See `Device.keep`."""
        return numbers.to(self.torch_device).contiguous()

    def pinned(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """See `Device.pinned`."""
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """See `Device.call`. The engine's threads begin with torch's default stream."""
        if torch.cuda.current_stream(self.torch_device) in (self._steps, self._copies):
            function(*args, **kwargs)
            return
        with torch.cuda.stream(self._steps):
            function(*args, **kwargs)

    @contextmanager
    def copying(self) -> Iterator[None]:
        """See `Device.copying`."""
        with torch.cuda.stream(self._copies):
            yield

    def record(self) -> Event:
        """See `Device.record`."""
        event = torch.cuda.Event()
        event.record(self._current())
        return event

    def wait(self, event: Any) -> None:
        """See `Device.wait`."""
        self._current().wait_event(event)

    def done(self, event: Any) -> bool:
        """See `Device.done`."""
        return bool(event.query())

    def sync(self, event: Any) -> None:
        """See `Device.sync`."""
        event.synchronize()

    def capture(self, operations: Callable[[], None]) -> Graph:
        """See `Device.capture`."""
        graph = torch.cuda.CUDAGraph()
        # Another thread may allocate or copy meanwhile.
        with torch.cuda.graph(graph, stream=self._steps, capture_error_mode="thread_local"):
            operations()
        return _Replayed(graph, self._steps)

    def join(self, file: str, index: int, count: int) -> Peers:
        """See `Device.join`."""
        dist.init_process_group(
            "nccl",
            init_method=f"file://{file}",
            rank=index,
            world_size=count,
            device_id=self.torch_device,
        )
        return GroupPeers()

    def _current(self) -> Any:
        current = torch.cuda.current_stream(self.torch_device)
        return current if current == self._copies else self._steps


class _Replayed:
    """`Graph` of a card."""

    def __init__(self, graph: Any, stream: Any) -> None:
        self._graph = graph
        self._stream = stream

    def replay(self) -> None:
        """See `Graph.replay`."""
        with torch.cuda.stream(self._stream):
            self._graph.replay()


def open_device(device: torch.device) -> Device:
    """The card with this index.

    Raises:
        RuntimeError: it is no card, or torch finds none.
    """
    if device.type != "cuda":
        raise RuntimeError(f"the device is {device.type}")
    count, index = torch.cuda.device_count(), device.index or 0
    if index >= count:
        raise RuntimeError(f"torch finds {count} CUDA devices, and none has number {index}")
    torch.cuda.init()
    return CudaDevice(index)
