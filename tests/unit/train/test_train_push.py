"""Which checkpoints are published when publishing is slower than training. FAKE server: the
real one is in tests/integration/test_push_while_training.py."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from veneer_registry.errors import InvalidField, ServerUnreachable
from veneer_train import push
from veneer_train.commands.common import share_cores
from veneer_train.export import AdapterSnapshot
from veneer_train.push import PushCallback, PushTarget

from tests.refused import refused


class _Server:
    """Holds the first publication until it is told to go on."""

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.got: list[tuple[int | None, str]] = []
        self.fails = False

    def publish(self, target: PushTarget, folder: Path, *, step: int | None = None) -> Any:
        self.got.append((step, target.alias))
        self.begun.set()
        assert self.go_on.wait(30)
        if self.fails:
            raise ServerUnreachable("gone")
        return SimpleNamespace(adapter=SimpleNamespace(revision=f"r{step}"))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> _Server:
    made = _Server()
    monkeypatch.setattr(push, "publish", made.publish)
    monkeypatch.setattr(push, "check_target", lambda target, base: ())
    monkeypatch.setattr(push, "take", lambda model, name: AdapterSnapshot({}, {}))
    return made


class _Pushing(PushCallback):
    """Lets the server go on when the end was submitted."""

    server: _Server
    submits_end: bool

    def _submit(self, model: Any, state: Any, *, last: bool = False) -> None:
        super()._submit(model, state, last=last)
        if last:
            self.server.go_on.set()


def callback(server: _Server, **options: Any) -> _Pushing:
    made = _Pushing("127.0.0.1:1", "sql", alias="prod", write=lambda *args: None, **options)
    made.server, made.submits_end = server, options.get("at_end", True)
    return made


def train(pushing: _Pushing, server: _Server, steps: int) -> None:
    """Steps go on while the first publication is under way."""
    model = SimpleNamespace(peft_config={})

    def state(step: int) -> Any:
        return SimpleNamespace(
            is_world_process_zero=True, global_step=step, max_steps=steps, log_history=[]
        )

    pushing.on_train_begin(None, state(0), None, model=model)
    for done in range(steps):
        pushing.on_step_begin(None, state(done), None, model=model)
        if done == 1:
            assert server.begun.wait(30)
    if not pushing.submits_end:
        server.go_on.set()
    pushing.on_train_end(None, state(steps), None, model=model)


def test_the_newest_takes_the_place_of_one_that_waits(server: _Server) -> None:
    pushing = callback(server, every=1)
    train(pushing, server, 5)
    # 1 was under way, 2 to 4 waited in turn, 5 is the end: the alias is its alone.
    assert server.got == [(1, ""), (5, "prod")]
    assert [(p.step, p.revision) for p in pushing.publications] == [(1, "r1"), (5, "r5")]


def test_a_server_that_goes_away_is_told_and_no_more(server: _Server) -> None:
    server.fails = True
    pushing = callback(server, every=1)
    train(pushing, server, 3)
    assert [(p.step, p.error) for p in pushing.publications] == [(1, "gone"), (3, "gone")]


def test_without_the_end_the_last_step_is_somebody_else_s(server: _Server) -> None:
    pushing = callback(server, every=1, at_end=False)
    train(pushing, server, 2)
    assert server.got == [(1, "")]


def test_a_copy_that_fails_is_told_and_training_goes_on(
    server: _Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: Any, name: str) -> AdapterSnapshot:
        raise KeyError("default")

    pushing = callback(server, every=1)
    train(pushing, server, 2)
    monkeypatch.setattr(push, "take", broken)
    server.go_on.set()
    pushing = callback(server, every=1)
    train(pushing, server, 2)
    assert [p.step for p in pushing.publications] == [1, 2]
    assert all("KeyError" in p.error for p in pushing.publications)


def test_what_cannot_be_is_refused() -> None:
    with refused(InvalidField, field="every"):
        PushCallback("127.0.0.1:1", "sql", every=-1)
    with refused(InvalidField, field="model"):
        push.peft_model(SimpleNamespace())


@pytest.mark.parametrize(
    ("server", "given", "policy"),
    [
        ("127.0.0.1:50051", None, "passive"),
        ("[::1]:50051", None, "passive"),
        ("https://localhost:50051", None, "passive"),
        ("localhost:50051", "active", "active"),
        ("gpu.example:50051", None, None),
    ],
)
def test_a_run_shares_its_cores_with_a_server_on_the_same_machine(
    server: str, given: str | None, policy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    niceness: list[int] = []
    monkeypatch.setattr(os, "setpriority", lambda which, who, value: niceness.append(value))
    share_cores(server)
    assert os.environ.get("OMP_WAIT_POLICY") == policy
    assert bool(niceness) == (server != "gpu.example:50051"), "people wait for streams"
    os.environ.pop("OMP_WAIT_POLICY", None)
