"""The bound on a first token: never above what a quiet engine would have taken."""

from __future__ import annotations

import random

from veneer_server.engine.pace import Pace


def step_s(tokens: int) -> float:
    """An engine whose steps cost a fixed part and a part for each token."""
    return 0.02 + tokens * 0.001


def quiet_s(tokens: int, chunk: int) -> float:
    """What it takes from an empty queue to the first token, on that engine."""
    chunks = [chunk] * (tokens // chunk) + ([tokens % chunk] if tokens % chunk else [])
    return sum(map(step_s, chunks))


def test_nothing_is_refused_before_anything_was_measured() -> None:
    assert Pace(512).seconds(100_000) == 0


def test_it_never_exceeds_the_time_of_a_quiet_engine() -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    generator = random.Random(seed)
    for _ in range(2000):
        chunk = generator.choice([64, 128, 512])
        pace = Pace(chunk)
        steps = [generator.randint(1, chunk) for _ in range(generator.randint(1, 8))]
        for tokens in steps:
            # Often slower than the engine can, by what shares the machine.
            pace.observe(tokens, step_s(tokens) * generator.choice([1, 1.5, 4]))
        pace.observe(max(steps), step_s(max(steps)))
        tokens = generator.randint(1, 4000)
        assert pace.seconds(tokens) <= quiet_s(tokens, chunk)


def test_small_steps_say_nothing_of_long_prompts() -> None:
    pace = Pace(512)
    pace.observe(1, step_s(1))
    assert pace.seconds(4000) < 0.03
    pace.observe(512, step_s(512))
    assert pace.seconds(4000) > 0.7 * 4000 * 0.001


def test_a_long_queue_is_worth_its_tokens() -> None:
    pace = Pace(512)
    pace.observe(512, 0.5)
    assert pace.seconds(10_000) > 7
    pace.observe(300, 0.0)  # a clock that did not move: not a rate
    assert pace.seconds(10_000) > 7
