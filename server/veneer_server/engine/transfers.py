"""Moves adapters between tiers for sequences and operators, and answers the operators."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from veneer_registry.errors import AdapterBudgetExceeded, AdapterEvicted, VeneerError

from veneer_server.engine.outbox import Outbox
from veneer_server.engine.residency.ledger import FLAG
from veneer_server.engine.residency.residency import Residency
from veneer_server.engine.residency.tiers import Action, Drop, Load
from veneer_server.engine.scheduling.scheduler import Scheduler
from veneer_server.step.inbox import Arrived, NoSlot
from veneer_server.wire.messages import (
    LOST,
    Activate,
    AdapterFailed,
    AdapterLoaded,
    AdapterSource,
    BudgetsState,
    Evict,
    Evicted,
    OperationDone,
    Reference,
    Unpin,
    UpdateBudgets,
    wire_error,
)


class AdapterMemory(Protocol):
    """Holds the adapters' bytes (implemented by `veneer_server.adapters.memory`). Calls return
    at once; the outcome of `load` and `move` arrives in the inbox as `Arrived`.

    Attributes:
        room: bytes for DEVICE copies, if fixed when the engine starts; otherwise None.
    """

    room: int | None

    def load(self, source: AdapterSource) -> None: ...

    def move(self, weights_digest: str) -> None: ...

    def admit(self, arrived: Arrived) -> None:
        """Make a complete copy visible to the runner. Called on the loop's thread."""

    def drop(self, weights_digest: str, tier: str) -> None: ...

    def reference(self, wanted: Reference) -> None:
        """Start to compute a reference; the answering `OperationDone` arrives in the inbox."""


class TierMoves:
    """Carries out the actions that residency decides on, and tracks the operations that wait
    for them.

    Args:
        ended: called for each sequence that fails because of its adapter.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        residency: Residency,
        memory: AdapterMemory,
        outbox: Outbox,
        ended: Callable[[int], None],
    ) -> None:
        self._scheduler = scheduler
        self._residency = residency
        self._memory = memory
        self._outbox = outbox
        self._ended = ended
        self._operations: dict[str, list[Activate]] = {}
        """Activations that wait for an adapter, by digest."""

    # ----------------------------------------------------------------- operators

    def activate(self, message: Activate) -> None:
        digest = message.adapter.weights_digest
        try:
            there = self._residency.activate(message.adapter, message.tier, message.pin)
        except VeneerError as error:
            self._outbox.fail_operation(message.operation, error)
            return
        self._outbox.changed(digest)
        if there:
            self._outbox.add(OperationDone(message.operation))
        else:
            self._operations.setdefault(digest, []).append(message)

    def evict(self, message: Evict) -> None:
        digest = message.weights_digest
        try:
            if message.mode == "abort":
                if self._residency.pinned(digest) and not message.unpin:
                    self._residency.evict(digest, "fail_if_busy", unpin=False)
                self._fail_sequences(
                    digest, AdapterEvicted("the adapter was evicted by an operator; try again")
                )
            done, freed, actions = self._residency.evict(digest, message.mode, message.unpin)
        except VeneerError as error:
            self._outbox.fail_operation(message.operation, error)
            return
        self._outbox.changed(digest)
        self.carry_out(actions)
        self._fail_operations(
            digest,
            AdapterEvicted("the adapter was evicted before it was loaded; activate it again"),
        )
        self._outbox.add(OperationDone(message.operation, done=done, freed_bytes=freed))

    def unpin(self, message: Unpin) -> None:
        self._residency.unpin(message.weights_digest)
        self._outbox.changed(message.weights_digest)
        self._outbox.add(OperationDone(message.operation))

    def update_budgets(self, message: UpdateBudgets, now: float) -> None:
        residency = self._residency
        try:
            self._check_room(message.device_bytes)
            residency.set_budgets(host=message.host_bytes, device=message.device_bytes)
        except VeneerError as error:
            self._outbox.fail_operation(message.operation, error)
            return
        self.start(now)  # evicts unused copies before the answer reports the bytes held
        budgets = BudgetsState(
            host_budget=residency.budget("host"),
            device_budget=residency.budget("device"),
            host_bytes=residency.bytes_in("host"),
            device_bytes=residency.bytes_in("device"),
        )
        self._outbox.add(OperationDone(message.operation, budgets=budgets))

    def _check_room(self, device_bytes: int | None) -> None:
        room = self._memory.room
        if room is None or device_bytes is None or device_bytes <= room:
            return
        raise AdapterBudgetExceeded(
            f"this backend reserved {room} device bytes for adapters at startup, less than "
            f"{device_bytes}: restart the server with a larger --{FLAG['device']}",
            metadata={"budget": str(device_bytes), "room": str(room), "tier": "device"},
        )

    # ----------------------------------------------------------------- transfers

    def start(self, now: float) -> None:
        """Start the loads that waiting sequences and operators need, while there is room."""
        actions, impossible = self._scheduler.plan_adapters(now)
        self.carry_out(actions)
        for digest in impossible:
            error = AdapterBudgetExceeded(
                "pinned adapters or lowered budgets leave no room for this adapter; "
                "evict one with `unpin`, or raise the adapter budgets with `UpdateBudgets`"
            )
            self._fail_adapter(digest, error)

    def carry_out(self, actions: Iterable[Action]) -> None:
        for action in actions:
            match action:
                case Load():
                    self._memory.load(action.source)
                case Drop():
                    self._memory.drop(action.weights_digest, action.tier)
                    self._outbox.changed(action.weights_digest)
                    self._outbox.add(Evicted(action.weights_digest, action.tier, action.cause))
                case _:
                    self._memory.move(action.weights_digest)

    def arrived(self, message: Arrived) -> None:
        digest = message.weights_digest
        self._outbox.changed(digest)
        if isinstance(message.error, NoSlot):
            drops = self._residency.find_place(digest)
            if drops is not None:
                self.carry_out([*drops, *self._residency.settle(digest)])
                return
        if message.error is not None:
            self._fail_adapter(digest, message.error)
            return
        self._memory.admit(message)
        took = sum(s for stage, s in message.stages.items() if stage != LOST)
        if message.tier == "host":
            self._residency.loaded(digest, took, message.part)
        else:
            self._residency.moved(digest, took)
        self._outbox.add(
            AdapterLoaded(digest, "disk" if message.tier == "host" else "host", message.stages)
        )
        self.carry_out(self._residency.settle(digest))
        waiting = self._operations.pop(digest, [])
        for operation in waiting:
            if message.tier in (operation.tier, "device"):
                self._outbox.add(OperationDone(operation.operation))
            else:
                self._operations.setdefault(digest, []).append(operation)

    # ------------------------------------------------------------------ failures

    def _fail_adapter(self, digest: str, error: VeneerError) -> None:
        """Fail everything that waits for an adapter that cannot be loaded."""
        self._fail_operations(digest, error)
        if self._residency.tier(digest) != "device":  # else only a pin's HOST copy is missing
            self._fail_sequences(digest, error)
        self._residency.failed(digest)
        self.carry_out(self._residency.settle(digest))
        self._outbox.add(AdapterFailed(digest, wire_error(error)))

    def _fail_sequences(self, digest: str, error: VeneerError) -> None:
        for sequence in self._scheduler.using(digest):
            _, actions = self._scheduler.cancel(sequence.id)
            self.carry_out(actions)
            self._ended(sequence.id)
            self._outbox.fail_sequence(sequence.id, error)

    def _fail_operations(self, digest: str, error: VeneerError) -> None:
        for operation in self._operations.pop(digest, []):
            self._outbox.fail_operation(operation.operation, error)
