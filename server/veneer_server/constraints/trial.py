"""A child process that compiles one constraint, computes its first mask, and ends.

Signals end it if it exceeds a limit: SIGPROF for CPU time, SIGABRT if the library runs out
of memory. Messages sent before that remain in its socket.
"""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable

import msgspec
from llguidance import LLTokenizer

from veneer_server.constraints.frames import (
    LONGEST,
    ConstraintCompiled,
    FromTrial,
    TrialVerdict,
    receive,
)
from veneer_server.constraints.grammar import (
    ConstraintRefused,
    compile_matcher,
    first_problem,
    library_limits,
)
from veneer_server.wire.messages import Constraint, ConstraintLimits

HARD_FACTOR = 4
"""A mask that takes this many times its limit ends the matcher process that computes it; one
that exceeds the limit by less ends only its own sequence."""


def too_slow(limits: ConstraintLimits) -> ConstraintRefused:
    """The refusal for a mask that took too long."""
    return ConstraintRefused(
        "mask_seconds",
        f"computing the allowed next tokens takes more than {limits.mask_seconds:g} s",
    )


def run_trial(
    connection: socket.socket, tokenizer: LLTokenizer, limits: ConstraintLimits
) -> None:
    """Receive one `Constraint`; answer with `ConstraintCompiled` and a `TrialVerdict`."""
    constraint = receive(connection, bytearray(LONGEST))
    if not isinstance(constraint, Constraint):
        return  # its caller has left

    def say(message: FromTrial) -> None:
        connection.send(msgspec.msgpack.encode(message))

    try:
        say(_tried(tokenizer, constraint, limits, say))
    except ConstraintRefused as refused:
        say(TrialVerdict(refused.limit, refused.problem))


def _tried(
    tokenizer: LLTokenizer,
    constraint: Constraint,
    limits: ConstraintLimits,
    say: Callable[[FromTrial], None],
) -> TrialVerdict:
    began = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, limits.compile_seconds)
    matcher = compile_matcher(tokenizer, constraint, library_limits(limits))
    compiled = time.process_time()
    say(ConstraintCompiled(compiled - began))
    signal.setitimer(signal.ITIMER_PROF, limits.mask_seconds)
    bits = matcher.compute_bitmask()
    signal.setitimer(signal.ITIMER_PROF, 0)
    seconds = time.process_time() - compiled
    if matcher.is_error() or not bits.strip(b"\0"):
        raise first_problem(matcher)
    if seconds > limits.mask_seconds:
        raise too_slow(limits)
    return TrialVerdict("", "", seconds)
