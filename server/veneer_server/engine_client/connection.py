"""One started engine process and the front's end of its socket."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import AsyncIterator
from dataclasses import replace

import msgspec
from veneer_registry.child_python import child_python
from veneer_registry.errors import EngineFailed

from veneer_server.progress import SINK, Part, StartStopped, stage
from veneer_server.wire.frames import LENGTH, framed
from veneer_server.wire.messages import (
    EngineConfig,
    EngineInfo,
    FromEngine,
    Loading,
    ToEngine,
    decode_from_engine,
    encode,
)

__all__ = ["Connection"]

STOP_SECONDS = 5.0
"""How long a process may take to end before it is killed."""

GIVE_UP_SECONDS = 3.0
"""The same of one that still loads: it removes what it has begun."""


class Connection:
    """From `open` to `close`; the process ends with it.

    Attributes:
        info: what the engine said of itself once the base model was loaded.
    """

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        info: EngineInfo,
    ) -> None:
        self.info = info
        self._process = process
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, config: EngineConfig) -> Connection:
        """Start a process and wait until it has loaded the base model; `progress.SINK` is
        told how far it is. Cancelling ends it.

        Raises:
            EngineFailed: it could not be started, or ended before it was ready; its own
                words are on stderr.
        """
        try:
            process, ours = await _spawn()
        except OSError as error:
            raise EngineFailed(
                f"the engine process could not be started: {error}. Free memory, or allow "
                "more processes and open files",
                metadata={
                    "cause": "not_started",
                    "errno": errno.errorcode.get(error.errno or 0, ""),
                },
            ) from error
        reader, writer = await asyncio.open_connection(sock=ours)
        begun = False
        try:
            writer.write(framed(msgspec.msgpack.encode(config)))
            with stage("starting the engine"):
                messages = await next_frame(reader)
            begun = bool(messages)
            info = await _loaded(reader, messages)
        except BaseException:
            writer.close()  # it ends by itself, and what it has started with it
            if begun and process.returncode is None:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(process.wait(), GIVE_UP_SECONDS)
            if process.returncode is None:
                process.kill()
            await process.wait()
            raise
        return cls(process, reader, writer, info)

    @property
    def pid(self) -> int:
        """Process id of the engine."""
        return self._process.pid

    def write(self, message: ToEngine) -> None:
        """Send one message; never blocks."""
        self._writer.write(encode([message]))

    async def messages(self) -> AsyncIterator[FromEngine]:
        """What the engine says, until its socket closes.

        Raises:
            EngineFailed: what it says cannot be read.
        """
        while frame := await next_frame(self._reader):
            for message in frame:
                yield message

    def kill(self) -> None:
        """End the process at once, if it has not ended; `messages` ends."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def close(self) -> None:
        """Wait for the process to end, which a closed socket makes it do; kill it
        after `STOP_SECONDS`."""
        self._writer.close()
        try:
            await asyncio.wait_for(self._process.wait(), STOP_SECONDS)
        except TimeoutError:
            self.kill()
            await self._process.wait()


async def _loaded(reader: asyncio.StreamReader, messages: list[FromEngine]) -> EngineInfo:
    """What the engine says of itself once the base model is loaded.

    Args: messages: its first.
    """
    parts: dict[str, Part] = {}
    try:
        while messages:
            for message in messages:
                if isinstance(message, EngineInfo):
                    return message
                if not isinstance(message, Loading):
                    raise EngineFailed("the engine said something else than how it loads")
                part = message.part
                parts[part.name] = part
                with contextlib.suppress(StartStopped):
                    SINK.get()(part)
                if part.state != "running":
                    del parts[part.name]
            messages = await next_frame(reader)
        raise EngineFailed(
            "the engine process ended while loading the base model; its log says why"
        )
    finally:
        for part in parts.values():  # it has ended in the middle of them
            SINK.get()(replace(part, state="failed"))


async def _spawn() -> tuple[asyncio.subprocess.Process, socket.socket]:
    """A process, and our end of its socket; raises OSError and leaves nothing open."""
    ours, theirs = socket.socketpair()
    with contextlib.ExitStack() as failed, theirs:
        failed.enter_context(ours)
        process = await asyncio.create_subprocess_exec(
            *child_python("-m", "veneer_server.engine.process", str(theirs.fileno())),
            pass_fds=(theirs.fileno(),),
            stdin=asyncio.subprocess.DEVNULL,
            env=_environment(),
            # The terminal's Ctrl-C is for the front alone. Not a session of its own: with
            # autogroup, Linux would then give the engine half of the processors and the
            # front's other processes the rest, whatever their nice values say.
            preexec_fn=os.setpgrp,
        )
        failed.pop_all()
    return process, ours


def _environment() -> dict[str, str]:
    """The engine's environment: OpenMP threads sleep at barriers unless told otherwise.

    Spinning is a little faster on an idle machine, but beside one busy process on
    two cores it makes a step three times as long, and the front is such a process.
    """
    return {"OMP_WAIT_POLICY": "passive", **os.environ}


async def next_frame(reader: asyncio.StreamReader) -> list[FromEngine]:
    """The messages of the next frame; none when the other side has closed.

    Raises:
        EngineFailed: it cannot be read, and so nothing after it.
    """
    try:
        (size,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
        return decode_from_engine(await reader.readexactly(size))
    except (asyncio.IncompleteReadError, OSError):
        return []
    except msgspec.MsgspecError as error:
        raise EngineFailed(
            f"a frame of the engine cannot be read: {error}", metadata={"cause": "bad_frame"}
        ) from error
