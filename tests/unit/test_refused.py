"""`tests.refused` detects every difference from the expected error."""

from __future__ import annotations

import pytest
from veneer_registry.errors import AdapterInvalid, InvalidArgument, InvalidField, VeneerError

from tests.refused import refused


def test_the_class_and_the_metadata_told_are_enough() -> None:
    with refused(InvalidField, field="offset", expected=3) as caught:
        raise InvalidField(
            "any words", metadata={"field": "offset", "expected": "3", "file": "x"}
        )
    assert caught.value.message == "any words"


@pytest.mark.parametrize(
    "error",
    [
        InvalidField("another value", metadata={"field": "data"}),
        InvalidField("no such key"),
        InvalidArgument("the class above", metadata={"field": "offset"}),
        AdapterInvalid("one beside it", metadata={"field": "offset"}),
    ],
    ids=str,
)
def test_what_differs_is_no_such_refusal(error: VeneerError) -> None:
    with pytest.raises((AssertionError, VeneerError)), refused(InvalidField, field="offset"):
        raise error


def test_a_class_below_is_another_refusal() -> None:
    with pytest.raises(AssertionError), refused(InvalidArgument):
        raise InvalidField("the class below")


def test_no_error_is_none() -> None:
    with pytest.raises(pytest.fail.Exception), refused(InvalidField):
        pass
