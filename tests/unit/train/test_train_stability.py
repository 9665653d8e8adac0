from __future__ import annotations

import pytest
from veneer_train.stability import StabilityWatch, TrainingStopped


@pytest.mark.parametrize(
    ("loss", "norm", "says"),
    [
        (float("nan"), 1.0, "the loss is nan"),
        (1.0, float("nan"), "the gradient norm is nan"),
        (1.0, float("inf"), "the gradient norm is inf"),
    ],
)
def test_what_is_not_finite_stops_at_once(loss: float, norm: float, says: str) -> None:
    watch = StabilityWatch()
    watch.check(1, 2.0, 1.0)
    with pytest.raises(TrainingStopped, match=says) as caught:
        watch.check(2, loss, norm)
    assert caught.value.metadata == {"step": "2"}
    assert "train.lr" in caught.value.message


def test_a_jump_stops_only_with_enough_to_compare() -> None:
    young, old = StabilityWatch(), StabilityWatch()
    for step in range(19):
        young.check(step, 1.0, 1.0)
        old.check(step, 1.0, 1.0)
    young.check(20, 1.0, 1e4)
    old.check(20, 1.0, 1.0)
    old.check(21, 1.0, 99.0)
    with pytest.raises(TrainingStopped, match=r"jumped from about 1 to 101"):
        old.check(22, 1.0, 101.0)
