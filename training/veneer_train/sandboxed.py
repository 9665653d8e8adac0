"""The process that `sandbox` runs code in. It imports none of our packages.

It reads a request from stdin (``source``, ``modules``, ``expressions``), imports the modules,
confines itself, and answers on stdout in lines: `CONFINED` or why not; `ENDED`
once the source has run; for each expression its value as a Python literal, or `FAILED`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import struct
import sys
import types
from typing import Final

CONFINED: Final = "confined"
ENDED: Final = "ended"
FAILED: Final = "!"

CPU_S: Final = 2
MEMORY: Final = 512 << 20

REFUSED: Final = frozenset(
    {"antigravity", "ctypes", "ensurepip", "idlelib", "test", "this", "turtle", "turtledemo"}
)
"""Modules that are not imported for an answer: they act on import, or need a screen."""
_LAZY: Final = (
    "_strptime",
    "encodings.ascii",
    "encodings.latin_1",
    "encodings.utf_8",
    "locale",
)
"""Modules that others of the standard library import only on use, too late once confined."""
_DEEPEST: Final = 20
"""Most levels of nesting in a value."""

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_SECCOMP: Final = 22
_PR_SET_NO_NEW_PRIVS: Final = 38
_FILTER_MODE: Final = 2
_SIGKILL: Final = 9

_LOAD: Final = 0x20
_EQUAL: Final = 0x15
_RETURN: Final = 0x06
_ALLOW: Final = 0x7FFF0000
_KILL: Final = 0x80000000
_EPERM: Final = 0x00050000 | 1
_OFFSET_NUMBER, _OFFSET_ARCHITECTURE = 0, 4

# The allowed calls: memory, locks, clocks, signals within the process, open descriptors (three
# of /dev/null and the answer's pipe), random numbers, and exit. Not allowed is any call that
# opens, starts, connects, sends, waits, maps another process, or changes these limits.
_CALLS: Final = (
    "read",
    "write",
    "writev",
    "close",
    "fstat",
    "lseek",
    "mmap",
    "mprotect",
    "munmap",
    "mremap",
    "madvise",
    "brk",
    "rt_sigaction",
    "rt_sigprocmask",
    "rt_sigreturn",
    "sigaltstack",
    "restart_syscall",
    "futex",
    "rseq",
    "sched_yield",
    "getrandom",
    "clock_gettime",
    "clock_getres",
    "gettimeofday",
    "getpid",
    "gettid",
    "getuid",
    "geteuid",
    "getgid",
    "getegid",
    "exit",
    "exit_group",
)
_X86_64: Final = (
    0,
    1,
    20,
    3,
    5,
    8,
    9,
    10,
    11,
    25,
    28,
    12,
    13,
    14,
    15,
    131,
    219,
    202,
    334,
    24,
    318,
    228,
    229,
    96,
    39,
    186,
    102,
    107,
    104,
    108,
    60,
    231,
)
_AARCH64: Final = (
    63,
    64,
    66,
    57,
    80,
    62,
    222,
    226,
    215,
    216,
    233,
    214,
    134,
    135,
    139,
    132,
    128,
    98,
    293,
    124,
    278,
    113,
    114,
    169,
    172,
    178,
    174,
    175,
    176,
    177,
    93,
    94,
)
_MACHINES: Final = {
    "x86_64": (0xC000003E, dict(zip(_CALLS, _X86_64, strict=True))),
    "aarch64": (0xC00000B7, dict(zip(_CALLS, _AARCH64, strict=True))),
}
"""Machine -> its AUDIT_ARCH and its numbers of the calls."""


def confine() -> str:
    """Set limits, then allow only `_CALLS`. Returns why that is impossible, or ""."""
    try:
        import ctypes
        import resource

        libc = ctypes.CDLL(None, use_errno=True)
        architecture, numbers = _MACHINES[os.uname().machine]
    except (ImportError, OSError, AttributeError, KeyError) as error:
        return f"no filter for this system: {type(error).__name__} {error}"
    if sys.platform != "linux" or sys.maxsize < 1 << 32:
        return f"no filter for this Python: {sys.platform}"
    for what, most in (
        (resource.RLIMIT_CPU, CPU_S),
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))
    program = filter_program(architecture, tuple(numbers.values()))
    code = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
    # If the parent ends, nobody waits for this process: end it, too.
    libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        _PR_SET_SECCOMP, _FILTER_MODE, ctypes.c_char_p(header), 0, 0
    ):
        return f"seccomp: {os.strerror(ctypes.get_errno())}"
    with contextlib.suppress(OSError):
        os.close(os.open("/", os.O_RDONLY))
        return "seccomp has no effect"
    return ""


def filter_program(architecture: int, allowed: tuple[int, ...]) -> bytes:
    """The BPF program: a call of another architecture kills the process, and a call that is not
    ``allowed`` fails with EPERM."""
    count = len(allowed)
    instructions = [
        (_LOAD, 0, 0, _OFFSET_ARCHITECTURE),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _OFFSET_NUMBER),
        *((_EQUAL, count - place, 0, number) for place, number in enumerate(allowed)),
        (_RETURN, 0, 0, _EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("=HBBI", *each) for each in instructions)


def literal(value: object, depth: int = 0) -> str:
    """The value as a Python literal; a subclass's value is written as its base's, since the two
    compare equal. Raises ValueError if it has none."""
    if value is None or isinstance(value, bool):
        return repr(value)
    if isinstance(value, int):
        return int.__repr__(value)
    if isinstance(value, str):
        return ascii(str.__str__(value))
    if isinstance(value, float) and math.isfinite(value):
        return float.__repr__(value)
    if depth == _DEEPEST:
        raise ValueError(f"no literal: more than {_DEEPEST} within each other")
    if isinstance(value, dict):
        pairs = (
            f"{literal(key, depth + 1)}: {literal(item, depth + 1)}"
            for key, item in value.items()
        )
        return "{" + ", ".join(pairs) + "}"
    if not isinstance(value, list | tuple | set | frozenset):
        raise ValueError(f"no literal: {type(value).__name__}")
    items = [literal(item, depth + 1) for item in value]
    joined = ", ".join(items)
    if isinstance(value, list):
        return f"[{joined}]"
    if isinstance(value, tuple):
        return f"({joined},)" if items else "()"
    return f"{{{joined}}}" if items else "set()"


def main() -> None:
    """Read the request, run it, and end."""
    request = json.loads(sys.stdin.buffer.read())
    results = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    os.close(nowhere)
    for name in (*_LAZY, *request["modules"]):
        with contextlib.suppress(BaseException):  # the answer's own import fails then
            importlib.import_module(name)
    problem = confine()
    os.write(results, f"{problem or CONFINED}\n".encode("ascii", "replace"))
    if problem:
        return
    for name in ("ctypes", "_ctypes"):
        sys.modules.pop(name, None)
    # `dataclasses` and others look a class's module up there.
    answer = sys.modules["answer"] = types.ModuleType("answer")
    namespace = vars(answer)
    try:
        # Else it would be compiled with the future imports of this file.
        code = compile(request["source"], "answer", "exec", dont_inherit=True)
        exec(code, namespace)  # nosec B102 # confined above
    except BaseException:
        os._exit(1)
    lines = [ENDED]
    for expression in request["expressions"]:
        try:
            code = compile(expression, "test", "eval", dont_inherit=True)
            lines.append(literal(eval(code, namespace)))  # noqa: S307 # nosec B307
        except BaseException:
            lines.append(FAILED)
    text = "".join(f"{line}\n" for line in lines).encode("ascii")
    while text:
        text = text[os.write(results, text) :]
    os._exit(0)


if __name__ == "__main__":
    main()
