"""A request's reads of the catalog do not wait for other work there."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from veneer_registry.registry import Registry

from tests.unit.registry.held_query import HeldQuery
from tests.unit.registry.kit import BASE, announce, bundle_files, push

Adapters = Callable[[int], Path]
Work = Callable[[Registry, Path], object]


def list_names(registry: Registry, folder: Path) -> object:
    return registry.list(labels={"team": "a", "tier": "b"})


def list_history(registry: Registry, folder: Path) -> object:
    return registry.history("chat")


def ask_for_an_upload(registry: Registry, folder: Path) -> object:
    return registry.committed(announce("chat", bundle_files(folder)))


def push_again(registry: Registry, folder: Path) -> object:
    return push(registry, "chat", folder)


def push_more(registry: Registry, folder: Path) -> object:
    return push(registry, "other", folder)


@pytest.mark.parametrize(
    ("work", "words"),
    [
        pytest.param(list_names, "CROSS JOIN revisions", id="a listing"),
        pytest.param(list_history, "FROM history", id="a history"),
        pytest.param(ask_for_an_upload, "FROM files", id="the question what to send"),
        pytest.param(push_again, "JOIN names", id="an upload's own look-up"),
        pytest.param(push_more, "UPDATE counter", id="a publish"),
    ],
)
def test_a_request_finds_its_adapter_beside(
    work: Work, words: str, data: Path, adapters: Adapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = adapters(1)
    with Registry.open(data, BASE) as registry:
        pushed = push(registry, "chat", folder).record.ref
    held = HeldQuery(monkeypatch, words)
    with Registry.open(data, BASE) as registry:
        results: list[object] = []
        thread = threading.Thread(target=lambda: results.append(work(registry, folder)))
        thread.start()
        try:
            held.wait()
            with (
                registry.acquire("chat") as lease,
                registry.acquire_weights(pushed.weights_digest) as same,
            ):
                assert lease.record.ref == same.record.ref == pushed
        finally:
            held.let_go()
            thread.join()
        assert not held.gave_up, "the request waited for what was held"
        assert len(results) == 1, "what was held ends well"
