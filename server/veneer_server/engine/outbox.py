"""Outbox: messages from the loop to the front, collected during a turn and sent together."""

from __future__ import annotations

from collections.abc import Callable

from veneer_registry.errors import InvalidField, NonFiniteOutput, VeneerError

from veneer_server.engine.residency.residency import Residency
from veneer_server.engine.scheduling.scheduler import Scheduler
from veneer_server.engine.scheduling.sequence import Sequence
from veneer_server.engine.scheduling.updates import SequenceUpdate
from veneer_server.step.plan import ConstraintFailure
from veneer_server.wire.messages import (
    FromEngine,
    Occupancy,
    OperationDone,
    SequenceFailed,
    SequenceOutput,
    WireError,
    wire_error,
)
from veneer_server.wire.messages import ResidencyChanged as ResidencyMessage


class Outbox:
    """Collects messages to the front and sends them. Belongs to the loop's thread.

    Args:
        send: writes one frame to the front.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        residency: Residency,
        send: Callable[[list[FromEngine]], None],
    ) -> None:
        self._scheduler = scheduler
        self._residency = residency
        self._send = send
        self._messages: list[FromEngine] = []
        self._changed: dict[str, None] = {}
        self._occupancy: Occupancy | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing is pending, except perhaps a change of occupancy."""
        return not (self._messages or self._changed)

    def add(self, message: FromEngine) -> None:
        self._messages.append(message)

    def changed(self, weights_digest: str) -> None:
        """Report the adapter's residency with the next flush."""
        self._changed[weights_digest] = None

    def fail_sequence(self, sequence: int, error: VeneerError) -> None:
        self._messages.append(SequenceFailed(sequence, wire_error(error)))

    def fail_operation(self, operation: int, error: VeneerError) -> None:
        self._messages.append(OperationDone(operation, wire_error(error)))

    def flush(self) -> None:
        """Send all pending messages, residency changes first, occupancy last."""
        changes = self._changes() if self._changed else []
        occupancy = self._new_occupancy()
        if occupancy != self._occupancy:
            self._occupancy = occupancy
            self._messages.append(occupancy)
        if changes or self._messages:
            self._send([*changes, *self._messages])
        self._changed.clear()
        self._messages = []

    def _changes(self) -> list[ResidencyMessage]:
        residency = self._residency
        host, device = residency.bytes_in("host"), residency.bytes_in("device")
        hosted, on_device = residency.count_in("host"), residency.count_in("device")
        return [
            ResidencyMessage(
                weights_digest=digest,
                tier=residency.tier(digest),
                pinned=residency.pinned(digest),
                bytes=residency.bytes_of(digest),
                host_bytes=host,
                device_bytes=device,
                host_count=hosted,
                device_count=on_device,
            )
            for digest in self._changed
        ]

    def _new_occupancy(self) -> Occupancy:
        scheduler = self._scheduler
        return Occupancy(
            running=scheduler.running,
            waiting=scheduler.waiting,
            waiting_for_adapter=scheduler.waiting_for_adapter,
            kv_blocks_used=scheduler.blocks.used,
            kv_blocks=scheduler.blocks.total,
            kv_blocks_cached=scheduler.blocks.cached,
            running_adapters=scheduler.running_adapters,
            waiting_adapters=scheduler.waiting_adapters,
        )


def cannot_follow(sequence: Sequence, failure: ConstraintFailure) -> WireError:
    """Return the error of a sequence whose constraint cannot be followed."""
    metadata = {"field": "constraint"} | ({"limit": failure.limit} if failure.limit else {})
    return wire_error(
        InvalidField(
            f"constraint cannot be applied after {sequence.generated} tokens: "
            f"{failure.problem}. Simplify it",
            metadata=metadata,
        )
    )


def output_of(update: SequenceUpdate, step: int) -> FromEngine:
    """Return the message that reports a step's update to the front.

    Args:
        step: the step's number.
    """
    sequence = update.sequence
    if update.failure is not None:
        return SequenceFailed(sequence.id, cannot_follow(sequence, update.failure))
    if update.token is None and update.finish is not None:
        # Its constraint was already complete before this step, but that was not known yet.
        return SequenceOutput(sequence.id, [], finish=update.finish.value)
    if not update.finite or update.token is None:
        name = sequence.adapter.name if sequence.adapter else "the base model"
        return SequenceFailed(
            sequence.id,
            wire_error(
                NonFiniteOutput(
                    f"the logits of {name} were NaN or infinite for this request; other "
                    "requests are unaffected. Check the adapter's training for overflow"
                )
            ),
        )
    wait = (sequence.admitted or sequence.arrived) - sequence.arrived
    return SequenceOutput(
        sequence=sequence.id,
        tokens=[update.token],
        logprobs=None if update.logprob is None else [update.logprob],
        prompt_logprobs=(
            list(sequence.prompt_logprobs)
            if update.first and sequence.request.prompt_logprobs
            else None
        ),
        top_logprobs=None if update.tops is None else [update.tops],
        prompt_top_logprobs=(
            list(sequence.prompt_top_logprobs)
            if update.first and sequence.prompt_top_logprobs
            else None
        ),
        prompt_ranks=(
            list(sequence.prompt_ranks)
            if update.first and sequence.request.prompt_ranks
            else None
        ),
        tier=sequence.found_in if update.first else None,
        load_seconds=sequence.load_seconds if update.first else 0.0,
        queue_seconds=max(0.0, wait - sequence.load_seconds) if update.first else 0.0,
        finish=update.finish.value if update.finish else None,
        cached_tokens=sequence.cached_tokens if update.first else 0,
        step=step if update.first else 0,
        mixed=update.first and sequence.mixed,
        accepted=int(update.accepted),
        rejected=update.rejected,
    )
