"""HOST and DEVICE copies of adapters, and the workers that make them.

Implements the engine's `AdapterMemory`. Separate processes read, verify and convert adapters
(`loaders`); worker threads call them and make copies; the loop's thread only puts finished
copies into dictionaries. On a CPU the DEVICE copy shares the HOST copy's memory, so a move only
makes a table.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Protocol, TypeVar

import torch
from veneer_registry.causes import cause_of
from veneer_registry.errors import AdapterBudgetExceeded, InternalError, VeneerError

from veneer_server.adapters.loader_process import NO_MEMORY, LoaderSetup
from veneer_server.adapters.loaders import HostCopy, Loaders
from veneer_server.adapters.reading import Dtype
from veneer_server.adapters.references import References
from veneer_server.models.config import DecoderConfig
from veneer_server.step.adapter_table import AdapterTable
from veneer_server.step.inbox import Arrived, Inbox
from veneer_server.step.layout import Layout
from veneer_server.system.priority import lower_priority
from veneer_server.wire.messages import AdapterSource, Reference

log = logging.getLogger(__name__)

_Made = TypeVar("_Made")

DTYPE_NAMES: Final[Mapping[torch.dtype, Dtype]] = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float32: "float32",
}


class Placer(Protocol):
    """The part of a backend that places DEVICE copies in the backend's own memory."""

    def place(self, layout: Layout, run: torch.Tensor) -> AdapterTable:
        """Copy a HOST copy's numbers to DEVICE. Called on a worker thread; may block.

        Raises:
            VeneerError: there is no room for the copy.
        """

    def part(self, layout: Layout) -> int:
        """Return how many of an adapter's numbers each card will hold, if cards divide them;
        else 0."""

    def release(self, table: AdapterTable) -> None:
        """Free a copy that no later step will use. Called on the loop's thread."""


class LoraMemory:
    """Owns all copies. The public methods are called on the loop's thread.

    Args:
        placer: makes DEVICE copies, if the backend has memory of its own for them.
        room: bytes of that memory.
        paired: see `Layout`.

    Attributes:
        tables: DEVICE copies by weights digest, read by the model runner.
        room: see `transfers.AdapterMemory`.
    """

    def __init__(
        self,
        *,
        inbox: Inbox,
        config: DecoderConfig,
        dtype: torch.dtype,
        device: torch.device,
        workers: int,
        references: References,
        placer: Placer | None = None,
        room: int | None = None,
        paired: bool = False,
    ) -> None:
        self.tables: dict[str, AdapterTable] = {}
        self._host: dict[str, HostCopy] = {}
        self._finished: dict[tuple[str, str], HostCopy | AdapterTable] = {}
        """Copies made by a worker and not admitted yet; stored before `Arrived` is sent."""
        self._inbox = inbox
        self._device = device
        self._references = references
        self._placer = placer
        self.room = room
        self._side_stream: torch.cuda.Stream | None = None
        if device.type == "cuda" and placer is None:
            self._side_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._workers = ThreadPoolExecutor(
            workers, thread_name_prefix="adapter-load", initializer=lower_priority
        )
        # Separate: a copy that sequences wait for must not wait for reads from disk.
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="adapter-copy")
        on_gpu = device.type == "cuda"
        self._loaders = Loaders(
            LoaderSetup(
                dict(config.shapes), config.num_layers, DTYPE_NAMES[dtype], paired=paired
            ),
            dtype,
            count=workers,
            pinned=on_gpu,
            tables=not on_gpu and placer is None,  # only if DEVICE is HOST memory
        )

    def start(self) -> None:
        """Start the loader processes, so that the first load need not wait for one."""
        self._loaders.start()

    def close(self) -> None:
        """End the workers and the loader processes."""
        self._workers.shutdown()
        self._copier.shutdown()
        self._loaders.close()

    def load(self, source: AdapterSource) -> None:
        """Read an adapter from disk into HOST."""
        self._workers.submit(self._guarded, source.weights_digest, "host", self._read, source)

    def move(self, weights_digest: str) -> None:
        """Copy an adapter from HOST to DEVICE."""
        host = self._host[weights_digest]
        self._copier.submit(self._guarded, weights_digest, "device", self._copy, host)

    def admit(self, arrived: Arrived) -> None:
        copy = self._finished.pop((arrived.weights_digest, arrived.tier))
        if isinstance(copy, HostCopy):
            self._host[arrived.weights_digest] = copy
        else:
            self.tables[arrived.weights_digest] = copy

    def drop(self, weights_digest: str, tier: str) -> None:
        if tier == "host":
            del self._host[weights_digest]
        else:
            # No step is running, since the loop's thread runs them. On CUDA the allocator
            # reuses memory in stream order.
            table = self.tables.pop(weights_digest)
            if self._placer is not None:
                self._placer.release(table)

    def reference(self, wanted: Reference) -> None:
        """Compute a reference from the base's and the adapter's files, on a separate worker."""
        self._references.start(wanted)

    # ------------------------------------------------------------ on a worker

    def _guarded(
        self,
        digest: str,
        tier: str,
        make: Callable[[_Made], tuple[HostCopy | AdapterTable, dict[str, float]]],
        argument: _Made,
    ) -> None:
        """Run ``make``, and send one `Arrived` to the loop whatever happens."""
        try:
            copy, stages = make(argument)
            self._finished[digest, tier] = copy
            self._inbox.put(Arrived(digest, tier, stages, part=self._part(copy)))
        except VeneerError as error:
            self._inbox.put(Arrived(digest, tier, {}, error))
        except MemoryError:
            self._inbox.put(Arrived(digest, tier, {}, AdapterBudgetExceeded(NO_MEMORY)))
        except Exception as error:
            log.exception("adapter %s could not be loaded", digest[:12])
            failure = InternalError(
                f"the adapter could not be loaded ({type(error).__name__}: {cause_of(error)}); "
                "the server's log has the details"
            )
            self._inbox.put(Arrived(digest, tier, {}, failure))

    def _part(self, copy: HostCopy | AdapterTable) -> int:
        """See `Arrived.part`."""
        if self._placer is None or not isinstance(copy, HostCopy):
            return 0
        return self._placer.part(copy.layout)

    def _read(self, source: AdapterSource) -> tuple[HostCopy, dict[str, float]]:
        return self._loaders.read(source)

    def _copy(self, host: HostCopy) -> tuple[AdapterTable, dict[str, float]]:
        began = time.perf_counter()
        if self._placer is not None:
            table = self._placer.place(host.layout, host.run)
        elif self._side_stream is None:
            table = host.take_table()
        else:
            with torch.cuda.stream(self._side_stream):
                run = host.run.to(self._device, non_blocking=True)
            self._side_stream.synchronize()
            # The step's stream will use memory that the side stream allocated.
            run.record_stream(torch.cuda.default_stream(self._device))
            table = AdapterTable(host.layout, run)
        return table, {"copy": time.perf_counter() - began}
