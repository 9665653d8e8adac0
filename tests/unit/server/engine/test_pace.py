"""The lower bound of a TTFT: never above what an idle engine would take."""

from __future__ import annotations

import random

from veneer_server.engine.scheduling.pace import StepPace

FIXED_S = 0.02


def step_s(tokens: int, fixed_s: float = FIXED_S) -> float:
    """An engine whose steps cost a fixed part and a part for each token."""
    return fixed_s + tokens * 0.001


def quiet_s(tokens: int, chunk: int, fixed_s: float) -> float:
    """What it takes from an empty queue to the first token, on that engine."""
    chunks = [chunk] * (tokens // chunk) + ([tokens % chunk] if tokens % chunk else [])
    return sum(step_s(c, fixed_s) for c in chunks)


def test_nothing_is_refused_before_anything_was_measured() -> None:
    assert StepPace(512).seconds(100_000) == 0


def test_it_never_exceeds_the_time_of_a_quiet_engine() -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    generator = random.Random(seed)
    for _ in range(2000):
        chunk = generator.choice([64, 128, 512])
        pace = StepPace(chunk)
        # Where the fixed part is all, a full step takes no longer than half of one.
        fixed_s = generator.choice([0.0, FIXED_S, 10.0])
        steps = [generator.randint(1, chunk) for _ in range(generator.randint(1, 8))]
        for tokens in steps:
            # Often slower than the engine can, by what shares the machine.
            pace.observe(tokens, step_s(tokens, fixed_s) * generator.choice([1, 1.5, 4]))
        pace.observe(max(steps), step_s(max(steps), fixed_s))
        tokens = generator.randint(1, 4000)
        assert pace.seconds(tokens) <= quiet_s(tokens, chunk, fixed_s)


def test_small_steps_say_nothing_of_long_prompts() -> None:
    pace = StepPace(512)
    pace.observe(1, step_s(1))
    assert pace.seconds(4000) < 0.03
    pace.observe(512, step_s(512))
    assert pace.seconds(4000) > 0.7 * 4000 * 0.001


def test_a_long_queue_is_worth_its_tokens() -> None:
    pace = StepPace(512)
    pace.observe(512, 0.5)
    assert pace.seconds(10_000) > 7
    pace.observe(300, 0.0)  # a clock that did not move: not a rate
    assert pace.seconds(10_000) > 7
