"""The step loop: take messages, decide, execute, report. The engine's only actor.

One thread owns scheduler, residency and tables, so none of them needs a lock.
Everything else (socket, load workers) puts messages into the inbox; a step
never waits for them, and the loop sleeps in the inbox when nothing can run.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Protocol

from veneer_registry.errors import (
    AdapterBudgetExceeded,
    AdapterEvicted,
    ContextTooLong,
    DeadlineTooShort,
    InvalidField,
    NonFiniteOutput,
    VeneerError,
)

from veneer_server.engine.residency.residency import Residency
from veneer_server.engine.residency.tiers import Action, Drop, Load
from veneer_server.engine.scheduling.pace import Pace
from veneer_server.engine.scheduling.scheduler import Scheduler, Update
from veneer_server.engine.scheduling.sequence import Sequence
from veneer_server.step.inbox import Arrived, Compiled, Inbox, News, Unheld
from veneer_server.step.plan import ConstraintFailure, Following, Runner, StepPlan
from veneer_server.wire.messages import (
    LOST,
    Activate,
    AdapterFailed,
    AdapterLoaded,
    AdapterSource,
    BudgetsState,
    Cancel,
    Constraint,
    ConstraintDone,
    Evict,
    Evicted,
    FromEngine,
    MatcherEnded,
    Occupancy,
    OperationDone,
    Ping,
    Pong,
    Reference,
    SequenceFailed,
    SequenceOutput,
    StepDone,
    Stop,
    Submit,
    ToEngine,
    Unpin,
    UpdateBudgets,
    WireError,
    wire_error,
)
from veneer_server.wire.messages import Residency as ResidencyMessage

__all__ = [
    "AdapterMemory",
    "GrammarMemory",
    "StepLoop",
    "Turn",
]

log = logging.getLogger(__name__)

CHECK_SECONDS = 60.0
"""An idle engine looks this often at everything it holds, which takes milliseconds for each
thousand adapters; what ended sequences must have given back it checks after each message."""
CHECK_AGAIN_SECONDS = 1.0
"""Until the next try where a message has interrupted that."""


class GrammarMemory(Protocol):
    """What holds the state of constraints (`veneer_server.constraints.grammars`)."""

    def compile(
        self,
        sequence: int,
        constraint: Constraint,
        done: Callable[[InvalidField | None], None],
        caller: str = "",
    ) -> None:
        """Return at once; ``done`` is called in any thread."""

    def forget(self, sequence: int) -> None: ...

    def ending(self, sequence: int) -> ConstraintFailure | Following:
        """How a sequence that was late goes on."""


class AdapterMemory(Protocol):
    """What holds the bytes (`veneer_server.adapters.memory`). Calls return at once;
    the outcome of `load` and `move` comes to the inbox as `Arrived`."""

    def load(self, source: AdapterSource) -> None: ...

    def move(self, weights_digest: str) -> None: ...

    def admit(self, arrived: Arrived) -> None:
        """Make a complete copy visible to the runner; on the loop's thread."""

    def drop(self, weights_digest: str, tier: str) -> None: ...

    def reference(self, wanted: Reference) -> None:
        """Have it computed; the `OperationDone` that answers it comes to the inbox."""


def _cannot_follow(sequence: Sequence, failure: ConstraintFailure) -> WireError:
    metadata = {"field": "constraint"} | ({"limit": failure.limit} if failure.limit else {})
    return wire_error(
        InvalidField(
            f"constraint cannot be followed after {sequence.generated} tokens: "
            f"{failure.problem}. Simplify it",
            metadata=metadata,
        )
    )


class Turn(Enum):
    """What one turn of the loop was."""

    STEPPED = "stepped"
    IDLE = "idle"
    """No sequence can go on before another message comes."""
    STOPPED = "stopped"
    """`Stop` was taken; there is no further turn."""


