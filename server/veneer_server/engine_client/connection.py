"""The connection to one engine process: starts it, and owns the front's end of its socket."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import AsyncIterator
from dataclasses import replace

import msgspec
from veneer_registry.causes import cause_of
from veneer_registry.child_python import child_python
from veneer_registry.errors import EngineFailed

from veneer_server.progress import SINK, StartPart, StartStopped, stage
from veneer_server.wire.frames import LENGTH, framed
from veneer_server.wire.messages import (
    EngineConfig,
    EngineInfo,
    FromEngine,
    StartProgress,
    ToEngine,
    decode_from_engine,
    encode,
)

STOP_SECONDS = 5.0
"""How long a process may take to end before it is killed."""

GIVE_UP_SECONDS = 3.0
"""The same for a process that is still loading, which first cleans up after itself."""


class EngineConnection:
    """A running engine process, from `open` to `close`; the process ends with the connection.

    Attributes:
        info: the engine's description of itself, sent once the base model was loaded.
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
    async def open(cls, config: EngineConfig) -> EngineConnection:
        """Start a process and wait until it has loaded the base model, reporting progress to
        `progress.SINK`. Cancelling this call ends the process.

        Raises:
            EngineFailed: the process could not be started, or ended before it was ready; its
                log on stderr says why.
        """
        try:
            process, ours = await _spawn()
        except OSError as error:
            raise EngineFailed(
                f"the engine process could not be started: {cause_of(error)}. Free memory, or "
                "allow more processes and open files",
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
            writer.close()  # the process then ends by itself, with its child processes
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
        """Yield the engine's messages, until its socket closes.

        Raises:
            EngineFailed: a message cannot be decoded.
        """
        while frame := await next_frame(self._reader):
            for message in frame:
                yield message

    def kill(self) -> None:
        """Kill the process if it has not ended; `messages` then ends."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def close(self) -> None:
        """Close the socket, which makes the process end; kill it after `STOP_SECONDS`."""
        self._writer.close()
        try:
            await asyncio.wait_for(self._process.wait(), STOP_SECONDS)
        except TimeoutError:
            self.kill()
            await self._process.wait()


async def _loaded(reader: asyncio.StreamReader, messages: list[FromEngine]) -> EngineInfo:
    """Wait for the engine's description of itself, sent once the base model is loaded.

    Args:
        messages: the engine's first messages.
    """
    parts: dict[str, StartPart] = {}
    try:
        while messages:
            for message in messages:
                if isinstance(message, EngineInfo):
                    return message
                if not isinstance(message, StartProgress):
                    raise EngineFailed("the engine sent an unexpected message while loading")
                part = message.part
                parts[part.name] = part
                with contextlib.suppress(StartStopped):
                    SINK.get()(part)
                if part.state != "running":
                    del parts[part.name]
            messages = await next_frame(reader)
        raise EngineFailed(
            "the engine process exited while loading the base model; see its log"
        )
    finally:
        for part in parts.values():  # parts that were running when it ended
            SINK.get()(replace(part, state="failed"))


async def _spawn() -> tuple[asyncio.subprocess.Process, socket.socket]:
    """Start a process; also return our end of its socket. After an OSError nothing is
    left open."""
    ours, theirs = socket.socketpair()
    with contextlib.ExitStack() as failed, theirs:
        failed.enter_context(ours)
        process = await asyncio.create_subprocess_exec(
            *child_python("-m", "veneer_server.engine.process", str(theirs.fileno())),
            pass_fds=(theirs.fileno(),),
            stdin=asyncio.subprocess.DEVNULL,
            env=_environment(),
            # Only the front gets the terminal's Ctrl-C. No setsid: with autogroup, Linux
            # would then give the engine half of the CPU time and the front's other processes
            # the rest, regardless of their nice values.
            preexec_fn=os.setpgrp,
        )
        failed.pop_all()
    return process, ours


def _environment() -> dict[str, str]:
    """Return the engine's environment, in which OpenMP threads sleep at barriers unless
    OMP_WAIT_POLICY is already set.

    Spinning is a little faster on an idle machine, but on two cores beside one busy
    process, such as the front, it makes a step take three times as long.
    """
    return {"OMP_WAIT_POLICY": "passive", **os.environ}


async def next_frame(reader: asyncio.StreamReader) -> list[FromEngine]:
    """Read the messages of the next frame; empty when the other side has closed.

    Raises:
        EngineFailed: the frame cannot be decoded, so neither can any later one.
    """
    try:
        (size,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
        return decode_from_engine(await reader.readexactly(size))
    except (asyncio.IncompleteReadError, OSError):
        return []
    except msgspec.MsgspecError as error:
        raise EngineFailed(
            f"cannot decode a frame of the engine: {error}",
            metadata={"cause": "bad_frame"},
        ) from error
