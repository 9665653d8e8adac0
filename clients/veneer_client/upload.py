"""Pushes an adapter: checks and hashes its folder locally, sends it in messages, and resumes
after an interruption.

`Upload` makes the decisions; the clients only send its queries and messages.
"""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import grpc
from veneer_proto.v1 import adapters_pb2
from veneer_registry.adapter import check_name
from veneer_registry.bundle_files import select_files
from veneer_registry.errors import (
    Aborted,
    AdapterInvalid,
    ChecksumMismatch,
    InvalidField,
    ResourceExhausted,
    ServerUnreachable,
    Unavailable,
    Unimplemented,
    VeneerError,
)
from veneer_registry.fingerprint import TOKENIZER_FILE, vocabulary_digest
from veneer_registry.format import check_adapter
from veneer_registry.regular_files import open_regular

from veneer_client import calls, calls_admin, convert_admin
from veneer_client.failures import Attempts, RetryPolicy, to_error, write_broke
from veneer_client.records import Pushed, Resumed
from veneer_client.replicas import WaitReplicas, reached, wait_for

__all__ = ["CHUNK_BYTES", "OnResume", "Progress", "PushOptions", "Upload", "prepare"]

_TOKENIZER_LIMIT: Final = 64 << 20

CHUNK_BYTES: Final = 1 << 20
"""Bytes per message; gRPC's receive limit is four times this."""

Progress = Callable[[int, int], None]
"""Called with (bytes that the server has or gRPC was given, total bytes), perhaps from another
thread. The first number falls if a broken connection lost some."""

OnResume = Callable[[Resumed], None]
"""Called when a push resumes from what the server has."""


@dataclass(frozen=True, slots=True)
class PushOptions:
    """Options of a push; see `Client.push`."""

    labels: Mapping[str, str]
    validate_only: bool
    activate: bool
    allow_replace: bool
    same_base: bool
    etag: str
    wait_replicas: WaitReplicas
    progress: Progress
    on_resume: OnResume
    retry: RetryPolicy
    timeout_s: float | None


class _Source:
    """A file to send: opened once, so that we send the file that was hashed even if its path
    has been replaced. The thread of an ended attempt may still be reading while the next
    attempt reads, hence the lock, and an offset with each read."""

    def __init__(self, path: Path, file: io.FileIO) -> None:
        self.path = path
        self._file = file
        self._lock = threading.Lock()

    def chunks(self, offset: int, size: int) -> Iterator[tuple[int, bytes]]:
        """Yield (offset, bytes) from ``offset`` to ``size``, the file's size when hashed.

        Raises:
            AdapterInvalid: the file has become shorter.
        """
        while offset < size:
            with self._lock:
                self._file.seek(offset)
                data = self._file.read(min(CHUNK_BYTES, size - offset))
            if not data:
                raise _changed(self.path)
            yield offset, data
            offset += len(data)

    def describe(self) -> adapters_pb2.UploadFile:
        """Its entry in the upload's spec, with its hash.

        Raises:
            AdapterInvalid: its size changes meanwhile.
        """
        digest, size = hashlib.sha256(), self._size()
        for _, data in self.chunks(0, size):
            digest.update(data)
        if self._size() != size:
            raise _changed(self.path)
        return adapters_pb2.UploadFile(
            name=self.path.name, size=size, sha256=digest.hexdigest()
        )

    def _size(self) -> int:
        with self._lock:
            return self._file.seek(0, io.SEEK_END)

    def close(self) -> None:
        with self._lock:
            self._file.close()


@dataclass(frozen=True, slots=True)
class _Bundle:
    """A checked and hashed folder.

    Attributes:
        sources: open files, in the order of ``files``.
        warnings: from the local check.
        skipped: files of the folder that are not part of a bundle.
        vocabulary: digest of the vocabulary of the tokenizer beside the adapter: see
            `vocabulary_digest`.
    """

    sources: tuple[_Source, ...]
    files: tuple[adapters_pb2.UploadFile, ...]
    warnings: tuple[str, ...]
    skipped: tuple[str, ...]
    vocabulary: str


