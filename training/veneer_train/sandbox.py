"""Runs Python that a model wrote in a separate, restricted process.

No environment, no site packages, an empty folder; limits on time, memory, files and processes;
an audit hook refuses sockets, processes and files outside the standard library. This guards
against accidents, not against malicious code: evaluate models that you do not trust in a
container.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from typing import Final

from veneer_registry.child_python import child_python

__all__ = ["run_python"]

_TIMEOUT_S: Final = 10.0
_MEMORY: Final = 512 << 20
_CPU_S: Final = 5

# Reports completion on a separate descriptor, since an answer may call sys.exit.
_FRAME: Final = """
import os, sys
try:
    import resource
    for name, value in (("RLIMIT_CPU", {cpu}), ("RLIMIT_AS", {memory}), ("RLIMIT_FSIZE", 0)):
        resource.setrlimit(getattr(resource, name), (value, value))
except (ImportError, ValueError, OSError):
    pass
source = sys.stdin.read()
allowed = tuple(p for p in sys.path if p)

def refuse(event, arguments, allowed=allowed):
    if event == "open":
        path, mode = str(arguments[0]), arguments[1] or "r"
        if path.startswith(allowed) and not set(mode) & set("wax+"):
            return
    elif not event.startswith(
        ("socket", "subprocess", "os.", "shutil", "ctypes", "winreg", "ftplib", "urllib")
    ) or event in ("os.listdir", "os.scandir"):
        return
    raise PermissionError(event)

sys.addaudithook(refuse)
exec(compile(source, "answer", "exec"), {{"__name__": "answer"}})
os.write({done}, b"done")
"""


def run_python(source: str) -> bool:
    """Whether the source runs to its end without an exception, within the limits."""
    reading, writing = os.pipe()
    frame = _FRAME.format(cpu=_CPU_S, memory=_MEMORY, done=writing)
    try:
        with tempfile.TemporaryDirectory(prefix="veneer-answer-") as folder:
            subprocess.run(
                child_python("-I", "-S", "-c", frame),
                input=source.encode(),
                cwd=folder,
                env={},
                pass_fds=[writing],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=_TIMEOUT_S,
                check=False,
            )
    except subprocess.TimeoutExpired:
        return False
    finally:
        os.close(writing)
        with os.fdopen(reading, "rb") as told:
            ended = told.read()
    return ended == b"done"
