"""``veneer chat``: from a script against the fake server, and in a real terminal."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner
from veneer_client import Chunk, Client
from veneer_client.cli.chat import ChatSession, ChatState
from veneer_client.cli.main import cli
from veneer_registry.errors import AdapterNotFound

from tests.refused import refused
from tests.unit.client.fake_server import FakeServer
from tests.unit.client.refusals import Refusal

Run = Callable[..., Any]


@pytest.fixture
def run(server: FakeServer) -> Run:
    def invoke(*args: str, lines: str) -> Any:
        place = {"VENEER_SERVER": server.address, "COLUMNS": "200"}
        return CliRunner().invoke(cli, ["chat", *args], env=place, input=lines)

    return invoke


def chats(server: FakeServer) -> list[tuple[str, list[str]]]:
    """Of each stream asked for: the adapter, and its turns."""
    return [
        (request.adapter, [f"{m.role}:{m.content}" for m in request.messages.messages])
        for name, request in server.calls
        if name == "GenerateStream"
    ]


def test_turns_from_a_script(server: FakeServer, run: Run) -> None:
    done = run("--max-tokens", "2", "--temperature", "0", lines="one\n\ntwo\n")
    assert (done.exit_code, done.stdout) == (0, "0 1 \n0 1 \n")
    assert "talking to fake-base" in done.stderr
    assert chats(server) == [
        ("", ["user:one"]),
        ("", ["user:one", "assistant:0 1 ", "user:two"]),
    ]
    request = server.calls[-1][1]
    assert (request.sampling.temperature, request.stopping.max_tokens) == (0.0, 2)


def test_commands_change_what_is_asked(server: FakeServer, run: Run) -> None:
    sql = server.add("sql")
    lines = (
        "a\n/adapter sql\nb\n/reset\n/system be brief\n//x\n/system\n/adapter\nc\n/quit\nd\n"
    )
    done = run("--max-tokens", "1", lines=lines)
    assert done.exit_code == 0, done.stderr
    assert chats(server) == [
        ("", ["user:a"]),
        ("sql", ["user:a", "assistant:0 ", "user:b"]),
        ("sql", ["system:be brief", "user:/x"]),
        ("", ["user:/x", "assistant:0 ", "user:c"]),
    ]
    assert f"talking to sql@{sql.revision[:12]}" in done.stderr


REVISION = "ab" * 32
"""Of every answer of the fake server by an adapter."""


@pytest.mark.parametrize("adapter", ["sql", "sql/prod", "sql@abab"])
def test_a_conversation_keeps_the_revision_that_it_began_with(
    adapter: str, server: FakeServer
) -> None:
    server.add("sql")
    with Client(server.address) as client:
        session = ChatSession(client, ChatState(adapter=adapter), {"max_tokens": 1})
        for line in ("a", "b", "c", "/reset", "d", "e", "/adapter sql", "f"):
            assert session.take(line)
    kept = f"sql@{REVISION}"
    assert [asked for asked, _ in chats(server)] == [
        adapter,
        kept,
        kept,
        adapter,
        kept,
        "sql",
    ]


def test_a_conversation_whose_revision_is_gone_says_what_to_do(
    server: FakeServer,
) -> None:
    server.add("sql")
    with Client(server.address) as client:
        session = ChatSession(client, ChatState(), {"max_tokens": 1})
        session.use("sql")
        assert session.take("a")
        gone = Refusal(grpc.StatusCode.NOT_FOUND, "it is gone", "ADAPTER_NOT_FOUND")
        server.refusals.append(gone)
        with refused(AdapterNotFound) as caught:
            session.take("b")
        assert "/adapter sql" in caught.value.message
        assert session.take("/adapter sql")
        assert session.take("b")
    assert [asked for asked, _ in chats(server)] == ["sql", f"sql@{REVISION}", "sql"]


@pytest.mark.parametrize(
    ("line", "says"), [("/adapter sqll", "did you mean chat?"), ("/nope", "/help lists")]
)
def test_an_error_ends_a_script(line: str, says: str, server: FakeServer, run: Run) -> None:
    failed = run(lines=f"{line}\nnever\n")
    assert failed.exit_code == 1
    assert says in failed.stderr
    assert len(failed.stderr.strip().splitlines()) == 2, "whom it talks to, and the error"
    assert chats(server) == []


def test_an_unknown_adapter_is_told_at_the_start(server: FakeServer, run: Run) -> None:
    failed = run("-a", "sqll", lines="never\n")
    assert (failed.exit_code, chats(server)) == (1, [])
    assert "did you mean chat?" in failed.stderr


class Terminal:
    """A person at ``veneer chat``: types, and reads until something was shown."""

    def __init__(self, process: subprocess.Popen[bytes], near: int) -> None:
        self.process = process
        self._near = near
        self._shown = b""

    def type(self, text: str) -> None:
        os.write(self._near, text.encode())

    def until(self, wanted: str) -> str:
        """All that was shown up to and with ``wanted``; pytest's timeout bounds it."""
        while wanted.encode() not in self._shown:
            self._shown += os.read(self._near, 4096)
        before, found, self._shown = self._shown.partition(wanted.encode())
        return (before + found).decode()


