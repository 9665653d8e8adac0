"""``--watch-dir``: publishes the folders that appear there, as adapters of the same names.

A changed folder becomes a new revision; removing a folder does not remove its adapter. The
published content is recorded in a file, so that a restart does not publish it again: a rollback
or a removal by hand stays. After a restart, folders that were refused are tried again.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import signal
import stat
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import msgspec
from veneer_registry.adapter import check_name
from veneer_registry.bundle_files import ALLOWED_FILES, REQUIRED_FILES
from veneer_registry.errors import AdapterInvalid, Unavailable, VeneerError
from veneer_registry.lora_config import CONFIG_FILE, CONFIG_LIMIT
from veneer_registry.records import UploadFile, UploadRequest
from veneer_registry.replacing import replace_file
from veneer_registry.rows import Who
from veneer_registry.safetensors_header import read_header
from veneer_registry.weights import WEIGHTS_FILE

from veneer_server.errors import detail_for_log
from veneer_server.logs import get_logger
from veneer_server.serving.local_folders import LocalFile, LocalFolders
from veneer_server.serving.spare_time import to_the_end
from veneer_server.serving.tenants import Tenant
from veneer_server.serving.uploads import UploadMessage, UploadOptions
from veneer_server.telemetry.watched_series import WatchedSeries

# -------------------- settled
# Decides whether a folder in the watched one is complete, and detects changes of its content.
#
# A folder counts as whole when its config parses, its weights are as long as their header says,
# nobody has one of its files open for writing, and nothing has changed between two scans.
# Copying a folder to a hidden name and then renaming it avoids depending on any of this.

_MOST: Final = 100_000
"""Most folders that are scanned."""


@dataclass(frozen=True, slots=True)
class FolderSeen:
    """The state of a folder at one scan.

    Attributes:
        signature: the real path of the folder, then name, inode, size and times of each bundle
            file; empty if a required file is missing.
    """

    signature: tuple[tuple[str | int, ...], ...]


def look(root: Path) -> Mapping[str, FolderSeen]:
    """Scan the folders in ``root``, by name; hidden ones are left out. Raises OSError."""
    found: dict[str, FolderSeen] = {}
    with os.scandir(root) as entries:
        for entry in entries:
            if not entry.name.startswith(".") and len(found) < _MOST and _is_folder(entry):
                found[entry.name] = look_at(root / entry.name)
    return found


def look_at(folder: Path) -> FolderSeen:
    """Scan one folder."""
    files: list[tuple[str | int, ...]] = []
    try:
        real = os.path.realpath(folder)
        for name in ALLOWED_FILES:
            try:
                status = os.stat(os.path.join(real, name))
            except FileNotFoundError:
                if name in REQUIRED_FILES:
                    return FolderSeen(())
                continue
            times = status.st_mtime_ns, status.st_ctime_ns
            kind = stat.S_IFMT(status.st_mode)
            files.append((name, status.st_dev, status.st_ino, kind, status.st_size, *times))
    except OSError as error:
        return FolderSeen(((error.strerror or "",),))  # publishing it will report the reason
    return FolderSeen(((real,), *files))


def is_whole(files: Sequence[LocalFile]) -> bool:
    """Whether the open files look complete and nobody has one open for writing."""
    by_name = {file.name: file for file in files}
    if not {*REQUIRED_FILES} <= by_name.keys():
        return False
    if any(_is_written(file.descriptor) for file in files):
        return False
    try:
        text = os.pread(by_name[CONFIG_FILE].descriptor, CONFIG_LIMIT, 0)
        if not isinstance(json.loads(text), dict):
            return False
        with os.fdopen(os.dup(by_name[WEIGHTS_FILE].descriptor), "rb") as file:
            read_header(file, WEIGHTS_FILE)
    except (OSError, ValueError, RecursionError, AdapterInvalid):
        return False
    return True


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_written(descriptor: int) -> bool:
    """Whether a process of this machine has the file open for writing, as far as we can tell:
    the kernel grants a read lease only if no process has."""
    if not hasattr(fcntl, "F_SETLEASE"):
        return False
    try:
        # A process that opens it now makes the kernel signal us. The default, SIGIO, would end
        # this process; SIGURG does not.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except BlockingIOError:
        return True
    except OSError:  # another user's file, or a file system without leases
        return False
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


INTERVAL_S: Final = 1.0
"""Seconds between scans."""
STALE_S: Final = 60.0
"""A folder that has not been whole for this many seconds is reported."""
_FIRST_WAIT_S: Final = 2.0
_LONGEST_WAIT_S: Final = 300.0
_FINAL: Final = frozenset(
    {"INVALID_ARGUMENT", "FAILED_PRECONDITION", "ALREADY_EXISTS", "NOT_FOUND", "UNIMPLEMENTED"}
)
"""Codes of errors that stay until the content changes: trying again does not help."""
_PASSING: Final = frozenset({"not_whole", "changed", "unreadable"})
"""Causes for which an error with one of these codes may still go away by itself."""

_log = get_logger(__name__)

Outcome = Literal["published", "refused"]


class _Done(msgspec.Struct, frozen=True):
    """The last outcome for a folder.

    Attributes:
        digest: SHA-256 over the names and SHA-256 of its files.
        signature: SHA-256 of the folder's signature at that scan.
    """

    digest: str
    signature: str
    outcome: Outcome


class _State(msgspec.Struct):
    """The content of the state file."""

    root: str
    folders: dict[str, _Done]


@dataclass(slots=True)
class _Waiting:
    """A folder that is not whole, or that will be tried again."""

    since: float
    """When it was first scanned with this content, on the loop's clock."""
    again: float = 0.0
    """When it may be tried again, on the loop's clock."""
    wait_s: float = _FIRST_WAIT_S
    told: set[str] = field(default_factory=set)
    """Error reasons that were already logged."""


