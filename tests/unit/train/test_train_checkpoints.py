"""Interrupted runs resume with the same result; incomplete checkpoints are never used."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback
from veneer_registry.errors import DiskFull, InvalidField
from veneer_train import loop
from veneer_train.checkpoint import RECORD, CheckpointFailed, disk_errors

from tests.refused import refused
from tests.unit.train.test_train_run import config, run

STEPS, CUT = 10, 8
"""Of 9 samples in batches of 2: the run is cut in its second epoch."""


class _Cut(TrainerCallback):
    """Ends the process's run in the middle, as a crash would."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == CUT:
            raise KeyboardInterrupt


def settings(base: Path, chats: Path, out: Path, **sections: dict[str, Any]) -> Any:
    """Dropout, so that the state of random numbers counts; more than one epoch."""
    chosen: dict[str, dict[str, Any]] = {
        "lora": {"r": 4, "alpha": 8, "dropout": 0.1},
        "train": {"lr": 0.01, "batch": 2, "accum": 1, "steps": STEPS, "schedule": "cosine"},
        "output": {"dir": str(out), "logs": f"{out}.logs", "save_every": 2},
    }
    for name, values in sections.items():
        chosen[name] = chosen.get(name, {}) | values
    return config(base, chats, out, **chosen)


def cut(chosen: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        loop.train(chosen, lambda row: None, callbacks=lambda snapshots: (_Cut(),))


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter_model.safetensors")


@pytest.mark.parametrize(("bucketing", "accum"), [(False, 1), (True, 1), (False, 2)])
def test_a_resumed_run_is_the_uninterrupted_one(
    tiny_base: Path, chats: Path, tmp_path: Path, bucketing: bool, accum: int
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    data: dict[str, Any] = {"data": {"bucketing": bucketing}, "train": {"accum": accum}}
    expected = run(settings(tiny_base, chats, whole, **data))
    cut(settings(tiny_base, chats, parts, **data))
    rows = run(settings(tiny_base, chats, parts, **data))

    assert rows[0] == {"event": "resumed", "step": 6, "folder": "checkpoint-6"}
    a, b = weights(whole), weights(parts)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name
    losses = [row["loss"] for row in expected if row["event"] == "step"][6:]
    again = [row["loss"] for row in rows if row["event"] == "step"]
    assert again == pytest.approx(losses, abs=1e-5)

    log = [
        json.loads(line)
        for line in (Path(f"{parts}.logs") / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in log if row["event"] == "step"] == list(range(1, STEPS + 1))
    assert [row["event"] for row in log if row["step"] == 0] == ["eval"]  # not measured twice
    manifest = json.loads((parts / "training_manifest.json").read_text())
    reference = json.loads((whole / "training_manifest.json").read_text())
    assert manifest["steps"] == reference["steps"] == STEPS
    assert manifest["tokens"] == reference["tokens"]
    assert manifest["metrics"]["val_loss_before"] == reference["metrics"]["val_loss_before"]


def test_what_is_torn_does_not_count(tiny_base: Path, chats: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    chosen = settings(tiny_base, chats, out)
    cut(chosen)
    folder = chosen.output.checkpoints_dir
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-4", "checkpoint-6"]
    file = folder / "checkpoint-6" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert run(chosen)[0]["step"] == 4
    assert not folder.exists()  # a run that has ended needs none


def test_only_the_newest_are_kept(tiny_base: Path, chats: Path, tmp_path: Path) -> None:
    chosen = settings(tiny_base, chats, tmp_path / "mine", output={"keep": 1})
    cut(chosen)
    (left,) = chosen.output.checkpoints_dir.iterdir()
    assert left.name == "checkpoint-6"
    assert (left / RECORD).is_file()


def test_a_resumed_run_saves_as_often_as_it_is_told_now(
    tiny_base: Path, chats: Path, tmp_path: Path
) -> None:
    out = tmp_path / "mine"
    cut(settings(tiny_base, chats, out))  # each two steps: 4 and 6 are there
    often = settings(tiny_base, chats, out, output={"save_every": 1})
    cut(often)
    left = {path.name for path in often.output.checkpoints_dir.iterdir()}
    assert left == {"checkpoint-6", "checkpoint-7"}


@pytest.mark.parametrize(
    ("section", "key", "value", "field"),
    [("lora", "alpha", 9.0, "lora.alpha"), ("train", "lr", 0.02, "train.lr")],
)
def test_a_run_does_not_go_on_as_another(
    tiny_base: Path,
    chats: Path,
    tmp_path: Path,
    section: str,
    key: str,
    value: float,
    field: str,
) -> None:
    out = tmp_path / "mine"
    cut(settings(tiny_base, chats, out))
    other = settings(tiny_base, chats, out, **{section: {key: value}})
    with refused(InvalidField, field=field, cause="another_run"):
        run(other)
    rows = run(other, overwrite=True)
    assert rows[0]["event"] == "eval"  # anew


def test_changed_data_is_another_run(tiny_base: Path, chats: Path, tmp_path: Path) -> None:
    chosen = settings(tiny_base, chats, tmp_path / "mine")
    cut(chosen)
    chats.write_text(chats.read_text().replace("Say 3", "Tell 3"))
    with refused(InvalidField, field="data.sha256.train"):
        run(chosen)


def test_resume_can_be_demanded_or_forbidden(
    tiny_base: Path, chats: Path, tmp_path: Path
) -> None:
    out = tmp_path / "mine"
    with refused(InvalidField, field="output.resume"):
        run(settings(tiny_base, chats, out, output={"resume": "must"}))
    cut(settings(tiny_base, chats, out))
    rows = run(settings(tiny_base, chats, out, output={"resume": "never"}))
    assert rows[0]["event"] == "eval"


def test_a_run_that_only_lacks_its_folder_trains_no_more(
    tiny_base: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk was full at the very end."""
    out = tmp_path / "mine"
    chosen = settings(tiny_base, chats, out)

    write_folder = loop.write_folder

    def full(folder: Path, *args: Any, **kwargs: Any) -> None:
        if folder == out:  # not before training, when it is tried elsewhere
            raise OSError(errno.ENOSPC, "No space left on device")
        write_folder(folder, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "write_folder", full)
        with refused(DiskFull):
            run(chosen)
    assert not out.exists()
    rows = run(chosen)
    assert [row["event"] for row in rows] == ["resumed", "eval"]
    assert (out / "adapter_model.safetensors").is_file()


def test_a_full_disk_costs_no_checkpoint_that_was_whole(
    tiny_base: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings(tiny_base, chats, tmp_path / "mine")
    # private: transformers writes this after the weights, and nothing public between them
    save = Trainer._save_optimizer_and_scheduler

    def once(self: Any, folder: str) -> None:
        if self.state.global_step > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, folder)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_optimizer_and_scheduler", once)  # private: as above
        with refused(DiskFull):
            run(chosen)
    assert [p.name for p in chosen.output.checkpoints_dir.iterdir()] == ["checkpoint-2"]
    assert run(chosen)[0]["step"] == 2


@contextmanager
def _small_files(limit: int) -> Iterator[None]:
    """No file may grow past ``limit`` bytes: what a quota does, really."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_what_libraries_say_of_a_file_they_cannot_write_is_one_error(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    large = {"x": torch.zeros(1 << 18)}
    with _small_files(1 << 16):
        with (
            refused(CheckpointFailed, what="it"),
            disk_errors("it", "help"),
        ):
            torch.save(large, tmp_path / "a")
        with refused(CheckpointFailed, what="it"), disk_errors("it", "help"):
            save_file(large, tmp_path / "b")
    with pytest.raises(DiskFull), disk_errors("it", "help"):
        raise RuntimeError("PytorchStreamWriter failed: No space left on device")


_VICTIM = """
import sys, time
from transformers import Trainer
from veneer_train import loop
from tests.unit.train.test_train_checkpoints import settings
from pathlib import Path
base, chats, out = map(Path, sys.argv[1:])
save = Trainer._save_rng_state
def slow(self, folder):
    if self.state.global_step == 4:
        print("saving", flush=True)
        time.sleep(600)
    save(self, folder)
Trainer._save_rng_state = slow
loop.train(settings(base, chats, out), lambda row: None)
"""


def test_kill_in_the_middle_of_a_save(tiny_base: Path, chats: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    command = [sys.executable, "-c", _VICTIM, str(tiny_base), str(chats), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment
    ) as victim:
        assert victim.stdout is not None
        assert victim.stdout.readline().strip() == "saving"
        victim.send_signal(signal.SIGKILL)
    chosen = settings(tiny_base, chats, out)
    torn = chosen.output.checkpoints_dir / "checkpoint-4"
    assert (torn / "adapter_model.safetensors").is_file()  # it had begun
    rows = run(chosen)
    assert (rows[0]["event"], rows[0]["step"]) == ("resumed", 2)
    assert (out / "adapter_model.safetensors").is_file()


def test_what_lies_at_the_folder_is_not_replaced_unless_it_is_an_adapter(
    tiny_base: Path, chats: Path, tmp_path: Path
) -> None:
    """Not even with --overwrite: a mistyped folder must not cost what is in it."""
    mine = tmp_path / "adapters"
    (mine / "one").mkdir(parents=True)
    (mine / "one" / "adapter_config.json").write_text("{}")
    with refused(InvalidField, field="output.dir", cause="no_adapter"):
        run(settings(tiny_base, chats, mine), overwrite=True)
    assert (mine / "one" / "adapter_config.json").is_file()
    link = tmp_path / "link"
    link.symlink_to(mine)
    with refused(InvalidField, field="output.dir", cause="no_folder"):
        run(settings(tiny_base, chats, link), overwrite=True)


def test_a_cut_run_that_replaces_a_folder_goes_on_too(
    tiny_base: Path, chats: Path, tmp_path: Path
) -> None:
    out = tmp_path / "mine"
    run(settings(tiny_base, chats, out, lora={"r": 2}))
    chosen = settings(tiny_base, chats, out)
    with pytest.raises(KeyboardInterrupt):
        loop.train(
            chosen, lambda row: None, overwrite=True, callbacks=lambda snapshots: (_Cut(),)
        )
    assert run(chosen, overwrite=True)[0]["step"] == 6
