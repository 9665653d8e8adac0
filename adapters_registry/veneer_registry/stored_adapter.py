"""Reads a stored adapter and compares it with its digest."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from veneer_registry.adapter import AdapterManifest, LoraModule
from veneer_registry.bundle_files import read_small
from veneer_registry.causes import cause_of
from veneer_registry.disk import disk_failed
from veneer_registry.errors import AdapterCorrupt, AdapterInvalid, DiskFailed
from veneer_registry.format import describe
from veneer_registry.lora_config import CONFIG_FILE, LoraSettings, parse_config
from veneer_registry.regular_files import open_regular
from veneer_registry.safetensors_header import SafetensorsHeader
from veneer_registry.weights import (
    WEIGHTS_FILE,
    ModuleTensors,
    Pieces,
    digest_weights,
    find_modules,
    mapped,
    read_weights_header,
    view_tensors,
)

_NOT_A_FILE: Final = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
"""Errors for a path that does not lead to a file. Retrying does not help."""

_HEADER_BYTES: Final = 64 << 10
"""Buffer size that holds all or most of a weights file's header."""


def verify_weights(folder: Path, digest: str) -> AdapterManifest:
    """Read the two weight files of a stored adapter and compare them with ``digest``.

    Returns the manifest of these files alone (no template, no training facts), so
    that a loader gets modules and scalings from verified bytes.

    Raises:
        AdapterCorrupt: files are missing, unreadable as an adapter, or do not match ``digest``.
    """
    with open_stored(folder, digest) as (manifest, _):
        return manifest


@contextlib.contextmanager
def open_stored(
    folder: Path, digest: str
) -> Iterator[tuple[AdapterManifest, Sequence[ModuleTensors]]]:
    """Like `verify_weights`, but also yields views of the verified bytes, in the order of
    ``manifest.modules``. The views are invalid after the block: copy what you keep.

    Raises:
        AdapterCorrupt: as `verify_weights`.
    """
    with contextlib.ExitStack() as stack:
        try:
            stored = stack.enter_context(open_unverified(folder, digest))
        except DiskFailed as error:  # content that cannot be read cannot be called intact
            raise _damaged(digest, error.metadata["why"], "files") from error
        stored.verify()
        manifest = describe(digest, stored.header, stored.settings, stored.modules, None)
        yield manifest, stored.tensors


@dataclasses.dataclass(frozen=True, slots=True)
class Stored:
    """An opened stored adapter; see `open_unverified`.

    Attributes:
        tensors: views, in the order of `modules`.
        verify: compares the content with its digest.
    """

    settings: LoraSettings
    header: SafetensorsHeader
    modules: tuple[LoraModule, ...]
    tensors: Sequence[ModuleTensors]
    verify: Callable[[], None]


@contextlib.contextmanager
def open_unverified(folder: Path, digest: str) -> Iterator[Stored]:
    """Like `open_stored`, but without checking the digest. The caller must call ``verify``,
    possibly in another thread while it works; until that returns, the content must not be
    trusted.

    Raises:
        AdapterCorrupt: files are missing, or unreadable as an adapter. ``verify`` raises it
            too, if the digest differs.
        DiskFailed: the system cannot read them now, which says nothing about their content.
    """
    with contextlib.ExitStack() as stack:
        try:
            settings = parse_config(read_small(folder, CONFIG_FILE))
            raw = open_regular(folder / WEIGHTS_FILE)
            file = stack.enter_context(io.BufferedReader(raw, _HEADER_BYTES))
            file.peek()  # before the read-ahead, or the header would wait for it
            stack.enter_context(_read_ahead(file.fileno()))
            header = read_weights_header(file)
            modules = find_modules(header, settings, None)
            content = stack.enter_context(mapped(file))
        except AdapterInvalid as error:
            raise _damaged(digest, cause_of(error)[:200], "files") from error
        except OSError as error:
            if error.errno in _NOT_A_FILE:
                raise _damaged(digest, cause_of(error)[:200], "files") from error
            raise disk_failed(folder, error) from error

        def verify() -> None:
            pieces: Pieces = lambda tensor: (content[tensor.begin : tensor.end],)  # noqa: E731
            found = digest_weights(pieces, header, modules, None)
            if found != digest:
                raise _damaged(digest, f"its content has digest {found[:12]}", "digest")

        tensors = stack.enter_context(view_tensors(content, header, modules))
        yield Stored(settings, header, modules, tensors, verify)


@contextlib.contextmanager
def _read_ahead(fd: int) -> Iterator[None]:
    """Prefetch the whole file during the block. This runs in a thread, since the call blocks
    until the kernel has found that much memory."""
    if not hasattr(os, "posix_fadvise"):
        yield
        return

    def ask() -> None:
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)

    thread = threading.Thread(target=ask, name="read-ahead")
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _damaged(digest: str, why: str, cause: str) -> AdapterCorrupt:
    return AdapterCorrupt(
        f"stored weights {digest[:12]} are damaged ({why}); push the adapter again",
        metadata={"weights_digest": digest, "why": why, "cause": cause},
    )
