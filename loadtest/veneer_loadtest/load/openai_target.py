"""Target for any endpoint with OpenAI's completions or chat API, streamed over HTTP."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final

import aiohttp
import msgspec

from veneer_loadtest.errors import HttpFailed, TargetFailed
from veneer_loadtest.https import https_context
from veneer_loadtest.load.plan import Planned, prompt_ids, prompt_text
from veneer_loadtest.load.spec import LoadSpec
from veneer_loadtest.load.targets import OpenAiSpec, Target, TargetStream

API_KEY: Final = "OPENAI_API_KEY"
"""Environment variable with the API key, so that no option and no result contains it."""

_DATA: Final = b"data:"
_LONGEST_LINE: Final = 8 << 20
_LIST_TIMEOUT_S: Final = 30.0
_TIER: Final = "veneer-adapter-tier"
_REVISION: Final = "veneer-revision"


class _Sse(TargetStream):
    """Server-sent events. A chunk with text counts as one token unless it has
    ``token_ids``; the total comes from ``usage``."""

    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        super().__init__()
        self._answer = answer
        self.facts.tier = answer.headers.get(_TIER, "")
        self.facts.revision = answer.headers.get(_REVISION, "")

    async def __aiter__(self) -> AsyncIterator[int]:
        finished = False
        async for line in self._answer.content:
            if not line.startswith(_DATA):
                continue
            data = line[len(_DATA) :].strip()
            if data == b"[DONE]":
                return
            chunk: dict[str, Any] = msgspec.json.decode(data)
            if error := chunk.get("error"):
                raise _failure(error, "STREAM_ERROR")
            self._usage(chunk.get("usage"))
            for choice in chunk.get("choices") or ():
                finished = finished or choice.get("finish_reason") is not None
                if new := _tokens(choice):
                    yield new
        if not finished:
            raise HttpFailed("STREAM_CUT", "the stream stopped before its end")

    def _usage(self, usage: dict[str, Any] | None) -> None:
        if not usage:
            return
        self.facts.prompt_tokens = usage.get("prompt_tokens") or 0
        self.facts.tokens = usage.get("completion_tokens")
        details = usage.get("prompt_tokens_details") or {}
        self.facts.cached = details.get("cached_tokens") or 0


def _tokens(choice: dict[str, Any]) -> int:
    ids = choice.get("token_ids")
    if ids is not None:
        return len(ids)
    return 1 if choice.get("text") or (choice.get("delta") or {}).get("content") else 0


def _failure(error: Any, otherwise: str) -> HttpFailed:
    if not isinstance(error, dict):
        return HttpFailed(otherwise, str(error))
    words = (error.get("code"), error.get("type"))
    reason = next((word for word in words if isinstance(word, str) and word), otherwise)
    return HttpFailed(reason, str(error.get("message") or otherwise))


class OpenAiTarget(Target):
    """See `OpenAiSpec`."""

    def __init__(self, load: LoadSpec, target: OpenAiSpec) -> None:
        super().__init__(load)
        self._target = target
        path = "completions" if target.api == "completions" else "chat/completions"
        self._url = f"{target.url.rstrip('/')}/v1/{path}"
        self._session: aiohttp.ClientSession | None = None

    @asynccontextmanager
    async def send(self, request: Planned) -> AsyncIterator[TargetStream]:
        """See `Target.send`."""
        with _failures(self._target.url):
            async with self._open().post(self._url, data=self._body(request)) as answer:
                if answer.status != 200:
                    raise _refusal(answer.status, await answer.read())
                yield _Sse(answer)

    async def connect(self) -> None:
        """See `Target.connect`."""
        await _models(self._open(), self._target.url)

    async def close(self) -> None:
        """See `Target.close`."""
        if self._session is not None:
            await self._session.close()

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:  # not in __init__: it needs the running loop
            self._session = _session()
        return self._session

    def _body(self, request: Planned) -> bytes:
        chat = self._target.api == "chat"
        prompt: dict[str, object]
        if chat:
            text = prompt_text(self._load, request)
            prompt = {"messages": [{"role": "user", "content": text}]}
        elif self._load.text or request.prompt:
            prompt = {"prompt": prompt_text(self._load, request)}
        else:
            prompt = {"prompt": prompt_ids(self._load, request)}
        return msgspec.json.encode(
            {
                "model": request.adapter or self._target.base_model,
                **prompt,
                "max_tokens": request.tokens,
                "temperature": 0,
                **({"ignore_eos": True} if self._load.ignore_eos else {}),
                "stream": True,
                "stream_options": {"include_usage": True},
                **self._target.fields.get(request.adapter, {}),
            }
        )


def _refusal(status: int, body: bytes) -> HttpFailed:
    try:
        error = msgspec.json.decode(body)["error"]
    except (msgspec.MsgspecError, KeyError, TypeError):
        error = body[:200].decode(errors="replace")
    return _failure(error, f"HTTP_{status}")


async def list_models(url: str) -> tuple[str, ...] | None:
    """Return the models that ``GET /v1/models`` lists, or None if there is no such list.

    Raises:
        TargetFailed: no server answers, or it refuses the API key.
    """
    async with _session() as session:
        return await _models(session, url)


async def _models(session: aiohttp.ClientSession, url: str) -> tuple[str, ...] | None:
    limit = aiohttp.ClientTimeout(total=_LIST_TIMEOUT_S)
    with _failures(url):
        async with session.get(f"{url.rstrip('/')}/v1/models", timeout=limit) as answer:
            if answer.status in (401, 403):
                raise TargetFailed(
                    f"{url} rejects the API key or requires one: set {API_KEY} "
                    f"[{_refusal(answer.status, await answer.read())}]",
                    metadata={"address": url, "cause": "api_key"},
                )
            if answer.status != 200:
                return None
            listed: dict[str, Any] = msgspec.json.decode(await answer.read())
            return tuple(str(model.get("id")) for model in listed.get("data") or ())


def _session() -> aiohttp.ClientSession:
    headers = {"content-type": "application/json"}
    if key := os.environ.get(API_KEY, ""):
        headers["authorization"] = f"Bearer {key}"
    return aiohttp.ClientSession(
        headers=headers,
        # As many connections as requests: a queue in the client would hide the server's.
        connector=aiohttp.TCPConnector(limit=0, ssl=https_context()),
        timeout=aiohttp.ClientTimeout(),  # the worker has its own timeout
        read_bufsize=_LONGEST_LINE,
    )


@contextmanager
def _failures(url: str) -> Iterator[None]:
    try:
        yield
    except aiohttp.ClientConnectorCertificateError as error:
        raise TargetFailed(
            f"the certificate of {url} is not trusted: give its CA certificate (--ca FILE, "
            f"VENEER_CA) [{error.certificate_error}]",
            metadata={"address": url, "cause": "certificate"},
        ) from error
    except (
        aiohttp.ClientConnectorError,
        aiohttp.ServerDisconnectedError,
        aiohttp.ServerTimeoutError,
    ) as error:
        raise TargetFailed(
            f"no server answers at {url}: give --openai the address of an OpenAI-compatible "
            f"server, without /v1 [{error}]",
            metadata={"address": url},
        ) from error
    except (aiohttp.ClientError, msgspec.DecodeError, ValueError) as error:
        raise HttpFailed(type(error).__name__, str(error)) from error
