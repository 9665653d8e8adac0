"""Run a real server whose engine process has a planted bug, with the command line of
``veneer-server``.

`planted_server` makes `running_server` start it instead of ``veneer-server``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

from tests import server_harness
from tests.other_engine import engine_of

_ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def planted_server(planted: str, folder: Path) -> Iterator[None]:
    """While the block runs, make `running_server` start servers with one of the bugs in
    `PLANTED`.

    Args:
        folder: folder for the command that replaces ``veneer-server``.
    """
    command = folder / "veneer-server"
    command.write_text(
        f"#!{sys.executable}\n"
        "import sys\n"
        f"sys.path.insert(0, {str(_ROOT)!r})\n"
        "from tests.torture.planted_server import _front\n"
        f"_front({planted!r})\n"
    )
    command.chmod(0o755)
    beside = SimpleNamespace(executable=str(folder / "python"))
    with patch.object(server_harness, "sys", beside):
        yield


def _front(planted: str) -> None:
    """Run the unmodified front process, except that it starts `_engine` as its engine."""
    from veneer_server.__main__ import main

    with engine_of("tests.torture.planted_server", planted):
        main()


def _engine(planted: str) -> None:
    from veneer_server.engine.process import main

    from tests.torture.planted_isolation import PLANTED

    with PLANTED[planted].bug():
        main()


if __name__ == "__main__":
    _engine(sys.argv.pop(1))
