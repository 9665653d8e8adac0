"""The wire between front and engine process: frozen messages, MessagePack, one socket.

Two closed unions, `ToEngine` and `FromEngine`. A frame is a 4-byte big-endian
length and one MessagePack array of messages, so that a whole step's output is
one frame. No torch and no grpc may be imported here.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from veneer_server.wire.base import (
    MemoryTier,
    PackedTops,
    TierName,
    Tops,
    first_tops,
    pack_tops,
    unpack_tops,
)
from veneer_server.wire.configuration import (
    ConstraintLimits,
    EngineConfig,
)
from veneer_server.wire.frames import framed
from veneer_server.wire.from_engine import (
    LOST,
    AdapterFailed,
    AdapterLoaded,
    BudgetsState,
    ConstraintDone,
    ConstraintOutcome,
    EngineInfo,
    Evicted,
    EvictionCause,
    FromEngine,
    MatcherEnded,
    Occupancy,
    OperationDone,
    Pong,
    Prefilled,
    ResidencyChanged,
    SequenceFailed,
    SequenceOutput,
    StartProgress,
    StepDone,
    WireError,
    wire_error,
)
from veneer_server.wire.requests import (
    PRIORITY_SECONDS,
    AdapterSource,
    Constraint,
    SequenceRequest,
    copy_key,
    split_key,
    token_work,
)
from veneer_server.wire.sampling import SamplingParams
from veneer_server.wire.to_engine import (
    Activate,
    Cancel,
    Evict,
    EvictMode,
    Pause,
    Ping,
    Reference,
    ResetPrefixCache,
    Stop,
    Submit,
    ToEngine,
    Unpin,
    UpdateBudgets,
)

__all__ = [
    "LOST",
    "PRIORITY_SECONDS",
    "Activate",
    "AdapterFailed",
    "AdapterLoaded",
    "AdapterSource",
    "BudgetsState",
    "Cancel",
    "Constraint",
    "ConstraintDone",
    "ConstraintLimits",
    "ConstraintOutcome",
    "EngineConfig",
    "EngineInfo",
    "Evict",
    "EvictMode",
    "Evicted",
    "EvictionCause",
    "FromEngine",
    "MatcherEnded",
    "MemoryTier",
    "Occupancy",
    "OperationDone",
    "PackedTops",
    "Pause",
    "Ping",
    "Pong",
    "Prefilled",
    "Reference",
    "ResetPrefixCache",
    "ResidencyChanged",
    "SamplingParams",
    "SequenceFailed",
    "SequenceOutput",
    "SequenceRequest",
    "StartProgress",
    "StepDone",
    "Stop",
    "Submit",
    "TierName",
    "ToEngine",
    "Tops",
    "Unpin",
    "UpdateBudgets",
    "WireError",
    "copy_key",
    "decode_from_engine",
    "decode_to_engine",
    "encode",
    "first_tops",
    "pack_tops",
    "split_key",
    "token_work",
    "unpack_tops",
    "wire_error",
]

_encoder = msgspec.msgpack.Encoder()
_to_engine = msgspec.msgpack.Decoder(list[ToEngine])
_from_engine = msgspec.msgpack.Decoder(list[FromEngine])


def encode(messages: Sequence[ToEngine] | Sequence[FromEngine]) -> bytes:
    """Encode all messages into one frame, in order."""
    return framed(_encoder.encode(messages))


def decode_to_engine(body: bytes) -> list[ToEngine]:
    """Decode the messages of one frame, given without its length prefix."""
    return _to_engine.decode(body)


def decode_from_engine(body: bytes) -> list[FromEngine]:
    """Decode the messages of one frame, given without its length prefix."""
    return _from_engine.decode(body)
