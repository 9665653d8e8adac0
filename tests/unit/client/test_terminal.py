"""What other people wrote never controls a terminal, whichever command shows it.

The FAKE server adds control characters, drawn at random, to every string that it sends. The
commands write to a real pseudo terminal.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import pty
import random
import re
import subprocess
import sys
import threading
import traceback
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import typer
from google.protobuf.message import Message
from rich.text import Text
from veneer_client.cli.main import cli
from veneer_proto.v1 import adapters_pb2, inference_pb2
from veneer_registry import screen, terminal
from veneer_registry.command_line import Program
from veneer_registry.terminal import visible, write_answer

from tests.planted import planted
from tests.unit.client.fake_server import FakeServer, Refusal

COLOUR = "\x1b[35;46m"
"""One that we do not use."""
SEQUENCES = (
    "\x1b]52;c;cHduZWQ=\x07",
    "\x1b]0;title\x1b\\",
    "\x1b[2J",
    COLOUR,
    "\x9b2J",
    "\x9d52;c;eA==\x9c",
    "\x1bPq\x1b\\",
    "\r",
    "\x08",
    "\x7f",
    "\x1b",
    "\x9b",
    "\x00",
    "\x85",
    "\u202e",
    "\u2066",
)
OURS = re.compile(
    r"\r(?=\x1b\[(?:2K|1A))|\x1b\[[0-9;]*m|\x1b\[\?25[lh]|\x1b\[2K|\x1b\[[0-9]*[AG]"
)
"""Colours; and the cursor of a bar or table that is redrawn."""
FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
MARK = "EVIL"


def payload(rng: random.Random) -> str:
    return MARK + "".join(
        rng.choice(SEQUENCES) if rng.random() < 0.7 else chr(rng.choice(CONTROLS))
        for _ in range(rng.randint(1, 6))
    )


CONTROLS = (*range(9), *range(11, 32), *range(0x7F, 0xA0), 0x202E, 0x2067)


def spoil(message: Message, rng: random.Random) -> None:
    """Add a payload to every string of a message, but for what a command asks by."""
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE and field.message_type.GetOptions().map_entry:
            kinds = field.message_type.fields_by_name
            for key in tuple(value):
                if kinds["value"].type == field.TYPE_MESSAGE:
                    spoil(value[key], rng)
                elif kinds["value"].type == field.TYPE_STRING:
                    value[key + payload(rng)] = value[key] + payload(rng)
                    value[key] += payload(rng)
        elif field.type == field.TYPE_MESSAGE:
            for each in value if field.is_repeated else [value]:
                spoil(each, rng)
        elif field.type == field.TYPE_STRING:
            if field.is_repeated:
                value[:] = [each + payload(rng) for each in value]
            else:
                setattr(message, field.name, value + payload(rng))


class Hostile(grpc.ServerInterceptor):  # type: ignore[misc]
    def __init__(self) -> None:
        self.rng = random.Random(seed := random.randrange(2**32))
        print(f"{seed=}")

    def intercept_service(self, continuation: Any, details: Any) -> Any:
        handler = continuation(details)
        if handler is None or "reflection" in details.method:
            return handler
        serialize = handler.response_serializer

        def spoiled(message: Any) -> Any:
            spoil(message, self.rng)
            return serialize(message)

        return handler._replace(response_serializer=spoiled)


class HostileServer(FakeServer):
    def _listen(self) -> grpc.Server:
        real = grpc.server
        self.hostile = Hostile()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(grpc, "server", lambda pool: real(pool, interceptors=[self.hostile]))
            return super()._listen()


@pytest.fixture
def hostile() -> Iterator[HostileServer]:
    with HostileServer() as made:
        adapter = made.add("chat")
        adapter.labels["team"] = "data"
        adapter.training.update({"config.lora.alpha": "16", "note": "x"})
        adapter.aliases.append("chat/prod")
        made.changes.append(
            adapters_pb2.HistoryEntry(event="published", name="chat", actor="me", peer="1:2")
        )
        yield made


@contextmanager
def pseudo_terminal() -> Iterator[tuple[Any, list[bytes]]]:
    """A stream on a real terminal, and what has arrived there."""
    ours, theirs = pty.openpty()
    tty.setraw(theirs)
    arrived: list[bytes] = []

    def drain() -> None:
        while True:
            try:
                data = os.read(ours, 65536)
            except OSError:  # the other side is closed
                return
            arrived.append(data)

    reader = threading.Thread(target=drain)
    reader.start()
    try:
        with open(theirs, "w", encoding="utf-8", newline="") as stream:
            yield stream, arrived
    finally:
        reader.join()
        os.close(ours)


def on_terminal(server: FakeServer, *args: str, lines: str = "") -> str:
    """All that a command writes to a terminal."""
    with pytest.MonkeyPatch.context() as patch, pseudo_terminal() as (stream, arrived):
        for name, value in {"VENEER_SERVER": server.address, "TERM": "xterm-256color"}.items():
            patch.setenv(name, value)
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)
        patch.setattr(sys, "stdin", io.StringIO(lines))
        with pytest.raises(SystemExit):
            cli(args)
    return b"".join(arrived).decode()


def check(shown: str) -> None:
    """Nothing but our own sequences reached the terminal."""
    left = OURS.sub("", shown.replace("\r\n", "\n"))
    assert not FORBIDDEN.search(left), repr(left[:2000])
    assert COLOUR not in shown


COMMANDS: tuple[tuple[str, ...], ...] = (
    ("ls",),
    ("ls", "--json"),
    ("ps",),
    ("info",),
    ("info", "--json"),
    ("health",),
    ("adapter", "show", "chat"),
    ("adapter", "show", "chat", "--full"),
    ("adapter", "show", "chat", "--json"),
    ("adapter", "aliases"),
    ("adapter", "history"),
    ("adapter", "history", "chat", "--json"),
    ("adapter", "label", "chat", "a=b"),
    ("adapter", "retain", "chat", "5"),
    ("adapter", "pin", "chat"),
    ("adapter", "unpin", "chat"),
    ("adapter", "share", "chat"),
    ("adapter", "activate", "chat"),
    ("adapter", "evict", "chat"),
    ("rm", "chat"),
    ("adapter", "alias", "chat/x", "chat"),
    ("adapter", "push", "FOLDER", "--name", "n"),
    ("self-test",),
    ("budgets",),
    ("usage",),
    ("plan", "--like", "chat"),
    ("generate", "hi"),
    ("generate", "hi", "--json"),
    ("generate", "hi", "--n", "2"),
    ("generate", "hi", "--top-logprobs", "1"),
    ("call", "GetServerInfo"),
    ("call", "ListAdapters"),
    ("--debug", "adapter", "show", "no"),
    ("chat",),
    ("chat", "-a", "chat"),
    ("adapter", "show", "no"),
)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_no_command_lets_a_stranger_control_the_terminal(
    hostile: HostileServer, adapter_folder: Path, command: tuple[str, ...]
) -> None:
    args = [str(adapter_folder) if each == "FOLDER" else each for each in command]
    shown = on_terminal(hostile, *args, lines="one\ntwo\n" if "chat" in command else "")
    check(shown)
    if "--json" in command and command[0] != "generate":
        assert MARK in json.dumps(json.loads(shown)), "the server's strings are shown"


@pytest.mark.parametrize("debug", [False, True])
def test_errors_of_a_server_are_text(server: FakeServer, debug: bool) -> None:
    rng = random.Random(seed := random.randrange(2**32))
    print(f"{seed=}")
    evil = payload(rng)
    server.refusals.append(
        Refusal(
            grpc.StatusCode.NOT_FOUND,
            evil,
            "ADAPTER_NOT_FOUND",
            {"did_you_mean": payload(rng)},
        )
    )
    shown = on_terminal(server, *(["--debug"] if debug else []), "adapter", "show", "chat")
    check(shown)
    assert MARK in shown
    assert debug or len(shown.strip().splitlines()) == 1


def test_an_escape_that_is_split_between_two_chunks_is_text(server: FakeServer) -> None:
    parts = ("a\x1b", "]52;c;cHduZWQ=", "\x07b\r", "\nc\x9b", "2J", "\ttab\n")
    server.pieces = [
        *(inference_pb2.GenerateStreamResponse(request_id="s", text=part) for part in parts),
        inference_pb2.GenerateStreamResponse(
            request_id="s",
            final=inference_pb2.GenerateStreamFinal(
                finish_reason=inference_pb2.FINISH_REASON_STOP,
                provenance=inference_pb2.Provenance(base_model="fake-base"),
            ),
        ),
    ]
    shown = on_terminal(server, "generate", "hi")
    assert shown.startswith("a\\u001b]52;c;cHduZWQ=\\u0007b\\r\nc\\u009b2J\ttab\n")


def test_a_pipe_gets_an_answer_s_bytes() -> None:
    everything = "".join(map(chr, (*range(0x300), *range(0x2000, 0x2070), 0x1F469)))
    reading, writing = os.pipe()
    with os.fdopen(writing, "w", encoding="utf-8", newline="") as pipe:
        write_answer(terminal.Guard(pipe), everything)
    with os.fdopen(reading, encoding="utf-8", newline="") as pipe:
        assert pipe.read() == everything


def test_a_terminal_gets_scripts_as_they_are_written() -> None:
    """Joiners and directions belong to answers in Persian or Arabic, and to emoji."""
    text = "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \u200f\U0001f469\u200d\U0001f4bb\n"
    with pseudo_terminal() as (stream, arrived):
        write_answer(stream, text)
    assert b"".join(arrived).decode() == text


def test_half_a_pair_is_no_byte_of_a_control() -> None:
    """In the locale C, Python's streams write U+DC80 to U+DCFF as bytes: here C2 9B, which is
    U+009B, out of a file of somebody's JSON."""
    evil = json.loads(r'"\udcc2\udc9b2J \ud83d"')
    code = (
        "import sys; from veneer_registry.terminal import Guard\n"
        "assert sys.stdout.errors == 'surrogateescape'\n"
        f"print({evil!r}, file=Guard(sys.stdout))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], env={"LC_ALL": "C"}, stdout=subprocess.PIPE, check=True
    ).stdout
    assert shown == rb"\udcc2\udc9b2J \ud83d" b"\n"


