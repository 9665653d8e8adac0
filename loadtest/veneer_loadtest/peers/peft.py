"""The parent's side of the PEFT peer: one child process, one call at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeVar

from veneer_registry.child_python import child_python
from veneer_registry.extras import install_extra

from veneer_loadtest.errors import PeerError
from veneer_loadtest.peers.peft_messages import (
    FromPeer,
    Generate,
    Generated,
    PeerFailed,
    PeerReady,
    PeftScore,
    PeftSetup,
    Scored,
    ToPeer,
    decode_from_peer,
    encode,
)

_LONGEST_LINE: Final = 64 << 20
"""Bytes; asyncio's default limit is shorter than a batch of log-probabilities."""

_IMPORTED: Final = ("torch", "transformers", "accelerate", "bitsandbytes", "peft")
"""Packages that `peft_process` imports. They are in the extra ``train``, which no other command
of ``veneer-loadtest`` needs."""

Reply = TypeVar("Reply", PeerReady, Generated, Scored)


def require_peft() -> None:
    """Check that the child process can import what it needs, before anything is started.

    Raises:
        PeerError: a package is not installed; the message says how to install it.
    """
    missing = [name for name in _IMPORTED if find_spec(name) is None]
    if missing:
        raise PeerError(
            f"compare needs PEFT and what it runs on, and {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not installed: {install_extra('train')}",
            metadata={"peer": "peft", "cause": "not_installed"},
        )


class PeftPeerProcess:
    """transformers + bitsandbytes + PEFT in a separate process; see `peft_process`.

    Between calls it blocks on a pipe and uses no CPU. Use it in an ``async with``.
    """

    ready: PeerReady

    def __init__(
        self, base_folder: Path, adapters: Mapping[str, Path], threads: int, log: Path
    ) -> None:
        self._setup = PeftSetup(
            base_folder=str(base_folder),
            adapters={name: str(folder) for name, folder in adapters.items()},
            threads=threads,
        )
        self._log = log
        self._process: asyncio.subprocess.Process

    async def __aenter__(self) -> PeftPeerProcess:
        with self._log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *child_python("-m", "veneer_loadtest.peers.peft_process"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                limit=_LONGEST_LINE,
                # Ctrl-C in a terminal then reaches only the parent, which kills the child.
                start_new_session=True,
            )
        try:
            self.ready = await self._ask(self._setup, PeerReady)
        except BaseException:
            await self.end()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.end()

    async def generate(self, call: Generate) -> Generated:
        """Decode one batch."""
        return await self._ask(call, Generated)

    async def score(self, call: PeftScore) -> Scored:
        """Score one row."""
        return await self._ask(call, Scored)

    async def _ask(self, call: ToPeer, reply: type[Reply]) -> Reply:
        answer = await self._exchange(call)
        if isinstance(answer, reply):
            return answer
        why = answer.message if isinstance(answer, PeerFailed) else f"it sent {answer}"
        raise PeerError(
            f"the PEFT peer failed ({why}); its log ends:\n{self._log_tail()}",
            metadata={"peer": "peft"},
        )

    async def _exchange(self, call: ToPeer) -> FromPeer:
        pipe_in: Any = self._process.stdin
        pipe_out: Any = self._process.stdout
        try:
            pipe_in.write(encode(call))
            await pipe_in.drain()
        except (BrokenPipeError, ConnectionResetError):
            return PeerFailed(message="it ended")
        line = await pipe_out.readline()
        return decode_from_peer(line) if line else PeerFailed(message="it ended")

    async def end(self) -> None:
        """Kill the process; a second call does nothing."""
        # Killed at once: it may be in the middle of a batch, and has no state to save.
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()

    def _log_tail(self) -> str:
        return "\n".join(self._log.read_text("utf-8", errors="replace").splitlines()[-8:])
