"""``veneer chat``: a conversation in the terminal, or line by line from a script."""

from __future__ import annotations

import contextlib
import re
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Final

import typer
from veneer_registry.errors import AdapterNotFound, InvalidField, VeneerError
from veneer_registry.screen import Screen, cell
from veneer_registry.terminal import write_answer

from veneer_client.cli.context import DebugFlag, ServerOption, connect, errors_shown
from veneer_client.cli.generate import (
    AdapterOption,
    MaxTokens,
    SessionOption,
    given,
    named,
)
from veneer_client.cli.sampling_flags import flag
from veneer_client.cli.show import summary, write_reasoning
from veneer_client.cli.words import in_cli_words
from veneer_client.client import Client
from veneer_client.types import BoundOptions, ChatMessage

__all__ = ["EXAMPLES", "ChatSession", "ChatState", "chat"]

EXAMPLES = """
Examples:

  veneer chat

  veneer chat -a chat --system "Answer in one sentence."

  printf 'My name is Ada.\\nWhat is my name?\\n' | veneer chat --temperature 0

Commands: /adapter NAME, /adapter, /system TEXT, /reset, /help, /quit. Ctrl-C stops the
answer, Ctrl-D quits.
"""

_HELP: Final = """\
/adapter NAME   switch to an adapter's current revision; without NAME, to the base model. The
                conversation stays on that revision even if a newer one is published
/system TEXT    set the system message; without TEXT remove it
/reset          forget the conversation
/quit           quit (also Ctrl-D); Ctrl-C stops an answer
//...           a message that begins with /"""
_HISTORY_LINES: Final = 1000


@dataclass
class ChatState:
    """The state that the next answer depends on."""

    adapter: str = ""
    revision: str = ""
    """The revision that gave the first answer, as ``name@revision``; "" before that answer
    and for the base."""
    system: str = ""
    session: str = field(default_factory=lambda: uuid.uuid4().hex)
    turns: list[ChatMessage] = field(default_factory=list)

    def asking(self, text: str) -> tuple[ChatMessage, ...]:
        """All messages to send for a new message of the user."""
        system = (ChatMessage("system", self.system),) if self.system else ()
        return (*system, *self.turns, ChatMessage("user", text))

    def answered(self, text: str, answer: str) -> None:
        """Add a message and its answer to the conversation."""
        self.turns += [ChatMessage("user", text), ChatMessage("assistant", answer)]


def chat(
    context: typer.Context,
    adapter: AdapterOption = None,
    system: Annotated[str, typer.Option(help="The system message.")] = "",
    max_tokens: MaxTokens = None,
    temperature: Annotated[float | None, flag("temperature")] = None,
    seed: Annotated[int | None, flag("seed")] = None,
    session: SessionOption = None,
    server: ServerOption = None,
    debug: DebugFlag = False,
) -> None:
    """Chat with the model, turn by turn."""
    options: BoundOptions = given(max_tokens=max_tokens, temperature=temperature, seed=seed)
    with errors_shown(context, debug), connect(context, server) as client:
        conversation = ChatState(system=system)
        conversation.session = session or conversation.session
        talk = ChatSession(client, conversation, options)
        talk.use(named(adapter))
        if sys.stdin.isatty():
            talk.terminal()
        else:
            talk.script()


class ChatSession:
    """Reads lines, runs commands, shows answers."""

    def __init__(self, client: Client, conversation: ChatState, options: BoundOptions) -> None:
        self._client = client
        self._conversation = conversation
        self._options = options
        self._notes = Screen(stderr=True, highlight=False, soft_wrap=True)

    def terminal(self) -> None:
        """Chat until the user quits; an error ends an answer, not the conversation."""
        self._note("/help shows the commands, Ctrl-D quits")
        with _line_editing():
            while True:
                try:
                    line = input("> ")
                except EOFError:
                    print()
                    return
                except KeyboardInterrupt:
                    print()
                    self._note("Ctrl-D quits")
                    continue
                try:
                    if not self.take(line):
                        return
                except VeneerError as error:
                    self._notes.print(f"[red]error:[/red] {cell(in_cli_words(error.message))}")

    def script(self) -> None:
        """Send each line of standard input as a message; stop at the first error."""
        for line in sys.stdin:
            if not self.take(line.rstrip("\r\n")):
                return

    def take(self, line: str) -> bool:
        """Run a command or answer a message; False to quit."""
        if line.startswith("/") and not line.startswith("//"):
            return self._obey(line)
        text = line[1:] if line.startswith("//") else line
        if text.strip():
            self._answer(text)
        return True

    def use(self, adapter: str) -> None:
        """Switch to an adapter. Raises AdapterNotFound without changing anything."""
        if adapter:
            whom = self._client.get(adapter).adapter.short
        else:
            whom = f"{self._client.info().base_model.name} (the base model)"
        self._conversation.adapter, self._conversation.revision = adapter, ""
        self._note(f"talking to {whom}")

    def _obey(self, line: str) -> bool:
        command, _, rest = line.partition(" ")
        match command, rest.strip():
            case "/quit", _:
                return False
            case "/help", _:
                self._note(_HELP)
            case "/adapter", name:
                self.use(name)
            case "/system", text:
                self._conversation.system = text
                self._note("system message set" if text else "no system message")
            case "/reset", _:
                self._conversation.turns.clear()
                self._conversation.revision = ""
                self._note("forgotten")
            case _:
                raise InvalidField(
                    f"unknown command {command}: /help lists all; start with // to send a "
                    "message that starts with /",
                    metadata={"field": "command"},
                )
        return True

    def _answer(self, text: str) -> None:
        conversation = self._conversation
        pieces: list[str] = []
        options = self._options
        if "/" in conversation.adapter:  # the same target of the alias for all turns
            options = {**options, "session_key": conversation.session}
        adapter = conversation.revision or conversation.adapter
        stream = self._client.chat_stream(conversation.asking(text), adapter=adapter, **options)
        stopped = False
        try:
            for chunk in stream:
                write_reasoning(chunk)
                pieces.append(chunk.text)
                write_answer(sys.stdout, chunk.text)
        except KeyboardInterrupt:
            stream.cancel()
            stopped = True
        except AdapterNotFound as error:
            if not conversation.revision:
                raise
            raise AdapterNotFound(
                f"{error.message}; /adapter {conversation.adapter} switches to its current "
                "revision",
                metadata=error.metadata,
            ) from error
        finally:
            if pieces and not pieces[-1].endswith("\n"):
                print(flush=True)
        answer = "".join(pieces)
        if answer or not stopped:
            conversation.answered(text, answer)
        if not stopped and (revision := stream.final.provenance.revision):
            name = re.split("[@/]", conversation.adapter)[0]
            conversation.revision = f"{name}@{revision}"
        self._note("stopped" if stopped else summary(stream.final))

    def _note(self, text: str) -> None:
        self._notes.print(text, style="dim", markup=False)


@contextlib.contextmanager
def _line_editing() -> Iterator[None]:
    """Arrow keys and a persistent history, if this Python has readline."""
    try:
        import readline
    except ImportError:  # Windows
        yield
        return
    history = Path(typer.get_app_dir("veneer")) / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(history)
    readline.set_history_length(_HISTORY_LINES)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            history.parent.mkdir(parents=True, exist_ok=True)
            history.touch(mode=0o600)  # the user's questions are private
            readline.write_history_file(history)
