"""What an upload's first message says, checked."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from veneer_proto.v1 import adapters_pb2
from veneer_registry.errors import InvalidField
from veneer_registry.records import UploadFile, UploadRequest

from veneer_server.replication.replicas import Wait
from veneer_server.replication.wire import wait_for

__all__ = ["MAX_FILES", "MAX_LABELS", "UploadOptions", "upload_options"]

MAX_FILES: Final = 16
MAX_LABELS: Final = 64
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class UploadOptions:
    """A checked `UploadSpec`."""

    request: UploadRequest
    validate_only: bool
    activate: bool
    resume: bool
    wait: Wait


def upload_options(spec: adapters_pb2.UploadSpec) -> UploadOptions:
    """The options that a spec gives. Raises InvalidField."""
    if not 1 <= len(spec.files) <= MAX_FILES:
        raise InvalidField(
            f"spec.files has {len(spec.files)} files: list each file of the adapter, at most "
            f"{MAX_FILES}",
            metadata={"field": "spec.files"},
        )
    for file in spec.files:
        if not _SHA256.fullmatch(file.sha256):
            raise InvalidField(
                f"the sha256 of {file.name[:80]!r} must be 64 hex digits in lower case",
                metadata={"field": "spec.files", "file": file.name[:80]},
            )
    if len(spec.labels) > MAX_LABELS:
        raise InvalidField(
            f"spec.labels has {len(spec.labels)} labels: give at most {MAX_LABELS}",
            metadata={"field": "spec.labels"},
        )
    if spec.validate_only and spec.activate:
        raise InvalidField(
            "spec.activate has no effect with spec.validate_only, which publishes nothing: set "
            "one of them",
            metadata={"field": "spec.activate"},
        )
    return UploadOptions(
        UploadRequest(
            name=spec.name,
            files=tuple(UploadFile(f.name, f.size, f.sha256) for f in spec.files),
            labels=dict(spec.labels),
            allow_replace=spec.allow_replace,
            etag=spec.etag,
        ),
        spec.validate_only,
        spec.activate,
        spec.resume,
        wait_for(spec.wait, "spec.wait"),
    )
