"""Checkpoints published during training, by our loop and by other trainers."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from typer.testing import CliRunner
from veneer_client import AsyncClient, Client, Text
from veneer_registry.errors import BaseModelMismatch, ServerUnreachable
from veneer_train.cli import app
from veneer_train.model import load_tokenizer
from veneer_train.push import PushCallback, PushOutcome

from tests.ports import free_port
from tests.refused import refused
from tests.server_harness import Server

pytestmark = [
    pytest.mark.verify,
    pytest.mark.real_base,
    pytest.mark.asyncio(loop_scope="session"),
]

ROWS = [
    {"prompt": f"{n} plus {n} is", "completion": f" {2 * n}, of course."} for n in range(12)
]


@pytest.fixture(autouse=True)
def _no_low_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run shares the process of the tests here."""
    monkeypatch.setattr("veneer_train.commands.train.share_cores", lambda server: None)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def command(server: str, base: Path, data: Path, out: Path, *more: str) -> list[str]:
    return [
        "train",
        "--preset",
        "quick",
        "--base",
        str(base),
        "--push",
        server,
        *("--set", f"data.train={data}", "--set", f"output.dir={out}"),
        *("--set", "train.steps=6", "--set", "train.batch=2", "--set", "lora.r=4"),
        *("--set", "output.save_every=0", "--set", "eval.compare_base=false"),
        *more,
    ]


async def _follow(server: Server, stop: asyncio.Event, seen: list[str]) -> None:
    """Asks the newest revision again and again; every answer says which it was."""
    async with AsyncClient(server.address) as client:
        while not stop.is_set():
            answer = await client.generate(
                Text("3 plus 3 is"), adapter="growing", max_tokens=4, temperature=0
            )
            seen.append(answer.provenance.revision)


async def _appears(client: AsyncClient, name: str) -> None:
    async for event in client.watch():
        if event.adapter is not None and event.adapter.name == name:
            return


async def test_checkpoints_serve_while_training_goes_on(
    server: Server, base_folder: Path, data: Path, tmp_path: Path
) -> None:
    asked = command(server.address, base_folder, data, tmp_path / "mine")
    asked += ["--name", "growing", "--alias", "prod", "--push-every", "2", "--json"]
    async with AsyncClient(server.address) as client:
        stop, seen = asyncio.Event(), list[str]()
        running = asyncio.create_task(asyncio.to_thread(CliRunner().invoke, app, asked))
        appearing = asyncio.create_task(_appears(client, "growing"))
        await asyncio.wait((running, appearing), return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            pytest.fail(f"nothing was published: {running.result().output}")
        following = asyncio.create_task(_follow(server, stop, seen))
        done = await running
        stop.set()
        await following
        assert done.exit_code == 0, done.output
        result = json.loads(done.stdout)
        details = await client.get("growing")
        steps = [r.labels["step"] for r in details.revisions]
        assert sorted(steps) == ["2", "4", "6"]
        assert details.adapter.revision == result["revision"]
        assert (await client.get("growing/prod")).adapter.revision == result["revision"]
        published = {r.revision[:12] for r in details.revisions}
        assert seen
        assert {revision[:12] for revision in seen} <= published
        await client.set_alias("growing/prod", remove=True)
        await client.delete("growing")


def _trainer(base: Path, folder: Path, callback: PushCallback) -> Trainer:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    samples: list[dict[str, Any]] = [
        {"input_ids": [n, 5, 6, 7], "labels": [n, 5, 6, 7]} for n in range(10, 18)
    ]
    return Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=3,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
        ),
        train_dataset=samples,
        callbacks=[callback],
    )


async def test_any_trainer_can_publish(
    server: Server, base_folder: Path, tmp_path: Path
) -> None:
    told: list[PushOutcome] = []
    callback = PushCallback(
        server.address,
        "foreign",
        every=2,
        alias="prod",
        base=base_folder,
        base_name="smollm2-135m",
        on_publication=told.append,
    )
    trainer = _trainer(base_folder, tmp_path, callback)
    await asyncio.to_thread(trainer.train)
    assert [(p.step, p.error) for p in told] == [(2, ""), (3, "")]
    async with AsyncClient(server.address) as client:
        details = await client.get("foreign/prod")
        assert details.adapter.revision == told[-1].revision
        assert details.adapter.labels["step"] == "3"
        await client.set_alias("foreign/prod", remove=True)
        await client.delete("foreign")


