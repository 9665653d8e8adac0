"""Runs Python that a model wrote, in a process that can do nothing but compute.

The process (`sandboxed`) is a Python of its own with an empty environment. Before it runs the
code it installs a seccomp filter, which it cannot take back: the listed system calls are
allowed, and all others fail. So the code cannot open a file or a socket, start a process or a
thread, send a signal, or read another process's memory. Limits bound its CPU time, memory and
output; the parent kills it when its time is up.

The process does not decide the verdict. It returns *values*, as Python literals, and the
caller compares them with the expected ones (`checks`). The process never gets the expected
values, so code that prints a verdict, exits early or replaces ``assert`` gains nothing.

Where the kernel or the CPU has no such filter, no code is run: see `require`.

It does not protect against kernel bugs in the allowed calls, leaks through timing, and the use
of one core until the CPU limit. To judge a model that may attack those, use a virtual machine.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from veneer_registry.child_python import child_python
from veneer_registry.errors import Unimplemented

from veneer_train import sandboxed

_TIMEOUT_S: Final = 20.0
"""Wall-clock limit, for code that hangs; code that computes is ended by its CPU limit, however
busy this machine is."""
_RESULT_BYTES: Final = 64 << 10
_SOURCE_CHARS: Final = 20_000
PROGRAM: Final = Path(sandboxed.__file__)

DESCRIPTION: Final = (
    "a separate process under a seccomp filter: no files, network, processes, threads or "
    f"environment, {sandboxed.CPU_S} s of CPU, {sandboxed.MEMORY >> 20} MiB. It does not "
    "protect against kernel bugs."
)
"""Text for people who are shown a verdict."""


@dataclass(frozen=True, slots=True)
class Ran:
    """Outcome of running the code.

    Attributes:
        ended: it ran to its end, and its process exited with status 0. Code may forge this.
        values: value of each expression, as a Python literal; None if it raised, returned
            something that has no literal, or was not reached.
    """

    ended: bool
    values: tuple[str | None, ...]


def require() -> None:
    """Raise Unimplemented if code cannot be isolated on this machine."""
    run_python("")


def run_python(source: str, expressions: Sequence[str] = ()) -> Ran:
    """Run ``source``, then evaluate ``expressions`` in its namespace.

    Only modules of the standard library that it names in an import are available.

    Raises:
        Unimplemented: this machine has no sandbox. Nothing was run.
    """
    nothing = Ran(False, (None,) * len(expressions))
    if len(source) > _SOURCE_CHARS:
        return nothing
    try:
        modules = _imports(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return nothing
    request = json.dumps(
        {"source": source, "modules": modules, "expressions": list(expressions)}
    )
    with subprocess.Popen(
        child_python("-I", "-S", str(PROGRAM)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env={},
    ) as child:
        assert child.stdin is not None, "asked for"
        assert child.stdout is not None, "asked for"
        guard = threading.Timer(_TIMEOUT_S, child.kill)
        guard.start()
        try:
            child.stdin.write(request.encode())
            child.stdin.close()
            told = child.stdout.read(_RESULT_BYTES + 1)
            if len(told) > _RESULT_BYTES:
                child.kill()
            status = child.wait()
        except BrokenPipeError:
            told, status = b"", child.wait()
        finally:
            guard.cancel()
            child.kill()
    first, *lines = told.decode("ascii", "replace").split("\n")
    # This line is written before the code runs, so the code cannot forge it.
    if first != sandboxed.CONFINED:
        raise Unimplemented(
            "generated code is not run here, since this machine cannot isolate it "
            f"({first or 'the process ended before it was confined'}). Use Linux on x86-64 or "
            "64-bit ARM with seccomp, or leave out the samples that have a 'python' check "
            "(eval.tasks: 0 in training)",
            metadata={"cause": "no_sandbox"},
        )
    if len(told) > _RESULT_BYTES or lines[:1] != [sandboxed.ENDED] or lines[-1]:
        return nothing
    values = tuple(line if line != sandboxed.FAILED else None for line in lines[1:-1])
    if status or len(values) != len(expressions):
        return nothing
    return Ran(True, values)


def _imports(source: str) -> list[str]:
    """Modules of the standard library that the source imports. ``from a import b`` gives ``a``
    and ``a.b``, which may be a module.

    Raises:
        SyntaxError, ValueError, RecursionError, MemoryError: it cannot be parsed.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    library = sys.stdlib_module_names - sandboxed.REFUSED
    return sorted(
        name
        for name in found
        if name.split(".")[0] in library and not name.endswith("__main__")
    )
