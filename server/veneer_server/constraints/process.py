"""The parent of all processes that hold constraints; the engine starts it.

It loads the tokenizer once (0.3 s and 60 MB) and forks a child for each trial and the
matcher processes. So a child starts in milliseconds and shares the vocabulary, a killed one is
replaced at once, and a child's use of time and memory ends with it.

It has no threads, since only then is forking safe, and runs no caller's constraint itself.
Only this process signals its children: since it reaps them, only it knows that a process id is
still theirs.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
import resource
import select
import signal
import socket
import sys
from typing import Final, NoReturn

import msgspec
from llguidance import LLTokenizer

from veneer_server.constraints.frames import (
    LONGEST,
    BeginMatching,
    ChildEnded,
    FromControl,
    Kill,
    MatchingSetup,
    ParentReady,
    Renice,
    Role,
    decode,
)
from veneer_server.constraints.grammar import load_tokenizer
from veneer_server.constraints.matcher.matching import MARKER, run_matching
from veneer_server.constraints.trial import run_trial
from veneer_server.system.heap import data_bytes, fill_holes
from veneer_server.wire.messages import ConstraintLimits

NAMES: Final[dict[Role, str]] = {
    "trial": "veneer-compile",
    "quick": "veneer-matcher",
    "slow": "veneer-matcher",
}
"""Process names that ``ps`` and ``top`` show; at most 15 characters."""

_NICE: Final = 10
_DESCRIPTORS: Final = 3
_NOTES_BYTES: Final = 64 << 10
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NAME: Final = 15

_libc = ctypes.CDLL(None)


def main() -> None:
    """Fork children until the engine closes the socket; they end with this process."""
    # Ctrl-C is handled by the front, which drains; the engine ends this process.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _libc.prctl(_PR_SET_NAME, b"veneer-constrai", 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    control = socket.socket(fileno=int(sys.argv[1]))
    body = control.recv(LONGEST)
    if not body:
        return
    setup = decode(body)
    assert isinstance(setup, MatchingSetup), "comes first"
    try:
        tokenizer = load_tokenizer(setup.tokenizer, setup.vocab_size, setup.eos_token_ids)
    except BaseException as error:  # of any kind, including panics
        control.send(msgspec.msgpack.encode(ParentReady(str(error) or type(error).__name__)))
        return
    gc.collect()
    fill_holes()  # loading the tokenizer left 28 MB of holes that children could use uncounted
    gc.freeze()  # garbage collection would copy pages shared with children
    with contextlib.suppress(ConnectionError):  # the engine has ended
        control.send(msgspec.msgpack.encode(ParentReady("")))
        _Parent(control, tokenizer, setup.limits).run()


class _Parent:
    def __init__(
        self, control: socket.socket, tokenizer: LLTokenizer, limits: ConstraintLimits
    ) -> None:
        self._control = control
        self._tokenizer = tokenizer
        self._limits: dict[Role, ConstraintLimits] = {
            "trial": limits,
            "quick": limits,
            "slow": _of_slow(limits),
        }
        self._children: dict[int, tuple[int, int]] = {}
        """Number and process id, by a descriptor that is readable once the child has ended.
        Children in here have not been reaped, so their process ids are valid."""
        self._poll = select.poll()
        self._pid = os.getpid()

    def run(self) -> None:
        self._poll.register(self._control, select.POLLIN)
        while True:
            for descriptor, _ in self._poll.poll():
                if descriptor in self._children:
                    self._reap(descriptor)
                elif not self._hear():
                    return

    def _say(self, message: FromControl) -> None:
        self._control.send(msgspec.msgpack.encode(message))

    def _hear(self) -> bool:
        body, descriptors, _, _ = socket.recv_fds(self._control, LONGEST, _DESCRIPTORS)
        if not body:
            return False
        match decode(body):
            case BeginMatching() as begin:
                self._begin(begin, descriptors)
            case Kill(number):
                for pid in self._pids(number):
                    os.kill(pid, signal.SIGKILL)
            case Renice(number):
                for pid in self._pids(number):
                    with contextlib.suppress(OSError):  # not allowed in some sandboxes
                        os.setpriority(os.PRIO_PROCESS, pid, _NICE)
        return True

    def _pids(self, number: int) -> list[int]:
        """The child's process id, unless it has been reaped."""
        return [pid for child, pid in self._children.values() if child == number]

    def _begin(self, begin: BeginMatching, descriptors: list[int]) -> None:
        try:
            pid = os.fork()
            if not pid:
                self._be_child(begin.role, *descriptors)
        except OSError:  # no process or no memory is left
            self._say(ChildEnded(begin.number, signal.SIGKILL))
            return
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        watched = os.pidfd_open(pid)
        self._children[watched] = begin.number, pid
        self._poll.register(watched, select.POLLIN)

    def _reap(self, descriptor: int) -> None:
        number, pid = self._children.pop(descriptor)
        self._poll.unregister(descriptor)
        os.close(descriptor)
        _, status = os.waitpid(pid, 0)
        ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        self._say(ChildEnded(number, ended_by))

    def _be_child(self, role: Role, connection: int, notes: int, marker: int) -> NoReturn:
        """Never returns, as the stack above belongs to the parent."""
        try:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            _libc.prctl(_PR_SET_NAME, NAMES[role].encode(), 0, 0, 0)
            if os.getppid() != self._pid:
                os._exit(0)  # the parent ended before PDEATHSIG was set
            self._control.close()
            for descriptor in self._children:
                os.close(descriptor)
            os.dup2(notes, 2)
            os.close(notes)
            with contextlib.closing(socket.socket(fileno=connection)) as talking:
                limits = self._limits[role]
                _bound(role, limits)
                if role == "trial":
                    run_trial(talking, self._tokenizer, limits)
                else:
                    if role == "slow":
                        os.nice(_NICE)
                    with mmap.mmap(marker, MARKER.size) as shared:
                        run_matching(talking, shared, self._tokenizer, limits)
        except BaseException as error:  # the parent's code must not run here
            with contextlib.suppress(OSError):
                os.write(2, repr(error).encode()[:1000])
            os._exit(1)
        os._exit(0)


def _of_slow(limits: ConstraintLimits) -> ConstraintLimits:
    """Limits of the slow process. Few sequences are slow, but those take the most memory:
    together they may take half of the quick process's limit, and at least one sequence's."""
    most = max(limits.memory, limits.matcher_memory // 2)
    return msgspec.structs.replace(limits, matcher_memory=most)


def _bound(role: Role, limits: ConstraintLimits) -> None:
    """Limit this process's memory, not counting shared memory, and the size of its notes."""
    own = limits.memory if role == "trial" else 2 * limits.matcher_memory
    most = data_bytes() + own
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_NOTES_BYTES, _NOTES_BYTES))


if __name__ == "__main__":
    main()