@contextmanager
def terminal(server: FakeServer, home: Path, *args: str) -> Iterator[Terminal]:
    near, far = pty.openpty()

    def own_terminal() -> None:
        os.login_tty(far)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    process = subprocess.Popen(
        [sys.executable, "-m", "veneer_client.cli.main", "chat", *args],
        env={
            **os.environ,
            "VENEER_SERVER": server.address,
            "HOME": str(home),
            "TERM": "dumb",
            "INPUTRC": "/dev/null",
        },
        preexec_fn=own_terminal,
    )
    os.close(far)
    try:
        yield Terminal(process, near)
    finally:
        process.kill()
        process.wait()
        os.close(near)


def test_a_conversation_in_a_terminal_and_its_history(
    server: FakeServer, tmp_path: Path
) -> None:
    with terminal(server, tmp_path) as person:
        person.until("> ")
        person.type("hello\n")
        person.until("0 1 2 ")
        person.until("> ")
        person.type("again\n")
        person.until("0 1 2 ")
        person.until("> ")
        person.type("\x04")
        assert person.process.wait(30) == 0
    assert chats(server)[-1] == ("", ["user:hello", "assistant:0 1 2 ", "user:again"])
    history = next(tmp_path.rglob("chat_history"))
    assert history.read_text().splitlines()[-2:] == ["hello", "again"]
    assert history.stat().st_mode & 0o077 == 0


class Interrupted:
    """A FAKE stream: Ctrl-C is pressed after its first piece, which no test can time."""

    cancelled = False

    def __iter__(self) -> Iterator[Chunk]:
        yield Chunk("0 ", (0,))
        raise KeyboardInterrupt

    def cancel(self) -> None:
        self.cancelled = True


def test_ctrl_c_stops_the_answer_not_the_conversation(server: FakeServer) -> None:
    stream = Interrupted()
    with Client(server.address) as client:
        whole = client.chat_stream
        session = ChatSession(client, ChatState(), {"max_tokens": 1})
        client.chat_stream = lambda *_, **__: stream  # type: ignore[assignment,method-assign]
        assert session.take("hello")
        assert stream.cancelled
        client.chat_stream = whole  # type: ignore[method-assign]
        assert session.take("again")
    assert chats(server) == [("", ["user:hello", "assistant:0 ", "user:again"])]


def test_ctrl_c_at_the_prompt_leaves_nothing_but_a_hint(
    server: FakeServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Not in the real terminal: Python may miss a Ctrl-C until the next key there."""
    keys = iter([KeyboardInterrupt(), "hello", EOFError()])

    def read(prompt: str) -> str:
        key = next(keys)
        if isinstance(key, str):
            return key
        raise key

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setenv("HOME", str(tmp_path))
    with Client(server.address) as client:
        ChatSession(client, ChatState(), {}).terminal()
    assert [turns for _, turns in chats(server)] == [["user:hello"]]
    assert capsys.readouterr().err.count("Ctrl-D quits") == 2, "at the start, and then"


def test_lines_are_edited_and_errors_survived(server: FakeServer, tmp_path: Path) -> None:
    with terminal(server, tmp_path) as person:
        person.until("> ")
        person.type("/adapter nope\n")
        person.until("error: no such adapter")
        person.until("> ")
        person.type("sx\x7fql\n")
        person.until("0 1 2 ")
        person.until("> ")
        person.type("\x1b[A\n")  # the line before, by the arrow key
        person.until("0 1 2 ")
        person.type("/quit\n")
        assert person.process.wait(30) == 0
    assert [turns[-1] for _, turns in chats(server)] == ["user:sql", "user:sql"]
