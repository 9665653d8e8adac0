"""Whose constraint is compiled next, and what is remembered."""

from __future__ import annotations

import random

from veneer_server.constraints.trials import REMEMBERED, Outcome, Trials
from veneer_server.wire.messages import Constraint


def regex(text: str) -> Constraint:
    return Constraint("regex", text)


def test_one_callers_many_constraints_leave_a_worker_to_others() -> None:
    trials = Trials(2)
    for number in range(60):
        assert trials.ask(number, regex(f"bad{number}"), "bad") is None
    assert trials.start() == regex("bad0")
    assert trials.start() is None
    trials.ask(100, regex("good"), "good")
    assert trials.start() == regex("good")
    trials.ask(101, regex("better"), "good")
    assert trials.end(regex("bad0"), Outcome()) == [0]
    assert trials.end(regex("good"), Outcome()) == [100]
    # Each had a turn: the first caller's is next again, then the other's.
    assert [trials.start(), trials.start()] == [regex("bad1"), regex("better")]


def test_one_worker_is_enough_and_callers_take_turns() -> None:
    trials, order = Trials(1), []
    for number, (text, caller) in enumerate([("a", "x"), ("b", "x"), ("c", "x"), ("d", "y")]):
        trials.ask(number, regex(text), caller)
    while (running := trials.start()) is not None:
        order.append(running.text)
        trials.end(running, Outcome())
    assert order == ["a", "d", "b", "c"]


def test_the_same_constraint_is_tried_once_and_its_outcome_remembered() -> None:
    trials, refused = Trials(2), Outcome("memory", "too large")
    for number in range(10):
        assert trials.ask(number, regex("same"), f"caller {number}") is None
    assert trials.start() == regex("same")
    assert trials.start() is None
    trials.ask(10, regex("same"), "late")
    assert trials.end(regex("same"), refused) == list(range(11))
    assert trials.ask(11, regex("same"), "later") is refused
    assert len(trials) == 0


def test_what_did_not_fail_by_itself_is_not_remembered() -> None:
    trials = Trials(1)
    trials.ask(1, regex("a"), "x")
    trials.start()
    assert trials.end(regex("a"), Outcome("memory", "killed", lasting=False)) == [1]
    assert trials.ask(2, regex("a"), "x") is None


def test_outcomes_are_bounded() -> None:
    trials = Trials(1)
    for number in range(REMEMBERED + 10):
        trials.ask(number, regex(str(number)), "x")
        trials.start()
        trials.end(regex(str(number)), Outcome())
    assert trials.ask(1, regex("0"), "x") is None
    assert trials.ask(2, regex(str(REMEMBERED + 9)), "x") == Outcome()


def test_nobody_waits_any_more() -> None:
    trials = Trials(1)
    for number in (1, 2):
        trials.ask(number, regex("a"), "x")
    trials.ask(3, regex("b"), "x")
    trials.start()
    assert trials.leave(1) is None
    assert trials.leave(2) == regex("a")  # runs, for nobody
    assert trials.leave(2) is None
    assert trials.leave(3) is None  # never ran
    assert trials.start() is None
    assert len(trials) == 0


def test_a_trial_that_was_killed_from_outside_runs_again_before_the_rest() -> None:
    trials = Trials(1)
    for number, text in enumerate("ab"):
        trials.ask(number, regex(text), "x")
    assert trials.start() == regex("a")
    trials.again(regex("a"))
    assert trials.start() == regex("a")


def test_any_order_of_events_answers_everybody_who_stayed() -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(200):
        trials, waiting, running = Trials(rng.randint(1, 3)), {}, set()
        for number in range(60):
            event = rng.random()
            if event < 0.5:
                text = regex(rng.choice("abcdef"))
                if trials.ask(number, text, rng.choice("xyz")) is None:
                    waiting[number] = text
            elif event < 0.6 and waiting:
                sequence = rng.choice(list(waiting))
                del waiting[sequence]
                if (stopped := trials.leave(sequence)) is not None:
                    running.discard(stopped)
            elif event < 0.8 and running:
                ended = running.pop()
                lasting = rng.random() < 0.5
                for sequence in trials.end(ended, Outcome(lasting=lasting)):
                    assert waiting.pop(sequence) == ended
            elif (started := trials.start()) is not None:
                assert started not in running
                running.add(started)
        while running or (started := trials.start()) is not None:
            if not running:
                running.add(started)
            ended = running.pop()
            for sequence in trials.end(ended, Outcome()):
                assert waiting.pop(sequence) == ended
        assert waiting == {}
        assert len(trials) == 0
