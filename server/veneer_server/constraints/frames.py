"""What travels between the engine and the processes that hold constraints.

Every message is one packet of a Unix socket that keeps their boundaries
(``SOCK_SEQPACKET``): nothing is ever half read, and a send either happens whole or
says that it would block.
"""

from __future__ import annotations

import socket
from typing import Final, Literal

import msgspec

from veneer_server.wire.messages import Constraint, ConstraintLimits

__all__ = [
    "LONGEST",
    "Advance",
    "Advanced",
    "Begin",
    "Compiled",
    "Ended",
    "Failed",
    "Follow",
    "Forget",
    "FromControl",
    "FromMatcher",
    "FromTrial",
    "Kill",
    "Limit",
    "Mask",
    "Masks",
    "Ready",
    "Renice",
    "Reply",
    "Role",
    "Setup",
    "ToControl",
    "ToMatcher",
    "Verdict",
    "decode",
    "pair",
    "receive",
]

LONGEST: Final = 160 << 10
"""Bytes of a packet; what a Unix socket takes without privileges is 208 KiB."""

Role = Literal["trial", "quick", "slow"]

Limit = Literal["", "compile_seconds", "memory", "mask_seconds", "fuel", "library"]
"""What stopped a constraint; ``library`` is a fault of llguidance, empty none of these."""


class _Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    pass


# ------------------------------------------------- the parent of all the others


class Setup(_Message, frozen=True):
    """First message to the process: the vocabulary, and the limits of its children."""

    tokenizer: str
    vocab_size: int
    eos_token_ids: list[int]
    limits: ConstraintLimits


class Ready(_Message, frozen=True):
    """Its answer. ``error`` is empty unless the tokenizer cannot be used."""

    error: str


class Begin(_Message, frozen=True):
    """Fork a child; its socket, its notes and its marker come along as descriptors."""

    number: int
    role: Role


class Kill(_Message, frozen=True):
    """End a child. Nothing happens where it has ended already."""

    number: int


class Renice(_Message, frozen=True):
    """Lower a child's priority, likewise."""

    number: int


class Ended(_Message, frozen=True):
    """A child has ended, by a signal or with status 0 (``signal`` is 0 then)."""

    number: int
    signal: int


ToControl = Begin | Kill | Renice

FromControl = Ready | Ended

# ------------------------------------------------------------------ a trial's child


class Compiled(_Message, frozen=True):
    """It compiles; what follows is the first mask."""

    seconds: float


class Verdict(_Message, frozen=True):
    """``problem`` is empty where the constraint may be followed."""

    limit: Limit
    problem: str
    mask_seconds: float = 0.0


FromTrial = Compiled | Verdict

# --------------------------------------------------------------- a matcher process


class Follow(_Message, frozen=True):
    """Compile, take the tokens that were chosen before (more come while not ``last``),
    and compute the mask."""

    sequence: int
    constraint: Constraint | None
    tokens: list[int]
    last: bool


class Advance(_Message, frozen=True):
    """Take one token for each of these sequences, then compute their masks."""

    pairs: list[tuple[int, int]]


class Forget(_Message, frozen=True):
    sequence: int


ToMatcher = Follow | Advance | Forget


class Advanced(_Message, frozen=True):
    """The tokens were taken: sequence, tokens so far, whether nothing more may follow."""

    rows: list[tuple[int, int, bool]]


class Mask(_Message, frozen=True):
    """What may follow after ``count`` tokens: a bit for each token of the vocabulary."""

    sequence: int
    count: int
    seconds: float
    bits: bytes


class Masks(_Message, frozen=True):
    """Some of them in one packet: each wakes the engine's thread."""

    rows: list[Mask]


class Failed(_Message, frozen=True):
    """The sequence cannot go on, and is forgotten."""

    sequence: int
    limit: Limit
    problem: str


FromMatcher = Advanced | Masks | Failed

Reply = Setup | ToControl | Constraint | ToMatcher | FromControl | FromTrial | FromMatcher

_decoder = msgspec.msgpack.Decoder(Reply)

decode = _decoder.decode


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected sockets."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def receive(connection: socket.socket, buffer: bytearray, *, wait: bool = True) -> Reply | None:
    """The next message; None when the other side has closed.

    Args:
        buffer: `LONGEST` bytes, used again for every message.
        wait: False never blocks, whatever the socket does by itself.

    Raises:
        BlockingIOError: there is none now.
    """
    try:
        size = connection.recv_into(buffer, 0, 0 if wait else socket.MSG_DONTWAIT)
    except ConnectionResetError:
        return None
    return decode(memoryview(buffer)[:size]) if size else None
