"""No secret and no prompt in what a server writes or answers, and none of its folders in what
callers and the audit log are told: thousands of good and bad calls, all logged."""

from __future__ import annotations

import asyncio
import base64
import errno
import hashlib
import importlib
import itertools
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import grpc
import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm
from veneer_proto.v1 import adapters_pb2, inference_pb2
from veneer_server import logs
from veneer_server.access import audit
from veneer_server.access.edit_keys import add_key
from veneer_server.access.principal import ROLES

from tests.planted import planted
from tests.unit.server.rpc.front_harness import (
    Front,
    failure,
    make_adapter,
    running,
    upload,
)

LINES: Final = 10_000
ONE: Final = inference_pb2.StoppingOptions(max_tokens=1)
PROMPT: Final = "whisper"
SESAME: Final = "sesame-"
"""Begins every wrong key, and much else that callers send."""
MARKS: Final = frozenset(
    {PROMPT, SESAME, base64.b64encode(SESAME.encode()).decode()[:9], "eyJ"}
)
"""One of them is in every secret but the right keys; the last begins the parts of a token."""
ISSUER: Final = "https://idp.example.org/realm"
ROLES_USED: Final = ("operator", "inference", "publisher")


@dataclass
class Heard:
    """What was written and answered."""

    log: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    audit: list[str] = field(default_factory=list)

    def leaks(self, secrets: set[str], folders: set[str]) -> list[str]:
        """Lines that say what they must not; folders may be in the log, which is the
        operator's."""
        told = (*self.answers, *self.audit)
        found = [line for line in (*self.log, *told) if any(s in line for s in secrets)]
        return found + [line for line in told if any(each in line for each in folders)]


@dataclass
class Server:
    front: Front
    heard: Heard
    keys: dict[str, str]
    signer: Any
    secrets: set[str] = field(default_factory=lambda: set(MARKS))
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def sesame(self) -> str:
        """A new secret."""
        number = next(self.numbers)
        return f"{SESAME}{number}-{hashlib.sha256(b'%d' % number).hexdigest()}"

    def token(self, **claims: Any) -> str:
        number = next(self.numbers)
        now = int(time.time())
        every = {"iss": ISSUER, "aud": "veneer", "exp": now + 600, "sub": f"user-{number}"}
        return jwt.encode(
            {**every, "roles": ["inference"], **claims}, self.signer, "ES256", {"kid": "one"}
        )


@contextmanager
def listening() -> Iterator[list[str]]:
    """Everything that the server's process logs, at the level debug, with every field."""
    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            # The client is in this process, too; and gRPC says of each call that it has a loop.
            if not record.name.startswith(("httpx", "httpcore", "grpc._cython")):
                told = {**record.__dict__, "exc_info": None}
                if record.exc_info:
                    told["exc_text"] = logging.Formatter().formatException(record.exc_info)
                lines.append(json.dumps(told, default=str))

    root, listener = logging.getLogger(), Listener()
    names = ("", "veneer_server", "veneer_registry", "uvicorn", "asyncio", "grpc")
    before = {name: logging.getLogger(name).level for name in names}
    root.addHandler(listener)
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.DEBUG)
        yield lines
    finally:
        root.removeHandler(listener)
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


@asynccontextmanager
async def server(base: Path, cache: Path, folder: Path) -> AsyncIterator[Server]:
    file, signer = folder / "keys.toml", ec.generate_private_key(ec.SECP256R1())
    keys = {
        role: add_key(file, name=role, tenant="default", roles=[role], expires=None).key
        for role in ROLES
    }
    listed = {**ECAlgorithm.to_jwk(signer.public_key(), as_dict=True), "kid": "one"}
    (folder / "jwks.json").write_text(json.dumps({"keys": [listed]}))
    heard = Heard()
    with (
        listening() as heard.log,
        # Refusals are sampled; here each has its line.
        patch.object(audit, "REFUSED_BYTES", 1 << 40),
        patch.object(logs, "BURST", 1e9),
    ):
        async with running(
            base,
            cache,
            folder / "front",
            openai_listen="127.0.0.1:0",
            keys_file=str(file),
            jwt_issuer=ISSUER,
            jwt_keys=str(folder / "jwks.json"),
            refusal_rate="0",
        ) as front:
            made = Server(front, heard, keys, signer)
            made.secrets |= {key.split("_", 2)[2] for key in keys.values()}
            yield made
    for file in (folder / "front/data").glob("audit*.jsonl"):
        heard.audit += file.read_text().splitlines()


