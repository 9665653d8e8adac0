"""Who calls: a value that is made once where a call comes in, and passed on as a parameter.

Nothing of it is in a context variable, but for what the log adds to each line (`logs`).
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
"""Metadata of gRPC calls: a name for the history of changes, where callers need not say who
they are."""

MOST_LAG: Final = "veneer-max-registry-lag"
"""Metadata: how many seconds old the view may be that the caller's names are looked up in. The
HTTP header has ``x-`` before it."""

_SECRETS: Final = ("authorization", "x-api-key", "api-key")
_SHOWN: Final = (*_SECRETS, ACTOR, "veneer-tenant", "x-veneer-tenant")
"""Metadata that says who calls. A certificate cannot be passed on: `Caller.shows_secret`."""

_TRACE: Final = ("traceparent", "tracestate")
_ANYONES: Final = Fairness(DEFAULT_TENANT)
_LONGEST: Final = 128
_UNPRINTABLE: Final = re.compile(r"[^\x20-\x7e]")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes one call, and what the call says of itself before its request is read.

    Attributes:
        principal: who it is; `ANYONE` until that is known.
        fairness: whose service the call counts as.
        method: as in `methods.METHODS`.
        peer: its connection: ``host:port``, over gRPC after ``ipv4:`` or ``ipv6:``.
        request_id: the call's.
        deadline: of the call, by `time.monotonic`; None if it has none.
        began: `time.perf_counter` when it came in.
        trace: its ``traceparent`` and ``tracestate``, as far as it has them.
        actor: the name that it gives itself; counts where callers need not say who they are.
        shown: the metadata that says who calls, for the registry that this server follows.
        most_lag: how old a view of the registry it takes, as it says it; None for any.
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
        """Of a call that comes in now, before it is known who makes it.

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
        """The same call, once more is known of it. `dataclasses.replace` would take four times
        as long, for every call."""
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
        """The tenant that it acts in."""
        return self.principal.tenant

    @property
    def who(self) -> Who:
        """Its name and address, for the history of changes."""
        name = self.principal.name or _UNPRINTABLE.sub("?", self.actor[:_LONGEST])
        return Who(name, self.peer)

    @property
    def sender(self) -> Sender:
        """Whose turn the call uses, wherever one caller could keep others waiting."""
        principal, user = self.principal, self.fairness.fairness_id
        key = principal.name or _host(self.peer)
        return Sender(principal.tenant, key, user, "" if user else self.peer)

    @property
    def time_left(self) -> float | None:
        """Seconds to the deadline, at least 0; None if there is none."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    @property
    def shows_secret(self) -> bool:
        """Whether `shown` has a key or token."""
        return any(name in _SECRETS for name, _ in self.shown)

    @property
    def most_lag_s(self) -> float:
        """The age in seconds of the oldest view that it takes; infinite if any. Raises
        InvalidField."""
        return math.inf if self.most_lag is None else _seconds(self.most_lag)

    def check_most_lag(self) -> None:
        """Raise InvalidField if `most_lag` is not a number of seconds."""
        _ = self.most_lag_s


def _host(connection: str) -> str:
    """The host of a connection without its port; of an IPv6 address the first 64 bits, of which
    a host has as many addresses as it likes."""
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
