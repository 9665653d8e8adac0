"""Chats with a base whose own template takes quadratic time. A chat of 4,096 system messages
ran for 48 s in a thread of the front, which nothing could end."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json

from veneer_server.models.source import import_bundled

from tests.attacks.accumulating import ACCUMULATING, Chatter, chat, hostile
from tests.attacks.case import Bug, Target
from tests.hostile.callers import http_answer
from tests.places import cache_dir


def _base() -> str:
    """Make a folder of the bundled base with the slow template; return its path."""
    name = hashlib.sha256(ACCUMULATING.encode()).hexdigest()[:16]
    folder = cache_dir() / "attacks" / name / "smollm2-135m"
    folder.mkdir(parents=True, exist_ok=True)
    for file in import_bundled(cache_dir()).path.iterdir():
        if not (to := folder / file.name).exists() and file.name != "chat_template.jinja":
            with contextlib.suppress(FileExistsError):
                to.symlink_to(file)
    (folder / "chat_template.jinja").write_text(ACCUMULATING)
    return str(folder)


TITLE = "chats that the base's own template renders in quadratic time"
KEYS = True
FLAGS = ("--base", _base())
BUG = Bug(
    "veneer_server.text.prompts",
    "await renderer.render(source, messages, sender, tools, options=options)",
    "await self._lanes.run("
    "0, lambda: ChatTemplate(source, {}).render(messages, tools, options=options), sender)",
)

REFUSED = ("TEMPLATE_FAILED", "QUEUE_FULL")
DOORS = (
    ("/v1/chat/completions", "messages"),
    ("/tokenize", "messages"),
    ("/v1/responses", "input"),
)


async def attack(target: Target) -> list[str]:
    """Each is refused after its time limit, over each API; meanwhile others are answered."""
    wrong: list[str] = []
    async with contextlib.AsyncExitStack() as stack:
        bad, mate, other = [
            await stack.enter_async_context(Chatter.of(target, key))
            for key in ("team-a", "inference-a", "team-b")
        ]

        async def over_grpc() -> None:
            if (said := await bad.says("", hostile(target.rng))) not in REFUSED:
                wrong.append(f"a slow chat: {said}")

        async def over_http(path: str, field: str) -> None:
            messages = [
                {"role": "system", "content": each.content}
                for each in hostile(target.rng).messages
            ]
            body = json.dumps({"model": "smollm2-135m", field: messages}, ensure_ascii=False)
            status, answer = await http_answer(
                target.openai,
                post(body.encode(), path, dict(target.metadata("team-a"))),
            )
            if status not in (400, 413, 429) or b"context_too_long" in answer:
                wrong.append(f"{path}: {status} {answer[-300:]!r}")

        async def good() -> None:
            for who, caller in (("its own", bad), ("its tenant's", mate), ("another", other)):
                small = chat(["Hi there"] * target.rng.randint(1, 20))
                if (said := await caller.says("", small)) != "OK":
                    wrong.append(f"a small chat, {who}: {said}")

        loop = asyncio.get_running_loop()
        until = loop.time() + target.seconds
        await asyncio.gather(over_grpc(), good())
        # Rendering takes long at low priority, so do not wait for these at the end.
        door = target.rng.choice(DOORS)
        beside = [asyncio.create_task(over_http(*door)), asyncio.create_task(over_grpc())]
        while True:
            await good()
            if loop.time() >= until:
                break
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
    return wrong[:20]


def post(body: bytes, path: str, headers: dict[str, str]) -> bytes:
    """Build a request that closes its connection."""
    named = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{named}"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body
