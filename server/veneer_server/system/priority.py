"""Makes worker threads, of the engine and of the front, yield to the step."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import Final

_NICE: Final = 10
"""Without it, a busy thread doubles a step's time on two cores."""


def lower_priority() -> None:
    """Lower the priority of the calling thread, if this is allowed."""
    # Linux gives each thread its own nice value; elsewhere this may not be so.
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
