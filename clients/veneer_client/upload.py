"""A push before it is sent: checked locally, hashed, cut into messages."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from veneer_proto.v1 import adapters_pb2
from veneer_registry.adapter import AdapterManifest, check_name
from veneer_registry.errors import AdapterInvalid, VeneerError
from veneer_registry.format import read_adapter, select_files

from veneer_client import convert_admin
from veneer_client.records import Pushed

__all__ = ["CHUNK_BYTES", "Progress", "PushOptions", "Upload", "prepare"]

CHUNK_BYTES: Final = 1 << 20
"""Bytes of one message; gRPC's receive limit is four times this."""

Progress = Callable[[int, int], None]
"""Told (bytes handed to gRPC, bytes in all), perhaps from another thread."""


@dataclass(frozen=True, slots=True)
class PushOptions:
    """What a push asks for beside the files; see `Client.push`."""

    labels: Mapping[str, str]
    validate_only: bool
    activate: bool
    allow_replace: bool


@dataclass(slots=True)
class Upload:
    """A checked folder, ready to be sent (more than once, if the server says retry).

    Attributes:
        manifest: what the local check found.
        skipped: files of the folder that are not sent.
        failure: set by `messages` when a file can no longer be read.
    """

    spec: adapters_pb2.UploadSpec
    paths: tuple[Path, ...]
    manifest: AdapterManifest
    skipped: tuple[str, ...]
    progress: Progress
    failure: VeneerError | None = field(default=None, init=False)

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.spec.files)

    def messages(self) -> Iterator[adapters_pb2.UploadAdapterRequest]:
        """The spec, then the files' chunks in order."""
        self.failure = None
        yield adapters_pb2.UploadAdapterRequest(spec=self.spec)
        sent = 0
        for path in self.paths:
            offset = 0
            try:
                with path.open("rb") as file:
                    while data := file.read(CHUNK_BYTES):
                        yield adapters_pb2.UploadAdapterRequest(
                            chunk=adapters_pb2.UploadChunk(
                                file=path.name, offset=offset, data=data
                            )
                        )
                        offset += len(data)
                        sent += len(data)
                        self.progress(sent, self.total_bytes)
            except OSError as error:
                # gRPC would turn it into UNKNOWN: end the stream here, and let the
                # client raise this instead of the server's "incomplete".
                self.failure = _unreadable(path, error)
                return

    def result(self, answer: adapters_pb2.UploadAdapterResponse) -> Pushed:
        """The server's answer and what the local check had to say."""
        if self.failure is not None:
            raise self.failure
        warnings = dict.fromkeys((*self.manifest.warnings, *answer.warnings))
        return Pushed(
            adapter=convert_admin.adapter_info(answer.adapter),
            published=answer.published,
            replaced=answer.replaced,
            warnings=tuple(warnings),
            skipped=self.skipped,
            sent_bytes=self.total_bytes,
        )


def prepare(folder: Path, name: str, options: PushOptions, progress: Progress) -> Upload:
    """Check an adapter folder as far as that is possible without its base; hash it.

    Raises:
        InvalidField: the name is not a legal adapter name.
        AdapterInvalid: the server would refuse these files; says which and why.
    """
    check_name(name)
    try:
        selection = select_files(folder)
        manifest = read_adapter(folder, None)
        files = [_describe(path) for path in selection.files]
    except OSError as error:
        raise _unreadable(folder, error) from error
    spec = adapters_pb2.UploadSpec(
        name=name,
        files=files,
        labels=options.labels,
        validate_only=options.validate_only,
        activate=options.activate,
        allow_replace=options.allow_replace,
    )
    return Upload(spec, selection.files, manifest, selection.skipped, progress)


def _describe(path: Path) -> adapters_pb2.UploadFile:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while data := file.read(CHUNK_BYTES):
            digest.update(data)
            size += len(data)
    return adapters_pb2.UploadFile(name=path.name, size=size, sha256=digest.hexdigest())


def _unreadable(path: Path, error: OSError) -> AdapterInvalid:
    return AdapterInvalid(
        f"{path} cannot be read ({error.strerror or error}): check its permissions",
        metadata={"file": path.name},
    )
