"""HOST and DEVICE copies of adapters, and the workers that make them.

Implements the loop's `AdapterMemory`. Workers read, verify, convert and copy;
the loop's thread only puts finished copies into dictionaries. On a CPU the
DEVICE copy shares the HOST copy's memory: moving an adapter costs its table.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from veneer_registry.errors import InternalError, VeneerError

from veneer_server.engine.loop import Arrived, Inbox
from veneer_server.engine.messages import AdapterSource
from veneer_server.lora.reading import HostCopy, read_copy
from veneer_server.lora.table import AdapterTable
from veneer_server.models.config import DecoderConfig

__all__ = ["LoraMemory"]

log = logging.getLogger(__name__)

_Made = TypeVar("_Made")

_NICE = 10
"""Workers yield to the step: on two cores a busy thread doubles its time."""


class LoraMemory:
    """Owns all copies. Methods belong to the loop's thread; only workers run elsewhere.

    Attributes:
        tables: DEVICE copies by weights digest, read by the model runner.
    """

    def __init__(
        self,
        *,
        inbox: Inbox,
        config: DecoderConfig,
        dtype: torch.dtype,
        device: torch.device,
        workers: int,
    ) -> None:
        self.tables: dict[str, AdapterTable] = {}
        self._host: dict[str, HostCopy] = {}
        self._finished: dict[tuple[str, str], HostCopy | AdapterTable] = {}
        """Made by a worker, not yet admitted; written before its `Arrived` is sent."""
        self._inbox = inbox
        self._config = config
        self._dtype = dtype
        self._device = device
        self._side_stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._side_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._workers = ThreadPoolExecutor(
            workers, thread_name_prefix="adapter-load", initializer=_lower_priority
        )

    def load(self, source: AdapterSource) -> None:
        """Read an adapter from disk into HOST."""
        self._workers.submit(self._guarded, source.weights_digest, "host", self._read, source)

    def move(self, weights_digest: str) -> None:
        """Copy an adapter from HOST to DEVICE."""
        host = self._host[weights_digest]
        self._workers.submit(self._guarded, weights_digest, "device", self._copy, host)

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
            # No step is running: the loop is the only one that runs them. On CUDA
            # the allocator reuses memory in stream order.
            del self.tables[weights_digest]

    # ------------------------------------------------------------ on a worker

    def _guarded(
        self,
        digest: str,
        tier: str,
        make: Callable[[_Made], tuple[HostCopy | AdapterTable, dict[str, float]]],
        argument: _Made,
    ) -> None:
        """Run ``make``; whatever happens, one `Arrived` goes to the loop."""
        try:
            copy, stages = make(argument)
            self._finished[digest, tier] = copy
            self._inbox.put(Arrived(digest, tier, stages))
        except VeneerError as error:
            self._inbox.put(Arrived(digest, tier, {}, error))
        except Exception as error:
            log.exception("adapter %s could not be loaded", digest[:12])
            failure = InternalError(
                f"the adapter could not be loaded ({type(error).__name__}: {error}); the "
                "server's log has the details"
            )
            self._inbox.put(Arrived(digest, tier, {}, failure))

    def _read(self, source: AdapterSource) -> tuple[HostCopy, dict[str, float]]:
        return read_copy(
            source,
            self._config.shapes,
            self._config.num_layers,
            self._dtype,
            pinned=self._side_stream is not None,
        )

    def _copy(self, host: HostCopy) -> tuple[AdapterTable, dict[str, float]]:
        began = time.perf_counter()
        run = host.run
        if self._side_stream is not None:
            with torch.cuda.stream(self._side_stream):
                run = run.to(self._device, non_blocking=True)
            self._side_stream.synchronize()
            # The step's stream will use memory that the side stream allocated.
            run.record_stream(torch.cuda.default_stream(self._device))
        table = AdapterTable(host.layout, run)
        return table, {"copy": time.perf_counter() - began}


def _lower_priority() -> None:
    # Linux gives each thread its own nice value; elsewhere this may not be allowed.
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
