"""What every call passes, at whichever door it comes in: gRPC, a JSON endpoint or a stream.

A door makes a `Caller` of what a call says before its request is read, and puts it into a
`CallContext`. Then it asks the gate:

1. `Gate.admit`: who calls, and whether that caller may. The block that it returns ends the call
   once the caller may not any more.
2. `Gate.answering`: while the call is answered. However that ends, the audit log has it.
3. `Gate.refuse`: a refusal is noted, counted, logged and paced. The door then sends it.

Between the first and the second a door asks `Calls` whether the server's phase lets calls in,
and reads the request. A caller that is refused is noted as who it was known to be by then.
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
"""Codes of errors that are the caller's own; see `queues.refusal_pace`."""

_LEFT: Final = Cancelled("the caller left, or its deadline passed")
"""How the audit log has calls whose end nobody waited for."""

_log = get_logger(__name__)


@dataclass(slots=True, eq=False)
class CallContext:
    """One call on its way through the server.

    Attributes:
        caller: who calls, as far as it is known.
        request, answer: what the audit log takes names from, see `Audit.note`.
        size: bytes of the request if it is large, else 0.
    """

    caller: Caller
    request: object = None
    answer: object = None
    size: int = 0


class Gate:
    """One for each set of methods that a port answers. Belongs to one event loop.

    Attributes:
        access: lets calls in.
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
        access: None lets everybody in.
        audit: notes calls that change something or are refused.
        pace: None for the default.
        quotas: limits of callers, who are told what is left of them.
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
        """Give the log's lines of this task the call's id."""
        REQUEST_ID.set(caller.request_id)
        TENANT.set("")

    def rename(self, context: CallContext, request_id: str) -> None:
        """Take the request id that the request itself asks for."""
        REQUEST_ID.set(request_id)
        caller = context.caller
        context.caller = caller.known(caller.principal, caller.fairness, request_id)

    async def admit(
        self, context: CallContext, credentials: Credentials
    ) -> AbstractContextManager[None]:
        """Find out who calls, and check that it may. The call ends, while the result is
        entered, once it would not be let in any more; but an answer that is being generated is
        not cut off. Raises as `Access.identify` and `Access.check`, and InvalidField for
        malformed metadata."""
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
        """A block in which a call is answered, and `CallContext.request` and `answer` are set.

        Args:
            event, logged: the log's line for an error that nobody expected.
            known: errors that the door sends as they are, after `refuse`.
            left: whether the caller has left, so that any other error comes from that.

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
        """Note, count and log a refusal, and wait before it is sent if its caller has sent
        many.

        Args:
            begun: a part of the answer has been sent, so there is nothing to delay.
            logged: fields of the log's line.
        """
        self.failed(context, error)
        await self.delay(context, error, begun=begun, **logged)

    def failed(self, context: CallContext, error: VeneerError) -> None:
        """Note and count an error that a caller is sent."""
        self._audit.note(context.caller, error, request=context.request)
        self.count(error)

    def count(self, error: VeneerError) -> None:
        """Count an error that a caller is sent."""
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
        """Log a refusal, unless many alike were logged just now."""
        _log.often(reason, "call refused", **logged, reason=reason, **detail_for_log(error))

    def limits(self, caller: Caller) -> tuple[tuple[str, str], ...]:
        """What is left of the caller's limits, for calls that count towards them."""
        if caller.method not in GENERATES:
            return ()
        return rate_headers(self._quotas, caller.principal.accounts)
