"""A FAKE of uploads for client tests; received bytes survive a restart."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import grpc
from veneer_proto.v1 import adapters_pb2, adapters_pb2_grpc

from tests.unit.client.refusals import Refusal

UNIMPLEMENTED = Refusal(grpc.StatusCode.UNIMPLEMENTED, "later", "UNIMPLEMENTED")
NO_METHOD = Refusal(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")


def refused(reason: str, message: str, field_: str = "") -> Refusal:
    """INVALID_ARGUMENT with details."""
    metadata = {"field": field_} if field_ else {}
    return Refusal(grpc.StatusCode.INVALID_ARGUMENT, message, reason, metadata)


@dataclass
class Upload:
    """The content of one call."""

    spec: adapters_pb2.UploadSpec
    chunks: list[adapters_pb2.UploadChunk] = field(default_factory=list)


class FakeUploads(adapters_pb2_grpc.AdapterServiceServicer):
    """UploadAdapter and GetUpload by the contract; `breaks` end connections."""

    def __init__(self) -> None:
        self.uploads: list[Upload] = []
        """One per UploadAdapter call that was not refused."""
        self.staged: dict[bytes, dict[str, bytearray]] = {}
        """Data of unfinished uploads: by name and files, then by file."""
        self.stored: dict[str, bytes] = {}
        """Content of published files by SHA-256."""
        self.breaks: deque[int] = deque()
        """Each one ends a connection when an upload has this many bytes (at once if it has them
        already)."""
        self.on_break: Callable[[], None] = self.restart
        self.no_get_upload: Refusal | None = None
        """An older server's answer to GetUpload."""

    refusals: deque[Refusal]

    def restart(self) -> None:
        raise NotImplementedError

    def note(self, method: str, request: Any, context: grpc.ServicerContext) -> None:
        raise NotImplementedError

    def add(self, name: str) -> adapters_pb2.Adapter:
        raise NotImplementedError

    def has(self, name: str) -> bool:
        raise NotImplementedError

    def GetUpload(self, request, context):  # noqa: N802
        self.note("GetUpload", request, context)
        if self.no_get_upload is not None:
            self.no_get_upload.end(context)
        return adapters_pb2.GetUploadResponse(committed=self._committed(request.spec))

    def UploadAdapter(self, request_iterator: Iterable[Any], context):  # noqa: N802
        messages = iter(request_iterator)
        spec = next(messages).spec
        if self.refusals:
            _drain(messages)
        self.note("UploadAdapter", spec, context)
        upload = Upload(spec)
        self.uploads.append(upload)
        if not spec.resume:
            self.staged.pop(_key(spec), None)
        committed = self._committed(spec) if spec.resume else {}
        files = self.staged.setdefault(
            _key(spec), {file.name: bytearray() for file in spec.files}
        )
        stored = {file.name for file in spec.files if committed.get(file.name) == file.size}
        if self._breaks(files, b""):
            return adapters_pb2.UploadAdapterResponse()
        for message in messages:
            chunk = message.chunk
            upload.chunks.append(chunk)
            if chunk.file in stored or chunk.offset != len(files[chunk.file]):
                _drain(messages)
                refused("INVALID_FIELD", "wrong offset", "offset").end(context)
            if self._breaks(files, chunk.data, chunk.file):
                return adapters_pb2.UploadAdapterResponse()
        for file in spec.files:
            content = bytes(files[file.name])
            if file.name in stored:
                content = self.stored.get(file.sha256, content)
            elif len(content) != file.size:
                metadata = {"field": "files", "received": str(len(content))}
                code = grpc.StatusCode.INVALID_ARGUMENT
                Refusal(code, f"{file.name}: send all", "INVALID_FIELD", metadata).end(context)
            if hashlib.sha256(content).hexdigest() != file.sha256:
                del self.staged[_key(spec)]
                refused("CHECKSUM_MISMATCH", f"{file.name} differs").end(context)
            self.stored[file.sha256] = content
        del self.staged[_key(spec)]
        return adapters_pb2.UploadAdapterResponse(
            published=not spec.validate_only and not self.has(spec.name),
            adapter=self.add(spec.name),
            warnings=["server says"],
        )

    def received(self, upload: Upload) -> int:
        """Bytes received by a call."""
        return sum(len(chunk.data) for chunk in upload.chunks)

    def _committed(self, spec: adapters_pb2.UploadSpec) -> dict[str, int]:
        staged = self.staged.get(_key(spec), {})
        return {
            file.name: file.size
            if file.sha256 in self.stored
            else len(staged.get(file.name, b""))
            for file in spec.files
        }

    def _breaks(self, files: dict[str, bytearray], data: bytes, name: str = "") -> bool:
        """Store data, but only up to the next break; returns whether it was reached."""
        before = sum(map(len, files.values()))
        ends = bool(self.breaks) and before + len(data) >= self.breaks[0]
        if name:
            most = max(0, self.breaks[0] - before) if ends else len(data)
            files[name] += data[:most]
        if ends:
            self.breaks.popleft()
            self.on_break()
        return ends


def _drain(messages: Iterable[Any]) -> None:
    """Read the rest, as the server does: a client whose write fails does not see why."""
    deque(messages, maxlen=0)


def _key(spec: adapters_pb2.UploadSpec) -> bytes:
    """Key of an upload: its name and files."""
    kept = adapters_pb2.UploadSpec(name=spec.name, files=spec.files)
    return kept.SerializeToString(deterministic=True)
