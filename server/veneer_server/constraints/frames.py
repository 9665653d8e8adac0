"""Messages between the engine and the processes that hold constraints.

Each message is one packet of a Unix socket that preserves boundaries (``SOCK_SEQPACKET``):
no message is ever read in part, and a send either sends all of it or would block.
"""

from __future__ import annotations

import socket
from typing import Final, Literal

import msgspec

from veneer_server.wire.messages import Constraint, ConstraintLimits

LONGEST: Final = 160 << 10
"""Maximum bytes of a packet; without privileges a Unix socket accepts 208 KiB."""

Role = Literal["trial", "quick", "slow"]

Limit = Literal["", "compile_seconds", "memory", "mask_seconds", "fuel", "library"]
"""The limit that stopped a constraint; ``library``: llguidance failed; empty: none of these."""


class _Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    pass


# ------------------------------------------------------------ the parent process


class MatchingSetup(_Message, frozen=True):
    """The first message to the parent: the vocabulary, and the limits of its children."""

    tokenizer: str
    vocab_size: int
    eos_token_ids: list[int]
    limits: ConstraintLimits


class ParentReady(_Message, frozen=True):
    """The parent's answer. ``error`` is empty unless the tokenizer cannot be used."""

    error: str


class BeginMatching(_Message, frozen=True):
    """Fork a child; its socket, notes and marker are attached as descriptors."""

    number: int
    role: Role


class Kill(_Message, frozen=True):
    """End a child. Does nothing if it has already ended."""

    number: int


class Renice(_Message, frozen=True):
    """Lower a child's priority. Does nothing if it has already ended."""

    number: int


class ChildEnded(_Message, frozen=True):
    """A child has ended; ``signal`` is 0 if no signal ended it."""

    number: int
    signal: int


ToControl = BeginMatching | Kill | Renice

FromControl = ParentReady | ChildEnded

# ------------------------------------------------------------------ a trial's child


class ConstraintCompiled(_Message, frozen=True):
    """The constraint has compiled; the first mask is next."""

    seconds: float


class TrialVerdict(_Message, frozen=True):
    """Result of a trial; ``problem`` is empty if the constraint may be used."""

    limit: Limit
    problem: str
    mask_seconds: float = 0.0


FromTrial = ConstraintCompiled | TrialVerdict

# --------------------------------------------------------------- a matcher process


class MatchSequence(_Message, frozen=True):
    """Compile, consume the tokens chosen so far (more messages follow unless ``last``), and
    compute the mask."""

    sequence: int
    constraint: Constraint | None
    tokens: list[int]
    last: bool


class Advance(_Message, frozen=True):
    """Consume one token for each of these sequences, then compute their masks."""

    pairs: list[tuple[int, int]]


class Forget(_Message, frozen=True):
    sequence: int


ToMatcher = MatchSequence | Advance | Forget


class Advanced(_Message, frozen=True):
    """Tokens were consumed: sequence, tokens so far, whether nothing more may follow."""

    rows: list[tuple[int, int, bool]]


class Mask(_Message, frozen=True):
    """Tokens that may follow after ``count`` tokens: a bit for each token of the vocabulary."""

    sequence: int
    count: int
    seconds: float
    bits: bytes


class Masks(_Message, frozen=True):
    """Several masks in one packet, since each packet wakes the engine's thread."""

    rows: list[Mask]


class MatchingFailed(_Message, frozen=True):
    """The sequence cannot continue, and has been forgotten."""

    sequence: int
    limit: Limit
    problem: str


FromMatcher = Advanced | Masks | MatchingFailed

Reply = (
    MatchingSetup | ToControl | Constraint | ToMatcher | FromControl | FromTrial | FromMatcher
)

_decoder = msgspec.msgpack.Decoder(Reply)

decode = _decoder.decode


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected sockets."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def receive(connection: socket.socket, buffer: bytearray, *, wait: bool = True) -> Reply | None:
    """The next message; None when the other side has closed.

    Args:
        buffer: `LONGEST` bytes, reused for every message.
        wait: if False, never blocks, whatever the socket's mode.

    Raises:
        BlockingIOError: there is no message yet.
    """
    try:
        size = connection.recv_into(buffer, 0, 0 if wait else socket.MSG_DONTWAIT)
    except ConnectionResetError:
        return None
    return decode(memoryview(buffer)[:size]) if size else None
