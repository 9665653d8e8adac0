"""Processes that check uploads: they find what `read_adapter` finds, and what happens when they
end."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file
from veneer_registry.adapter import BaseFingerprint, BaseSpec
from veneer_registry.errors import (
    AdapterInvalid,
    BaseModelMismatch,
    DiskFailed,
    InternalError,
)
from veneer_registry.format import read_adapter
from veneer_registry.weights import WEIGHTS_FILE
from veneer_server.adapters.checkers import Checkers

from tests.adapter_files import write_safetensors
from tests.child_module import run_in_turn, run_instead
from tests.refused import refused
from tests.unit.server.rpc.front_harness import HIDDEN, make_adapter

BASE = BaseSpec(
    name="tiny",
    num_layers=2,
    shapes={"q_proj": (HIDDEN, HIDDEN)},
    fingerprint=BaseFingerprint("a" * 64, "b" * 64),
    names=("hub/tiny",),
)


@pytest.fixture
def checkers() -> Iterator[Checkers]:
    made = Checkers()
    yield made
    made.close()


def test_it_finds_what_a_check_in_this_process_finds(
    checkers: Checkers, tmp_path: Path
) -> None:
    for seed in range(3):
        folder = make_adapter(tmp_path / str(seed), seed=seed, template="{{ messages }}")
        assert checkers.read(folder, BASE) == read_adapter(folder, BASE)
        assert checkers.read(folder, None) == read_adapter(folder, None)
    assert len(checkers.pids) == 1, "one process checks one after the other"


def test_a_refusal_is_the_same_error(checkers: Checkers, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a")
    (folder / "adapter_config.json").write_text('{"r": "many"}')
    with pytest.raises(AdapterInvalid) as here:
        read_adapter(folder, BASE)
    with pytest.raises(AdapterInvalid) as there:
        checkers.read(folder, BASE)
    assert there.value.message == here.value.message
    assert there.value.metadata == here.value.metadata


def test_another_base_is_refused(checkers: Checkers, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a")
    (folder / "veneer_manifest.json").unlink(missing_ok=True)
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace("{", '{"base_model_name_or_path": "x/y",', 1))
    with pytest.raises(BaseModelMismatch):
        read_adapter(folder, BASE)
    with pytest.raises(BaseModelMismatch):
        checkers.read(folder, BASE)


def test_embeddings_are_compared_and_left_out_in_that_process(
    checkers: Checkers, tmp_path: Path
) -> None:
    own = np.arange(40 * HIDDEN, dtype=np.float32).reshape(40, HIDDEN)
    (tmp_path / "base").mkdir()
    write_safetensors(tmp_path / "base/model.safetensors", {"model.embed_tokens.weight": own})
    base = replace(BASE, folder=str(tmp_path / "base"))
    plain = make_adapter(tmp_path / "plain")
    name = "base_model.model.lm_head.weight"
    for changed in (False, True):
        folder = make_adapter(tmp_path / "a")
        tensors = load_file(folder / WEIGHTS_FILE) | {name: own + 1 if changed else own}
        write_safetensors(folder / WEIGHTS_FILE, tensors)
        if changed:
            with refused(AdapterInvalid, tensor=name):
                checkers.read(folder, base)
            continue
        found = checkers.read(folder, base)
        assert found.weights_digest == read_adapter(plain, base).weights_digest
        assert load_file(folder / WEIGHTS_FILE).keys() == tensors.keys() - {name}


def test_a_file_that_cannot_be_read_is_an_error_without_its_folder(
    checkers: Checkers, tmp_path: Path
) -> None:
    folder = make_adapter(tmp_path / "a")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterInvalid) as caught:
        checkers.read(folder, BASE)
    assert str(tmp_path) not in caught.value.message


def test_many_at_once_have_processes_of_their_own_and_one_stays(
    checkers: Checkers, tmp_path: Path
) -> None:
    folders = [make_adapter(tmp_path / str(seed), seed=seed) for seed in range(6)]
    together = threading.Barrier(len(folders))

    def check(folder: Path) -> str:
        together.wait()
        return checkers.read(folder, BASE).weights_digest

    with ThreadPoolExecutor(len(folders)) as threads:
        found = list(threads.map(check, folders))
    assert found == [read_adapter(folder, BASE).weights_digest for folder in folders]
    assert len(checkers.pids) == 1
    ours = {child.pid for child in psutil.Process().children()}
    assert len(ours & set(checkers.pids)) == 1


def test_a_process_that_ended_is_replaced(checkers: Checkers, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a")
    checkers.read(folder, BASE)
    (before,) = checkers.pids
    os.kill(before, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(before)])
    assert checkers.read(folder, BASE) == read_adapter(folder, BASE)
    assert checkers.pids != (before,)


def test_a_process_that_ends_each_time_is_an_error_and_no_more(
    checkers: Checkers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_adapter(tmp_path / "a")
    with monkeypatch.context() as patch:
        run_instead(patch, "this")  # prints a poem and leaves
        with refused(InternalError, tries="2"):
            checkers.read(folder, BASE)
    assert checkers.pids == ()
    assert checkers.read(folder, BASE) == read_adapter(folder, BASE), "the next one is checked"


def test_a_process_that_takes_too_long_each_time_may_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sleeps_for_ever.py").write_text("import signal\nsignal.pause()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run_instead(monkeypatch, "sleeps_for_ever")
    checkers = Checkers(limit_s=0.2)
    with refused(DiskFailed, tries="2") as caught:
        checkers.read(make_adapter(tmp_path / "a"), BASE)
    assert caught.value.retry_after_s
    assert checkers.pids == ()


@pytest.mark.parametrize("first", ["sleeps", "ends"])
def test_each_try_is_told_as_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    """One takes too long and one ends by itself: an operator looks for different causes."""
    run_in_turn(tmp_path, monkeypatch, first)
    checkers = Checkers(limit_s=2.0)
    wanted = InternalError if first == "sleeps" else DiskFailed
    with refused(wanted, tries="2") as caught:
        checkers.read(make_adapter(tmp_path / "a"), BASE)
    ends = ["killed after 2 s", "status 3"]
    assert ", then ".join(ends if first == "sleeps" else ends[::-1]) in caught.value.message
    assert checkers.pids == ()


def test_none_is_left_after_the_end(tmp_path: Path) -> None:
    checkers = Checkers()
    checkers.read(make_adapter(tmp_path / "a"), BASE)
    (pid,) = checkers.pids
    checkers.close()
    assert not psutil.pid_exists(pid)
    checkers.read(make_adapter(tmp_path / "b"), BASE)
    assert checkers.pids == ()
