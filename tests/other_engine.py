"""Make a front process start another module as its engine process."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from veneer_registry.child_python import child_python

_ROOT = Path(__file__).resolve().parents[1]
_ENGINE = tuple(child_python("-m", "veneer_server.engine.process")[1:])


@contextmanager
def engine_of(*module: str) -> Iterator[None]:
    """Inside the block, start engines as ``python -m MODULE ARGUMENTS``, followed by the
    front's arguments; the module is looked up from the repository's root."""
    right: Any = asyncio.create_subprocess_exec

    async def start(program: str, *arguments: str, **options: Any) -> Any:
        if arguments[: len(_ENGINE)] == _ENGINE:
            options["env"] = {**options.get("env", os.environ), "PYTHONPATH": _python_path()}
            arguments = ("-P", "-m", *module, *arguments[len(_ENGINE) :])
        return await right(program, *arguments, **options)

    with patch.object(asyncio, "create_subprocess_exec", start):
        yield


def _python_path() -> str:
    found = os.environ.get("PYTHONPATH", "")
    return os.pathsep.join([str(_ROOT), *([found] if found else [])])
