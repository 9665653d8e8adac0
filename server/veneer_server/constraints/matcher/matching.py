"""A child process that follows sequences: consumes their tokens and computes their masks.

One thread runs one job at a time, the cheapest first: sequences with slow masks wait for
those with quick ones, and compilations wait for both. The marker always holds the current
job's sequence, so that the engine knows which one to blame for a sudden end.
"""

from __future__ import annotations

import mmap
import signal
import socket
import struct
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import msgspec
from llguidance import LLMatcher, LLTokenizer

from veneer_server.constraints.frames import (
    LONGEST,
    Advance,
    Advanced,
    Forget,
    FromMatcher,
    Mask,
    Masks,
    MatchingFailed,
    MatchSequence,
    receive,
)
from veneer_server.constraints.grammar import (
    ConstraintRefused,
    compile_matcher,
    first_problem,
    library_limits,
)
from veneer_server.constraints.matcher.numbers import Digits
from veneer_server.constraints.trial import HARD_FACTOR, too_slow
from veneer_server.system.heap import allocated_bytes, return_freed
from veneer_server.wire.messages import Constraint, ConstraintLimits

MARKER: Final = struct.Struct("<q")
"""At the start of the marker's memory: the current job's sequence; 0 between jobs."""

_PROTOTYPES: Final = 32
"""Maximum number of compiled constraints kept: copying one takes microseconds, compiling it
milliseconds."""

_PROTOTYPES_SHARE: Final = 8
"""Kept constraints may take the process's memory limit divided by this."""

_LARGE: Final = 4 << 20
"""Once sequences with more bytes than this have been forgotten, freed memory is returned to
the system when the process is idle."""

_TOGETHER_S: Final = 0.001
"""Masks computed within this time are sent together."""

_FORGETTING: Final = 0.8
"""Decay per token of a sequence's cost after an expensive mask."""


@dataclass(slots=True)
class _Matched:
    """A sequence. ``grown``: bytes that its jobs have allocated. ``compiled``: bytes of its
    compiled constraint, which others may share."""

    matcher: LLMatcher | None = None
    count: int = 0
    cost: float = 0.0
    grown: int = 0
    compiled: int = 0
    wanted: Constraint | None = None
    digits: Digits | None = None
    tokens: list[int] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return self.grown + self.compiled


@dataclass(frozen=True, slots=True)
class _Prototype:
    matcher: LLMatcher
    bits: bytes
    seconds: float
    grown: int


def run_matching(
    connection: socket.socket,
    marker: mmap.mmap,
    tokenizer: LLTokenizer,
    limits: ConstraintLimits,
) -> None:
    """Serve until the engine closes the socket."""
    _Matching(connection, marker, tokenizer, limits).run()


