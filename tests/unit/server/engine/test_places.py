"""Places in the queue: a request's samples take theirs together, and release them."""

from __future__ import annotations

import pytest
from veneer_registry.errors import InvalidField, QueueFull
from veneer_server.engine_client.client import EngineClient
from veneer_server.wire.messages import EngineConfig

from tests.refused import refused


def client() -> EngineClient:
    """One that may run 3 and queue 2."""
    return EngineClient(EngineConfig("", "", "", "", max_running=3), max_queue=2)


def test_places_are_taken_together_and_given_back() -> None:
    engine = client()
    with engine.places(3):
        with pytest.raises(QueueFull) as caught, engine.places(3):
            pass
        assert caught.value.retry_after_s
        with engine.places(2), pytest.raises(QueueFull), engine.places(1):
            pass
    with engine.places(5):
        pass


def test_places_come_back_whatever_ended_the_request() -> None:
    engine = client()
    with pytest.raises(RuntimeError), engine.places(5):
        raise RuntimeError
    with engine.places(5):
        pass


def test_more_samples_than_there_are_places_will_never_fit() -> None:
    with refused(InvalidField, field="output.n", limit=5), client().places(6):
        pass
