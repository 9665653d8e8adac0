"""Messages between `peft` and its child process: JSON, one message per line."""

from __future__ import annotations

from typing import Final

import msgspec


class PeftMessage(msgspec.Struct, frozen=True, tag=True):
    """Base of all messages."""


class PeftSetup(PeftMessage, frozen=True):
    """First message: what to load. ``adapters`` maps a name to its folder."""

    base_folder: str
    adapters: dict[str, str]
    threads: int


class Generate(PeftMessage, frozen=True):
    """Decode one padded batch greedily, with exactly ``tokens`` new tokens per row."""

    prompts: list[list[int]]
    adapters: list[str]
    tokens: int


class PeftScore(PeftMessage, frozen=True):
    """Score one row: log-probabilities of its tokens after the first, under one adapter."""

    row: list[int]
    adapter: str


ToPeer = PeftSetup | Generate | PeftScore


class PeerReady(PeftMessage, frozen=True):
    """The model and all adapters are loaded."""

    device: str
    versions: dict[str, str]
    load_s: float


class Generated(PeftMessage, frozen=True):
    """The decoded batch. ``step_s``: seconds from the call's start to each step's tokens."""

    rows: list[list[int]]
    step_s: list[float]
    wall_s: float
    cpu_s: float


class Scored(PeftMessage, frozen=True):
    """The scored row: log-probabilities of its tokens after the first, and of the likeliest
    token at each of these positions."""

    logprobs: list[float]
    best: list[float]


class PeerFailed(PeftMessage, frozen=True):
    """The last message of a peer that failed."""

    message: str


FromPeer = PeerReady | Generated | Scored | PeerFailed

_encoder: Final = msgspec.json.Encoder()
_to_peer: Final[msgspec.json.Decoder[ToPeer]] = msgspec.json.Decoder(ToPeer)
_from_peer: Final[msgspec.json.Decoder[FromPeer]] = msgspec.json.Decoder(FromPeer)


def encode(message: ToPeer | FromPeer) -> bytes:
    """Encode a message as one line, with its newline."""
    return _encoder.encode(message) + b"\n"


def decode_to_peer(line: bytes) -> ToPeer:
    """Decode the message on one line."""
    return _to_peer.decode(line)


def decode_from_peer(line: bytes) -> FromPeer:
    """Decode the message on one line."""
    return _from_peer.decode(line)
