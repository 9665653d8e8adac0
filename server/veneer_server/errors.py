"""How errors are shown to callers and in logs, over gRPC and HTTP alike."""

from __future__ import annotations

from typing import Final, TypeVar

from veneer_registry.errors import InternalError, VeneerError

E = TypeVar("E", bound=BaseException)

DOMAIN: Final = "veneer"
"""``ErrorInfo.domain`` of every error."""

# By default, clients reject trailing metadata over 8 KiB, and then see no error at all. The
# message is sent three times (once percent-encoded), and binary details in base64.
MAX_MESSAGE: Final = 800
"""Most bytes of an error's message in any answer, gRPC or HTTP."""

MAX_VALUE: Final = 200
"""Most bytes of one metadata value."""


def internal_error(request_id: str) -> InternalError:
    """The error that a caller gets for a bug: it has the request id, and no internals."""
    return InternalError(
        f"internal error: report request id {request_id} with the server's log",
        metadata={"request_id": request_id},
    )


def detail_for_log(error: Exception) -> dict[str, str]:
    """The error's detail, which callers do not get, as fields of a log line."""
    detail = error.detail if isinstance(error, VeneerError) else ""
    return {"detail": detail} if detail else {}


def clip(text: str, size: int) -> str:
    """The text, cut to at most ``size`` bytes of UTF-8."""
    data = text.encode()
    if len(data) <= size:
        return text
    return data[: size - 3].decode(errors="ignore") + "…"


def one_line(text: str) -> str:
    """Replace line breaks and control characters with spaces; a caller may have sent them."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else " " for char in text)


def without_frames(error: E) -> E:
    """The same error without tracebacks, including those of its causes.

    A refused call keeps its error until the next full garbage collection: gRPC's abort is
    part of a reference cycle, and so is an error held in a variable of the function that
    caught it. The traceback's frames would keep the caller's prompt alive for as long.
    """
    todo: list[BaseException | None] = [error]
    seen: set[int] = set()
    while todo:
        one = todo.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            one.__traceback__ = None
            todo += [one.__cause__, one.__context__]
    return error