def test_json_stays_json_with_the_same_content() -> None:
    rng = random.Random(seed := random.randrange(2**32))
    print(f"{seed=}")
    for _ in range(200):
        text = "".join(
            chr(rng.choice((*CONTROLS, 0xE0001, 65, 0x2028, 0xDC9B))) for _ in range(20)
        )
        assert json.loads(visible(json.dumps(text, ensure_ascii=False))) == text


def test_a_console_shows_text_that_is_no_string_too() -> None:
    def shown() -> str:
        out = io.StringIO()
        screen.Screen(file=out, width=200, force_terminal=True).print(Text("a\x1b[2J\x9bb"))
        return out.getvalue()

    check(shown())
    with (
        planted(screen, "yield Segment(shown, segment.style)", "yield segment"),
        pytest.raises(AssertionError),
    ):
        check(shown())


PROGRAMS = (
    "veneer_client.cli.main:cli",
    "veneer_server.__main__:cli",
    "veneer_train.cli:app",
    "veneer_loadtest.cli:cli",
    "veneer_loadtest.simulation.command:cli",
    "veneer_ray.command:cli",
)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_is_guarded(program: str) -> None:
    module, _, name = program.partition(":")
    assert isinstance(getattr(importlib.import_module(module), name), Program)


@pytest.mark.parametrize("way", ["print", "echo", "stderr", "exception", "console"])
def test_a_program_shows_what_it_prints_in_any_way(way: str) -> None:
    """Whichever program it is: none has to remember."""
    evil = "a\x1b]52;c;eA==\x07\x9b2J\rb"
    program = Program(help="A program.")

    @program.command()
    def run() -> None:
        match way:
            case "print":
                print(evil)
            case "echo":
                typer.echo(evil)
            case "stderr":
                sys.stderr.writelines([evil, "\n"])
            case "exception":
                raise ValueError(evil)
            case "console":
                screen.Screen(stderr=True, force_terminal=True, highlight=False).print(
                    f"[red]{evil}[/red]"
                )

    with pytest.MonkeyPatch.context() as patch, pseudo_terminal() as (stream, arrived):
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)
        try:
            program([], standalone_mode=way != "exception")
        except SystemExit:
            pass
        except ValueError as error:
            traceback.print_exception(error)  # as the interpreter does at its end
    shown = b"".join(arrived).decode()
    check(shown)
    assert "a\\u001b]52;c;eA==\\u0007\\u009b2J\\rb" in shown


@pytest.mark.parametrize(
    ("module", "right", "wrong", "command"),
    [
        (terminal, "self.raw.write(visible(text))", "self.raw.write(text)", "adapter pin chat"),
        (terminal, "_IN_ANSWERS.sub(_escape, text) if", "text if", "generate hi"),
    ],
)
def test_a_place_that_is_forgotten_is_seen(
    hostile: HostileServer, module: Any, right: str, wrong: str, command: str
) -> None:
    with planted(module, right, wrong):
        shown = on_terminal(hostile, *command.split())
    with pytest.raises(AssertionError):
        check(shown)
