"""What an unexpected error says, without the paths that only the operator may read."""

from __future__ import annotations

import os


def cause_of(error: BaseException) -> str:
    """An error's own words; of a path only the last part, so callers may read it."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    name = os.path.basename(os.fsdecode(error.filename)) if error.filename else ""
    return f"{name}: {error.strerror}" if name else error.strerror
