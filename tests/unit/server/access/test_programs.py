"""The load tester and the trainer's push against a server with TLS and keys. The engine is a
FAKE, and so is the training: what is shown is who gets in, and what the others are told."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from threading import Thread
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner, Result
from veneer_client import Client
from veneer_loadtest.cli import cli as loadtest
from veneer_loadtest.results import RunResult, read_result
from veneer_server.access.edit_keys import add_key
from veneer_server.access.principal import ROLES
from veneer_train.cli import app as train

from tests.pki import Pki
from tests.unit.server.access.test_tls import content
from tests.unit.server.rpc.front_harness import Front, make_adapter, running

SMALL = ("--streams", "2", "--requests", "6", "--prompt-tokens", "4", "--tokens", "2")


@dataclass
class Secured:
    front: Front
    pki: Pki
    keys: dict[str, str]

    def url(self, port: str) -> str:
        return f"https://{self.front.addresses[port]}"


@pytest.fixture(scope="module")
def secured(
    base_folder: Path, front_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Secured]:
    """In a thread of its own: the programs want the main one, for their signals."""
    data = tmp_path_factory.mktemp("secured")
    pki, file = Pki(data / "pki"), data / "keys.toml"
    keys = {
        role: add_key(file, name=role, tenant="default", roles=[role], expires=None).key
        for role in ROLES
    }
    keys["wrong"] = keys["operator"][:-1] + ("A" if keys["operator"][-1] != "A" else "B")
    loop, stop = asyncio.new_event_loop(), asyncio.Event()
    made: Queue[Front | BaseException] = Queue()

    async def serve() -> None:
        async with running(
            base_folder,
            front_cache,
            data,
            credentials=grpc.ssl_channel_credentials(content(pki.ca_file)),
            openai_listen="127.0.0.1:0",
            tls_cert=pki.cert,
            tls_key=pki.key,
            keys_file=str(file),
        ) as front:
            made.put(front)
            await stop.wait()

    def serve_here() -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(serve())
        except BaseException as error:
            made.put(error)
            raise
        finally:
            loop.close()

    thread = Thread(target=serve_here)
    thread.start()
    front = made.get()
    assert isinstance(front, Front), front
    yield Secured(front, pki, keys)
    loop.call_soon_threadsafe(stop.set)
    thread.join()


@pytest.fixture(autouse=True)
def _own_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Programs keep their flags in the environment: put back what was there."""
    for name in ("API_KEY", "CA", "CERT", "KEY", "PROFILE", "SERVER"):
        monkeypatch.setenv(f"VENEER_{name}", "")
        monkeypatch.delenv(f"VENEER_{name}")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def call(program: Any, *words: str) -> Result:
    return CliRunner().invoke(program, list(words))


def must_refuse(done: Result, *told: str, secret: str) -> None:
    """Exit status 1, and one line that says these, but not the secret."""
    assert done.exit_code == 1, done.output
    (line,) = [line for line in done.stderr.splitlines() if line]
    for each in told:
        assert each in line
    assert secret not in done.output