def grpc_calls(server: Server) -> Iterator[Callable[[], Any]]:
    """Good and bad calls, over and over, each to be begun."""
    unary, adapters = server.front.inference.Generate, server.front.adapters

    def bearer(secret: str) -> Any:
        return (("authorization", f"Bearer {secret}"),)

    good = {role: bearer(server.keys[role]) for role in ROLES_USED}

    def generate(text: str = PROMPT, **fields: Any) -> Any:
        return inference_pb2.GenerateRequest(**{"prompt": text, "stopping": ONE, **fields})

    def asked(metadata: Any, text: str = PROMPT, **fields: Any) -> Callable[[], Any]:
        return lambda: unary(generate(text, **fields), metadata=metadata)

    def upload(file: str, data: str) -> Any:
        spec = adapters_pb2.UploadSpec(name="mine")
        spec.files.add(name=file, size=len(data), sha256="0" * 64)
        chunk = adapters_pb2.UploadChunk(file=file, offset=0, data=data.encode())
        request = adapters_pb2.UploadAdapterRequest
        return iter([request(spec=spec), request(chunk=chunk)])

    def uploaded(file: str, data: str) -> Callable[[], Any]:
        return lambda: adapters.UploadAdapter(upload(file, data), metadata=good["publisher"])

    def deleted(role: str, name: str) -> Callable[[], Any]:
        request = adapters_pb2.DeleteAdapterRequest(name=name)
        return lambda: adapters.DeleteAdapter(request, metadata=good[role])

    def registered(uri: str) -> Callable[[], Any]:
        request = adapters_pb2.RegisterAdapterRequest(name="mine", uri=uri)
        return lambda: adapters.RegisterAdapter(request, metadata=good["publisher"])

    constraint = inference_pb2.Constraint
    for number in itertools.count():
        new = server.sesame()
        basic = base64.b64encode(new.encode()).decode()
        yield asked(good["inference"])
        yield asked(bearer(f"vn_abcdefgh_{new}"))
        yield asked((("x-api-key", new),))
        yield asked((("authorization", f"Basic {basic}"),))
        yield asked(good["publisher"], new)
        yield asked(good["inference"], f"{new} " * 60)
        yield asked(bearer(server.token()))
        yield asked(bearer(server.token(aud="x")))
        yield asked(bearer(server.token()[:-9] + "AAAAAAAAA"))
        yield asked(good["inference"], stopping=inference_pb2.StoppingOptions(stop=[new] * 99))
        yield asked(good["inference"], sampling=inference_pb2.SamplingOptions(temperature=-1))
        yield asked(good["inference"], constraint=constraint(regex=f"({new}"))
        yield asked(good["inference"], constraint=constraint(json_schema=f'{{"type": "{new}"'))
        yield asked(good["inference"], adapter=f"nobody-{number}")
        for role in ROLES_USED:
            yield deleted(role, f"gone-{number}")
        yield registered(f"/{new}")
        yield uploaded("../../x", new)
        yield uploaded("adapter_config.json", new)


async def call_grpc(server: Server, count: int) -> None:
    waiting = asyncio.Semaphore(32)

    async def one(begin: Callable[[], Any]) -> None:
        async with waiting:
            try:
                await begin()
            except grpc.aio.AioRpcError as error:
                told = (error.code().name, error.details(), error.trailing_metadata())
                server.heard.answers.append(repr(told))

    async with asyncio.TaskGroup() as group:
        for begin in itertools.islice(grpc_calls(server), count):
            group.create_task(one(begin))


async def call_http(server: Server, count: int) -> None:
    url = f"http://{server.front.addresses['openai']}"
    bearer = {"authorization": f"Bearer {server.keys['inference']}"}

    async def one(http: httpx.AsyncClient, number: int) -> None:
        unique = server.sesame()
        body = {"model": "smollm2-135m", "prompt": PROMPT, "max_tokens": 1}
        chat = {"model": "smollm2-135m", "max_tokens": 1}
        sent: list[Callable[[], Awaitable[httpx.Response]]] = [
            lambda: http.post("/v1/completions", json=body, headers=bearer),
            lambda: http.post(
                "/v1/completions", json=body, headers={"authorization": f"Bearer {unique}"}
            ),
            lambda: http.post("/v1/completions", json=body, headers={"x-api-key": unique}),
            lambda: http.post(f"/v1/completions?key={unique}", json=body),
            lambda: http.post(
                "/v1/completions", content=f'{{"prompt": "{unique}', headers=bearer
            ),
            lambda: http.post(
                "/v1/completions", json={**body, "prompt": [unique, 3]}, headers=bearer
            ),
            lambda: http.post(
                "/v1/chat/completions",
                json={**chat, "messages": [{"role": unique[:9], "content": unique}]},
                headers=bearer,
            ),
            lambda: http.post(
                "/v1/chat/completions",
                json={**chat, "messages": unique},
                headers={**bearer, "cookie": unique},
            ),
            lambda: http.get(f"/v1/models?token={unique}", headers=bearer),
            lambda: http.get("/v1/models", headers={"x-api-key": server.token(exp=1)}),
        ]
        answer = await sent[number % len(sent)]()
        server.heard.answers += [*answer.text.splitlines(), repr(answer.headers)]

    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=60) as http:
        for number in range(count):
            await one(http, number)