class Upload:
    """A push of a checked folder, over as many connections as needed.

    Each attempt asks what the server has (`question`), starts there (`begin`) and sends
    the rest (`messages`). The outcome depends only on the content, so sending something
    twice is harmless. After a failure, `wait_s` says whether to retry: without limit while
    the server makes progress, and `RetryPolicy.attempts` times without progress.
    A context manager, which closes its files on exit.
    """

    def __init__(self, name: str, bundle: _Bundle, options: PushOptions) -> None:
        self._bundle = bundle
        self._options = options
        self._spec = adapters_pb2.UploadSpec(
            name=name,
            files=bundle.files,
            labels=options.labels,
            validate_only=options.validate_only,
            activate=options.activate,
            allow_replace=options.allow_replace,
            same_base=options.same_base,
            vocabulary=bundle.vocabulary,
            etag=options.etag,
            wait=wait_for(options.wait_replicas),
        )
        self._total = sum(file.size for file in bundle.files)
        self._attempts = Attempts(
            options.retry,
            repeatable=True,
            timeout_s=options.timeout_s,
            reconnect_s=calls.RECONNECT_S,
            repeated=(Unavailable, ResourceExhausted, Aborted),
        )
        self._attempt = 0
        self._old_server = False
        self._anew = False  # the next attempt starts at 0, without asking
        self._was_anew = False
        self._committed: Mapping[str, int] = {}
        self._furthest = -1
        self._interrupted_by: VeneerError | None = None
        self._unreadable: VeneerError | None = None
        self._sent = self._resumes = 0
        self._skipped: int | None = None

    def close(self) -> None:
        """Close the files. Idempotent."""
        self._attempt += 1  # gRPC's thread may still be reading
        for source in self._bundle.sources:
            source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def remaining_s(self) -> float | None:
        """Seconds left until the push's deadline; None without one."""
        return self._attempts.remaining_s()

    def question(
        self,
    ) -> calls.Call[adapters_pb2.GetUploadResponse, Mapping[str, int]] | None:
        """The query to send before the next attempt, if any."""
        return None if self._old_server or self._anew else calls_admin.committed(self._spec)

    def begin(self, committed: Mapping[str, int]) -> None:
        """Start an attempt from what the server has; ``committed`` is bytes by file."""
        self._attempt += 1
        self._anew = False
        self._committed = {
            file.name: min(committed.get(file.name, 0), file.size) for file in self._spec.files
        }
        at = sum(self._committed.values())
        if self._skipped is None:
            self._skipped = at
        if at > self._furthest:
            self._furthest = at
            self._attempts.succeeded()
        else:
            self._attempts.reached()
        self._spec.resume = at > 0
        if at or self._interrupted_by is not None:
            self._resumes += self._interrupted_by is not None
            self._options.on_resume(Resumed(at, self._total, self._interrupted_by))
        self._options.progress(at, self._total)

    def messages(self) -> Iterator[adapters_pb2.UploadAdapterRequest]:
        """The spec, then the bytes that the server lacks, file by file."""
        return self._messages(self._attempt, self._committed)

    def _messages(
        self, attempt: int, committed: Mapping[str, int]
    ) -> Iterator[adapters_pb2.UploadAdapterRequest]:
        done = sum(committed.values())
        yield adapters_pb2.UploadAdapterRequest(spec=self._spec)
        try:
            for source, file in zip(self._bundle.sources, self._bundle.files, strict=True):
                for offset, data in source.chunks(committed[file.name], file.size):
                    # Count before the yield: the call may end, and the next attempt begin,
                    # before this generator continues.
                    self._sent += len(data)
                    yield _message(file.name, offset, data)
                    if attempt != self._attempt:
                        return  # gRPC's thread is still reading for a call that has ended
                    done += len(data)
                    self._options.progress(done, self._total)
        except (OSError, ValueError, AdapterInvalid) as error:
            if attempt != self._attempt:
                return  # the push has ended; reading its closed files gave a ValueError
            # gRPC would turn the error into UNKNOWN. So end the stream here, and let the
            # client raise it instead of the server's "incomplete".
            self._unreadable = (
                error if isinstance(error, AdapterInvalid) else _unreadable(source.path, error)
            )

    def failed(self, error: grpc.RpcError, address: str) -> VeneerError:
        """The typed error of a failed call of this push."""
        if self._unreadable is not None:
            return self._unreadable
        failure = to_error(error, address, timeout_s=self._options.timeout_s)
        if write_broke(error):
            failure = ServerUnreachable(
                f"the connection to {address} broke while sending the adapter "
                f"[{error.details()}]",
                metadata={"address": address},
            )
        if isinstance(failure, ServerUnreachable) and self._attempt and not self._old_server:
            failure.message += "; push again to resume it"
            failure.metadata["fix"] = "push again"
        return failure

    def wait_s(self, failure: VeneerError) -> float | None:
        """Seconds to wait before the next attempt; None when ``failure`` is final."""
        if isinstance(failure, Unimplemented) and not self._old_server:
            self._old_server = True  # it lacks GetUpload: every attempt sends everything
            return 0.0
        self._interrupted_by = failure
        if isinstance(failure, ChecksumMismatch):
            # Data of an earlier attempt is damaged on the server: start over, but only once.
            self._anew = self._spec.resume and not self._was_anew
            self._was_anew, self._furthest = True, -1
            return 0.0 if self._anew else None
        if self._spec.resume and _out_of_step(failure):
            failure = ServerUnreachable(failure.message)
        return self._attempts.wait_s(failure)

    def result(self, answer: adapters_pb2.UploadAdapterResponse) -> Pushed:
        """The server's answer, combined with the local check's warnings."""
        if self._unreadable is not None:
            raise self._unreadable
        warnings = dict.fromkeys((*self._bundle.warnings, *answer.warnings))
        return Pushed(
            adapter=convert_admin.adapter_info(answer.adapter),
            published=answer.published,
            replaced=answer.replaced,
            warnings=tuple(warnings),
            skipped=self._bundle.skipped,
            sent_bytes=self._sent,
            skipped_bytes=self._skipped or 0,
            resumes=self._resumes,
            replicas=reached(answer.replicas, answer.HasField("replicas")),
        )


