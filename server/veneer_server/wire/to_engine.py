"""Messages from the front to the engine process."""

from __future__ import annotations

from typing import Literal

from veneer_server.wire.base import MemoryTier, Message
from veneer_server.wire.requests import AdapterSource, SequenceRequest

EvictMode = Literal["drain", "fail_if_busy", "abort", "forget"]


class Submit(Message, frozen=True):
    """A new sequence.

    Attributes:
        sequence: id chosen by the engine client, never reused.
    """

    sequence: int
    request: SequenceRequest


class Cancel(Message, frozen=True):
    """End a sequence now; answered by a `SequenceOutput` with ``cancelled``
    unless it has already finished."""

    sequence: int


class Activate(Message, frozen=True):
    """Load an adapter into ``host`` or ``device``; answered by `OperationDone`."""

    operation: int
    adapter: AdapterSource
    tier: MemoryTier = "device"
    pin: bool = False


class Evict(Message, frozen=True):
    """Free an adapter's memory; answered by `OperationDone`.

    ``drain`` frees it when the sequences now running have ended; other sequences wait and load
    it again. ``fail_if_busy`` refuses while any sequence uses it; ``abort`` ends such sequences
    with ADAPTER_EVICTED. ``forget`` is for weights that no registered name has any more: it
    frees them when the last of their sequences, including waiting ones, has ended.
    """

    operation: int
    weights_digest: str
    mode: EvictMode = "drain"
    unpin: bool = False


class Unpin(Message, frozen=True):
    """Remove an adapter's pin without freeing anything; answered by `OperationDone`."""

    operation: int
    weights_digest: str


class UpdateBudgets(Message, frozen=True):
    """Change the bytes that adapters may take; answered by `OperationDone`.

    None leaves a budget as it is. Unused adapters beyond a lower budget are evicted at once,
    others when their sequences have ended. Refused if pinned adapters alone exceed the budget.
    """

    operation: int
    host_bytes: int | None = None
    device_bytes: int | None = None


class Pause(Message, frozen=True):
    """Run no further step until a `Pause` with ``paused`` unset. Answered by `OperationDone`,
    after which no step runs. Sequences keep their KV blocks and adapters, new sequences are
    queued, and adapters are still loaded."""

    operation: int
    paused: bool


class ResetPrefixCache(Message, frozen=True):
    """Forget all prefixes that were computed before; answered by `OperationDone`. Running
    sequences keep the blocks that they use."""

    operation: int


class Reference(Message, frozen=True):
    """Compute a prompt's log-probabilities independently of the serving path; answered by
    `OperationDone`.

    Attributes:
        tokens: at least one; each after the first gets its log-probability.
        adapter: read from its files even if it is resident. None: the base alone.
    """

    operation: int
    tokens: list[int]
    adapter: AdapterSource | None = None


class Ping(Message, frozen=True):
    """A heartbeat. The step loop itself answers, which proves that it makes progress."""

    number: int


class Stop(Message, frozen=True):
    """End the engine process; the front has drained it."""


ToEngine = (
    Submit
    | Cancel
    | Activate
    | Evict
    | Unpin
    | UpdateBudgets
    | Pause
    | ResetPrefixCache
    | Reference
    | Ping
    | Stop
)