async def drive(server: Server, grpc_count: int, http_count: int) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(call_grpc(server, grpc_count))
        group.create_task(call_http(server, http_count))


def folders(*paths: Path) -> set[str]:
    """Paths that tell how the server's machine is set up."""
    return {str(path) for path in (*paths, Path.home(), Path(__file__).parents[4])} - {"/"}


@pytest.mark.push
async def test_none_of_ten_thousand_lines_has_a_secret_a_prompt_or_a_path(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    async with server(base_folder, front_cache, tmp_path) as driven:
        await drive(driven, 3450, 720)
    heard = driven.heard
    assert driven.heard.leaks(driven.secrets, folders(base_folder, front_cache, tmp_path)) == []
    told = {"log": len(heard.log), "answers": len(heard.answers), "audit": len(heard.audit)}
    assert sum(told.values()) > LINES, told
    assert all(count > 1000 for count in told.values()), told


def full_disk(monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    fails(monkeypatch, errno.ENOSPC)


def broken_disk(monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    fails(monkeypatch, errno.EIO)


def fails(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let no folder be renamed, as a publish does."""

    def rename(source: Any, to: Any, **given: Any) -> None:
        raise OSError(number, os.strerror(number), str(source), None, str(to))

    monkeypatch.setattr(os, "rename", rename)


def damaged_catalog(monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    for file in data.glob("catalog.sqlite*"):
        file.write_bytes(b"\xff" * file.stat().st_size)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (full_disk, "DISK_FULL"),
        (broken_disk, "DISK_FAILED"),
        (damaged_catalog, "CATALOG_DAMAGED"),
    ],
)
async def test_who_is_told_of_a_damaged_disk_is_not_told_of_its_folders(
    base_folder: Path,
    front_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[pytest.MonkeyPatch, Path], None],
    reason: str,
) -> None:
    async with server(base_folder, front_cache, tmp_path) as driven:
        damage(monkeypatch, tmp_path / "front/data")
        key = (("authorization", f"Bearer {driven.keys['publisher']}"),)
        files = upload(make_adapter(tmp_path / "adapter"), "mine")
        error = await failure(driven.front.adapters.UploadAdapter(files, metadata=key))
        monkeypatch.undo()
    heard = driven.heard
    heard.answers += [error.message, repr(error.metadata), repr(error.trailing)]
    assert error.reason == reason
    assert heard.leaks(driven.secrets, folders(base_folder, front_cache, tmp_path)) == []
    refused = [line for line in heard.log if reason in line]
    assert any(str(tmp_path) in line for line in refused), "the operator's log must say where"


@pytest.mark.verify
@pytest.mark.parametrize(
    ("module", "right", "wrong"),
    [
        (
            "veneer_server.access.authenticate",
            'raise _refused("the API key is unknown, was revoked or has expired", "key")',
            'raise _refused(f"the API key {secret} is unknown", "key")',
        ),
        (
            "veneer_server.serving.gate",
            "self.log(error.reason, error, **logged)",
            '_log.info("metadata", given=context.caller.shown)',
        ),
        (
            "veneer_server.serving.gate",
            "self._audit.note(context.caller, error, request=context.request)",
            "self.rename(context, repr(context.request)[-64:]); "
            "self._audit.note(context.caller, error)",
        ),
        (
            "veneer_server.access.authenticate",
            'raise _refused("the authorization header must be `Bearer KEY`", "scheme")',
            "raise _refused(credentials.authorization, 'scheme')",
        ),
    ],
    ids=["a key in an error", "metadata in the log", "a request in the audit", "a header"],
)
async def test_a_planted_leak_is_seen(
    base_folder: Path, front_cache: Path, tmp_path: Path, module: str, right: str, wrong: str
) -> None:
    with planted(importlib.import_module(module), right, wrong):
        async with server(base_folder, front_cache, tmp_path) as driven:
            await drive(driven, 60, 0)
    assert driven.heard.leaks(driven.secrets, folders(base_folder, front_cache, tmp_path))
