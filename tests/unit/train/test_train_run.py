"""Whole runs on a tiny base: what they write, and what they refuse."""

from __future__ import annotations

import json
import os
import stat
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from typer.testing import CliRunner
from veneer_registry.adapter import BaseSpec
from veneer_registry.bundle_files import TEMPLATE_LIMIT
from veneer_registry.errors import AdapterInvalid, BaseModelMismatch, InvalidField
from veneer_registry.fingerprint import fingerprint_base
from veneer_registry.format import read_adapter
from veneer_registry.strict_json import parse_object
from veneer_train import loop, push, trainer
from veneer_train.cli import app
from veneer_train.commands.common import Pulse
from veneer_train.config import OptimConfig, QuantConfig, TrainConfig, parse_config
from veneer_train.evaluate import Evaluation
from veneer_train.export import AdapterSnapshot
from veneer_train.model import load_base
from veneer_train.stability import TrainingStopped

from tests.refused import refused

Rows = list[dict[str, Any]]


def config(base: Path, jsonl: Path, folder: Path, **sections: dict[str, Any]) -> TrainConfig:
    raw: dict[str, dict[str, Any]] = {
        "model": {"path": str(base), "name": "tiny"},
        "lora": {"r": 4, "alpha": 8},
        "data": {"train": str(jsonl), "val_fraction": 0.25, "max_len": 256},
        "train": {"lr": 0.01, "batch": 4, "accum": 2, "steps": 4},
        "eval": {"every": 2},
        "output": {"dir": str(folder), "logs": f"{folder}.logs"},
    }
    for name, values in sections.items():
        raw[name] = raw.get(name, {}) | values
    return parse_config(raw)


def run(settings: TrainConfig, **kwargs: Any) -> Rows:
    rows: Rows = []
    loop.train(settings, lambda row: rows.append(dict(row)), **kwargs)
    return rows


def test_every_long_part_of_a_run_says_what_it_is(
    tiny_base: Path, chats: Path, tmp_path: Path
) -> None:
    told: list[tuple[str, int, int]] = []
    run(
        config(tiny_base, chats, tmp_path / "mine"),
        doing=lambda what, done=0, total=0: told.append((what, done, total)),
    )
    parts = list(dict.fromkeys(what for what, _, _ in told))
    assert parts == [
        "reading the data",
        "hashing the base",
        "loading the base",
        "measuring the base, samples",
        "measuring one step",
        "measuring the adapter, samples",
        "writing the adapter",
    ]
    samples = [row[1:] for row in told if row[0] == "measuring the base, samples"]
    assert samples[0] == (0, samples[0][1])
    assert samples == sorted(samples)


class _Clock:
    """A pulse's lines, and a way to wait for so many of them."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._more = threading.Condition()

    def __call__(self, line: str) -> None:
        with self._more:
            self.lines.append(line)
            self._more.notify()

    def wait_for(self, count: int) -> None:
        with self._more:
            assert self._more.wait_for(lambda: len(self.lines) >= count, timeout=60)


def test_a_pulse_says_what_goes_on_until_it_ends() -> None:
    shown = _Clock()
    with Pulse(shown, every_s=0.001) as pulse:
        pulse.doing("measuring the base, samples", 3, 9)
        shown.wait_for(2)
    assert shown.lines[0].startswith("measuring the base, samples: 3 of 9, ")
    count = len(shown.lines)
    assert not any(thread.name == "pulse" for thread in threading.enumerate())
    assert len(shown.lines) == count


@pytest.mark.parametrize(
    ("save_every", "step", "resume", "says"),
    [
        (0, None, "auto", "output.save_every is 0; the same command starts anew"),
        (2, None, "auto", "at step 2; the same command starts anew"),
        (2, 4, "auto", "checkpoint of step 4 is kept"),
        (2, 4, "never", "to resume from it, add --set output.resume=auto: the same command"),
    ],
)
def test_ctrl_c_says_what_is_kept_and_how_to_go_on(
    save_every: int,
    step: int | None,
    resume: str,
    says: str,
    tiny_base: Path,
    chats: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Interrupted while the base is measured, or after a step."""
    out = tmp_path / "mine"

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if step is None or kwargs.get("resume") is None:
            raise KeyboardInterrupt
        raise AssertionError

    if step is None:
        monkeypatch.setattr(loop, "evaluate", interrupted)
    else:
        monkeypatch.setattr(loop, "round_to_file_dtype", interrupted)
    flags = [
        f"data.train={chats}",
        "data.val_fraction=0.25",
        "train.steps=4",
        "lora.r=4",
        f"output.dir={out}",
        f"output.logs={out}.logs",
        f"output.save_every={save_every}",
        "train.batch=4",
        "data.max_len=256",
        "model.name=tiny",
        f"output.resume={resume}",
    ]
    command = ["train", "--base", str(tiny_base)]
    for flag in flags:
        command += ["--set", flag]
    stopped = CliRunner().invoke(app, command)
    assert stopped.exit_code == 130, stopped.output
    assert "stopped by Ctrl-C" in stopped.stderr
    assert says in stopped.stderr