class _Matching:
    def __init__(
        self,
        connection: socket.socket,
        marker: mmap.mmap,
        tokenizer: LLTokenizer,
        limits: ConstraintLimits,
    ) -> None:
        self._connection = connection
        self._marker = marker
        self._tokenizer = tokenizer
        self._limits = limits
        self._library_limits = library_limits(limits)
        self._buffer = bytearray(LONGEST)
        self._followed: dict[int, _Matched] = {}
        self._to_compile: OrderedDict[int, None] = OrderedDict()
        self._to_mask: dict[int, None] = {}
        self._prototypes: OrderedDict[Constraint, _Prototype] = OrderedDict()
        self._masks: list[Mask] = []
        """Masks that are computed but not sent yet; the first dates from `_since`."""
        self._since = 0.0
        self._freed = 0
        """Bytes of the sequences forgotten since memory was last returned to the system."""
        self._base = self._size = allocated_bytes()

    def run(self) -> None:
        while self._take_messages():
            if self._to_mask:
                sequence = min(self._to_mask, key=lambda s: self._followed[s].cost)
                del self._to_mask[sequence]
                self._job(sequence, self._mask)
            elif self._to_compile:
                sequence, _ = self._to_compile.popitem(last=False)
                self._job(sequence, self._compile)
            self._bound_memory()
            self._send_masks()

    # ------------------------------------------------------------------- messages

    def _take_messages(self) -> bool:
        """Handle pending messages; if idle, wait for one. False once the engine has closed."""
        while True:
            idle = not self._to_mask and not self._to_compile and not self._masks
            if idle and self._freed > _LARGE:
                self._return_memory()
            try:
                message = receive(self._connection, self._buffer, wait=idle)
            except BlockingIOError:
                return True
            match message:
                case MatchSequence():
                    self._follow(message)
                case Advance():
                    self._advance(message)
                case Forget():
                    self._forget(message.sequence)
                case _:
                    return False

    def _follow(self, message: MatchSequence) -> None:
        followed = self._followed.setdefault(message.sequence, _Matched())
        followed.wanted = followed.wanted or message.constraint
        if message.constraint is not None and followed.digits is None:
            followed.digits = self._digits_of(message.constraint)
        followed.tokens += message.tokens
        if message.last:
            self._to_compile[message.sequence] = None

    def _digits_of(self, constraint: Constraint) -> Digits | None:
        most = self._limits.number_digits
        if constraint.kind != "json_schema" or not most:
            return None
        return Digits(most, lambda token: self._tokenizer.decode_bytes([token]))

    def _advance(self, message: Advance) -> None:
        rows = []
        self._guard(HARD_FACTOR * self._limits.mask_seconds * len(message.pairs))
        for sequence, token in message.pairs:
            followed = self._followed.get(sequence)
            if followed is None:
                continue  # it has failed, and the engine is about to learn of it
            if followed.matcher is None:
                followed.tokens.append(token)  # not compiled yet
                continue
            self._marker[: MARKER.size] = MARKER.pack(sequence)
            good = followed.matcher.consume_token(token)  # panics become errors
            followed.count += 1
            if followed.digits is not None:
                followed.digits.take([token])
            if not good:
                self._fail(sequence, first_problem(followed.matcher))
                continue
            stopped = followed.matcher.is_stopped()
            rows.append((sequence, followed.count, stopped))
            if not stopped:
                self._to_mask[sequence] = None
        self._guard(0)
        self._marker[: MARKER.size] = MARKER.pack(0)
        if rows:
            self._say(Advanced(rows))

    def _forget(self, sequence: int) -> None:
        followed = self._followed.pop(sequence, None)
        if followed is not None:
            self._freed += followed.bytes
            del followed
            self._size = allocated_bytes()
        self._to_mask.pop(sequence, None)
        self._to_compile.pop(sequence, None)

    def _say(self, message: FromMatcher) -> None:
        self._connection.send(msgspec.msgpack.encode(message))

    def _fail(self, sequence: int, refused: ConstraintRefused) -> None:
        self._forget(sequence)
        self._say(MatchingFailed(sequence, refused.limit, refused.problem))

    # ----------------------------------------------------------------------- jobs

    def _job(self, sequence: int, work: Callable[[int, _Matched], None]) -> None:
        followed = self._followed[sequence]
        self._marker[: MARKER.size] = MARKER.pack(sequence)
        try:
            work(sequence, followed)
        except ConstraintRefused as refused:
            self._fail(sequence, refused)
        except (ConnectionError, BrokenPipeError):
            raise
        except BaseException:  # a panic is not an Exception
            self._fail(
                sequence, ConstraintRefused("library", "the library that applies it failed")
            )
        self._guard(0)
        followed.grown += self._growth()
        if followed.grown > self._limits.memory and sequence in self._followed:
            self._fail(sequence, _too_large(self._limits.memory))
        self._marker[: MARKER.size] = MARKER.pack(0)

    def _compile(self, sequence: int, followed: _Matched) -> None:
        assert followed.wanted is not None, "the first message has it"
        prototype = self._prototype(followed.wanted)
        followed.matcher, followed.wanted = prototype.matcher.deep_copy(), None
        followed.cost = prototype.seconds
        followed.compiled = prototype.grown
        tokens, followed.tokens = followed.tokens, []
        followed.count = len(tokens)
        if not tokens:
            self._say(Masks([Mask(sequence, 0, prototype.seconds, prototype.bits)]))
            return
        if followed.digits is not None:
            followed.digits.take(tokens)
        self._guard(self._limits.compile_seconds + len(tokens) * self._limits.mask_seconds)
        if not followed.matcher.consume_tokens(tokens):
            raise first_problem(followed.matcher)
        if followed.matcher.is_stopped():
            self._say(Advanced([(sequence, followed.count, True)]))
        else:
            self._to_mask[sequence] = None

    def _prototype(self, constraint: Constraint) -> _Prototype:
        found = self._prototypes.get(constraint)
        if found is not None:
            self._prototypes.move_to_end(constraint)
            return found
        self._guard(self._limits.compile_seconds)
        matcher = compile_matcher(self._tokenizer, constraint, self._library_limits)
        bits, seconds = self._bits(matcher)
        made = self._prototypes[constraint] = _Prototype(matcher, bits, seconds, self._growth())
        most = self._limits.matcher_memory // _PROTOTYPES_SHARE
        while (
            len(self._prototypes) > _PROTOTYPES
            or sum(p.grown for p in self._prototypes.values()) > most
        ):
            self._prototypes.popitem(last=False)
        return made

    def _mask(self, sequence: int, followed: _Matched) -> None:
        assert followed.matcher is not None, "only compiled sequences get here"
        bits, seconds = self._bits(followed.matcher)
        followed.cost = max(seconds, _FORGETTING * followed.cost)
        if followed.digits is not None:
            bits = followed.digits.bounded(bits)
        self._masks.append(Mask(sequence, followed.count, seconds, bits))

    def _send_masks(self) -> None:
        """Send the masks if no more are due, they have waited long, or they are many."""
        if not self._masks:
            return
        now = time.monotonic()
        if len(self._masks) == 1:
            self._since = now
        room = LONGEST // 2 - sum(len(mask.bits) for mask in self._masks)
        if not self._to_mask or now - self._since > _TOGETHER_S or room < 0:
            masks, self._masks = self._masks, []
            self._say(Masks(masks))

    def _bits(self, matcher: LLMatcher) -> tuple[bytes, float]:
        """Compute the mask; return it and the CPU seconds it took."""
        self._guard(HARD_FACTOR * self._limits.mask_seconds)
        began = time.thread_time()
        bits = matcher.compute_bitmask()
        seconds = time.thread_time() - began
        if matcher.is_error() or not bits.strip(b"\0"):
            raise first_problem(matcher)
        if seconds > self._limits.mask_seconds:
            raise too_slow(self._limits)
        return bits, seconds

    # --------------------------------------------------------------------- limits

    def _guard(self, seconds: float) -> None:
        """End this process after ``seconds`` of CPU time; 0 cancels the timer."""
        signal.setitimer(signal.ITIMER_PROF, seconds)

    def _growth(self) -> int:
        """Bytes allocated since the last call, less those freed."""
        before, self._size = self._size, allocated_bytes()
        return max(0, self._size - before)

    def _bound_memory(self) -> None:
        """End the largest sequences until the rest fit. Not within a job, which would keep its
        own sequence's memory."""
        if self._size - self._base <= self._limits.matcher_memory:
            return
        self._prototypes.clear()
        self._return_memory()
        while self._size - self._base > self._limits.matcher_memory and self._followed:
            # The newest of several that are as large.
            largest = max(reversed(self._followed), key=lambda s: self._followed[s].bytes)
            self._fail(largest, _too_large_together(self._limits.matcher_memory))
            self._return_memory()

    def _return_memory(self) -> None:
        """Return freed memory to the system."""
        return_freed()
        self._freed, self._size = 0, allocated_bytes()


def _too_large(size: int) -> ConstraintRefused:
    return ConstraintRefused("memory", f"applying it needs more than {size >> 20} MiB")


def _too_large_together(size: int) -> ConstraintRefused:
    return ConstraintRefused(
        "memory",
        f"the constraints in use need more than {size >> 20} MiB together, and this is the "
        "largest",
    )