async def test_trl_s_trainer_can_publish(
    server: Server, base_folder: Path, tmp_path: Path
) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    told: list[PushOutcome] = []
    turns = [
        [
            {"role": "user", "content": f"Say {n}."},
            {"role": "assistant", "content": f"I say {n}."},
        ]
        for n in range(8)
    ]
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base_folder),
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            max_length=64,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
        ),
        train_dataset=Dataset.from_list([{"messages": t} for t in turns]),
        processing_class=load_tokenizer(base_folder),
        peft_config=LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        callbacks=[
            PushCallback(
                server.address, "by-trl", every=1, base=base_folder, on_publication=told.append
            )
        ],
    )
    await asyncio.to_thread(trainer.train)
    assert [(p.step, p.error) for p in told] == [(1, ""), (2, "")]
    async with AsyncClient(server.address) as client:
        answer = await client.generate(Text("Say 3."), adapter="by-trl", max_tokens=2)
        assert answer.provenance.revision == told[-1].revision
        await client.delete("by-trl")


def _other_base(base: Path, other: Path) -> Path:
    """The base with one token named otherwise."""
    other.mkdir()
    for file in base.iterdir():
        (other / file.name).symlink_to(file)
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["added_tokens"][-1]["content"] += "x"
    (other / "tokenizer.json").unlink()
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    return other


async def test_a_server_of_another_base_is_refused_before_training(
    server: Server, base_folder: Path, data: Path, tmp_path: Path
) -> None:
    """The control is the test above: with the right base it trains."""
    other = _other_base(base_folder, tmp_path / "base")
    callback = PushCallback(server.address, "foreign", base=other, base_name="other")
    trainer = _trainer(base_folder, tmp_path, callback)
    with refused(BaseModelMismatch) as caught:
        await asyncio.to_thread(trainer.train)
    assert "base_tokenizer" in caught.value.metadata, "which part differs"
    assert trainer.state.global_step == 0


async def test_the_command_asks_before_it_loads_anything(
    server: Server, base_folder: Path, data: Path, tmp_path: Path
) -> None:
    other = _other_base(base_folder, tmp_path / "base")
    for base, address, told in (
        (other, server.address, "a base other than"),
        (base_folder, f"127.0.0.1:{free_port()}", "no Veneer server answers"),
    ):
        asked = [*command(address, base, data, tmp_path / "mine"), "--name", "foreign"]
        done = await asyncio.to_thread(CliRunner().invoke, app, asked)
        assert done.exit_code == 1
        assert told in done.stderr
    assert not (tmp_path / "mine.logs").exists()


async def test_nobody_there_is_known_before_training(base_folder: Path, tmp_path: Path) -> None:
    callback = PushCallback(f"127.0.0.1:{free_port()}", "foreign", base=base_folder)
    trainer = _trainer(base_folder, tmp_path, callback)
    with pytest.raises(ServerUnreachable):
        await asyncio.to_thread(trainer.train)
    assert trainer.state.global_step == 0


async def test_a_publication_that_fails_costs_the_run_nothing(
    server: Server, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[PushOutcome] = []

    def broken(*args: Any, **kwargs: Any) -> None:
        raise OSError("no folder today")

    callback = PushCallback(
        server.address, "foreign", every=2, on_publication=told.append, write=broken
    )
    trainer = _trainer(base_folder, tmp_path, callback)
    await asyncio.to_thread(trainer.train)
    assert trainer.state.global_step == 3
    assert [p.step for p in told] == [2, 3]
    assert all("no folder today" in p.error for p in told)
    with Client(server.address) as client:
        assert not list(client.list(name_prefix="foreign"))