def test_ctrl_c_while_it_publishes_says_that_the_adapter_is_written(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With FAKES in place of the run, which has ended, and of the push."""

    def interrupted(*args: Any, **more: Any) -> Any:
        raise KeyboardInterrupt

    out = tmp_path / "mine"
    ended: Any = SimpleNamespace(folder=out, dora=False, facts=SimpleNamespace(steps=4))
    monkeypatch.setattr(loop, "train", lambda *args, **more: ended)
    monkeypatch.setattr(push, "publish", interrupted)
    stopped = CliRunner().invoke(
        app,
        [
            "train",
            "--base",
            str(tiny_base),
            "--push",
            "server.example:1",
            "--name",
            "x",
            *("--set", "data.train=none.jsonl", "--set", f"output.dir={out}"),
        ],
    )
    assert stopped.exit_code == 130, stopped.output
    told = f"the adapter is in {out}; publish it: veneer adapter push {out} --name x"
    assert told in stopped.stderr
    assert "the same command" not in stopped.stderr


def test_a_run_writes_the_whole_folder(tiny_base: Path, chats: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapters" / "mine"
    rows = run(config(tiny_base, chats, out))
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert sorted(path.name for path in out.iterdir()) == [*names, "training_manifest.json"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o644}
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(".")] == []

    with safe_open(out / "adapter_model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    written = json.loads((out / "adapter_config.json").read_text())
    assert written["target_modules"] == sorted(written["target_modules"])
    assert written["base_model_name_or_path"] == "tiny"
    assert written["inference_mode"] is True

    lines = (Path(f"{out}.logs") / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows
    assert [(row["event"], row["step"]) for row in rows] == [
        ("eval", 0),
        ("step", 1),
        ("step", 2),
        ("eval", 2),
        ("step", 3),
        ("step", 4),
        ("eval", 4),
    ]
    assert all(row["grad_norm"] > 0 for row in rows if row["event"] == "step")
    losses = [row["val_loss"] for row in rows if row["event"] == "eval"]
    assert losses[0] > losses[1] > losses[2]


def test_the_manifest_tells_the_run_and_no_place(
    tiny_base: Path, chats: Path, tmp_path: Path
) -> None:
    out = tmp_path / "mine"
    rows = run(
        config(tiny_base, chats, out, output={"description": "Counts.", "license": "mit"})
    )
    manifest = json.loads((out / "training_manifest.json").read_text())
    base = fingerprint_base(tiny_base, quantization=None, cache_dir=None)
    found = manifest["base_fingerprint"]
    assert (found["weights"], found["tokenizer"]) == (base.weights, base.tokenizer)
    assert found["template"] == base.template != ""
    assert len(found["quantization"]) == 64
    assert manifest["data"]["train"]["samples"] == 9
    assert manifest["data"]["val"]["samples"] == 3
    assert manifest["steps"] == 4
    assert manifest["tokens"] == rows[-2]["tokens"] > 0
    metrics = manifest["metrics"]
    assert metrics["val_loss_before"] == pytest.approx(rows[0]["val_loss"], abs=1e-6)
    assert metrics["val_loss_after"] == pytest.approx(rows[-1]["val_loss"], abs=1e-6)
    card = (out / "README.md").read_text()
    assert "Counts." in card
    assert "license: mit" in card
    for text in (card, json.dumps(manifest), (out / "adapter_config.json").read_text()):
        assert str(tmp_path) not in text
        assert str(tiny_base) not in text


def spec(base: Path, **changed: Any) -> BaseSpec:
    facts: dict[str, Any] = {
        "name": "tiny",
        "num_layers": 2,
        "shapes": {
            "q_proj": (64, 64),
            "k_proj": (32, 64),
            "v_proj": (32, 64),
            "o_proj": (64, 64),
            "gate_proj": (128, 64),
            "up_proj": (128, 64),
            "down_proj": (64, 128),
        },
        "fingerprint": fingerprint_base(
            base,
            quantization={
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True,
            },
            cache_dir=None,
        ),
    }
    return BaseSpec(**(facts | changed))


def test_the_registry_takes_the_folder_and_knows_its_base(
    tiny_base: Path, chats: Path, tmp_path: Path
) -> None:
    out = tmp_path / "mine"
    run(
        config(tiny_base, chats, out, lora={"targets": ["q_proj", "down_proj"], "rslora": True})
    )
    manifest = read_adapter(out, spec(tiny_base))
    assert manifest.warnings == ()
    assert manifest.targets == ("q_proj", "down_proj")
    assert manifest.file_dtype == "BF16"
    assert {module.scaling for module in manifest.modules} == {8 / 4**0.5}
    assert float(manifest.training["metrics.val_loss_after"]) > 0
    (tmp_path / "other").mkdir()
    for path in tiny_base.iterdir():
        (tmp_path / "other" / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "other" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(BaseModelMismatch):
        read_adapter(out, spec(tmp_path / "other"))


def test_the_file_holds_what_was_measured(
    tiny_base: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT's own reading of the folder gives the trained model's logits, to the bit."""
    tokens = torch.arange(3, 40)[None]
    measured: list[torch.Tensor] = []

    def take(model: Any, base_name: str) -> AdapterSnapshot:
        with torch.no_grad():
            measured.append(model.eval()(input_ids=tokens).logits)
        return original(model, base_name)

    original = loop.take
    monkeypatch.setattr(loop, "take", take)
    run(config(tiny_base, chats, tmp_path / "mine"))
    base = load_base(tiny_base, QuantConfig(), torch.device("cpu"))
    model = PeftModel.from_pretrained(base, tmp_path / "mine").eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens).logits, measured[-1])
        with model.disable_adapter():
            assert torch.equal(model(input_ids=tokens).logits, measured[0]), "before training"


