"""The step loop: take messages, plan a step, run it, report.

One thread owns scheduler, residency and tables, so none of them needs a lock.
Everything else (socket, load workers) puts messages into the inbox; a step
never waits for them, and the loop blocks on the inbox when nothing can run.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable
from enum import Enum
from typing import Protocol

from veneer_registry.errors import (
    ContextTooLong,
    DeadlineTooShort,
    InvalidField,
    VeneerError,
)

from veneer_server.engine.outbox import Outbox, cannot_follow, output_of
from veneer_server.engine.residency.residency import Residency
from veneer_server.engine.scheduling.pace import StepPace
from veneer_server.engine.scheduling.scheduler import Scheduler
from veneer_server.engine.scheduling.sequence import Sequence
from veneer_server.engine.transfers import AdapterMemory, TierMoves
from veneer_server.queues.fairness import NOBODY, Sender
from veneer_server.step.inbox import Arrived, ConstraintReady, Inbox, News, Unheld
from veneer_server.step.plan import (
    AheadRunner,
    ConstraintFailure,
    ConstraintState,
    Runner,
    SequenceResult,
    StepPlan,
)
from veneer_server.wire.messages import (
    Activate,
    Cancel,
    Constraint,
    ConstraintDone,
    Evict,
    FromEngine,
    MatcherEnded,
    OperationDone,
    Pause,
    Ping,
    Pong,
    Prefilled,
    Reference,
    ResetPrefixCache,
    SequenceFailed,
    SequenceOutput,
    StepDone,
    Stop,
    Submit,
    ToEngine,
    Unpin,
    UpdateBudgets,
)

log = logging.getLogger(__name__)

CHECK_SECONDS = 60.0
"""How often an idle engine checks everything it holds, which takes milliseconds per thousand
adapters. A cheap check for leftovers of ended sequences runs whenever no sequence is left."""
CHECK_AGAIN_SECONDS = 1.0
"""Time until the next attempt after a message interrupted a check."""


class GrammarMemory(Protocol):
    """Holds the state of constraints (`veneer_server.constraints.grammars`)."""

    def compile(
        self,
        sequence: int,
        constraint: Constraint,
        done: Callable[[InvalidField | None], None],
        sender: Sender = NOBODY,
    ) -> None:
        """Return at once; ``done`` may be called on any thread."""

    def forget(self, sequence: int) -> None: ...

    def ending(self, sequence: int) -> ConstraintFailure | ConstraintState:
        """Return how a sequence whose constraint was late continues."""


class Turn(Enum):
    """What one turn of the loop did."""

    STEPPED = "stepped"
    IDLE = "idle"
    """No sequence can run before another message arrives."""
    STOPPED = "stopped"
    """`Stop` arrived; there is no further turn."""


class StepLoop:
    """The loop, with the engine's state; see the module docstring.

    Args:
        send: writes one frame to the front; called on the loop's thread.
        clock: monotonic seconds.
        grammars: None if the base's tokenizer does not support constraints.
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
        self._ahead = runner if isinstance(runner, AheadRunner) else None
        self._flying: StepPlan | None = None
        """With an `AheadRunner`: the step that is submitted, but not read yet."""
        self._stepped = 0.0
        """When the last step ended."""
        self._memory = memory
        self._clock = clock
        self._grammars = grammars
        self._compiling: dict[int, Submit] = {}
        """Submitted sequences that wait for their constraint, by id."""
        self._outbox = Outbox(scheduler, residency, send)
        self._transfers = TierMoves(scheduler, residency, memory, self._outbox, self._ended)
        self._pace = StepPace(scheduler.limits.prompt_tokens)
        self._next_check = self._clock() + CHECK_SECONDS
        self._paused = False
        self.steps = 0

    def run(self) -> None:
        """Run the loop until `Stop`. An exception raised here is fatal to the process."""
        while (turn := self.turn()) is not Turn.STOPPED:
            if turn is Turn.IDLE and not self._take_messages(block=True):
                return

    def turn(self) -> Turn:
        """Take the pending messages, plan, run a step, report. Never waits for a message: if
        nothing can run, it returns, and the caller may wait."""
        if not self._take_messages(block=False):
            return Turn.STOPPED
        self._transfers.start(self._clock())
        plan = None if self._paused else self._scheduler.schedule(self._clock())
        if plan is not None or self._flying is not None:
            if not self._outbox.empty:
                # The answer to a cancel or an evict does not wait for the end of a step.
                self._outbox.flush()
            if self._ahead is not None:
                self._step_ahead(self._ahead, plan)
            elif plan is not None:
                self._step(plan)
            return Turn.STEPPED
        self._outbox.flush()
        if not self._scheduler.has_work():
            self._scheduler.check_unused()
            self._check_when_due()
        return Turn.IDLE

    def check_integrity(self) -> None:
        """Raise AssertionError if anything leaked."""
        self._scheduler.check_integrity()

    def _check_when_due(self) -> None:
        """Run `check_integrity` every `CHECK_SECONDS`, stopping if a message arrives. Needs no
        timer, since the front pings an idle engine every second."""
        now = self._clock()
        if now < self._next_check:
            return
        self._next_check = now + CHECK_AGAIN_SECONDS  # if interrupted
        for _ in self._scheduler.integrity():
            if not self._inbox.empty():
                return
        self._next_check = now + CHECK_SECONDS

    # ------------------------------------------------------------------ messages

    def _take_messages(self, *, block: bool) -> bool:
        """Handle the messages in the inbox; return False on `Stop`."""
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
            case ConstraintReady():
                self._compiled(message)
            case Cancel():
                waited = self._compiling.pop(message.sequence, None)
                sequence, actions = self._scheduler.cancel(message.sequence)
                self._transfers.carry_out(actions)
                if waited is not None or sequence is not None:
                    self._ended(message.sequence)
                    self._tell_prefill()
                    self._outbox.add(SequenceOutput(message.sequence, [], finish="cancelled"))
            case Activate():
                self._transfers.activate(message)
            case Evict():
                self._transfers.evict(message)
            case Unpin():
                self._transfers.unpin(message)
            case UpdateBudgets():
                self._transfers.update_budgets(message, self._clock())
            case Pause():
                self._paused = message.paused
                self._outbox.add(OperationDone(message.operation))
            case ResetPrefixCache():
                self._scheduler.blocks.reset_cache()
                self._outbox.add(OperationDone(message.operation))
            case Reference():
                self._memory.reference(message)
            case Unheld():
                self._unheld(message.sequence)
            case OperationDone() | ConstraintDone() | MatcherEnded():  # from a worker
                self._outbox.add(message)
            case Ping():
                self._outbox.add(Pong(message.number, self.steps))
            case Arrived():
                self._transfers.arrived(message)

    def _submit(self, message: Submit) -> None:
        if message.request.constraint is None:
            self._admit(message)
        elif self._grammars is None:
            error = InvalidField(
                "constraint is not supported with this base model: llguidance cannot read "
                "its tokenizer.json. Remove the constraint, or serve another base",
                metadata={"field": "constraint"},
            )
            self._outbox.fail_sequence(message.sequence, error)
        else:
            number = message.sequence
            self._compiling[number] = message
            self._grammars.compile(
                number,
                message.request.constraint,
                lambda e: self._inbox.put(ConstraintReady(number, e)),
                message.request.sender,
            )

    def _compiled(self, message: ConstraintReady) -> None:
        waited = self._compiling.pop(message.sequence, None)
        if waited is None:
            self._ended(message.sequence)  # cancelled meanwhile
        elif message.error is not None:
            self._ended(message.sequence)
            self._outbox.fail_sequence(message.sequence, message.error)
        else:
            self._admit(waited)

    def _unheld(self, number: int) -> None:
        assert self._grammars is not None, "a sequence without a constraint is never late"
        how = self._grammars.ending(number)
        if how is ConstraintState.LATE:
            return  # outdated: sent before the last token was sampled
        self._scheduler.unhold(number)
        if how is ConstraintState.GOES_ON:
            return
        sequence, actions = self._scheduler.cancel(number)
        if sequence is None:
            return
        self._transfers.carry_out(actions)
        self._ended(number)
        self._tell_prefill()
        self._outbox.add(
            SequenceOutput(number, [], finish="stop")
            if how is ConstraintState.COMPLETE
            else SequenceFailed(number, cannot_follow(sequence, how))
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
                    f"{longest} tokens of prompt and completion can never fit the KV cache of "
                    f"{self._scheduler.blocks.total * self._scheduler.blocks.block_size} "
                    "tokens; request fewer, or start the server with a larger --kv-cache-bytes"
                )
            self._check_deadline(message)
            if request.adapter is not None:
                found = self._residency.lease(request.adapter)
        except VeneerError as error:
            self._ended(message.sequence)
            self._outbox.fail_sequence(message.sequence, error)
            return
        now = self._clock()
        arrived = now if request.arrived is None else min(now, request.arrived)
        self._scheduler.add(Sequence(message.sequence, request, arrived, found))

    def _check_deadline(self, message: Submit) -> None:
        """Refuse a sequence that cannot get its first token before its deadline, so that no
        time is spent on it."""
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
            f"the deadline leaves {max(0.0, left):.2f} s, but computing {own} new prompt "
            f"tokens after {ahead} of running requests takes at least {least:.2f} s: "
            + ("retry when fewer requests are running" if helps else "increase the deadline"),
            metadata={"least_s": f"{least:.3f}", "ahead_tokens": str(ahead)},
            retry_after_s=least - alone if helps else None,
        )

    # ---------------------------------------------------------------------- step

    def _step(self, plan: StepPlan) -> None:
        self._stepped = self._clock()
        self._report(plan, self._runner.execute(plan))

    def _step_ahead(self, runner: AheadRunner, plan: StepPlan | None) -> None:
        """Submit a step, then read the previous one, so that the device has work meanwhile. A
        token that ends its sequence is thus known one step late, and `Scheduler.update` drops
        the next one."""
        flying, self._flying = self._flying, plan
        if plan is not None:
            if flying is None:
                self._stepped = self._clock()
            runner.submit(plan)
            self._scheduler.submitted(plan)
        if flying is not None:
            self._report(flying, runner.read())
        if plan is not None and plan.scores:
            self._flying = None
            self._report(plan, runner.read())

    def _tell_prefill(self) -> None:
        """Report prefill progress. Call before adding the messages that end sequences."""
        for sequence in self._scheduler.take_prefilled():
            self._outbox.add(
                Prefilled(
                    sequence.id,
                    min(sequence.computed, sequence.prompt_length),
                    sequence.cached_tokens,
                )
            )

    def _report(self, plan: StepPlan, results: tuple[SequenceResult, ...]) -> None:
        began = self._stepped
        self.steps += 1
        updates, actions = self._scheduler.update(plan, results)
        self._transfers.carry_out(actions)
        self._tell_prefill()
        for update in updates:
            if update.finish is not None or update.token is None:
                self._ended(update.sequence.id)
            self._outbox.add(output_of(update, self.steps))
        lookups = self._scheduler.take_lookups()
        self._stepped = self._clock()
        seconds = self._stepped - began
        self._pace.observe(plan.rows, seconds)
        self._scheduler.took(plan, seconds)
        drafted, accepted = self._scheduler.take_drafts()
        extra_prefill, extra_decode = plan.extra_work
        self._outbox.add(
            StepDone(
                step=self.steps,
                seconds=seconds,
                prefill_tokens=plan.prefill_tokens,
                decode_rows=plan.rows - plan.prefill_tokens - plan.draft_tokens,
                adapters=len(plan.adapters),
                prefix_asked=lookups.asked,
                prefix_found=lookups.found,
                extra_prefill=extra_prefill,
                extra_decode=extra_decode,
                drafted=drafted,
                accepted=accepted,
            )
        )
        self._outbox.flush()
