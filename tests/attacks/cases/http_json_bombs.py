"""Bodies of 4 MiB that are quick to send and slow to parse."""

from __future__ import annotations

import asyncio
import time

from tests.attacks.case import Target
from tests.attacks.cases.text_long_prompts import post
from tests.hostile.callers import http_answer

TITLE = "JSON of millions of objects, lists, keys and escapes"

SIZE = (4 << 20) - 200


def _bombs() -> list[tuple[str, bytes]]:
    def filled(head: bytes, entry: bytes, tail: bytes) -> bytes:
        return head + entry * ((SIZE - len(head) - len(tail)) // len(entry)) + tail

    keys = b",".join(b'"%d":0' % n for n in range(350_000))
    return [
        ("objects", filled(b'{"messages":[', b"{},", b"{}]}")),
        ("lists", filled(b"[", b"[],", b"[]]")),
        ("depth", b"[" * (SIZE // 2) + b"]" * (SIZE // 2)),
        ("depth of objects", filled(b"", b'{"a":', b"1")),
        ("strings", filled(b'{"stop":[', b'"",', b'""]}')),
        ("numbers", filled(b'{"prompt":[', b"1,", b"1]}")),
        ("digits", filled(b'{"prompt":', b"9", b"}")),
        ("keys", b'{"logit_bias":{' + keys[:SIZE] + b"}}"),
        ("escapes", filled(b'{"prompt":"', b"\\u0000", b'"}')),
        ("quotes", filled(b'{"prompt":"', b'\\"', b'"}')),
        ("backslashes", filled(b'{"prompt":"', b"\\\\", b'"}')),
        ("halves of pairs", filled(b'{"prompt":"', b"\\ud800", b'"}')),
        ("spaces", filled(b"{", b" ", b"}")),
        (
            "messages",
            filled(b'{"model":"x","messages":[', b'{"role":"a","content":""},', b"1]}"),
        ),
        ("unended", b'{"prompt":"' + b"x" * (SIZE - 20)),
    ]


async def attack(target: Target) -> list[str]:
    wrong: list[str] = []
    bombs = _bombs()

    async def one(name: str, body: bytes, path: str) -> None:
        status, answer = await http_answer(target.openai, post(body, path))
        if status not in (400, 413, 429):
            wrong.append(f"{name} to {path}: {status} {answer[:200]!r}")

    ends = time.monotonic() + target.seconds
    while True:
        for path in ("/v1/completions", "/v1/chat/completions"):
            await asyncio.gather(*(one(name, body, path) for name, body in bombs))
        if time.monotonic() >= ends:
            return sorted(set(wrong))
