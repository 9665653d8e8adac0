"""Record the code that each process of a server enters, in this file's folder.

`tests.structure.calls` copies it to a new folder as ``sitecustomize.py`` and puts that folder
on the server's ``PYTHONPATH``. So every Python process of the server runs it at its start, and
sets a profile function before it starts a thread. All processes map the byte in the file
``phase``, the number of the recording; 0 means none. Anything seen for the first time is
appended to ``PHASE-PID`` at once, so nothing is lost when a process is killed. A line is one of

- ``f FILE:LINE NAME``: a function of ours is called, or a coroutine or generator of ours
  resumes. Lambdas count; comprehensions, modules and bodies of classes do not.
- ``c MODULE.NAME``: a counted function gets or returns an object of this class of ours (such as
  ``self``), or the class itself. Methods that Python generates, such as a dataclass's
  ``__init__``, are not functions of ours, but their arguments count.
"""

from __future__ import annotations

import contextlib
import inspect
import mmap
import os
import sys
import threading
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from types import CodeType, FrameType

OURS = ("veneer_server", "veneer_registry")
"""The packages that count. `veneer_proto` is generated."""

FOLDER = Path(__file__).parent

with (FOLDER / "phase").open("rb") as file:
    PHASE = mmap.mmap(file.fileno(), 1, access=mmap.ACCESS_READ)

seen: set[tuple[object, ...]] = set()


def profile(frame: FrameType, event: str, result: object) -> None:
    if not (phase := PHASE[0]) or event not in ("call", "return"):
        return
    code = frame.f_code
    # In a module that was started with -m, __name__ is "__main__".
    package = frame.f_globals.get("__package__")
    if not is_ours(package) or not counts(code):
        return
    if event == "return":
        see_class(phase, result)
        return
    if not code.co_filename.startswith("<") and (phase, code) not in seen:
        seen.add((phase, code))
        record(phase, f"f {code.co_filename}:{code.co_firstlineno} {code.co_qualname}")
    values = frame.f_locals
    for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]:
        see_class(phase, values.get(name))


def is_ours(module: object) -> bool:
    return isinstance(module, str) and module.partition(".")[0] in OURS


def counts(code: CodeType) -> bool:
    comprehension = code.co_name.startswith("<") and code.co_name != "<lambda>"
    return bool(code.co_flags & inspect.CO_OPTIMIZED) and not comprehension


def see_class(phase: int, value: object) -> None:
    kind = value if isinstance(value, type) else type(value)
    if (phase, kind) in seen:
        return
    seen.add((phase, kind))
    module = kind.__module__
    if module == "__main__":
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        module = spec.name if spec is not None else ""
    if is_ours(module):
        record(phase, f"c {module}.{kind.__qualname__}")


def record(phase: int, line: str) -> None:
    # Not kept open, because a forked process may close all descriptors that it does not know.
    with (FOLDER / f"{phase}-{os.getpid()}").open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def run_hidden() -> None:
    """Run the `sitecustomize` that Python would run without this one."""
    others = [folder for folder in sys.path if folder != str(FOLDER)]
    spec = PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        # It may itself look for another `sitecustomize` and not find it.
        with contextlib.suppress(ModuleNotFoundError):
            spec.loader.exec_module(module_from_spec(spec))


run_hidden()
threading.setprofile(profile)
sys.setprofile(profile)
