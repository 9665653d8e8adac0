"""The command with which every package here starts a Python child process."""

from __future__ import annotations

import sys


def child_python(*arguments: str) -> list[str]:
    """Return the command for this interpreter with ``arguments``, but without the current
    folder on its path.

    ``-m`` and ``-c`` put the current folder first on `sys.path`: a ``numpy.py`` in the folder
    that a server is started from would run inside the engine. ``-P`` leaves it out. ``-I``
    would also drop `PYTHONPATH` and the user's site packages.
    """
    return [sys.executable, "-P", *arguments]
