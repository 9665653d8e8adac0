"""Whose constraint is compiled next, and what is remembered."""

from __future__ import annotations

import random

from veneer_server.constraints.trials import REMEMBERED, TOO_SLOW_FOR_S, Outcome, Trials
from veneer_server.queues.fairness import Sender
from veneer_server.wire.messages import Constraint


def regex(text: str) -> Constraint:
    return Constraint("regex", text)


def caller(connection: str) -> Sender:
    """A connection of a server without keys."""
    return Sender("default", "127.0.0.1", "", connection)


def test_one_callers_many_constraints_leave_a_worker_to_others() -> None:
    trials = Trials(2)
    for number in range(60):
        assert trials.ask(number, regex(f"bad{number}"), caller("bad")) is None
    assert trials.start() == regex("bad0")
    assert trials.start() is None
    trials.ask(100, regex("good"), caller("good"))
    assert trials.start() == regex("good")
    trials.ask(101, regex("better"), caller("good"))
    assert trials.end(regex("bad0"), Outcome()) == [0]
    assert trials.end(regex("good"), Outcome()) == [100]
    # Each had a turn: the first caller's is next again, then the other's.
    assert [trials.start(), trials.start()] == [regex("bad1"), regex("better")]


def test_many_connections_of_a_tenant_have_one_turn() -> None:
    """150 connections, each with a slow constraint, made another tenant wait for 98 s."""
    for workers in (1, 2, 3):
        trials, order = Trials(workers), []
        for number in range(150):
            bad = Sender("bad", f"key {number % 3}", "", str(number))
            trials.ask(number, regex(f"bad{number}"), bad)
        running = [found for _ in range(workers) if (found := trials.start())]
        for number in range(3):
            good = Sender("good", "key", "", "one")
            trials.ask(1000 + number, regex(f"good{number}"), good)
        while running or len(trials):
            while (found := trials.start()) is not None:
                running.append(found)
            order.append((ended := running.pop(0)).text)
            trials.end(ended, Outcome())
        last = max(order.index(f"good{number}") for number in range(3))
        assert last <= 2 * workers + 4, "at least every second turn is its own"


def test_once_several_tenants_ask_none_has_all_workers() -> None:
    def started(*senders: Sender) -> list[Constraint | None]:
        trials = Trials(2)
        for number, sender in enumerate(senders):
            trials.ask(number, regex(str(number)), sender)
        return [trials.start() for _ in range(3)]

    one, two = Sender("t", "k", "", "1"), Sender("t", "k", "", "2")
    key, other = Sender("t", "l", "", "3"), Sender("u", "k", "", "4")
    both = [regex("0"), regex("1"), None]
    assert started(one, one) == [regex("0"), None, None]
    assert started(one, two) == both, "nobody else is known"
    assert started(one, two, key) == [regex("0"), regex("2"), None]
    assert started(one, key) == both
    assert started(one, key, other) == [regex("0"), regex("2"), None]


def test_one_worker_is_enough_and_callers_take_turns() -> None:
    trials, order = Trials(1), []
    for number, (text, name) in enumerate([("a", "x"), ("b", "x"), ("c", "x"), ("d", "y")]):
        trials.ask(number, regex(text), caller(name))
    while (running := trials.start()) is not None:
        order.append(running.text)
        trials.end(running, Outcome())
    assert order == ["a", "d", "b", "c"]


def test_the_same_constraint_is_tried_once_and_its_outcome_remembered() -> None:
    trials, refused = Trials(2), Outcome("memory", "too large")
    for number in range(10):
        assert trials.ask(number, regex("same"), caller(f"caller {number}")) is None
    assert trials.start() == regex("same")
    assert trials.start() is None
    trials.ask(10, regex("same"), caller("late"))
    assert trials.end(regex("same"), refused) == list(range(11))
    assert trials.ask(11, regex("same"), caller("later")) is refused
    assert len(trials) == 0


def test_what_did_not_fail_by_itself_is_not_remembered() -> None:
    trials = Trials(1)
    trials.ask(1, regex("a"), caller("x"))
    trials.start()
    assert trials.end(regex("a"), Outcome("memory", "killed", lasting=False)) == [1]
    assert trials.ask(2, regex("a"), caller("x")) is None


def test_what_took_too_long_is_tried_again_after_a_while() -> None:
    """Whoever keeps the machine busy must not switch a constraint off for ever."""
    now = 0.0
    trials = Trials(1, lambda: now)
    slow, large = Outcome("compile_seconds", "slow"), Outcome("memory", "large")
    for number, outcome in enumerate((slow, large)):
        trials.ask(number, regex(outcome.problem), caller("x"))
        trials.start()
        trials.end(regex(outcome.problem), outcome)
    now = TOO_SLOW_FOR_S / 2
    assert trials.ask(2, regex("slow"), caller("y")) == slow
    now = TOO_SLOW_FOR_S + 1
    assert trials.ask(3, regex("large"), caller("y")) == large
    assert trials.ask(4, regex("slow"), caller("y")) is None


def test_outcomes_are_bounded() -> None:
    trials = Trials(1)
    for number in range(REMEMBERED + 10):
        trials.ask(number, regex(str(number)), caller("x"))
        trials.start()
        trials.end(regex(str(number)), Outcome())
    assert trials.ask(1, regex("0"), caller("x")) is None
    assert trials.ask(2, regex(str(REMEMBERED + 9)), caller("x")) == Outcome()


def test_nobody_waits_any_more() -> None:
    trials = Trials(1)
    for number in (1, 2):
        trials.ask(number, regex("a"), caller("x"))
    trials.ask(3, regex("b"), caller("x"))
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
        trials.ask(number, regex(text), caller("x"))
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
            who = Sender(rng.choice("tu"), rng.choice("kl"), "", rng.choice("xyz"))
            if event < 0.5:
                text = regex(rng.choice("abcdef"))
                if trials.ask(number, text, who) is None:
                    waiting[number] = text
            elif event < 0.6 and waiting:
                sequence = rng.choice(list(waiting))
                del waiting[sequence]
                if (stopped := trials.leave(sequence)) is not None:
                    running.discard(stopped)
            elif event < 0.8 and running:
                ended = running.pop()
                if rng.random() < 0.3:
                    assert trials.again(ended)
                    continue
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