class _Unchanged(Exception):
    """The folder's content has been handled before."""


class WatchedFolder:
    """Scans the watched folder and publishes its adapters. Belongs to one event loop."""

    def __init__(
        self,
        root: Path,
        home: Callable[[], Tenant],
        *,
        state: Path,
        most_bytes: int,
        series: WatchedSeries,
        ready: Callable[[], bool] = lambda: True,
        interval_s: float = INTERVAL_S,
    ) -> None:
        """Args:
        home: the tenant to publish for.
        state: file that records the outcomes.
        most_bytes: largest size of an adapter's weights.
        ready: whether adapters can be published now.
        """
        self._root = root.absolute()
        self._home = home
        self._file = state
        self._series = series
        self._ready = ready
        self._interval_s = interval_s
        self._local = LocalFolders((self._root,), most_bytes, "watch_dir", "--watch-dir")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="watch-dir")
        self._state = _State(str(self._root), {})
        self._before: dict[str, FolderSeen] = {}
        self._waiting: dict[tuple[str, FolderSeen], _Waiting] = {}
        self._unreadable = ""
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read the recorded outcomes, and start scanning."""
        await to_the_end(self.read_state, self._reader)
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Stop scanning; a commit in progress is completed first."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            try:
                if self._ready():
                    await self.look()
            except Exception as error:  # a bug must not end the watch
                _log.error("watched folder not scanned", error)
            # With many folders or a slow disk, scan less often.
            await asyncio.sleep(max(self._interval_s, 9 * (loop.time() - began)))

    async def look(self) -> None:
        """Scan once, and publish the folders that have not changed since the last scan."""
        try:
            found = dict(await to_the_end(lambda: look(self._root), self._reader))
        except OSError as error:
            if self._unreadable != (why := error.strerror or str(error)):
                _log.error("the watched folder cannot be read", folder=self._root, why=why)
                self._series.failed("UNREADABLE")
            self._unreadable = why
            return  # a disk that is unreachable for a while must not remove recorded outcomes
        self._unreadable = ""
        before, self._before = self._before, found
        gone = self._state.folders.keys() - found.keys()
        for name in gone:
            del self._state.folders[name]
        if gone:
            await self._keep()
        now = found.items()
        self._waiting = {key: each for key, each in self._waiting.items() if key in now}
        for name, seen in sorted(found.items()):
            if seen.signature and before.get(name) == seen:
                await self._settled(name, seen)
        self._count(found)

    async def _settled(self, name: str, seen: FolderSeen) -> None:
        """Publish a folder that has not changed since the last scan, unless that is done."""
        done = self._state.folders.get(name)
        if done is not None and done.signature == _signature(seen):
            return
        now = asyncio.get_running_loop().time()
        waiting = self._waiting.setdefault((name, seen), _Waiting(now))
        if now < waiting.again:
            return
        digest: list[str] = []
        try:
            await self._publish(name, seen, done, digest)
        except _Unchanged:
            assert done is not None, "unchanged implies an earlier outcome"
            await self._do(name, seen, digest[0], done.outcome)
        except VeneerError as error:
            cause = error.metadata.get("cause")
            if cause == "not_whole" and now - waiting.since < STALE_S:
                return
            final = error.code in _FINAL and cause not in _PASSING
            waiting.again = now + waiting.wait_s
            waiting.wait_s = min(waiting.wait_s * 2, _LONGEST_WAIT_S)
            if error.reason not in waiting.told:
                waiting.told.add(error.reason)
                self._tell(name, error)
            if final:
                await self._do(name, seen, digest[0] if digest else "", "refused")

    async def _publish(
        self, name: str, seen: FolderSeen, done: _Done | None, digest: list[str]
    ) -> None:
        """Upload and publish a folder. Its digest is appended to ``digest`` once it is known.

        Raises:
            _Unchanged: its content is that of ``done``.
            VeneerError: the upload failed, or the folder is not whole or changed meanwhile.
        """
        check_name(name)
        home, path = self._home(), self._root / name
        options = UploadOptions(UploadRequest(name, (), allow_replace=True))
        async with self._local.opened(str(path)) as files:
            if not await to_the_end(lambda: is_whole(files), self._reader):
                raise _not_whole()
            async with aclosing(self._local.messages(files, options)) as messages:
                first = await anext(messages)
                assert isinstance(first, UploadOptions), "they come first"
                digest.append(_digest(first.request.files))
                if done is not None and done.digest == digest[0]:
                    raise _Unchanged
                async with (
                    aclosing(_joined(first, messages)) as joined,
                    home.uploads.receive(joined) as (_, upload),
                ):
                    # If somebody wrote while we read, the upload may mix old and new data.
                    if await to_the_end(lambda: look_at(path), self._reader) != seen:
                        raise _changed()
                    published = await home.changes.publish(
                        upload, activate=False, who=Who("watch-dir", "server")
                    )
        if published.published:
            self._series.published.inc()
        await self._do(name, seen, digest[0], "published")

    async def _do(self, name: str, seen: FolderSeen, digest: str, outcome: Outcome) -> None:
        self._waiting.pop((name, seen), None)
        self._state.folders[name] = _Done(digest, _signature(seen), outcome)
        await self._keep()

    def _tell(self, name: str, error: VeneerError) -> None:
        self._series.failed(error.reason)
        more = detail_for_log(error)
        _log.error(
            "watched folder not published",
            None,
            folder=name[:80],
            reason=error.reason,
            why=error.message,
            **more,
        )

    def _count(self, found: dict[str, FolderSeen]) -> None:
        states = Counter[str]()
        for name, seen in found.items():
            done = self._state.folders.get(name)
            known = done is not None and done.signature == _signature(seen)
            states[done.outcome if done is not None and known else "waiting"] += 1
        self._series.folders_are(states)

    # ------------------------------------------------------------------------ state

    def read_state(self) -> None:
        """Read the outcomes recorded by an earlier run of the server."""
        try:
            state = msgspec.json.decode(self._file.read_bytes(), type=_State)
        except FileNotFoundError:
            return
        except (OSError, msgspec.DecodeError) as error:
            _log.warning(
                "the record of what was published from the watched folder is lost",
                why=str(error),
            )
            return
        if state.root == str(self._root):
            # Folders that were refused may pass now, with other settings.
            done = {n: each for n, each in state.folders.items() if each.outcome == "published"}
            self._state.folders.update(done)

    async def _keep(self) -> None:
        data = msgspec.json.encode(self._state)
        try:
            await to_the_end(lambda: replace_file(self._file, data, mode=0o600), self._reader)
        except OSError as error:  # kept in memory; written with the next change
            _log.warning(
                "the record of what was published from the watched folder was not saved",
                why=str(error),
            )


async def _joined(
    first: UploadMessage, rest: AsyncGenerator[UploadMessage, None]
) -> AsyncGenerator[UploadMessage, None]:
    yield first
    async for message in rest:
        yield message


def _signature(seen: FolderSeen) -> str:
    return hashlib.sha256(json.dumps(seen.signature).encode()).hexdigest()


def _digest(files: Sequence[UploadFile]) -> str:
    sums = sorted([file.name, file.sha256] for file in files)
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()


def _not_whole() -> VeneerError:
    return AdapterInvalid(
        "the folder is not a complete adapter: its config does not parse, its weights are "
        "shorter than their header says, or it is still being written; copy to a hidden name "
        "next to it and rename that",
        metadata={"cause": "not_whole"},
    )


def _changed() -> Unavailable:
    return Unavailable(
        "the folder changed while it was read: reading it again",
        metadata={"cause": "changed"},
    )
