"""The registry's frozen parameter and result types. No I/O."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from veneer_registry.adapter import NO_CLAIM, AdapterManifest, AdapterRef, BaseClaim
from veneer_registry.rows import AliasRow
from veneer_registry.strict_json import canonical_json


@dataclass(frozen=True, slots=True)
class UploadFile:
    """One announced file: its name, size in bytes, and SHA-256 (64 hex digits)."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class UploadRequest:
    """An announced upload.

    Attributes:
        name: the adapter's name.
        files: every file of the bundle.
        labels: arbitrary key-value pairs to filter by.
        allow_replace: publish even if the name holds other content.
        etag: if not empty, the name's etag must equal it.
        claim: what the publisher says about its base.
    """

    name: str
    files: tuple[UploadFile, ...]
    labels: Mapping[str, str] = field(default_factory=dict)
    allow_replace: bool = False
    etag: str = ""
    claim: BaseClaim = NO_CLAIM

    @property
    def upload_id(self) -> str:
        """64 hex digits: the same for the same files under the same name, so that an
        interrupted upload can be found."""
        files = sorted([file.name, file.size, file.sha256] for file in self.files)
        return hashlib.sha256(canonical_json([self.name, files])).hexdigest()


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """One registered revision.

    Attributes:
        ref: name, revision, weights digest.
        manifest: description of its files.
        created: when the name got this revision, Unix seconds.
        labels: as given with the upload or by a later update.
        current: whether the plain name resolves to it.
        etag: changes with every change of the name's registration; "" if there is none.
        bytes: size of the bundle's files on disk.
        aliases: aliases (without the adapter's name) that have this revision as a target.
        retain: how many superseded revisions its name keeps.
        quarantined: why its stored content is not served, or None.
        foreign: whether it was registered for another base.
        shared: whether other tenants of the server may use its name.
    """

    ref: AdapterRef
    manifest: AdapterManifest
    created: float
    labels: Mapping[str, str]
    current: bool
    etag: str
    bytes: int
    aliases: tuple[str, ...] = ()
    retain: int = 0
    quarantined: str | None = None
    foreign: bool = False
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Published:
    """Outcome of a publish.

    Attributes:
        record: the revision, as registered or (when only validating) as it would be.
        published: False if the name already held this content, or when only validating.
        replaced: whether another revision was current before.
        warnings: sentences for the uploader.
        dropped: superseded revisions that the name no longer keeps.
    """

    record: AdapterRecord
    published: bool
    replaced: bool
    warnings: tuple[str, ...]
    dropped: tuple[AdapterRef, ...] = ()


@dataclass(frozen=True, slots=True)
class AliasChange:
    """Outcome of moving an alias.

    Attributes:
        alias: the alias as it is now; it has no targets if it was removed.
        before: its previous (revision, weight) pairs; empty for a new alias.
    """

    alias: AliasRow
    before: tuple[tuple[str, int], ...]
