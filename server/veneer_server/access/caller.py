"""The caller of a call: a value that is made once, when a call arrives, and passed as a
parameter.

None of it is kept in context variables, except what the log adds to each line (`logs`).
"""

from __future__ import annotations

import ipaddress
import math
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import unquote

from veneer_registry.errors import InvalidField
from veneer_registry.rows import Who

from veneer_server.access.principal import ANYONE, DEFAULT_TENANT, Principal
from veneer_server.queues.fairness import Fairness, Sender

ACTOR: Final = "veneer-actor"
"""Metadata of gRPC calls: the caller's name for the history of changes, on servers without
authentication."""

MOST_LAG: Final = "veneer-max-registry-lag"
"""Metadata: the highest age in seconds of the registry view in which the call's names may be
looked up. The HTTP header is the same with the prefix ``x-``."""

_SECRETS: Final = ("authorization", "x-api-key", "api-key")
_SHOWN: Final = (*_SECRETS, ACTOR, "veneer-tenant", "x-veneer-tenant")
"""Metadata that identifies the caller. A certificate cannot be passed on, see
`Caller.shows_secret`."""

_TRACE: Final = ("traceparent", "tracestate")
_ANYONES: Final = Fairness(DEFAULT_TENANT)
_LONGEST: Final = 128
_UNPRINTABLE: Final = re.compile(r"[^\x20-\x7e]")


@dataclass(frozen=True, slots=True)
class Caller:
    """The caller of one call, and the call's metadata, known before its request is read.

    Attributes:
        principal: the caller's identity; `ANYONE` until it is known.
        fairness: the tenant, and the gateway's user, whose share of the service the call uses.
        method: the method's name, as in `methods.METHODS`.
        peer: the connection: ``host:port``, over gRPC after ``ipv4:`` or ``ipv6:``.
        request_id: id of the call.
        deadline: deadline of the call, by `time.monotonic`; None if it has none.
        began: `time.perf_counter` when the call arrived.
        trace: its ``traceparent`` and ``tracestate``, as far as it has them.
        actor: the name that the caller gives itself, on servers without authentication.
        shown: the metadata that identifies the caller, for the registry that this server
            follows.
        most_lag: the highest age of the registry view that the caller accepts, as it was sent;
            None for any.
    """

    principal: Principal = ANYONE
    fairness: Fairness = _ANYONES
    method: str = ""
    peer: str = ""
    request_id: str = ""
    deadline: float | None = None
    began: float = 0.0
    trace: Mapping[str, str] = field(default_factory=dict)
    actor: str = ""
    shown: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    most_lag: str | None = None

    @classmethod
    def arriving(
        cls,
        method: str,
        peer: str,
        request_id: str,
        headers: Mapping[str, str],
        *,
        time_left: float | None = None,
        names_itself: bool = False,
    ) -> Caller:
        """Make the caller of a call that arrives now, before its identity is known.

        Args:
            headers: HTTP headers or gRPC metadata, by lower-case name.
            time_left: seconds to its deadline; None if it has none.
            names_itself: whether metadata `ACTOR` counts.
        """
        return cls(
            method=method,
            peer=peer,
            request_id=request_id,
            deadline=None if time_left is None else time.monotonic() + time_left,
            began=time.perf_counter(),
            trace={name: headers[name] for name in _TRACE if name in headers},
            actor=headers.get(ACTOR, "") if names_itself else "",
            shown=tuple((name, headers[name]) for name in _SHOWN if name in headers),
            most_lag=headers.get(MOST_LAG) or headers.get(f"x-{MOST_LAG}"),
        )

    def known(self, principal: Principal, fairness: Fairness, request_id: str) -> Caller:
        """Return the same caller with what is known by now. `dataclasses.replace` would take
        four times as long, for every call."""
        return Caller(
            principal,
            fairness,
            self.method,
            self.peer,
            request_id,
            self.deadline,
            self.began,
            self.trace,
            self.actor,
            self.shown,
            self.most_lag,
        )

    @property
    def tenant(self) -> str:
        """The tenant that the caller acts in."""
        return self.principal.tenant

    @property
    def who(self) -> Who:
        """The caller's name and address, for the history of changes."""
        name = self.principal.name or _UNPRINTABLE.sub("?", self.actor[:_LONGEST])
        return Who(name, self.peer)

    @property
    def sender(self) -> Sender:
        """The sender whose turn the call uses, wherever one caller could make others wait."""
        principal, user = self.principal, self.fairness.fairness_id
        key = principal.name or _host(self.peer)
        return Sender(principal.tenant, key, user, "" if user else self.peer)

    @property
    def time_left(self) -> float | None:
        """Seconds to the deadline, at least 0; None if there is none."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    @property
    def shows_secret(self) -> bool:
        """Whether `shown` contains a key or token."""
        return any(name in _SECRETS for name, _ in self.shown)

    @property
    def most_lag_s(self) -> float:
        """The highest age in seconds of the view that the caller accepts; infinite for any.
        Raises InvalidField."""
        return math.inf if self.most_lag is None else _seconds(self.most_lag)

    def check_most_lag(self) -> None:
        """Raise InvalidField if `most_lag` is not a number of seconds."""
        _ = self.most_lag_s


def _host(connection: str) -> str:
    """The host of a connection, without its port. Of an IPv6 address, only the first 64 bits: a
    host can use any address in its /64 network."""
    kind, _, rest = connection.partition(":")
    host = (rest if kind in ("ipv4", "ipv6") else connection).rpartition(":")[0]
    if ":" in host or "%" in host:
        host = unquote(host).strip("[]").partition("%")[0]
        with suppress(ValueError):
            address = ipaddress.IPv6Address(host)
            if (mapped := address.ipv4_mapped) is not None:
                return str(mapped)
            return str(ipaddress.IPv6Network((address, 64), strict=False))
    return host


def _seconds(given: str) -> float:
    try:
        found = float(given)
    except ValueError:
        found = math.nan
    if not 0 <= found < math.inf:
        raise InvalidField(
            f"{MOST_LAG} is {given[:40]!r}: give seconds, 0 or more",
            metadata={"field": MOST_LAG},
        )
    return found
