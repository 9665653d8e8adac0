"""The worker that computes references for the self-test, one at a time.

A thread of its own at low priority: a pass takes as long as dozens of steps, so it must
hold up neither a step nor an adapter that a request waits for.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import torch
from veneer_registry.errors import InternalError, VeneerError

from veneer_server.engine.loop import Inbox, wire_error
from veneer_server.engine.messages import OperationDone, Reference
from veneer_server.models.loader import DecoderWeights
from veneer_server.models.reference import reference_logprobs
from veneer_server.priority import lower_priority

__all__ = ["References"]

log = logging.getLogger(__name__)


class References:
    """Answers each `Reference` by an `OperationDone` in the inbox.

    Args:
        weights: of the base, as they serve.
    """

    def __init__(self, inbox: Inbox, weights: DecoderWeights) -> None:
        self._inbox = inbox
        self._weights = weights
        self._worker = ThreadPoolExecutor(
            1, thread_name_prefix="reference", initializer=_begin_worker
        )

    def start(self, wanted: Reference) -> None:
        """Return at once; it is computed when those before it are."""
        self._worker.submit(self._answer, wanted)

    def _answer(self, wanted: Reference) -> None:
        try:
            logprobs = reference_logprobs(self._weights, wanted.tokens, wanted.adapter)
        except VeneerError as error:
            done = OperationDone(wanted.operation, wire_error(error))
        except Exception as error:
            log.exception("a reference could not be computed")
            failure = InternalError(
                f"the reference could not be computed ({type(error).__name__}: {error}); the "
                "server's log has the details"
            )
            done = OperationDone(wanted.operation, wire_error(failure))
        else:
            done = OperationDone(wanted.operation, logprobs=logprobs)
        self._inbox.put(done)


def _begin_worker() -> None:
    lower_priority()
    # This thread's team only: a second team would run beside the step's.
    torch.set_num_threads(1)
