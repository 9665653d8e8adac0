"""The front's side of fetching: starts a process for each fetch, and ends it."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec
from veneer_registry.disk import disk_errors
from veneer_registry.errors import InternalError, InvalidField, QuotaExceeded

from veneer_server.adapters.child import ChildProcess
from veneer_server.adapters.fetching.allowed import AllowList
from veneer_server.adapters.fetching.process import Fetch, Fetched
from veneer_server.adapters.fetching.uris import Uri, parse_uri
from veneer_server.wire.frames import framed, read_frame

_log = logging.getLogger(__name__)

MODULE: Final = "veneer_server.adapters.fetching.process"
MAX_AT_ONCE: Final = 4
"""Most fetches that run at once; each may fill its folder up to the largest adapter."""
GRACE_S: Final = 10.0
"""Seconds after its deadline at which a process is killed."""
LONGEST_TOKEN: Final = 16 << 10

_HUB: Final = "https://huggingface.co"
_KEPT: Final = (
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "TZ",
    "PYTHONPATH",
    "VIRTUAL_ENV",
    "LD_LIBRARY_PATH",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "STORAGE_EMULATOR_HOST",
)
_KEPT_PREFIXES: Final = ("AWS_", "GOOGLE_", "CLOUDSDK_")
_DEFAULTS: Final = {
    # Cloud metadata services, which no entry of --fetch-allow names, are used only if the
    # operator sets these variables.
    "AWS_EC2_METADATA_DISABLED": "true",
    "NO_GCE_CHECK": "true",
}
_FORCED: Final = {
    "PYTHONDONTWRITEBYTECODE": "1",
    # If true, gcsfs connects by gRPC, which bypasses the check of addresses.
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
}


@dataclass(frozen=True, slots=True)
class FetchSettings:
    """The operator's settings for fetching.

    Attributes:
        staging: folder for files being fetched.
        allowed: entries of the allow-list, see the module `allowed`.
        tokens: where to read tokens: ``PREFIX FILE`` or ``PREFIX env:NAME``.
        hub: the hub's URL; "" for HF_ENDPOINT, or Hugging Face's.
        most_bytes: most bytes of an adapter's weights.
        deadline_s: seconds that a fetch may take.
        least_rate: minimum bytes a second, over half a minute.
    """

    staging: Path
    allowed: Sequence[str] = ()
    tokens: Sequence[str] = ()
    hub: str = ""
    most_bytes: int = 2 << 30
    deadline_s: float = 600.0
    least_rate: int = 16 << 10


@dataclass(frozen=True, slots=True)
class _Run:
    """One fetch, which can be stopped because its caller has left."""

    uri: Uri
    folder: Path
    child: ChildProcess
    stopped: threading.Event = field(default_factory=threading.Event)

    def stop(self) -> None:
        """Stop the fetch, whether or not its process has started."""
        self.stopped.set()
        self.child.interrupt()


class Fetchers:
    """Runs fetches. Belongs to one event loop."""

    def __init__(self, settings: FetchSettings) -> None:
        """Raises InvalidField if a setting is malformed."""
        self._settings = settings
        self._allowed = AllowList(settings.allowed)
        self._tokens = dict(map(_token_setting, settings.tokens))
        self._running: list[str] = []
        self._workers = ThreadPoolExecutor(MAX_AT_ONCE, thread_name_prefix="fetch")

    def check(self, uri: Uri) -> None:
        """Raise InvalidField unless ``uri`` may be fetched."""
        self._allowed.check(uri)

    @asynccontextmanager
    async def fetched(self, uri: Uri, tenant: str) -> AsyncIterator[Path]:
        """Fetch ``uri`` and yield a folder with its files, which is removed after the block.

        Args:
            tenant: the caller's tenant. While others fetch, it may use half of the places.

        Raises:
            InvalidField: ``uri`` may not be fetched.
            AdapterInvalid, Aborted, Unimplemented: it cannot be fetched; see `web` and
                `buckets`.
            QuotaExceeded: too many fetches are running.
        """
        self.check(uri)
        mine = self._running.count(tenant)
        most = MAX_AT_ONCE // 2 if {*self._running} - {tenant} else MAX_AT_ONCE
        if len(self._running) >= MAX_AT_ONCE or mine >= most:
            raise QuotaExceeded(
                f"{most} adapters are being fetched already: retry when one is done",
                metadata={"limit": str(most), "cause": "fetches"},
                retry_after_s=2.0,
            )
        self._running.append(tenant)
        loop, folder = asyncio.get_running_loop(), None
        try:
            with disk_errors(self._settings.staging):
                folder = self._new_folder()
            run = _Run(uri, folder, ChildProcess(MODULE, environment=environment(os.environ)))
            fetching = loop.run_in_executor(self._workers, self._fetch, run)
            try:
                answer = await asyncio.shield(fetching)
            except asyncio.CancelledError:
                run.stop()
                await asyncio.wait({fetching})
                raise
            if not answer.confined:
                _log.warning(
                    "the kernel has no Landlock: fetches are confined only by resource limits"
                )
            if answer.failure is not None:
                raise answer.failure.error
            yield folder
        finally:
            self._running.remove(tenant)
            if folder is not None:
                removing = loop.run_in_executor(self._workers, shutil.rmtree, folder, True)
                await asyncio.wait({removing})

    def clear(self) -> None:
        """Remove files that a killed server has left behind."""
        shutil.rmtree(self._settings.staging, ignore_errors=True)

    def _new_folder(self) -> Path:
        self._settings.staging.mkdir(mode=0o700, parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(dir=self._settings.staging))

    def _fetch(self, run: _Run) -> Fetched:
        settings = self._settings
        wanted = Fetch(
            uri=str(run.uri),
            folder=str(run.folder),
            allowed=tuple(self._allowed.texts),
            tokens={prefix: _read_token(place) for prefix, place in self._tokens.items()},
            hub=settings.hub or os.environ.get("HF_ENDPOINT") or _HUB,
            most_bytes=settings.most_bytes,
            deadline_s=settings.deadline_s,
            least_rate=settings.least_rate,
        )
        why = "it ended"
        try:
            connection = run.child.start()
            if run.stopped.is_set():
                raise OSError("the caller left")
            connection.settimeout(settings.deadline_s + GRACE_S)
            connection.sendall(framed(msgspec.msgpack.encode(wanted)))
            if (body := read_frame(connection)) is not None:
                return msgspec.msgpack.decode(body, type=Fetched)
        except (OSError, msgspec.DecodeError) as error:
            why = str(error)
        finally:
            ended = run.child.end(kill=True)
        raise InternalError(
            "the adapter could not be fetched: the process that fetches it ended; try again; "
            "if this persists, report it with the server's log",
            metadata={"field": "uri", "cause": "process"},
            detail=f"{why}; {ended}",
        )


def environment(ours: Mapping[str, str]) -> dict[str, str]:
    """Return the process's environment: the variables that Python, TLS and the libraries for
    buckets need."""
    kept = {
        name: value
        for name, value in ours.items()
        if name in _KEPT or name.startswith(_KEPT_PREFIXES)
    }
    chosen = {name: ours.get(name, default) for name, default in _DEFAULTS.items()}
    return {**kept, **chosen, **_FORCED}


def _token_setting(text: str) -> tuple[str, str]:
    """Parse a token setting into its prefix and the place of its token."""
    prefix, _, place = text.strip().partition(" ")
    try:
        scheme = parse_uri(prefix, prefix=True).scheme
        if not place.strip() or scheme not in ("https", "hf"):
            raise ValueError("give PREFIX FILE or PREFIX env:NAME; PREFIX is https:// or hf://")
    except (InvalidField, ValueError) as error:
        raise InvalidField(
            f"--fetch-token {prefix[:200]!r} is not allowed: {error}",
            metadata={"key": "fetch_token"},
        ) from error
    return prefix, place.strip()


def _read_token(place: str) -> str:
    """Read the token that a setting refers to. Raises InternalError without the token in it."""
    try:
        if place.startswith("env:"):
            token = os.environ[place.removeprefix("env:")]
        else:
            with Path(place).expanduser().open("rb") as file:
                token = file.read(LONGEST_TOKEN).decode("ascii")
    except (OSError, KeyError, ValueError) as error:
        raise _no_token(f"{place}: {type(error).__name__}") from None
    token = token.strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise _no_token(f"{place}: not a token")
    return token


def _no_token(detail: str) -> InternalError:
    return InternalError(
        "the server's own credentials for fetching cannot be read: the operator finds the "
        "reason in the server's log (--fetch-token)",
        metadata={"field": "uri", "cause": "token"},
        detail=detail,
    )