def prepare(folder: Path, name: str, options: PushOptions) -> Upload:
    """Check an adapter folder as far as possible without its base, and hash it.

    Checks kinds and sizes of the files first: see `select_files`.

    Raises:
        InvalidField: the name is not a legal adapter name.
        AdapterInvalid: the server would refuse these files; the message says which and why.
    """
    check_name(name)
    with ExitStack() as opened:
        try:
            selection = select_files(folder)
            sources = []
            for path in selection.files:
                sources.append(_Source(path, open_regular(path)))
                opened.callback(sources[-1].close)
            warnings = check_adapter(folder)
            files = tuple(source.describe() for source in sources)
        except OSError as error:
            raise _unreadable(folder, error) from error
        bundle = _Bundle(
            tuple(sources), files, warnings, selection.skipped, _vocabulary(folder)
        )
        upload = Upload(name, bundle, options)
        opened.pop_all()  # from here on the upload closes them
        return upload


def _vocabulary(folder: Path) -> str:
    """`vocabulary_digest` of the tokenizer in the folder; "" if there is none that can be
    read, which is no error: it is not part of the adapter."""
    try:
        with open_regular(folder / TOKENIZER_FILE) as file:
            data = file.read(_TOKENIZER_LIMIT + 1) or b""
    except (AdapterInvalid, OSError):
        return ""
    return vocabulary_digest(data) if len(data) <= _TOKENIZER_LIMIT else ""


def _message(file: str, offset: int, data: bytes) -> adapters_pb2.UploadAdapterRequest:
    """One chunk. The nested message is filled in place, which saves a copy."""
    message = adapters_pb2.UploadAdapterRequest()
    message.chunk.file, message.chunk.offset, message.chunk.data = file, offset, data
    return message


def _out_of_step(failure: VeneerError) -> bool:
    """Whether the server now has other bytes than it told us, so that we must ask it again:
    more, from a connection that we thought dead, or fewer, since it found a file damaged."""
    if not isinstance(failure, InvalidField):
        return False
    field = failure.metadata.get("field")
    return field == "offset" or (field == "files" and "received" in failure.metadata)


def _unreadable(path: Path, error: OSError | ValueError) -> AdapterInvalid:
    why = (error.strerror if isinstance(error, OSError) else None) or error
    return AdapterInvalid(
        f"{path} cannot be read ({why}): check its permissions", metadata={"file": path.name}
    )


def _changed(path: Path) -> AdapterInvalid:
    why = "changed while it was read; push again when nothing is writing to it"
    return AdapterInvalid(
        f"{path} {why}", metadata={"file": path.name, "why": why, "cause": "changed"}
    )
