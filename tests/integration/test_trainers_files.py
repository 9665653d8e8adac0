"""Adapters as trainers write them, through the real server: the same answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from veneer_proto.v1 import adapters_pb2
from veneer_registry.converting import convert_adapter

from tests.foreign_adapters import write_gguf, write_mlx
from tests.server_harness import Server

pytestmark = [pytest.mark.real_base, pytest.mark.asyncio(loop_scope="session")]

WEIGHTS = "adapter_model.safetensors"
NAME = "made-elsewhere"


async def scores(server: Server, adapter: str) -> list[float]:
    answer = await server.generate(
        prompt="Once upon a time there was a queen. " * 4,
        adapter=adapter,
        output={"logprobs": True, "echo": True},
        stopping={"max_tokens": 1},
    )
    return [entry.logprob for entry in answer.prompt_logprobs]


def as_unsloth_saves(peft: Path, base: Path, out: Path) -> Path:
    """Its own name of the base, keys with the adapter's name, and the embeddings that PEFT
    added: all at once."""
    shutil.copytree(peft, out)
    config = json.loads((out / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "unsloth/SmolLM2-135M-Instruct-unsloth-bnb-4bit"
    (out / "adapter_config.json").write_text(json.dumps(config))
    tensors: dict[str, Any] = {
        name.replace(".weight", ".default.weight"): tensor
        for name, tensor in load_file(peft / WEIGHTS).items()
    }
    embedding = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    tensors["base_model.model.model.embed_tokens.weight"] = embedding
    tensors["base_model.model.lm_head.weight"] = embedding.float()  # the base's is tied
    save_file(tensors, out / WEIGHTS)
    return out


@pytest.mark.push
@pytest.mark.parametrize("form", ["unsloth", "mlx", "gguf"])
async def test_the_same_adapter_in_another_form_gives_the_same_answers(
    form: str,
    server: Server,
    real_adapters: dict[str, Path],
    base_folder: Path,
    tmp_path: Path,
) -> None:
    original, folder = real_adapters["rank-4"], tmp_path / "out"
    if form == "unsloth":
        as_unsloth_saves(original, base_folder, folder)
    elif form == "mlx":
        convert_adapter(write_mlx(original, tmp_path / "mlx"), folder)
    else:
        source = write_gguf(original, tmp_path / "a.gguf")
        convert_adapter(source, folder, base=base_folder)
    published = await server.push(folder, NAME)
    try:
        asked = adapters_pb2.GetAdapterRequest(name="rank-4")
        plain = (await server.adapters.GetAdapter(asked)).adapter
        assert published.adapter.weights_digest == plain.weights_digest
        assert published.adapter.base_word == "rule"
        assert published.adapter.disk_bytes < 2 * plain.disk_bytes, "embeddings are not kept"
        assert await scores(server, NAME) == await scores(server, "rank-4")
    finally:
        await server.adapters.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(name=NAME))
