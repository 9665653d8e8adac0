"""Maps gRPC failures to the error tree, and decides whether to retry."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import grpc
from google.rpc import error_details_pb2, status_pb2
from veneer_registry.errors import (
    Aborted,
    Cancelled,
    DeadlineExceeded,
    Draining,
    FailedPrecondition,
    InternalError,
    InvalidArgument,
    ResourceExhausted,
    ServerUnreachable,
    Unavailable,
    Unimplemented,
    VeneerError,
    error_for_reason,
)

__all__ = [
    "Attempts",
    "RetryPolicy",
    "cancelled",
    "no_such_service",
    "not_ready",
    "starting",
    "to_error",
    "write_broke",
]

_DETAILS_KEY: Final = "grpc-status-details-bin"
_DOMAIN: Final = "veneer"

_BY_CODE: Final[dict[grpc.StatusCode, type[VeneerError]]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.ABORTED: Aborted,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.UNIMPLEMENTED: Unimplemented,
    grpc.StatusCode.INTERNAL: InternalError,
}


def to_error(
    error: grpc.RpcError | grpc.aio.AioRpcError, address: str, *, timeout_s: float | None
) -> VeneerError:
    """The typed error of a failed call.

    With ``google.rpc.ErrorInfo`` of domain ``veneer`` it is the error that the server
    raised, with its metadata and retry delay. Without it, something in between answered
    (the network, a proxy, gRPC itself), and the status code decides.
    """
    code: grpc.StatusCode = error.code()
    message = error.details() or code.name
    status = _status(error)
    if status is not None:
        info, retry_s = error_details_pb2.ErrorInfo(), None
        for detail in status.details:
            if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
                detail.Unpack(info)
            elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
                retry = error_details_pb2.RetryInfo()
                detail.Unpack(retry)
                retry_s = retry.retry_delay.ToNanoseconds() / 1e9
        if info.domain == _DOMAIN:
            known = error_for_reason(info.reason)
            return known(message, metadata=dict(info.metadata), retry_after_s=retry_s)
    if code is grpc.StatusCode.UNAVAILABLE and "CERTIFICATE_VERIFY_FAILED" in message:
        return ServerUnreachable(
            f"the certificate of {address} is not trusted: give its CA certificate (--ca "
            f"FILE, VENEER_CA) ({_distrust(message)})",
            metadata={"address": address, "cause": "certificate"},
        )
    if code is grpc.StatusCode.UNAVAILABLE and "WRONG_VERSION_NUMBER" in message:
        return ServerUnreachable(
            f"{address} does not speak TLS: give HOST:PORT, or http://HOST:PORT",
            metadata={"address": address, "cause": "no_tls"},
        )
    if code is grpc.StatusCode.UNAVAILABLE and _NO_GRPC.search(message):
        return ServerUnreachable(
            f"{address} answers, but not in gRPC; it may be the HTTP port: give the gRPC "
            "address, which the server's --listen sets and its ready line shows (default "
            "port: 50051)",
            metadata={"address": address, "cause": "no_grpc"},
        )
    if code is grpc.StatusCode.UNAVAILABLE:
        # A port with TLS closes a plain-text connection like this, too.
        tls = "; if it has TLS: https://HOST:PORT" if "Socket closed" in message else ""
        return ServerUnreachable(
            f"no Veneer server answers at {address}: start one with `veneer-server`, or "
            f"give the right address (--server HOST:PORT, VENEER_SERVER){tls} "
            f"({_in_plain_words(message)})",
            metadata={"address": address},
        )
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        within = f" within {timeout_s:g} s" if timeout_s is not None else " in time"
        return DeadlineExceeded(
            f"{address} did not finish the call{within}: increase the timeout, request fewer "
            "tokens, or check the server's load",
            metadata={"address": address, "cause": "client_deadline"},
        )
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return Unimplemented(
            f"{address} does not implement this method: is it a Veneer server of this version? "
            f"[{message}]"
        )
    return _BY_CODE.get(code, VeneerError)(f"{message} [{code.name} from {address}]")


_NO_GRPC: Final = re.compile("Expected SETTINGS frame|http1.x server|missing selected ALPN")
"""gRPC's messages for a server that does not speak gRPC, without and with TLS."""
_CONNECTING: Final = re.compile(r".*?last error: (?:\w+: )?(?:ipv[46]:\S+: )?(?P<why>.*)", re.S)
_WHY: Final = re.compile(r"Failed to connect to remote host: (?P<why>.*)", re.S)


def _in_plain_words(message: str) -> str:
    """Why gRPC could not connect, without the address and gRPC's own phrases."""
    if "lookup" in message or "name not found" in message.lower():
        return "no host has this name"
    for pattern in (_CONNECTING, _WHY):
        if found := pattern.fullmatch(message):
            message = found["why"]
    return message[:1].lower() + message[1:]


