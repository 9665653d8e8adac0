"""Requests that a web page makes its reader's browser send to a local server without keys."""

from __future__ import annotations

import asyncio
from typing import Final

import httpx

from tests.attacks.case import Bug, Target

TITLE = "requests of web pages to a local server"
BUG = Bug(
    "veneer_server.system.hosts",
    "if origin is None and site is None:",
    "if True:",
)

_CHANGES: Final = (
    "/pause?mode=keep",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/reset_prefix_cache",
)
_GENERATES: Final = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/messages",
    "/inference/v1/generate",
    "/api/chat",
    "/openai/deployments/a/chat/completions",
)
_READS: Final = (
    "/v1/models",
    "/metrics",
    "/load",
    "/is_paused",
    "/server_info",
    "/api/tags",
)
_SIMPLE: Final = (
    {},
    {"content-type": "text/plain"},
    {"content-type": "application/x-www-form-urlencoded"},
    {"content-type": "application/json"},
)


async def attack(target: Target) -> list[str]:
    """Each request must be refused, and nothing may be paused."""
    loop, wrong = asyncio.get_running_loop(), []
    until, rng = loop.time() + target.seconds, target.rng
    port = target.openai.rsplit(":", 1)[1]

    def page() -> dict[str, str]:
        name = "".join(rng.choices("abcxyz-", k=rng.randrange(1, 20)))
        origins = (
            f"https://{name}.example",
            f"http://localhost:{rng.randrange(1, 1 << 15)}",
            "null",
            f"http://127.0.0.1.{name}.example:{port}",
            f"http://{name}.localhost:{port}",
        )
        sites = ({}, {"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"})
        return rng.choice(
            (
                {"origin": rng.choice(origins)} | rng.choice(sites),
                rng.choice(sites[1:]),
                {"host": f"{name}.example:{port}", "origin": f"http://{name}.example:{port}"},
                {"host": f"{name}.example"},
            )
        )

    async with httpx.AsyncClient(
        trust_env=False, timeout=60, base_url=f"http://{target.openai}"
    ) as http:
        while loop.time() < until:
            headers = page() | rng.choice(_SIMPLE)
            path = rng.choice((*_CHANGES, *_GENERATES, *_READS))
            verb = "GET" if path in _READS else "POST"
            base = (
                f"http://{target.metrics}" if path == "/metrics" and rng.random() < 0.5 else ""
            )
            body = None if verb == "GET" else b"{}"
            answer = await http.request(verb, base + path, headers=headers, content=body)
            if answer.status_code != 403:
                wrong.append(f"{verb} {path} with {headers}: {answer.status_code}")
        if (await http.get("/is_paused")).json()["is_paused"]:
            wrong.append("a page has paused the server")
            await http.post("/resume")
    return wrong
