"""Finds objects that only a garbage collection would free."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from google.protobuf.message import Message


class Garbage:
    """Garbage of a part of a test, after its end."""

    def __init__(self) -> None:
        self.found: list[object] = []

    def large(self, size: int) -> list[str]:
        """Places where the server's frames in it hold a text or message of at least ``size``
        bytes."""
        return [
            f"{frame.f_code.co_qualname}: {name}"
            for frame in self.found
            if isinstance(frame, FrameType) and "veneer_server" in frame.f_code.co_filename
            for name, value in frame.f_locals.items()
            if (isinstance(value, str | bytes | bytearray | list) and len(value) >= size)
            or (isinstance(value, Message) and value.ByteSize() >= size)
        ]


@contextmanager
def collected() -> Iterator[Garbage]:
    """Collect the garbage of the ``with`` block's code, for `Garbage.large`."""
    garbage = Garbage()
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield garbage
        gc.collect()
        garbage.found = list(gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
