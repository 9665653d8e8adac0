"""Runs SQL in memory. As a program: compares two statements, within limits of time and memory.

It imports none of our packages, as it is run without them. The program is
for statements that a model wrote. SQLite can be interrupted only between its steps, and one
step may take minutes; a process can be ended at any time, with the memory it took.
"""

from __future__ import annotations

import json
import re
import sqlite3
import sys
from collections import Counter
from collections.abc import Iterable
from contextlib import closing
from typing import Any, Final

CPU_S: Final = 5
MEMORY: Final = 512 << 20
SAME: Final = 10
"""Exit status. Not 0 or 1, with which Python ends if it could not run this file."""
DIFFERENT: Final = 11

_HEAP: Final = 256 << 20
"""SQLite's heap limit in the program. Data that a statement sorts or groups is kept in the
heap, not in files."""
_STEPS: Final = 5_000_000
_BYTES: Final = 1 << 20
"""Most bytes of one value, and of all values that a statement returns."""
_ROWS: Final = 10_000
_COLUMNS: Final = 100
_READS: Final = frozenset(
    {
        sqlite3.SQLITE_SELECT,
        sqlite3.SQLITE_READ,
        sqlite3.SQLITE_FUNCTION,
        sqlite3.SQLITE_RECURSIVE,
    }
)


def rows(setup: str, statement: str) -> list[tuple[Any, ...]] | None:
    """The rows that a statement returns, floats rounded to six digits; None if it fails.

    The statement may not write or attach. Its steps and its result are limited, not its time.

    Raises:
        sqlite3.Error: the set-up fails.
    """
    with closing(sqlite3.connect(":memory:")) as database:
        database.executescript(setup)
        database.execute("PRAGMA temp_store = MEMORY")
        database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _BYTES)
        database.setlimit(sqlite3.SQLITE_LIMIT_COLUMN, _COLUMNS)
        database.set_authorizer(
            lambda action, *_: sqlite3.SQLITE_OK if action in _READS else sqlite3.SQLITE_DENY
        )
        database.set_progress_handler(lambda: 1, _STEPS)
        try:
            found = _few(database.execute(statement))
        except (sqlite3.Error, sqlite3.Warning, ValueError, MemoryError):
            return None
    return None if found is None else [tuple(map(rounded, row)) for row in found]


def rounded(value: object) -> object:
    """Round a float to six digits; return anything else as it is."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def same(setup: str, statement: str, expected: str) -> bool:
    """Whether a statement returns the same rows as ``expected``, and in the same order if that
    has ORDER BY."""
    wanted = rows(setup, expected)
    got = rows(setup, statement)
    if wanted is None or got is None or len(got) != len(wanted):
        return False
    if _ordered(expected):
        return got == wanted
    return Counter(got) == Counter(wanted)


def _few(found: Iterable[tuple[Any, ...]]) -> list[tuple[Any, ...]] | None:
    """The rows; None if they are more than any task wants."""
    few, left = list[tuple[Any, ...]](), _BYTES
    for row in found:
        few.append(row)
        left -= sum(len(value) if isinstance(value, str | bytes) else 8 for value in row)
        if left < 0 or len(few) > _ROWS:
            return None
    return few


def _ordered(statement: str) -> bool:
    """Whether the statement has an ORDER BY outside of subqueries and string literals."""
    bare = re.sub(r"'[^']*'", "", statement)
    while (inner := re.sub(r"\([^()]*\)", "", bare)) != bare:
        bare = inner
    return "order by" in bare.lower()


def main() -> None:
    """Read `same`'s arguments from stdin as JSON; end with `SAME` or `DIFFERENT`."""
    import resource  # not on every system that imports this file

    asked = json.loads(sys.stdin.buffer.read())
    for what, most in (
        (resource.RLIMIT_CPU, CPU_S),
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))
    with closing(sqlite3.connect(":memory:")) as database:
        database.execute(f"PRAGMA hard_heap_limit = {_HEAP}").fetchall()
    sys.exit(SAME if same(**asked) else DIFFERENT)


if __name__ == "__main__":
    main()