class StepLoop:
    """Runs until `Stop`.

    Args:
        send: writes one frame to the front; called on the loop's thread.
        clock: monotonic seconds.
        grammars: None where the base's tokenizer allows no constraints.
    """

    def __init__(
        self,
        *,
        inbox: Inbox,
        scheduler: Scheduler,
        residency: Residency,
        runner: Runner,
        memory: AdapterMemory,
        send: Callable[[list[FromEngine]], None],
        clock: Callable[[], float] = time.monotonic,
        grammars: GrammarMemory | None = None,
    ) -> None:
        self._inbox = inbox
        self._scheduler = scheduler
        self._residency = residency
        self._runner = runner
        self._memory = memory
        self._send = send
        self._clock = clock
        self._grammars = grammars
        self._compiling: dict[int, Submit] = {}
        """Submitted sequences that wait for their constraint, by id."""
        self._operations: dict[str, list[Activate]] = {}
        """Activations that wait for an adapter, by digest."""
        self._outgoing: list[FromEngine] = []
        self._changed: dict[str, None] = {}
        self._occupancy: Occupancy | None = None
        self._pace = Pace(scheduler.limits.prompt_tokens)
        self._next_check = self._clock() + CHECK_SECONDS
        self.steps = 0

    def run(self) -> None:
        """The loop. An exception out of here is fatal for the process."""
        while (turn := self.turn()) is not Turn.STOPPED:
            if turn is Turn.IDLE and not self._take_messages(block=True):
                return

    def turn(self) -> Turn:
        """Take the messages that are there, plan, run a step, answer. Never waits for a
        message: where nothing can run, that is for the caller."""
        if not self._take_messages(block=False):
            return Turn.STOPPED
        self._start_transfers()
        plan = self._scheduler.schedule(self._clock())
        if plan is not None:
            if self._outgoing or self._changed:
                # Who cancelled or evicts does not wait for the end of a step.
                self._flush()
            self._step(plan)
            return Turn.STEPPED
        self._flush()
        if not self._scheduler.has_work():
            self._scheduler.check_unused()
            self._check_when_due()
        return Turn.IDLE

    def check_integrity(self) -> None:
        """Raises AssertionError if anything leaked."""
        self._scheduler.check_integrity()

    def _check_when_due(self) -> None:
        """`check_integrity` once in `CHECK_SECONDS`, until a message arrives. No timer of its
        own: the front pings an idle engine every second."""
        now = self._clock()
        if now < self._next_check:
            return
        self._next_check = now + CHECK_AGAIN_SECONDS  # where it is interrupted
        for _ in self._scheduler.integrity():
            if not self._inbox.empty():
                return
        self._next_check = now + CHECK_SECONDS

    # ------------------------------------------------------------------ messages

    def _take_messages(self, *, block: bool) -> bool:
        """Handle what is in the inbox; False on `Stop`."""
        while True:
            try:
                message = self._inbox.get(block=block)
            except queue.Empty:
                return True
            block = False
            if isinstance(message, Stop):
                return False
            self._handle(message)

    def _handle(self, message: ToEngine | News) -> None:
        match message:
            case Submit():
                self._submit(message)
            case Compiled():
                self._compiled(message)
            case Cancel():
                waited = self._compiling.pop(message.sequence, None)
                sequence, actions = self._scheduler.cancel(message.sequence)
                self._carry_out(actions)
                if waited is not None or sequence is not None:
                    self._ended(message.sequence)
                    self._outgoing.append(
                        SequenceOutput(message.sequence, [], finish="cancelled")
                    )
            case Activate():
                self._activate(message)
            case Evict():
                self._evict(message)
            case Unpin():
                self._residency.unpin(message.weights_digest)
                self._changed[message.weights_digest] = None
                self._outgoing.append(OperationDone(message.operation))
            case UpdateBudgets():
                self._update_budgets(message)
            case Reference():
                self._memory.reference(message)
            case Unheld():
                self._unheld(message.sequence)
            case OperationDone() | ConstraintDone() | MatcherEnded():  # a worker's
                self._outgoing.append(message)
            case Ping():
                self._outgoing.append(Pong(message.number, self.steps))
            case Arrived():
                self._arrived(message)

    def _submit(self, message: Submit) -> None:
        if message.request.constraint is None:
            self._admit(message)
        elif self._grammars is None:
            error = InvalidField(
                "constraint is not possible with this base model: llguidance cannot read its "
                "tokenizer.json. Leave it out, or serve another base",
                metadata={"field": "constraint"},
            )
            self._outgoing.append(SequenceFailed(message.sequence, wire_error(error)))
        else:
            number = message.sequence
            self._compiling[number] = message
            self._grammars.compile(
                number,
                message.request.constraint,
                lambda e: self._inbox.put(Compiled(number, e)),
                message.request.caller,
            )

    def _compiled(self, message: Compiled) -> None:
        waited = self._compiling.pop(message.sequence, None)
        if waited is None:
            self._ended(message.sequence)  # cancelled meanwhile
        elif message.error is not None:
            self._ended(message.sequence)
            self._outgoing.append(SequenceFailed(message.sequence, wire_error(message.error)))
        else:
            self._admit(waited)

    def _unheld(self, number: int) -> None:
        assert self._grammars is not None, "what was never constrained is not late"
        how = self._grammars.ending(number)
        if how is Following.LATE:
            return  # it was told before the last token was chosen
        self._scheduler.unhold(number)
        if how is Following.GOES_ON:
            return
        sequence, actions = self._scheduler.cancel(number)
        if sequence is None:
            return
        self._carry_out(actions)
        self._ended(number)
        self._outgoing.append(
            SequenceOutput(number, [], finish="stop")
            if how is Following.COMPLETE
            else SequenceFailed(number, _cannot_follow(sequence, how))
        )

    def _ended(self, sequence: int) -> None:
        if self._grammars is not None:
            self._grammars.forget(sequence)

    def _admit(self, message: Submit) -> None:
        found, request = None, message.request
        try:
            longest = len(request.prompt) + request.max_tokens
            if not self._scheduler.blocks.can_ever_hold(longest):
                raise ContextTooLong(
                    f"{longest} tokens of prompt and completion can never fit the KV cache "
                    f"of {self._scheduler.blocks.total * self._scheduler.blocks.block_size} "
                    "tokens; ask for fewer, or start the server with a larger "
                    "--kv-cache-bytes"
                )
            self._check_deadline(message)
            if request.adapter is not None:
                found = self._residency.lease(request.adapter)
        except VeneerError as error:
            self._ended(message.sequence)
            self._outgoing.append(SequenceFailed(message.sequence, wire_error(error)))
            return
        self._scheduler.add(Sequence(message.sequence, request, self._clock(), found))

    def _check_deadline(self, message: Submit) -> None:
        """Refuse what cannot have its first token in time, before it takes any."""
        deadline = message.request.deadline
        if deadline is None:
            return
        now = self._clock()
        own, ahead = self._scheduler.least_tokens(
            Sequence(message.sequence, message.request, now, None)
        )
        least, left = self._pace.seconds(own + ahead), deadline - now
        if least <= left:
            return
        alone = self._pace.seconds(own)
        helps = alone <= left
        raise DeadlineTooShort(
            f"the deadline leaves {max(0.0, left):.2f} s, but the first token of {own} new "
            f"prompt tokens behind {ahead} running ones takes at least {least:.2f} s: "
            + ("retry when less is running" if helps else "allow more time"),
            metadata={"least_s": f"{least:.3f}", "ahead_tokens": str(ahead)},
            retry_after_s=least - alone if helps else None,
        )

    def _activate(self, message: Activate) -> None:
        digest = message.adapter.weights_digest
        try:
            there = self._residency.activate(message.adapter, message.tier, message.pin)
        except VeneerError as error:
            self._outgoing.append(OperationDone(message.operation, wire_error(error)))
            return
        self._changed[digest] = None
        if there:
            self._outgoing.append(OperationDone(message.operation))
        else:
            self._operations.setdefault(digest, []).append(message)

    def _evict(self, message: Evict) -> None:
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
            self._outgoing.append(OperationDone(message.operation, wire_error(error)))
            return
        self._changed[digest] = None
        self._carry_out(actions)
        self._fail_operations(
            digest,
            AdapterEvicted("the adapter was evicted before it was there; activate it again"),
        )
        self._outgoing.append(OperationDone(message.operation, done=done, freed_bytes=freed))

    def _update_budgets(self, message: UpdateBudgets) -> None:
        residency = self._residency
        try:
            residency.set_budgets(host=message.host_bytes, device=message.device_bytes)
        except VeneerError as error:
            self._outgoing.append(OperationDone(message.operation, wire_error(error)))
            return
        self._start_transfers()  # what is not in use goes before the answer says what is held
        budgets = BudgetsState(
            host_budget=residency.budget("host"),
            device_budget=residency.budget("device"),
            host_bytes=residency.bytes_in("host"),
            device_bytes=residency.bytes_in("device"),
        )
        self._outgoing.append(OperationDone(message.operation, budgets=budgets))

    # ------------------------------------------------------------------ adapters

    def _start_transfers(self) -> None:
        actions, impossible = self._scheduler.plan_adapters(self._clock())
        self._carry_out(actions)
        for digest in impossible:
            error = AdapterBudgetExceeded(
                "pinned adapters, or budgets that were lowered, leave no room for this one; "
                "evict one with `unpin`, or raise the adapter budgets with `UpdateBudgets`"
            )
            self._fail_adapter(digest, error)

    def _carry_out(self, actions: Iterable[Action]) -> None:
        for action in actions:
            match action:
                case Load():
                    self._memory.load(action.source)
                case Drop():
                    self._memory.drop(action.weights_digest, action.tier)
                    self._changed[action.weights_digest] = None
                    self._outgoing.append(
                        Evicted(action.weights_digest, action.tier, action.cause)
                    )
                case _:
                    self._memory.move(action.weights_digest)

    def _arrived(self, message: Arrived) -> None:
        digest = message.weights_digest
        self._changed[digest] = None
        if message.error is not None:
            self._fail_adapter(digest, message.error)
            return
        self._memory.admit(message)
        took = sum(s for stage, s in message.stages.items() if stage != LOST)
        if message.tier == "host":
            self._residency.loaded(digest, took)
        else:
            self._residency.moved(digest, took)
        self._outgoing.append(
            AdapterLoaded(digest, "disk" if message.tier == "host" else "host", message.stages)
        )
        self._carry_out(self._residency.settle(digest))
        waiting = self._operations.pop(digest, [])
        for operation in waiting:
            if message.tier in (operation.tier, "device"):
                self._outgoing.append(OperationDone(operation.operation))
            else:
                self._operations.setdefault(digest, []).append(operation)

    def _fail_adapter(self, digest: str, error: VeneerError) -> None:
        """It cannot be brought into memory: end all that waits for it."""
        self._fail_operations(digest, error)
        if self._residency.tier(digest) != "device":  # else only HOST lacks it, for a pin
            self._fail_sequences(digest, error)
        self._residency.failed(digest)
        self._carry_out(self._residency.settle(digest))
        self._outgoing.append(AdapterFailed(digest, wire_error(error)))

    def _fail_sequences(self, digest: str, error: VeneerError) -> None:
        for sequence in self._scheduler.using(digest):
            _, actions = self._scheduler.cancel(sequence.id)
            self._carry_out(actions)
            self._ended(sequence.id)
            self._outgoing.append(SequenceFailed(sequence.id, wire_error(error)))

    def _fail_operations(self, digest: str, error: VeneerError) -> None:
        for operation in self._operations.pop(digest, []):
            self._outgoing.append(OperationDone(operation.operation, wire_error(error)))

    # ---------------------------------------------------------------------- step

    def _step(self, plan: StepPlan) -> None:
        began = self._clock()
        results = self._runner.execute(plan)
        self.steps += 1
        updates, actions = self._scheduler.update(plan, results)
        self._carry_out(actions)
        for update in updates:
            self._outgoing.append(self._output(update))
        lookups = self._scheduler.take_lookups()
        seconds = self._clock() - began
        self._pace.observe(plan.rows, seconds)
        self._outgoing.append(
            StepDone(
                step=self.steps,
                seconds=seconds,
                prefill_tokens=plan.prefill_tokens,
                decode_rows=plan.rows - plan.prefill_tokens,
                adapters=len(plan.adapters),
                prefix_asked=lookups.asked,
                prefix_found=lookups.found,
            )
        )
        self._flush()

    def _output(self, update: Update) -> FromEngine:
        sequence = update.sequence
        if update.finish is not None or update.token is None:
            self._ended(sequence.id)
        if update.failure is not None:
            return SequenceFailed(sequence.id, _cannot_follow(sequence, update.failure))
        if update.token is None and update.finish is not None:
            # Its constraint was complete before this step, which came too soon to know it.
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
            tier=sequence.found_in if update.first else None,
            load_seconds=sequence.load_seconds if update.first else 0.0,
            queue_seconds=max(0.0, wait - sequence.load_seconds) if update.first else 0.0,
            finish=update.finish.value if update.finish else None,
            cached_tokens=sequence.cached_tokens if update.first else 0,
            step=self.steps if update.first else 0,
        )

    def _flush(self) -> None:
        """Send what has gathered, residency changes first, occupancy last."""
        changes: list[FromEngine] = []
        if self._changed:
            residency = self._residency
            host, device = residency.bytes_in("host"), residency.bytes_in("device")
            hosted, on_device = residency.count_in("host"), residency.count_in("device")
            changes.extend(
                ResidencyMessage(
                    weights_digest=digest,
                    tier=self._residency.tier(digest),
                    pinned=self._residency.pinned(digest),
                    bytes=self._residency.bytes_of(digest),
                    host_bytes=host,
                    device_bytes=device,
                    host_count=hosted,
                    device_count=on_device,
                )
                for digest in self._changed
            )
        occupancy = Occupancy(
            running=self._scheduler.running,
            waiting=self._scheduler.waiting,
            waiting_for_adapter=self._scheduler.waiting_for_adapter,
            kv_blocks_used=self._scheduler.blocks.used,
            kv_blocks=self._scheduler.blocks.total,
            kv_blocks_cached=self._scheduler.blocks.cached,
            running_adapters=self._scheduler.running_adapters,
            waiting_adapters=self._scheduler.waiting_adapters,
        )
        if occupancy != self._occupancy:
            self._occupancy = occupancy
            self._outgoing.append(occupancy)
        if changes or self._outgoing:
            self._send([*changes, *self._outgoing])
        self._changed.clear()
        self._outgoing = []