def test_a_load_over_grpc(
    secured: Secured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VENEER_API_KEY", secured.keys["operator"])
    file = tmp_path / "run.json"
    done = call(
        loadtest,
        *("--ca", secured.pki.ca_file, "run", "--server", secured.url("grpc")),
        *("--metrics", secured.url("metrics"), "--generate", "1", "--rank", "1"),
        *("--targets", "q_proj", "--json", str(file), *SMALL),
    )
    assert done.exit_code == 0, done.output
    result = read_result(file)
    assert isinstance(result, RunResult)
    assert (result.levels[0].requests.ok, result.levels[0].requests.failed) == (6, 0)
    assert secured.keys["operator"] not in file.read_text()


def test_a_load_over_https(
    secured: Secured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", secured.keys["inference"])
    monkeypatch.setenv("VENEER_CA", secured.pki.ca_file)
    file = tmp_path / "run.json"
    done = call(
        loadtest,
        "run",
        "--openai",
        secured.url("openai"),
        "--json",
        str(file),
        *("--names", "smollm2-135m", *SMALL),
    )
    assert done.exit_code == 0, done.output
    result = read_result(file)
    assert isinstance(result, RunResult)
    assert result.levels[0].requests.ok == 6


@pytest.mark.parametrize(
    ("role", "more", "told"),
    [
        ("wrong", (), ("unknown, was revoked or has expired", "VENEER_API_KEY")),
        ("", (), ("authentication required", "VENEER_API_KEY")),
        ("inference", ("--generate", "1"), ("role publisher", "has inference")),
    ],
)
def test_a_load_that_may_not_be(
    secured: Secured,
    monkeypatch: pytest.MonkeyPatch,
    role: str,
    more: tuple[str, ...],
    told: tuple[str, ...],
) -> None:
    key = secured.keys.get(role, "")
    monkeypatch.setenv("VENEER_API_KEY", key)
    done = call(
        loadtest,
        *("--ca", secured.pki.ca_file, "run", "--server", secured.url("grpc"), *more),
        *("--rank", "1", "--targets", "q_proj", *SMALL),
    )
    must_refuse(done, *told, secret=key or "vn_")


def test_a_load_over_https_that_may_not_be(
    secured: Secured, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = secured.keys["wrong"]
    monkeypatch.setenv("OPENAI_API_KEY", key)
    words = ("run", "--openai", secured.url("openai"), "--names", "smollm2-135m", *SMALL)
    done = call(loadtest, "--ca", secured.pki.ca_file, *words)
    must_refuse(done, "rejects the API key", "OPENAI_API_KEY", secret=key)
    monkeypatch.delenv("VENEER_CA")
    must_refuse(call(loadtest, *words), "not trusted", "--ca", secret=key)
    done = call(loadtest, "--ca", "/nowhere.pem", *words)
    must_refuse(done, "certificate files", "--ca", secret=key)


def test_metrics_that_a_key_may_not_read(
    secured: Secured, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = secured.keys["inference"]
    monkeypatch.setenv("VENEER_API_KEY", key)
    done = call(
        loadtest,
        *("--ca", secured.pki.ca_file, "run", "--server", secured.url("grpc")),
        *("--metrics", secured.url("metrics"), "--names", "x", *SMALL),
    )
    must_refuse(done, "role metrics", "VENEER_API_KEY", secret=key)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """FAKE training: asks the server first, as the real one does, and then has an adapter.
    Fills the list with what it did."""
    done: list[str] = []

    def fake(config: Any, report: Any, *, check_base: Any, **more: Any) -> Any:
        check_base(None)
        done.append("trained")
        folder = make_adapter(tmp_path / "made")
        facts = SimpleNamespace(steps=3, metrics=dict)
        return SimpleNamespace(folder=folder, facts=facts, dora=False)

    monkeypatch.setattr("veneer_train.loop.train", fake)
    monkeypatch.setattr("veneer_train.commands.train.share_cores", lambda server: None)
    return done


def push_words(secured: Secured, base: Path, tmp_path: Path, *more: str) -> list[str]:
    return [
        *("--ca", secured.pki.ca_file, "train", "--preset", "quick", "--base", str(base)),
        *("--set", f"data.train={tmp_path / 'data.jsonl'}"),
        *("--set", f"output.dir={tmp_path / 'out'}"),
        *("--push", secured.url("grpc"), "--name", "trained", *more),
    ]


def test_a_push_of_the_trainer(
    secured: Secured,
    base_folder: Path,
    tmp_path: Path,
    trained: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VENEER_API_KEY", secured.keys["publisher"])
    words = push_words(secured, base_folder, tmp_path, "--alias", "prod")
    done = call(train, *words)
    assert done.exit_code == 0, done.output
    assert "published as" in done.output
    with Client(secured.url("grpc")) as client:
        assert [each.alias for each in client.list_aliases("trained")] == ["trained/prod"]


@pytest.mark.parametrize(
    ("role", "told"),
    [
        ("wrong", "unknown, was revoked or has expired"),
        ("inference", "`veneer adapter push`"),
    ],
)
def test_a_push_that_may_not_be_is_refused_before_training(
    secured: Secured,
    base_folder: Path,
    tmp_path: Path,
    trained: list[str],
    monkeypatch: pytest.MonkeyPatch,
    role: str,
    told: str,
) -> None:
    key = secured.keys[role]
    monkeypatch.setenv("VENEER_API_KEY", key)
    done = call(train, *push_words(secured, base_folder, tmp_path))
    must_refuse(done, told, secret=key)
    assert trained == []
