"""The worker that computes references for the self-test.

It has its own thread at low priority, because a pass takes as long as hundreds of steps, and
must delay neither a step nor an adapter that a request waits for.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from veneer_registry.causes import cause_of
from veneer_registry.errors import AdapterCorrupt, InternalError, VeneerError
from veneer_registry.fingerprint import weights_fingerprint

from veneer_server.models.config import Quantization
from veneer_server.models.reference import references
from veneer_server.models.source import BaseDamaged
from veneer_server.models.source_weights import SourceWeights
from veneer_server.step.inbox import Inbox
from veneer_server.system.priority import lower_priority
from veneer_server.wire.messages import OperationDone, Reference, wire_error

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServedBase:
    """The served base, as its files describe it.

    Attributes:
        fingerprint: fingerprint of the weights; "" if unknown.
    """

    folder: Path
    quantization: Quantization
    dtype: torch.dtype
    fingerprint: str = ""


class References:
    """Answers each `Reference` with an `OperationDone` in the inbox."""

    def __init__(self, inbox: Inbox, base: ServedBase) -> None:
        self._inbox = inbox
        self._base = base
        self._wanted: queue.SimpleQueue[Reference] = queue.SimpleQueue()
        self._worker = ThreadPoolExecutor(
            1, thread_name_prefix="reference", initializer=_begin_worker
        )

    def start(self, wanted: Reference) -> None:
        """Start to compute a reference and return at once; references are computed in order."""
        self._wanted.put(wanted)
        self._worker.submit(self._answer)

    def _answer(self) -> None:
        """Answer all pending references, with one pass for those of the same text."""
        if self._wanted.empty():
            return  # an earlier call answered this one too
        changed = self._changed()  # takes a while: more references of the test arrive meanwhile
        texts: dict[tuple[int, ...], list[Reference]] = {}
        while not self._wanted.empty():
            wanted = self._wanted.get()
            texts.setdefault(tuple(wanted.tokens), []).append(wanted)
        for together in texts.values():
            found = [changed] * len(together) if changed else self._computed(together)
            for wanted, result in zip(together, found, strict=True):
                if isinstance(result, VeneerError):
                    self._inbox.put(OperationDone(wanted.operation, wire_error(result)))
                else:
                    self._inbox.put(OperationDone(wanted.operation, logprobs=result))

    def _changed(self) -> VeneerError | None:
        """The error to answer with if the base's files have changed or cannot be read."""
        base = self._base
        try:
            if not base.fingerprint or weights_fingerprint(base.folder) == base.fingerprint:
                return None
            cause, why = "changed", "have changed since the server started"
        except (VeneerError, OSError) as error:
            cause, why = "unreadable", f"cannot be read: {cause_of(error)}"
        return BaseDamaged(
            f"the base's files {why}; the served base cannot be compared with them: restore "
            "them, or restart the server",
            metadata={"cause": cause},
        )

    def _computed(self, together: Sequence[Reference]) -> Sequence[list[float] | VeneerError]:
        try:
            return self._pass(together)
        except VeneerError as error:
            return [error] * len(together)
        except Exception as error:
            log.exception("a reference could not be computed")
            cause = f"{type(error).__name__}: {cause_of(error)}"
            failure = InternalError(
                f"the reference could not be computed ({cause}); the server's log has the "
                "details",
                metadata={"error": type(error).__name__},
            )
            return [failure] * len(together)

    def _pass(self, together: Sequence[Reference]) -> list[list[float] | AdapterCorrupt]:
        base = self._base
        with SourceWeights(base.folder, base.quantization, base.dtype) as weights:
            return references(weights, together[0].tokens, [w.adapter for w in together])


def _begin_worker() -> None:
    lower_priority()
    # Only for this thread: otherwise a second thread pool would compete with the step's.
    torch.set_num_threads(1)