def _distrust(message: str) -> str:
    """Why a certificate is not trusted, in OpenSSL's words."""
    found = re.search(r"CERTIFICATE_VERIFY_FAILED: (?P<why>[^:\]]+)", message)
    return found["why"].strip() if found else message


def write_broke(error: grpc.RpcError | grpc.aio.AioRpcError) -> bool:
    """Whether the error says only that a message could not be sent: grpc.aio then reports
    INTERNAL, whatever ended the call."""
    return error.code() is grpc.StatusCode.INTERNAL and _status(error) is None


def no_such_service(error: VeneerError) -> bool:
    """Whether a health check found that the server does not have the service."""
    cause = error.__cause__
    found = isinstance(cause, grpc.RpcError) and cause.code() is grpc.StatusCode.NOT_FOUND
    return bool(found)


def not_ready(address: str) -> Unavailable:
    """The error for a server that has loaded but whose engine does not answer."""
    return Unavailable(f"{address} is not ready: it is loading, or its engine is restarting")


def cancelled() -> Cancelled:
    """The error for a call that its caller cancelled."""
    return Cancelled("the call was cancelled, or the client was closed")


@contextmanager
def starting() -> Iterator[None]:
    """Wrap the start of a call: on a closed channel gRPC raises errors of other types, which
    become `Cancelled`."""
    try:
        yield
    except (ValueError, grpc.aio.UsageError) as error:
        raise Cancelled(
            "the client was closed: create a new one", metadata={"cause": "client_closed"}
        ) from error


def _status(error: grpc.RpcError | grpc.aio.AioRpcError) -> status_pb2.Status | None:
    trailing: Any = error.trailing_metadata() or ()
    for key, value in trailing:
        if key == _DETAILS_KEY:
            status = status_pb2.Status()
            status.ParseFromString(value)
            return status
    return None


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often a refused call is retried.

    A call is retried only if the server said when (``RetryInfo``) with UNAVAILABLE or
    RESOURCE_EXHAUSTED, the call is safe to repeat, no part of its answer has arrived, and
    the wait fits ``longest_wait_s`` and the call's deadline. A server that said it is
    draining may be unreachable until it is back. A watch and a push also wait for a server
    that was reachable before, and reset the count after any progress.

    Attributes:
        attempts: total attempts, or attempts without progress; 1 turns retries off.
        longest_wait_s: longest wait; if the server asks for more, the call fails.
        growth: the first wait is at least what the server said, and each further one this
            many times the last: with the defaults half a minute in total, enough for a restart.
        final: errors after which a call is not retried, such as `ModelLoading`.
    """

    attempts: int = 8
    longest_wait_s: float = 5.0
    growth: float = 1.5
    final: tuple[type[VeneerError], ...] = ()


class Attempts:
    """The attempts of one call: its deadline, and the wait before the next one."""

    def __init__(
        self,
        policy: RetryPolicy,
        *,
        repeatable: bool,
        timeout_s: float | None,
        reconnect_s: float | None = None,
        repeated: tuple[type[VeneerError], ...] = (Unavailable, ResourceExhausted),
    ) -> None:
        """Args:
        reconnect_s: first wait for a server that was reachable before, at most the policy's
            ``longest_wait_s``; None gives up.
        repeated: errors after which a call is retried, if they say when.
        """
        self._policy = policy
        self._repeated = repeated
        self._allowed = policy.attempts if repeatable else 1
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._reconnect_s = (
            None if reconnect_s is None else min(reconnect_s, policy.longest_wait_s)
        )
        self._back_s: float | None = None
        self._made = 0

    def remaining_s(self) -> float | None:
        """Seconds left until the deadline; None without one."""
        if self._deadline is None:
            return None
        return max(0.0, self._deadline - time.monotonic())

    def reached(self) -> None:
        """The server is up; if it goes away, we wait for it."""
        self._back_s = self._reconnect_s

    def succeeded(self) -> None:
        """An answer arrived; earlier failures no longer count."""
        self._made = 0
        self.reached()

    def wait_s(self, error: VeneerError) -> float | None:
        """Seconds to wait before the next attempt; None when ``error`` is final."""
        self._made += 1
        if self._made >= self._allowed:
            return None
        if not isinstance(error, self._repeated) or isinstance(error, self._policy.final):
            return None
        told = error.retry_after_s
        if isinstance(error, Draining):
            self._back_s = told
        elif isinstance(error, ServerUnreachable):
            told = self._back_s
        if told is None or told > self._policy.longest_wait_s:
            return None
        grown = told * self._policy.growth ** (self._made - 1)
        # Jitter: clients that were refused together should not come back together.
        wait = min(grown * random.uniform(1.0, 1.25), self._policy.longest_wait_s)  # nosec B311 # not for secrets
        remaining = self.remaining_s()
        return None if remaining is not None and wait >= remaining else wait
