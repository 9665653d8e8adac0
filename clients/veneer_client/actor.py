"""The name that a caller gives itself, which the server records in its history."""

from __future__ import annotations

import getpass
import os
import socket
from typing import Final

__all__ = ["actor_metadata"]

_KEY: Final = "veneer-actor"
_VARIABLE: Final = "VENEER_ACTOR"
_LONGEST: Final = 128


def actor_metadata(actor: str | None) -> tuple[tuple[str, str], ...]:
    """Metadata for every call: ``actor``, else VENEER_ACTOR, else ``user@host``.

    Header values are printable ASCII; other characters become ``?``. The name is a claim,
    which the server records but does not verify.
    """
    given = (actor or os.environ.get(_VARIABLE, "")).strip()
    shown = "".join(char if " " <= char <= "~" else "?" for char in given or _user_and_host())
    return ((_KEY, shown[:_LONGEST]),)


def _user_and_host() -> str:
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):  # e.g. a container's user id has no name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"
