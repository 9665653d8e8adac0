"""The only module that needs a GPU: streams, events, pinned memory, captured graphs.

The rest of the backend goes through `Device`, which tests replace by a simulated device that
executes enqueued operations on the CPU (``tests/gpu/engine/simulated.py``). So only the
protocols of this module are checked without a GPU; docs/gpu.md lists what the module does.

An operation is a function with its arguments: one of our kernels' Python functions, or a torch
function that writes to a given tensor. Neither allocates device memory or waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist

from veneer_server.backends.parallel.peers import GroupPeers, Peers


class Event(Protocol):
    """A point in a stream, reached once everything enqueued before it has finished."""


class Graph(Protocol):
    """Captured operations: their launches, with the addresses used at capture."""

    def replay(self) -> None:
        """Enqueue all the operations on the stream for steps."""


class Device(Protocol):
    """A GPU with two streams, one for steps and one for copies. Each executes its operations
    asynchronously and in order.

    Attributes:
        torch_device: the device that its tensors are on.
    """

    torch_device: torch.device

    def empty(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Allocate device memory. Its address stays the same as long as the tensor lives."""

    def keep(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return constant data in device memory; the same tensor if it is there already. Not
        for use while serving: it may wait for the device."""

    def pinned(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Allocate pinned host memory, which the device can copy from and to asynchronously."""

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Enqueue an operation on the current stream: the one for steps, or see `copying`."""

    def copying(self) -> AbstractContextManager[None]:
        """Make the stream for copies this thread's current stream within the context."""

    def record(self) -> Event:
        """Record an event in the current stream."""

    def wait(self, event: Event) -> None:
        """Make everything enqueued on the current stream from now on start after the event. The
        host does not wait."""

    def done(self, event: Event) -> bool:
        """Return True if the device has reached the event. The host does not wait."""

    def sync(self, event: Event) -> None:
        """Block the host until the device has reached the event."""

    def capture(self, operations: Callable[[], None]) -> Graph:
        """Capture a graph of the operations that a function enqueues, without executing them.
        The function must have run before, since kernels are compiled when first launched."""

    def join(self, file: str, index: int, count: int) -> Peers:
        """Join a group of ``count`` processes as process ``index``. Each has its own GPU; they
        find each other through ``file``, which must be new."""


def matmul(device: Device, x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor) -> None:
    """Enqueue ``y`` = ``x`` times the transposed weight, by cuBLAS. All have one dtype: ``x``
    [rows, in], ``weight`` [out, in], ``y`` [rows, out]."""
    device.call(torch.mm, x, weight.t(), out=y)


class CudaDevice:
    """`Device` on a real GPU. Tests only execute it where there is one."""

    def __init__(self, index: int) -> None:
        self.torch_device = torch.device("cuda", index)
        # cuBLAS and Triton may use TF32 or reduced sums where torch allows it.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        with torch.cuda.device(index):
            # Not the default stream, which waits for other streams and cannot be captured.
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
        """See `Device.call`. The engine's threads start on torch's default stream, so that one
        is replaced by the stream for steps."""
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
    """`Graph` on a real GPU."""

    def __init__(self, graph: Any, stream: Any) -> None:
        self._graph = graph
        self._stream = stream

    def replay(self) -> None:
        """See `Graph.replay`."""
        with torch.cuda.stream(self._stream):
            self._graph.replay()


def open_device(device: torch.device) -> Device:
    """Open the GPU with this index.

    Raises:
        RuntimeError: the device is not a GPU, or torch finds none with this index.
    """
    if device.type != "cuda":
        raise RuntimeError(f"the device is {device.type}")
    count, index = torch.cuda.device_count(), device.index or 0
    if index >= count:
        raise RuntimeError(f"torch finds {count} CUDA devices, and none has number {index}")
    torch.cuda.init()
    return CudaDevice(index)