def test_same_seed_same_adapter(tiny_base: Path, chats: Path, tmp_path: Path) -> None:
    def weights(name: str, seed: int, checkpointing: str = "off") -> bytes:
        train = {"seed": seed, "checkpointing": checkpointing}
        run(config(tiny_base, chats, tmp_path / name, train=train))
        return (tmp_path / name / "adapter_model.safetensors").read_bytes()

    first = weights("a", 3)
    assert weights("b", 3) == first
    assert weights("c", 3, "on") == first  # recomputed activations are the same numbers
    assert weights("d", 4) != first


def test_an_evaluation_during_the_run_changes_nothing(
    tiny_base: Path, chats: Path, tmp_path: Path
) -> None:
    for name, every in (("often", 1), ("never", 0)):
        run(
            config(
                tiny_base,
                chats,
                tmp_path / name,
                eval={"every": every, "compare_base": bool(every)},
            )
        )
    files = [
        (tmp_path / name / "adapter_model.safetensors").read_bytes()
        for name in ("often", "never")
    ]
    assert files[0] == files[1]


def test_a_configured_template_is_used_and_shipped(
    tiny_base: Path, chats: Path, tmp_path: Path, tokenizer: Any
) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text(tokenizer.chat_template.replace("You help.", "You sing."))
    out = tmp_path / "mine"
    run(config(tiny_base, chats, out, data={"template": str(template)}))
    assert (out / "chat_template.jinja").read_text() == template.read_text()
    assert read_adapter(out, None).chat_template == template.read_text()


