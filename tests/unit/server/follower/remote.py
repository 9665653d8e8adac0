"""FAKE: a registry in this process, whose transfers a test spoils."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from veneer_registry.errors import AdapterNotFound, Unavailable
from veneer_registry.format import read_adapter
from veneer_server.follower.fetching import FilePart

from tests.unit.registry.kit import make_adapter

FILES: Final = ("adapter_config.json", "adapter_model.safetensors")
CHUNK: Final = 1000


class Remote:
    """A registry in this process, whose transfers a test spoils."""

    def __init__(self, folder: Path, count: int = 4) -> None:
        self.folders: dict[str, Path] = {}
        for seed in range(count):
            made = make_adapter(folder / f"adapter{seed}", seed=seed)
            self.folders[read_adapter(made, None).weights_digest] = made
        self.digests = list(self.folders)
        self.asked: list[tuple[str, str, int]] = []
        self.break_after: int | None = None
        self.spoil_next = False
        self.gates: dict[str, asyncio.Event] = {}
        self.distrusted: list[str] = []

    def size(self, digest: str) -> int:
        return sum((self.folders[digest] / name).stat().st_size for name in FILES)

    async def chunks(
        self, tenant: str, digest: str, file: str, offset: int
    ) -> AsyncIterator[FilePart]:
        self.asked.append((digest, file, offset))
        if digest in self.gates:
            await self.gates[digest].wait()
        if digest not in self.folders:
            raise AdapterNotFound("it is gone")
        data = (self.folders[digest] / file).read_bytes()
        while True:
            part = data[offset : offset + CHUNK]
            crc32 = zlib.crc32(part)
            if self.spoil_next and part:
                self.spoil_next, part = False, bytes(len(part))
            yield FilePart(len(data), offset, part, crc32)
            offset += len(part)
            if offset >= len(data):
                return
            if self.break_after is not None and offset >= self.break_after:
                self.break_after = None
                raise Unavailable("the connection broke")

    def distrust(self, digest: str) -> None:
        self.distrusted.append(digest)
