"""What the registry takes and gives: frozen, no I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from veneer_registry.adapter import AdapterManifest, AdapterRef

__all__ = ["AdapterRecord", "Published", "UploadFile", "UploadRequest"]


@dataclass(frozen=True, slots=True)
class UploadFile:
    """One announced file: its name, bytes, and SHA-256 (64 hex digits)."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class UploadRequest:
    """An announced upload.

    Attributes:
        name: what the adapter shall be called.
        files: every file of the bundle.
        labels: free pairs to filter by.
        allow_replace: the name may hold other content now.
    """

    name: str
    files: tuple[UploadFile, ...]
    labels: Mapping[str, str] = field(default_factory=dict)
    allow_replace: bool = False


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """One registered revision.

    Attributes:
        ref: name, revision, weights digest.
        manifest: what its files hold.
        created: when the name got this revision, Unix seconds.
        labels: as given with the upload.
        current: the plain name resolves to it.
        etag: changes with every change of the name's registration; "" if there is none.
        bytes: size of the bundle's files on disk.
    """

    ref: AdapterRef
    manifest: AdapterManifest
    created: float
    labels: Mapping[str, str]
    current: bool
    etag: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Published:
    """Outcome of a publish.

    Attributes:
        record: the revision, as registered or (validate only) as it would be.
        published: False where the name already held this content, or nothing was
            to be published.
        replaced: another revision was current before.
        warnings: sentences for the uploader.
        dropped: superseded revisions that the name does not keep any more.
    """

    record: AdapterRecord
    published: bool
    replaced: bool
    warnings: tuple[str, ...]
    dropped: tuple[AdapterRef, ...] = ()