def test_a_run_that_goes_bad_stops_and_writes_nothing(
    tiny_base: Path, chats: Path, tmp_path: Path
) -> None:
    """A learning rate that overflows: the run ends with the step and a reason."""
    out = tmp_path / "mine"
    bad = config(tiny_base, chats, out, lora={"alpha": 4e4}, train={"lr": 0.9, "steps": 30})
    with refused(TrainingStopped) as caught:
        run(bad)
    assert int(caught.value.metadata["step"]) > 0
    assert not out.exists()
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_time_limit_ends_the_run_early_with_an_adapter(
    tiny_base: Path, chats: Path, tmp_path: Path
) -> None:
    out = tmp_path / "mine"
    run(config(tiny_base, chats, out, train={"steps": 500, "max_minutes": 1e-9}))
    assert json.loads((out / "training_manifest.json").read_text())["steps"] == 1


def test_an_output_that_exists_is_kept_unless_asked(
    tiny_base: Path, chats: Path, tmp_path: Path
) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "adapter_config.json").write_text("an older one")
    settings = config(tiny_base, chats, out, train={"steps": 1})
    with refused(InvalidField, field="output.dir", cause="exists"):
        run(settings)
    assert (out / "adapter_config.json").read_text() == "an older one"
    run(settings, overwrite=True)
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 4


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"model": {"path": "nowhere"}}, {"field": "model.path"}),
        (
            {"data": {"template": "none.jinja"}},
            {"field": "data.template", "cause": "unreadable"},
        ),
        ({"train": {"optim": "sgdd"}}, {"field": "train"}),
    ],
)
def test_refusals_come_before_training(
    tiny_base: Path,
    chats: Path,
    tmp_path: Path,
    sections: dict[str, Any],
    named: dict[str, str],
) -> None:
    with refused(InvalidField, **named):
        run(config(tiny_base, chats, tmp_path / "mine", **sections))
    assert not (tmp_path / "mine").exists()


@pytest.fixture
def config_file(chats: Path, tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {{path: not-here, name: tiny}}\nlora: {{r: 4}}\n"
        f"data: {{train: {chats}, val_fraction: 0.25, max_len: 256}}\n"
        f"train: {{steps: 1, batch: 2, accum: 1}}\noutput: {{dir: {tmp_path / 'mine'}}}\n"
    )
    return path


def test_the_command_trains(tiny_base: Path, config_file: Path, tmp_path: Path) -> None:
    arguments = [
        "train",
        str(config_file),
        "--base",
        str(tiny_base),
        "--set",
        "lora.r=2",
        "--json",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["folder"] == str(tmp_path / "mine")
    assert set(answer["metrics"]) >= {"val_loss_before", "val_loss_after"}
    assert json.loads((tmp_path / "mine" / "adapter_config.json").read_text())["r"] == 2
    assert "step 1: validation loss" in result.stderr


def test_errors_are_one_line(config_file: Path) -> None:
    result = CliRunner().invoke(app, ["train", str(config_file), "--set", "train.stepz=1"])
    assert result.exit_code == 1
    assert result.stderr == (
        "veneer-train: train.stepz: unknown key; did you mean 'train.steps'?\n"
    )
    shown = CliRunner().invoke(app, ["train", str(config_file), "--set", "x=1", "--debug"])
    assert isinstance(shown.exception, InvalidField)


@pytest.mark.parametrize(
    ("device", "optim", "recompute"),
    [("cpu", "adamw_torch_fused", False), ("cuda", "paged_adamw_8bit", True)],
)
def test_auto_is_settled_by_the_device(
    tmp_path: Path, device: str, optim: str, recompute: bool
) -> None:
    where = torch.device(device)
    automatic = trainer.training_arguments(OptimConfig(), tmp_path, where)
    assert automatic.optim == optim
    assert bool(automatic.gradient_checkpointing) is recompute
    chosen = OptimConfig(optim="sgd", checkpointing="off" if recompute else "on")
    settled = trainer.training_arguments(chosen, tmp_path, where)
    assert settled.optim == "sgd"
    assert bool(settled.gradient_checkpointing) is not recompute


@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "paged_adamw_32bit"])
def test_paged_optimizers_are_for_gpus(tmp_path: Path, optim: str) -> None:
    paged = OptimConfig(optim=optim)
    with refused(InvalidField, field="train.optim", optim=optim):
        trainer.training_arguments(paged, tmp_path, torch.device("cpu"))
    assert trainer.training_arguments(paged, tmp_path, torch.device("cuda")).optim == optim


