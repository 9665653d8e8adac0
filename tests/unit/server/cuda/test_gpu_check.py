"""`make gpu-check` without a card: its logic, over FAKE commands that write real kinds of
files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import typer
from veneer_loadtest.cli import cli
from veneer_loadtest.load.summary import parse_seconds
from veneer_server.models.loader import load_weights
from veneer_train.cli import app

from tests.gpu.cards import CARDS, card_of
from tests.gpu.check import __main__ as program
from tests.gpu.check.random_base import write
from tests.gpu.check.result import GpuCheck, schema_text
from tests.gpu.check.runs import Failed
from tests.gpu.check.steps import LLAMA_7B, Model, Step, seconds
from tests.places import REPOSITORY
from tests.unit.loadtest import results_kit as kit

RIGHT = {
    "why": "",
    "wrong": {},
    "checked": ["norm", "nf4"],
    "seconds": 1.25,
    "name": "NVIDIA H100 80GB HBM3",
    "capability": "9.0",
    "torch": "2.11",
    "cuda": "13.0",
    "triton": "3.6",
}
SIZES = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}


class Commands:
    """FAKE: parses commands as the real programs do, and writes what they would.

    Args:
        fails: the command that ends with an error.
        before: loss before training.
    """

    def __init__(self, fails: str = "", before: float = 1.5) -> None:
        self.ran: list[str] = []
        self.before = before
        self._fails = fails
        self._programs: Any = {
            name: typer.main.get_command(each)
            for name, each in (("veneer_loadtest", cli), ("veneer_train", app))
        }

    def __call__(self, command: Sequence[str], file: Path) -> None:
        module, name, *arguments = command
        made = self._programs[module].commands[name]
        given = made.make_context(name, list(arguments)).params  # exits if a flag is unknown
        if name == "run":
            assert parse_seconds("", given["duration"]) > parse_seconds("", given["warmup"])
        self.ran.append(name)
        if name == self._fails:
            raise Failed("status 1: out of memory")
        file.parent.mkdir(exist_ok=True)
        if name == "lab":
            columns = '"method","base loss","val loss","tokens/s","peak, MB","planned, MB"\n'
            file.write_text(columns + f"{given['methods']},{self.before},0.5,900,700,690\n")
            return
        result: Any = kit.swap() if name == "swap" else kit.compare()
        if name == "run":
            speeds = {0: 1000.0, 8: 900.0}
            result = kit.run(
                # The base counts as one adapter.
                *(kit.level(count or 1, tokens_per_s=each) for count, each in speeds.items())
            )
        file.write_bytes(msgspec.json.encode(result))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "a-7b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SIZES))
    return folder


def _run(base: Path, commands: Commands, kernels: dict[str, Any]) -> tuple[int, GpuCheck]:
    file = base.parent / "result.json"
    flags = ["--json", file, "--base", base, "--streams", "1,8", "--adapters", "8"]
    status = program.main(list(map(str, flags)), kernels=lambda: kernels, runner=commands)
    return status, msgspec.json.decode(file.read_bytes(), type=GpuCheck, strict=True)


def test_answers_come_before_speed_and_all_is_in_the_file(base: Path) -> None:
    commands = Commands()
    status, found = _run(base, commands, RIGHT)
    assert (status, found.failed) == (0, {})
    assert commands.ran == ["compare", "run", "run", "swap", "lab", "lab"]
    assert found.answers == {"8": 0.07}
    assert [(s.streams, s.adapters) for s in found.serving] == [(1, 0), (1, 8), (8, 0), (8, 8)]
    alone, mixed = found.serving[2:]
    assert alone.ratio_to_base is alone.ratio_to_peft is None
    assert mixed.ratio_to_base == pytest.approx(0.9)
    assert mixed.ratio_to_peft == pytest.approx(900 / 40)
    # By hand: 125 steps a second that read 3.938 GB; 112.5 that read 4.578 with 8 adapters.
    assert alone.bandwidth_share == pytest.approx(0.1470, abs=1e-3)
    assert mixed.bandwidth_share == pytest.approx(0.1537, abs=1e-3)
    assert found.swap["disk_delta_ms"] == 40
    assert [t.method for t in found.training] == ["qlora", "lora"]
    assert (found.card, found.base) == (RIGHT["name"], "a-7b")


def test_wrong_kernels_are_not_served_with(base: Path) -> None:
    commands = Commands()
    wrong = {
        **RIGHT,
        "why": "nf4: 3 numbers are wrong",
        "wrong": {"nf4": "3 numbers are wrong"},
    }
    status, found = _run(base, commands, wrong)
    assert status == 1
    assert commands.ran == ["lab", "lab"]
    assert found.failed == {"kernels": "nf4: 3 numbers are wrong"}
    assert found.kernels.wrong == {"nf4": "3 numbers are wrong"}


def test_speed_is_not_measured_where_no_answers_were_right(base: Path) -> None:
    commands = Commands(fails="compare")
    status, found = _run(base, commands, RIGHT)
    assert (status, commands.ran) == (1, ["compare", "lab", "lab"])
    assert found.failed == {"answers of 8 adapters": "status 1: out of memory"}


def test_what_fails_does_not_end_the_rest(base: Path, capsys: Any) -> None:
    status, found = _run(base, Commands(fails="swap"), RIGHT)
    assert status == 1
    assert list(found.failed) == ["swaps"]
    assert len(found.serving) == 4
    assert "FAILED swaps: status 1: out of memory" in capsys.readouterr().out


def test_a_loss_that_does_not_fall_is_told(base: Path) -> None:
    status, found = _run(base, Commands(before=0.5), RIGHT)
    why = "the loss goes from 0.500 to 0.500"
    assert (status, found.failed) == (
        1,
        {"training by qlora": why, "training by lora": why},
    )
    assert [t.method for t in found.training] == ["qlora", "lora"]


def test_without_a_card_it_says_so(tmp_path: Path, capsys: Any) -> None:
    commands = Commands()
    file = tmp_path / "result.json"
    none = {"torch": "2.13.0+cpu", "cuda": "", "why": "torch finds no CUDA device"}
    status = program.main(["--json", str(file)], kernels=lambda: none, runner=commands)
    assert status == program.NO_CARD
    told = capsys.readouterr().out
    assert told == "nothing was checked or measured: torch finds no CUDA device\n"
    assert not file.exists()
    assert not commands.ran


def test_the_schema_is_that_of_the_file() -> None:
    """`make schema` writes it."""
    published = (REPOSITORY / "docs" / "gpu-check.schema.json").read_text("utf-8")
    assert published == schema_text()


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-SXM4-40GB", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", None),
    ],
)
def test_cards_by_name(name: str, known: str | None) -> None:
    assert card_of(name) == (CARDS[known] if known else None)


def test_paper_figures_of_a_7b_step() -> None:
    """By hand: 6.476e9 weights of linears in 4.127 bits are 3.341 GB, the head 0.262 GB, a
    token's K and V 0.524 MB; an adapter of rank 16 has 39.98e6 numbers."""
    assert LLAMA_7B.linear_weights == 6_476_005_376
    assert LLAMA_7B.lora_weights(16) == 39_976_960
    by_hand = (3.341e9 + 0.262e9 + 1024 * 524_288) / 3350e9
    h100 = CARDS["H100"]
    assert seconds(LLAMA_7B, Step(1, 1, 1024), "nf4", h100) == pytest.approx(by_hand, rel=1e-3)
    mixed = seconds(LLAMA_7B, Step(8, 8, 1024, 8), "nf4", h100)
    more = mixed - seconds(LLAMA_7B, Step(8, 8, 1024), "nf4", h100)
    assert more == pytest.approx(8 * 2 * 39_976_960 / 3350e9, rel=1e-3)
    # A prompt computes: 2 operations a weight and row.
    prompt = seconds(LLAMA_7B, Step(2048, 2, 1024), "bf16", h100)
    assert prompt > 2 * 2048 * 6.476e9 / 989e12


def test_a_base_of_random_weights_is_one_that_is_served(tmp_path: Path) -> None:
    model = Model(layers=2, hidden=64, inner=128, heads=4, kv_heads=2, head=16, vocab=320)
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    vocabulary = json.dumps({"model": {"vocab": {"a": 0, "b": 319}}})
    (tokenizer / "tokenizer.json").write_text(vocabulary)
    # A smaller vocabulary than the tokenizer's would be indexed beyond its end.
    write(replace(model, vocab=32), tmp_path / "base", tokenizer)
    assert program.model_of(tmp_path / "base") == model
    assert (tmp_path / "base" / "tokenizer.json").read_text() == vocabulary
    made = load_weights(
        tmp_path / "base", quantization="none", dtype=torch.bfloat16, device=torch.device("cpu")
    )
    assert made.config.shapes["k_proj"] == (32, 64)
    assert made.parameters == model.linear_weights + 2 * 320 * 64 + (2 * 2 + 1) * 64
