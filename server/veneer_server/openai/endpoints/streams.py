"""Long answers, of which each reader holds a piece at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Final

from fastapi.responses import StreamingResponse

from veneer_server.openai.http.asgi import ABORT, Receive, Scope, Send

__all__ = ["LongAnswer", "in_pieces"]

_PIECE: Final = 64 << 10


class LongAnswer(StreamingResponse):
    """An answer in pieces. A client that has not read it all within the limit is
    disconnected."""

    def __init__(
        self,
        pieces: AsyncIterator[bytes],
        limit_s: float,
        headers: Mapping[str, str],
    ) -> None:
        super().__init__(pieces, headers=headers)
        self._limit_s = limit_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._limit_s):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            scope["state"][ABORT]()
            await asyncio.sleep(0)  # lets uvicorn notice, so that it logs no error


async def in_pieces(body: bytes) -> AsyncIterator[bytes]:
    """A body piece by piece, so that none is copied into a socket's buffer as a whole."""
    for at in range(0, len(body), _PIECE):
        yield body[at : at + _PIECE]