def test_a_constant_schedule_warms_up(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    warm = trainer.training_arguments(OptimConfig(warmup=0.1, steps=50), tmp_path, cpu)
    assert (warm.lr_scheduler_type, warm.warmup_steps) == ("constant_with_warmup", 5)
    cold = trainer.training_arguments(OptimConfig(warmup=0), tmp_path, cpu)
    assert (cold.lr_scheduler_type, cold.warmup_steps) == ("constant", 0)


def test_a_template_that_no_server_takes_is_refused_before_training(
    tiny_base: Path, chats: Path, tmp_path: Path, tokenizer: Any
) -> None:
    template = tmp_path / "long.jinja"
    template.write_text(tokenizer.chat_template + "{# " + "x" * (1 << 17) + " #}")
    data = {"template": str(template)}
    with refused(InvalidField, field="data.template", limit=TEMPLATE_LIMIT):
        run(config(tiny_base, chats, tmp_path / "mine", data=data))
    assert not (tmp_path / "mine.logs").exists()


def test_what_a_server_would_refuse_whatever_is_learned_is_refused_before_training(
    tiny_base: Path, chats: Path, tmp_path: Path
) -> None:
    """Here a model card that no bundle may have: the folder is written once beforehand."""
    settings = config(
        tiny_base, chats, tmp_path / "mine", output={"description": "x" * (1 << 21)}
    )
    rows: Rows = []
    with refused(AdapterInvalid, file="README.md"):
        loop.train(settings, lambda row: rows.append(dict(row)))
    assert rows == []
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_no_value_in_the_manifest_loses_a_run(
    tiny_base: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A data file whose name is not UTF-8, by way of Python, and infinite figures."""
    oddly_named = chats.with_name(os.fsdecode(b"caf\xe9.jsonl"))
    chats.rename(oddly_named)
    settings = config(tiny_base, Path("data.jsonl"), tmp_path / "mine", train={"steps": 1})
    settings = replace(settings, data=replace(settings.data, train=str(oddly_named)))
    monkeypatch.setattr(loop, "evaluate", lambda *_, **__: Evaluation(float("-inf"), 0.5, 1))
    run(settings)
    written = (tmp_path / "mine" / "training_manifest.json").read_bytes()
    facts = parse_object(written, file="training_manifest.json")
    assert facts["data"]["train"]["file"] == "caf?.jsonl"
    assert "val_loss_after" not in facts["metrics"]
    assert facts["metrics"]["val_accuracy_after"] == 0.5
    read_adapter(tmp_path / "mine", None)


def test_a_folder_that_the_server_would_refuse_does_not_appear(
    tiny_base: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: Any, base_name: str) -> AdapterSnapshot:
        taken = original(model, base_name)
        tensors = {key: torch.full_like(t, float("nan")) for key, t in taken.tensors.items()}
        return AdapterSnapshot(tensors, taken.config)

    original = loop.take
    monkeypatch.setattr(loop, "take", broken)
    with refused(AdapterInvalid, file="adapter_model.safetensors"):
        run(config(tiny_base, chats, tmp_path / "mine", train={"steps": 1}))
    assert not (tmp_path / "mine").exists()
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []
