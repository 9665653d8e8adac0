"""Shared by the attacks with chats that a public template renders in quadratic time."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import grpc
from veneer_proto.v1 import adapters_pb2_grpc, inference_pb2, inference_pb2_grpc

from tests.attacks.case import Target
from tests.hostile.callers import reason_of
from tests.server_harness import read_files, upload_messages

ACCUMULATING: Final = (
    "{% set ns = namespace(system_prompt='', first=true) %}"
    "{% for again in range(8) %}{% set ns.system_prompt = '' %}"
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{% if ns.first %}{% set ns.system_prompt = ns.system_prompt + message['content'] %}"
    "{% set ns.first = false %}"
    "{% else %}{% set ns.system_prompt = ns.system_prompt + '\\n\\n' + message['content'] %}"
    "{% endif %}{% endif %}{% endfor %}{% endfor %}"
    "{{ bos_token }}{{ ns.system_prompt }}"
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "<|User|>{{ message['content'] }}{% endif %}{% endfor %}<|Assistant|>"
)
"""Gathers system prompts like DeepSeek V3's public template, but several times, so that it
takes long with little memory."""

_ADAPTER: Final = Path(__file__).parents[2] / "examples" / "adapters" / "chat"

ANSWER_S: Final = 60.0
"""Seconds after which an answer counts as missing."""


def chat(contents: list[str], role: str = "user") -> inference_pb2.ChatInput:
    messages = [inference_pb2.ChatMessage(role=role, content=each) for each in contents]
    return inference_pb2.ChatInput(messages=messages)


def hostile(rng: random.Random) -> inference_pb2.ChatInput:
    """Make 3,500 to 4,096 messages of at most 4 MB that take 10 s or more of CPU time."""
    return chat(["x" * rng.randint(850, 950)] * rng.randint(3500, 4096), role="system")


class Chatter:
    """A caller with one key and its own connection."""

    def __init__(self, channel: grpc.aio.Channel, metadata: Any) -> None:
        # The stubs are typed for synchronous channels.
        self._inference: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        self._adapters: Any = adapters_pb2_grpc.AdapterServiceStub(channel)
        self._metadata = metadata

    @classmethod
    @asynccontextmanager
    async def of(cls, target: Target, key: str) -> AsyncIterator[Chatter]:
        """Connect with ``key``, one of `KEYS`."""
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
        async with grpc.aio.insecure_channel(target.grpc, options=options) as channel:
            yield cls(channel, target.metadata(key))

    async def push(self, name: str, template: str) -> None:
        files = {**read_files(_ADAPTER), "chat_template.jinja": template.encode()}
        messages = upload_messages(files, name, allow_replace=True)
        await self._adapters.UploadAdapter(messages, metadata=self._metadata)

    async def says(self, adapter: str, messages: inference_pb2.ChatInput) -> str:
        """Send a chat; return "OK", or the reason and cause of its refusal."""
        request = inference_pb2.GenerateRequest(
            adapter=adapter,
            messages=messages,
            stopping=inference_pb2.StoppingOptions(max_tokens=2),
        )
        try:
            await self._inference.Generate(request, metadata=self._metadata, timeout=ANSWER_S)
        except grpc.aio.AioRpcError as error:
            return reason_of(error) or error.code().name
        return "OK"
