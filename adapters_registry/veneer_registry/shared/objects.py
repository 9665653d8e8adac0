"""Objects under a prefix of an S3 bucket, through fsspec, whose errors become ours."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, TypeVar

import fsspec
from aiobotocore.session import get_session
from aiohttp import ClientError as HttpError
from botocore.exceptions import BotoCoreError
from botocore.exceptions import ClientError as RefusedError

from veneer_registry.disk import disk_full
from veneer_registry.errors import InvalidField, Unavailable

_log = logging.getLogger(__name__)

T = TypeVar("T")

_URL: Final = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])((?:/[A-Za-z0-9._-]+)*)/?")
RETRY_S: Final = 5.0
_DELETED_AT_ONCE: Final = 500
_CALLS: Final = ThreadPoolExecutor(16, thread_name_prefix="objects")
_STALE_PARTS_S: Final = 24 * 3600.0
"""Age at which an interrupted multipart upload is removed: it is invisible but costs money."""


@dataclass(frozen=True, slots=True)
class Stat:
    """Size in bytes, and Unix seconds of the last write."""

    size: int
    modified: float


def check_url(url: str) -> tuple[str, str]:
    """Split ``s3://bucket/prefix`` into bucket and prefix, the latter without outer slashes.

    Raises InvalidField. Connects to nothing.
    """
    match = _URL.fullmatch(url)
    if match is None or ".." in url:
        raise InvalidField(
            f"--store {url[:100]!r} is not s3://BUCKET/PREFIX: use letters, digits, '.', '_' "
            "and '-'. Endpoint and credentials come from the standard AWS variables or files",
            metadata={"field": "store"},
        )
    return match[1], match[2].strip("/")


class Objects:
    """The objects whose keys begin with a prefix. Thread-safe.

    Keys are relative to the prefix. An object appears whole or not at all, and once written
    every reader sees it (S3 is strongly consistent).

    Attributes:
        fs: fsspec's file system.
    """

    def __init__(self, url: str, **options: Any) -> None:
        """Connects to nothing.

        Args:
            options: for `s3fs.S3FileSystem`, for tests.
        """
        self._bucket, self._prefix = check_url(url)
        self.url = url.rstrip("/")
        self._root = "/".join(filter(None, (self._bucket, self._prefix)))
        self.fs = fsspec.filesystem(
            "s3",
            skip_instance_cache=True,
            use_listings_cache=False,
            session=_session(),
            config_kwargs={
                "connect_timeout": 5,
                "read_timeout": 10,
                # Some accesses are made under the catalog's lock: better to fail soon.
                "retries": {"total_max_attempts": 2, "mode": "standard"},
            },
            **options,
        )
        self.fs.retries = 1  # botocore retries

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"

    def put(self, key: str, path: Path) -> None:
        """Write a file's content; large files in parts. Raises Unavailable."""
        with self._errors():
            self.fs.put_file(str(path), self._path(key))

    def write(self, key: str, data: bytes) -> None:
        """Write bytes. Raises Unavailable."""
        with self._errors():
            self.fs.pipe_file(self._path(key), data)

    def read(self, key: str) -> bytes | None:
        """Read a small object; None if there is none. Raises Unavailable."""
        with self._errors(), contextlib.suppress(FileNotFoundError):
            return bytes(self.fs.cat_file(self._path(key)))
        return None

    def read_part(self, key: str, start: int, end: int) -> bytes | None:
        """Read the bytes from ``start`` to before ``end``; None if there is no object. Raises
        Unavailable."""
        with self._errors(), contextlib.suppress(FileNotFoundError):
            return bytes(self.fs.cat_file(self._path(key), start=start, end=end))
        return None

    def get(self, key: str, to: Path) -> bool:
        """Write an object's content to a file; False if there is none.

        Raises Unavailable, DiskFull.
        """
        with self._errors(to.parent), contextlib.suppress(FileNotFoundError):
            self.fs.get_file(self._path(key), str(to))
            return True
        return False

    def stat(self, key: str) -> Stat | None:
        """Size and time of an object; None if there is none. Raises Unavailable."""
        with self._errors(), contextlib.suppress(FileNotFoundError):
            found = self.fs.info(self._path(key))
            if found["type"] == "file":
                return _stat(found)
        return None

    def list(self, folder: str) -> dict[str, Stat]:
        """All objects whose keys begin with ``folder``/. Raises Unavailable."""
        root = self._path(folder)
        with self._errors():
            found = self.fs.find(root, detail=True)
        start = len(self._root) + 1
        return {path[start:]: _stat(each) for path, each in found.items()}

    def any(self, folder: str) -> bool:
        """Whether an object's key begins with ``folder``/. Raises Unavailable."""
        prefix = f"{self._prefix}/{folder}/" if self._prefix else f"{folder}/"
        with self._errors():
            page = self.fs.call_s3(
                "list_objects_v2", Bucket=self._bucket, Prefix=prefix, MaxKeys=1
            )
        return bool(page.get("Contents"))

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects. Idempotent. Raises Unavailable."""
        paths = [{"Key": self._path(key).partition("/")[2]} for key in keys]
        with self._errors():
            for at in range(0, len(paths), _DELETED_AT_ONCE):
                answer = self.fs.call_s3(
                    "delete_objects",
                    Bucket=self._bucket,
                    Delete={"Objects": paths[at : at + _DELETED_AT_ONCE], "Quiet": True},
                )
                if failed := answer.get("Errors"):
                    raise OSError(errno.EIO, f"delete: {failed[0].get('Code')}")

    def at_once(self, calls: Iterable[Callable[[], T]]) -> tuple[T, ...]:
        """Make independent calls at the same time, since each takes a round trip; return their
        results in order. Waits for all, then raises the first error."""
        made = [_CALLS.submit(call) for call in calls]
        wait(made)
        return tuple(each.result() for each in made)

    def copy(self, key: str, to: str) -> None:
        """Copy an object inside the store. Raises Unavailable."""
        with self._errors():
            self.fs.cp_file(self._path(key), self._path(to))

    def drop_stale_parts(self, now: float) -> int:
        """Abort multipart uploads that were interrupted long ago. Return how many."""
        dropped = 0
        where = {"Bucket": self._bucket, "Prefix": self._prefix and f"{self._prefix}/"}
        with self._errors():
            while True:
                page = self.fs.call_s3("list_multipart_uploads", **where)
                for each in page.get("Uploads") or ():
                    if each["Initiated"].timestamp() >= now - _STALE_PARTS_S:
                        continue
                    with contextlib.suppress(FileNotFoundError):  # another server was faster
                        self.fs.call_s3(
                            "abort_multipart_upload",
                            Bucket=self._bucket,
                            Key=each["Key"],
                            UploadId=each["UploadId"],
                        )
                        dropped += 1
                if not page.get("IsTruncated"):
                    return dropped
                where["KeyMarker"] = page.get("NextKeyMarker")
                where["UploadIdMarker"] = page.get("NextUploadIdMarker")

    @contextlib.contextmanager
    def _errors(self, local: Path | None = None) -> Iterator[None]:
        """Turn access errors into ours, except FileNotFoundError for a missing object."""
        try:
            yield
        except FileNotFoundError as error:
            if "bucket" in str(error).lower():
                raise self._unavailable(error) from error
            raise
        except OSError as error:
            if local is not None and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise disk_full(local) from error
            raise self._unavailable(error) from error
        except (BotoCoreError, RefusedError, HttpError, TimeoutError) as error:
            raise self._unavailable(error) from error

    def _unavailable(self, error: Exception) -> Unavailable:
        why = " ".join(str(error).split())[:300] or type(error).__name__
        refused = isinstance(error, PermissionError)
        what = "denies access" if refused else "cannot be reached"
        return Unavailable(
            f"the object store {what}, nothing was published; try again",
            metadata={"cause": "object_store"},
            retry_after_s=RETRY_S,
            detail=f"{self.url}: {why}",
        )


@functools.cache
def _session() -> Any:
    """Return the shared session: loading the description of the S3 API takes a while."""
    return get_session()


def _stat(found: dict[str, Any]) -> Stat:
    when = found.get("LastModified")
    return Stat(
        int(found.get("size") or 0), when.timestamp() if isinstance(when, datetime) else 0.0
    )
