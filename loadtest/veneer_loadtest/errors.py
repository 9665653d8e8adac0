"""Errors of a run; each message is one line that says what to do."""

from __future__ import annotations

from veneer_client import VeneerError


class BadOption(VeneerError):
    """An invalid option value; the message says what is valid (metadata ``field``, the
    option, or ``one_of``)."""

    code = "INVALID_ARGUMENT"
    reason = "INVALID_FIELD"


class BadTrace(VeneerError):
    """A trace file that cannot be replayed (metadata ``file``, ``line`` or ``cause``)."""

    code = "INVALID_ARGUMENT"
    reason = "BAD_TRACE"


class SloMissed(VeneerError):
    """No number of replicas that was allowed keeps the limits (metadata ``limit``: the ones
    that were missed with the most replicas)."""

    code = "FAILED_PRECONDITION"
    reason = "SLO_MISSED"


class TargetFailed(VeneerError):
    """The server under test cannot be measured: it is unreachable, fails, or does not match the
    options."""

    code = "FAILED_PRECONDITION"
    reason = "TARGET_FAILED"


class PeerError(VeneerError):
    """A peer of ``compare`` could not be started, or failed."""

    code = "FAILED_PRECONDITION"
    reason = "PEER_FAILED"


class GeneratorFailed(VeneerError):
    """A worker process of the load generator ended too early."""

    code = "INTERNAL"
    reason = "GENERATOR_FAILED"


class BadResult(VeneerError):
    """A result file that cannot be read (metadata ``file`` and ``cause``)."""

    code = "INVALID_ARGUMENT"
    reason = "BAD_RESULT"


class HttpFailed(VeneerError):
    """An endpoint rejected a request or ended an answer early.

    Attributes:
        word: the reason as the endpoint names it, if it gave one.
    """

    code = "INTERNAL"
    reason = "HTTP_FAILED"

    def __init__(self, word: str, message: str) -> None:
        super().__init__(message)
        self.word = word
