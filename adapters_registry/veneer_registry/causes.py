"""The message of an unexpected error, without full paths, which only the operator may see."""

from __future__ import annotations

import os


def cause_of(error: BaseException) -> str:
    """Return the error's message. Paths are cut to their last part, so callers may see it."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    name = os.path.basename(os.fsdecode(error.filename)) if error.filename else ""
    return f"{name}: {error.strerror}" if name else error.strerror
