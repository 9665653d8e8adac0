"""Cross-origin resource sharing: which web pages may call the gateway from a browser.

Off by default: a browser then hides the answers from pages of other origins, and sends no JSON
for them. A server without keys refuses the requests that it does send (`system.hosts`). Keys
travel in a header, never in a cookie, so no answer allows credentials.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Final

from veneer_server.openai.errors import HttpError

Headers = list[tuple[bytes, bytes]]

_MAX_AGE_S: Final = 600
"""How long a browser may remember the answer to a preflight."""

_EXPOSED: Final = ", ".join(
    (
        "x-request-id",
        "retry-after",
        "retry-after-ms",
        "x-should-retry",
        "veneer-revision",
        "veneer-weights-digest",
        "veneer-adapter-tier",
        "veneer-ignored",
        *(
            f"x-ratelimit-{what}-{unit}"
            for unit in ("requests", "tokens")
            for what in ("limit", "remaining", "reset")
        ),
    )
)
"""Headers of answers that a page may read."""

_NAMES: Final = re.compile(rb"[A-Za-z0-9_-]+(?:[ \t]*,[ \t]*[A-Za-z0-9_-]+)*")


class Cors:
    """The origins whose pages may call; ``*`` allows all."""

    def __init__(self, origins: Collection[str] = ()) -> None:
        self._any = "*" in origins
        self._origins = frozenset(origin.encode() for origin in origins)

    def headers(self, request: Mapping[bytes, bytes]) -> Headers:
        """The CORS headers of an answer to a request, be it a success or an error."""
        if not self._origins:
            return []
        vary = [] if self._any else [(b"vary", b"origin")]
        origin = request.get(b"origin")
        if origin is None or not self._allows(origin):
            return vary
        return [
            (b"access-control-allow-origin", b"*" if self._any else origin),
            (b"access-control-expose-headers", _EXPOSED.encode()),
            *vary,
        ]

    def asks(self, method: str, request: Mapping[bytes, bytes]) -> bool:
        """Whether the request is a browser's preflight, which has no credentials."""
        asked = b"origin" in request and b"access-control-request-method" in request
        return bool(self._origins) and method == "OPTIONS" and asked

    def preflight(self, request: Mapping[bytes, bytes], allowed: Iterable[str]) -> Headers:
        """The headers of the answer to a preflight, besides `headers`.

        Args:
            allowed: methods that the path takes.

        Raises:
            HttpError: pages of this origin may not call.
        """
        if not self._allows(request[b"origin"]):
            raise HttpError(
                403,
                "origin_not_allowed",
                "pages from this origin may not call this server: start it with "
                "--cors-origin ORIGIN",
            )
        found = [
            (b"access-control-allow-methods", ", ".join(sorted(allowed)).encode()),
            (b"access-control-max-age", str(_MAX_AGE_S).encode()),
        ]
        names = request.get(b"access-control-request-headers", b"")
        if _NAMES.fullmatch(names):
            found.append((b"access-control-allow-headers", names))
        return found

    def allows(self, origin: str) -> bool:
        """Whether pages of an origin may call; ``*`` stands for every origin."""
        return self._allows(origin.encode("latin-1"))

    def _allows(self, origin: bytes) -> bool:
        return self._any or origin.lower() in self._origins
