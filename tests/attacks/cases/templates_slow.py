"""Chats with slow templates: sixteen can delay another adapter's chat by 3 s.

Sixteen adapters have different templates, which take 0.05 to 0.4 s each, and each is called
over a separate connection. So neither turns by template nor turns by caller alone bound a
chat's wait.
"""

from __future__ import annotations

import asyncio
import hashlib
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np
from veneer_proto.v1 import adapters_pb2 as pb
from veneer_proto.v1 import adapters_pb2_grpc, inference_pb2, inference_pb2_grpc

from tests.adapter_files import write_adapter
from tests.attacks.case import Target

TITLE = "chats with sixteen different slow chat templates at a time"

_TEMPLATES: Final = 16
_SLOW: Final = (
    "{# %d #}{%% for a in range(%d) %%}{%% for b in range(1000) %%}{%% endfor %%}{%% endfor %%}"
    "{{ messages[0].content }}"
)
_QUICK: Final = "{{ messages[0].content }}"
_PATIENCE_S: Final = 30
_ALONE: Final = 10
"""Number of quick chats without slow ones; the first one has a new template."""
_LATER_S: Final = 0.5
"""Seconds that a quick chat may wait longer than without slow chats. If all took turns, it
would wait for 3 s."""
_OVERTAKEN: Final = _TEMPLATES - 2
"""Maximum number of slow chats answered meanwhile, if times are not judged. If each had its own
turn, all would be answered."""
_ALLOWED: Final = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED)


async def attack(target: Target) -> list[str]:
    """Chats with an adapter whose template is quick must be answered meanwhile."""
    wrong: list[str] = []
    slow = [f"slow-chat-{n}" for n in range(_TEMPLATES)]
    async with AsyncExitStack() as stack:
        # Otherwise channels to the same address share a connection.
        alone = [("grpc.use_local_subchannel_pool", 1)]
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(target.grpc, alone))
            for _ in range(_TEMPLATES + 1)
        ]
        adapters: Any = adapters_pb2_grpc.AdapterServiceStub(channels[0])
        await adapters.UploadAdapter(_upload(target.work / "quick", "quick-chat", _QUICK))
        for n, name in enumerate(slow):
            template = _SLOW % (n, 700 * (1 + n % 8))
            await adapters.UploadAdapter(_upload(target.work / name, name, template))
        stubs: list[Any] = [inference_pb2_grpc.InferenceServiceStub(each) for each in channels]
        loop = asyncio.get_running_loop()
        answered = 0

        async def quick() -> tuple[float, int]:
            """Return the seconds of a quick chat, and the number of slow chats answered
            meanwhile."""
            began, before = loop.time(), answered
            if (code := await _chat(stubs[0], "quick-chat", _PATIENCE_S)) is not None:
                wrong.append(f"a quick chat: {code.name}")
            return loop.time() - began, answered - before

        alone_s = max([(await quick())[0] for _ in range(_ALONE)][1:])
        until = loop.time() + target.seconds

        async def chats(stub: Any, name: str) -> None:
            nonlocal answered
            while loop.time() < until:
                code = await _chat(stub, name, 120)
                answered += 1
                if code is not None and code not in _ALLOWED:
                    wrong.append(f"a slow chat: {code.name}")

        slows = [
            asyncio.create_task(chats(stub, name))
            for stub, name in zip(stubs[1:], slow, strict=True)
            for _ in range(4 if target.full else 1)
        ]
        # The first chat also waits for the check of each new template, so it is not judged.
        chatted = []
        while loop.time() < until:
            chatted.append(await quick())
        later_s = max((seconds for seconds, _ in chatted[1:]), default=0.0) - alone_s
        overtaken = max((before for _, before in chatted[1:]), default=0)
        if target.times and later_s > _LATER_S:
            wrong.append(f"a quick chat took {later_s:.2f} s longer, {alone_s:.2f} s without")
        if not target.times and overtaken > _OVERTAKEN:
            wrong.append(f"{overtaken} slow chats were answered before a quick one")
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
    """Return the upload messages of a small adapter for the bundled base, with a template."""
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
