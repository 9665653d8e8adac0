"""The gate that every call passes, whether over gRPC, HTTP or a stream.

Before it reads a request, an API makes a `Caller` from the call's metadata and puts it into a
`CallContext`. Then it uses the gate:

1. `Gate.admit` identifies the caller and checks that it may make this call. The context manager
   that it returns ends the call once the caller may no longer make it.
2. `Gate.answering` wraps the answering of the call, and notes the outcome in the audit log.
3. `Gate.refuse` notes, counts, logs and delays a refusal, which the API then sends.

Between the first and the second, the API asks `Calls` whether the server's phase admits calls,
and reads the request. A refused call is noted with as much of its caller as was known by then.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Final

from veneer_registry.errors import Cancelled, ModelLoading, VeneerError

from veneer_server.access.audit import Audit
from veneer_server.access.authenticate import Access, Credentials
from veneer_server.access.caller import Caller
from veneer_server.access.methods import GENERATES
from veneer_server.access.principal import DEFAULT_TENANT
from veneer_server.errors import detail_for_log, internal_error
from veneer_server.logs import REQUEST_ID, TENANT, get_logger
from veneer_server.queues.refusal_pace import RefusalPace
from veneer_server.quotas.rates import Quotas
from veneer_server.quotas.standing import rate_headers
from veneer_server.telemetry.metrics import Metrics

REQUEST_ID_FORM: Final = re.compile(r"[\x21-\x7e]{1,128}")
"""Request ids that callers may choose."""

PACED: Final = frozenset(
    {"INVALID_ARGUMENT", "NOT_FOUND", "PERMISSION_DENIED", "UNAUTHENTICATED"}
)
"""Codes of errors that the caller has caused; see `queues.refusal_pace`."""

_LEFT: Final = Cancelled("the caller left, or its deadline passed")
"""The error in the audit log for calls whose caller left before the end."""

_log = get_logger(__name__)


@dataclass(slots=True, eq=False)
class CallContext:
    """One call on its way through the server.

    Attributes:
        caller: the caller, as far as it is known.
        request, answer: the messages from which the audit log takes names, see `Audit.note`.
        size: bytes of the request if it is large, else 0.
    """

    caller: Caller
    request: object = None
    answer: object = None
    size: int = 0


class Gate:
    """Admits and refuses calls, and notes how they end. There is one gate for each set of
    methods that a port answers. Belongs to one event loop.

    Attributes:
        access: decides who is admitted.
        pace: delays refusals.
    """

    def __init__(
        self,
        metrics: Metrics,
        *,
        access: Access | None = None,
        audit: Audit | None = None,
        pace: RefusalPace | None = None,
        quotas: Quotas | None = None,
        elsewhere: Set[str] = frozenset(),
    ) -> None:
        """Args:
        access: decides who is admitted; None admits everybody.
        audit: the audit log, for calls that change something or are refused.
        pace: delays refusals; None for the default.
        quotas: the callers' limits; answers say what is left of them.
        elsewhere: methods that only another port answers.
        """
        self.access = access or Access()
        self.pace = pace or RefusalPace()
        self._audit = audit or Audit(None)
        self._quotas = quotas or Quotas()
        self._metrics = metrics
        self._elsewhere = elsewhere

    # ------------------------------------------------------------------ letting in

    def arrived(self, caller: Caller) -> None:
        """Put the call's request id on the log lines of this task."""
        REQUEST_ID.set(caller.request_id)
        TENANT.set("")

    def rename(self, context: CallContext, request_id: str) -> None:
        """Set the request id to one given in the request itself."""
        REQUEST_ID.set(request_id)
        caller = context.caller
        context.caller = caller.known(caller.principal, caller.fairness, request_id)

    async def admit(
        self, context: CallContext, credentials: Credentials
    ) -> AbstractContextManager[None]:
        """Identify the caller, and check that it may make this call.

        Returns a context manager, inside which the call ends once it would no longer be
        admitted; but an answer that is being generated is not cut off. Raises as
        `Access.identify` and `Access.check`, and InvalidField for malformed metadata."""
        access, caller = self.access, context.caller
        method = caller.method
        principal = await access.identify(method, credentials)
        TENANT.set("" if principal.tenant == DEFAULT_TENANT else principal.tenant)
        fairness = access.fairness(principal, credentials)
        context.caller = caller.known(principal, fairness, caller.request_id)
        access.check(method, principal, credentials, self._elsewhere)
        caller.check_most_lag()
        if method in GENERATES:
            return nullcontext()
        return access.while_admitted(method, principal, credentials, self._elsewhere)

    # ------------------------------------------------------------------- answering

    @contextmanager
    def answering(
        self,
        context: CallContext,
        event: str,
        *,
        known: tuple[type[Exception], ...] = (VeneerError,),
        left: Callable[[], bool] = lambda: False,
        **logged: object,
    ) -> Iterator[None]:
        """Answer a call inside this block, which sets `CallContext.request` and `answer`.

        Args:
            event, logged: event and fields of the log line for an unexpected error.
            known: errors that the API sends unchanged, after `refuse`.
            left: whether the caller has left; an unexpected error is then taken for its result.

        Raises:
            VeneerError: an error in ``known``; an InternalError in place of any other.
        """
        try:
            yield
        except asyncio.CancelledError:
            self._audit.note(context.caller, _LEFT, request=context.request)
            raise
        except known:
            raise
        except Exception as error:
            if left():
                self._audit.note(context.caller, _LEFT, request=context.request)
                raise asyncio.CancelledError from error
            _log.error(event, error, **logged)
            raise internal_error(context.caller.request_id) from error
        self.answered(context)

    def answered(self, context: CallContext) -> None:
        """Note a call that has been answered outside of `answering`."""
        self._audit.note(context.caller, request=context.request, answer=context.answer)

    # -------------------------------------------------------------------- refusing

    async def refuse(
        self, context: CallContext, error: VeneerError, *, begun: bool = False, **logged: str
    ) -> None:
        """Note, count and log a refusal, and delay it if its caller has caused many.

        Args:
            begun: part of the answer has been sent, so there is nothing to delay.
            logged: fields of the log line.
        """
        self.failed(context, error)
        await self.delay(context, error, begun=begun, **logged)

    def failed(self, context: CallContext, error: VeneerError) -> None:
        """Note and count an error that is sent to a caller."""
        self._audit.note(context.caller, error, request=context.request)
        self.count(error)

    def count(self, error: VeneerError) -> None:
        """Count an error that is sent to a caller."""
        self._metrics.failures.labels(error.reason).inc()

    async def delay(
        self, context: CallContext, error: VeneerError, *, begun: bool = False, **logged: str
    ) -> None:
        """Log a refusal and wait, as `refuse` does."""
        if not isinstance(error, ModelLoading):  # waiting clients retry over and over
            self.log(error.reason, error, **logged)
        if error.code in PACED and not begun:
            await self.pace.wait(context.caller.peer, context.size)

    def log(self, reason: str, error: Exception, **logged: str) -> None:
        """Log a refusal, unless many similar ones were logged just now."""
        _log.often(reason, "call refused", **logged, reason=reason, **detail_for_log(error))

    def limits(self, caller: Caller) -> tuple[tuple[str, str], ...]:
        """Headers that say what is left of the caller's limits, for calls that count towards
        them."""
        if caller.method not in GENERATES:
            return ()
        return rate_headers(self._quotas, caller.principal.accounts)
