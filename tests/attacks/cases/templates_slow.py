"""Chats with a slow template: sixteen delayed another adapter's chat by 3 s."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np
from veneer_proto.v1 import adapters_pb2 as pb
from veneer_proto.v1 import adapters_pb2_grpc, inference_pb2, inference_pb2_grpc
from veneer_registry.writer import write_adapter

from tests.attacks.case import Target

TITLE = "sixteen chats at a time with a slow chat template"

_SLOW: Final = (
    "{% for a in range(99999) %}{% for b in range(60) %}{% endfor %}{% endfor %}"
    "{{ messages[0].content }}"
)
_QUICK: Final = "{{ messages[0].content }}"
_PATIENCE_S: Final = 30
_ALLOWED: Final = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED)


async def attack(target: Target) -> list[str]:
    """Chats of an adapter with a quick template are answered beside them."""
    wrong: list[str] = []
    async with grpc.aio.insecure_channel(target.grpc) as channel:
        adapters: Any = adapters_pb2_grpc.AdapterServiceStub(channel)
        inference: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        for name, template in (("slow-chat", _SLOW), ("quick-chat", _QUICK)):
            await adapters.UploadAdapter(_upload(target.work / name, name, template))
        loop = asyncio.get_running_loop()
        until = loop.time() + target.seconds

        async def slow() -> None:
            while loop.time() < until:
                code = await _chat(inference, "slow-chat", 120)
                if code is not None and code not in _ALLOWED:
                    wrong.append(f"a slow chat: {code.name}")

        slows = [asyncio.create_task(slow()) for _ in range(16 if target.full else 4)]
        while loop.time() < until:
            if (code := await _chat(inference, "quick-chat", _PATIENCE_S)) is not None:
                wrong.append(f"a quick chat: {code.name}")
        for task in slows:
            task.cancel()
        await asyncio.gather(*slows, return_exceptions=True)
    return wrong


async def _chat(stub: Any, adapter: str, limit_s: float) -> grpc.StatusCode | None:
    message = inference_pb2.ChatMessage(role="user", content="Hello there")
    request = inference_pb2.GenerateRequest(
        adapter=adapter,
        messages=inference_pb2.ChatInput(messages=[message]),
        stopping=inference_pb2.StoppingOptions(max_tokens=2),
    )
    try:
        await stub.Generate(request, timeout=limit_s)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return None


def _upload(folder: Path, name: str, template: str) -> list[pb.UploadAdapterRequest]:
    """A small adapter of the bundled base, with a template."""
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    generator = np.random.default_rng(len(name))
    write_adapter(
        folder,
        {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]},
        {
            f"{stem}.lora_A.weight": generator.normal(size=(2, 576)).astype(np.float32),
            f"{stem}.lora_B.weight": generator.normal(size=(576, 2)).astype(np.float32),
        },
    )
    (folder / "chat_template.jinja").write_text(template)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    described = [
        pb.UploadFile(name=file, size=len(data), sha256=hashlib.sha256(data).hexdigest())
        for file, data in files.items()
    ]
    spec = pb.UploadSpec(name=name, files=described, allow_replace=True)
    return [
        pb.UploadAdapterRequest(spec=spec),
        *(
            pb.UploadAdapterRequest(chunk=pb.UploadChunk(file=file, data=data))
            for file, data in files.items()
        ),
    ]
