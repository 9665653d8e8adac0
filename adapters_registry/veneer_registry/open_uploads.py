"""Open uploads: their folders, which are active, and what interrupted ones left behind."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping

from veneer_registry.core import Core
from veneer_registry.disk import disk_full
from veneer_registry.errors import InvalidField
from veneer_registry.records import UploadRequest
from veneer_registry.upload import Upload, check_request
from veneer_registry.weights import WEIGHTS_FILE


class OpenUploads:
    """Uploads that have begun and not ended. Thread-safe."""

    def __init__(self, core: Core, max_adapter_bytes: int) -> None:
        self._core = core
        self._max_adapter_bytes = max_adapter_bytes
        self._active: dict[str, Upload] = {}
        """Upload id -> the upload that is using the folder of that name."""
        self._uploads: set[Upload] = set()
        self._lock = threading.Lock()

    def close(self) -> None:
        """End open uploads, so that they can be resumed."""
        with self._lock:
            uploads = tuple(self._uploads)
        for upload in uploads:
            upload.suspend()

    def check(self, request: UploadRequest) -> None:
        """Refuse a request that can never become an adapter here."""
        check_request(request, self._max_adapter_bytes)
        if request.name == self._core.base.name:
            # OpenAI's `model` names bases and adapters: no request could select this one.
            raise InvalidField(
                f"{request.name!r} is the base model's name; choose another for the adapter",
                metadata={"field": "name"},
            )

    def committed(self, request: UploadRequest) -> Mapping[str, int]:
        """Bytes of each file that a resumed upload need not send."""
        self.check(request)
        received = self._core.store.uploads.received(request.upload_id)
        return {
            file.name: file.size
            if self._stored(file.sha256) is not None
            else min(file.size, received.get(file.name, 0))
            for file in request.files
        }

    def stores(self, request: UploadRequest) -> bool:
        """See `Registry.stores`."""
        weights = [file for file in request.files if file.name == WEIGHTS_FILE]
        return bool(weights) and all(self._stored(file.sha256) for file in weights)

    def _stored(self, sha256: str) -> tuple[str, str] | None:
        found = self._core.catalog.file(sha256)
        if found is None or self._core.index.quarantined(found[0]) is not None:
            return None
        return found if self._core.store.has(*found) else None

    def begin(self, request: UploadRequest, *, resume: bool) -> Upload:
        """See `Registry.begin_upload`."""
        self.check(request)
        there = self.committed(request) if resume else {}
        missing = sum(file.size - there.get(file.name, 0) for file in request.files)
        if missing > self._core.store.free_bytes():
            raise disk_full(self._core.lock.data_dir)
        with self._lock:
            active = self._active.get(request.upload_id)
            own = active is not None and (not resume or not active.take_over())
            upload = self._register(request, resume=resume, own_folder=own)
        if resume and not own:
            self._link_stored(upload)
        upload.open()
        return upload

    def _register(self, request: UploadRequest, *, resume: bool, own_folder: bool) -> Upload:
        store = self._core.store
        if own_folder:
            # Another connection is sending the same upload: let both continue. This one
            # cannot be resumed.
            folder = store.new_staging()
        else:
            folder = store.uploads.folder(request.upload_id)
            if not resume:
                store.drop_staging(folder)
                folder = store.uploads.folder(request.upload_id)
        upload = Upload(request, folder, self._ended, resumed=resume)
        self._uploads.add(upload)
        if not own_folder:
            self._active[request.upload_id] = upload
        return upload

    def _link_stored(self, upload: Upload) -> None:
        for file in upload.request.files:
            path = upload.folder / file.name
            if (found := self._stored(file.sha256)) is None:
                continue
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            self._core.store.link(*found, path)

    def _ended(self, upload: Upload, keep: bool) -> None:
        upload_id = upload.request.upload_id
        resumable = self._active.get(upload_id) is upload
        if not (keep and resumable and upload.received_bytes):
            self._core.store.drop_staging(upload.folder)
        if resumable:
            # Last, since from here on another connection may use the folder. No other
            # upload can have replaced this one: that needs this upload's lock.
            del self._active[upload_id]
        self._uploads.discard(upload)

    def sweep(self, idle_s: float) -> int:
        """Remove interrupted uploads that have been idle for ``idle_s``. Returns how many."""
        swept = 0
        for folder in self._core.store.uploads.stale(time.time() - idle_s):
            with self._lock:
                if folder.name not in self._active:
                    self._core.store.drop_staging(folder)
                    swept += 1
        return swept

    def trim(self, *, most: int, most_bytes: int) -> int:
        """Remove the oldest interrupted uploads until at most ``most`` are left, with at most
        ``most_bytes`` in all. The newest stays whatever its size. Returns how many were
        removed.
        """
        trimmed = 0
        with self._lock:
            broken = [
                (size, folder)
                for _, size, folder in self._core.store.uploads.kept()
                if folder.name not in self._active
            ]
            total = sum(size for size, _ in broken)
            for at, (size, folder) in enumerate(broken[:-1]):
                if len(broken) - at <= most and total <= most_bytes:
                    break
                self._core.store.drop_staging(folder)
                total -= size
                trimmed += 1
        return trimmed
