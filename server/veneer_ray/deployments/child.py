"""Runs ``veneer-server`` in this process, which is killed when its parent ends in any way.

    python -P -m veneer_ray.deployments.child PARENT FLAGS...

A killed replica cannot stop its server, but the next replica needs the server's ports and
memory. The server's own children end with it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Final

from veneer_registry.child_python import child_python

_PR_SET_PDEATHSIG: Final = 1


def main() -> None:
    """Entry point."""
    parent = int(sys.argv[1])
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(1)  # the parent ended before the signal was set
    command = child_python("-m", "veneer_server", *sys.argv[2:])
    os.execv(command[0], command)  # nosec B606


if __name__ == "__main__":
    main()
