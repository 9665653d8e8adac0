from __future__ import annotations

import math

import pytest
from veneer_train.stability import StabilityWatch, TrainingStopped

from tests.refused import refused


@pytest.mark.parametrize(
    ("loss", "norm", "what"),
    [
        (float("nan"), 1.0, "loss"),
        (1.0, float("nan"), "gradient norm"),
        (1.0, float("inf"), "gradient norm"),
    ],
)
def test_what_is_not_finite_stops_at_once(loss: float, norm: float, what: str) -> None:
    watch = StabilityWatch(49152)
    watch.check(1, 2.0, 1.0)
    with refused(TrainingStopped, step=2, cause="not_finite") as caught:
        watch.check(2, loss, norm)
    assert what in caught.value.message
    assert "train.lr" in caught.value.message


def test_a_jump_stops_only_with_enough_to_compare() -> None:
    young, some, old = (StabilityWatch(49152) for _ in range(3))
    for step in range(1, 5):
        young.check(step, 1.0, 1.0)
    young.check(5, 1.0, 1e4)
    for step in range(1, 6):
        some.check(step, 1.0, 1.0)
    some.check(6, 1.0, 99.0)
    with refused(TrainingStopped, step=7, cause="jump"):
        some.check(7, 1.0, 101.0)
    for step in range(1, 31):
        old.check(step, 1.0, 1.0)
    with refused(TrainingStopped, step=31, cause="jump"):
        old.check(31, 1.0, 101.0)


def test_a_loss_worse_than_guessing_stops_in_the_third_step() -> None:
    """Loss and gradient norm of a real run: the bundled base, the example `chat`, lr 0.9
    without a warm-up. In its 40 steps the norm is above 100 times the usual one only in
    steps 2 and 3, and the loss comes back to 7."""
    watch = StabilityWatch(49152)
    watch.check(1, 5.125, 1.8309)
    watch.check(2, 16.522, 355.8343)
    with refused(TrainingStopped, step=3, cause="worse_than_guessing"):
        watch.check(3, 26.38, 2901.1294)


def test_an_odd_batch_and_a_hard_beginning_are_no_reason() -> None:
    guessing = math.log(320)
    watch = StabilityWatch(320)
    for step in range(1, 40, 2):
        watch.check(step, 2.0, 1.0)
        watch.check(step + 1, guessing + 3, 1.0)
    # It begins worse than guessing, as a base does on text like none that it knows.
    hard = StabilityWatch(320)
    for step in range(1, 40):
        hard.check(step, guessing + 5, 1.0)


@pytest.mark.parametrize("first", [1e-4, 1.0, 50.0])
def test_a_warm_up_is_no_jump(first: float) -> None:
    """Norms fall, or rise with the learning rate, by a tenth of what a jump is."""
    rising, falling = StabilityWatch(320), StabilityWatch(320)
    for step in range(1, 60):
        rising.check(step, 5.0, first * min(step, 10))
        falling.check(step, 5.0, first / min(step, 10))
