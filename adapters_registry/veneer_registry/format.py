"""The adapter format: read, validate and write a PEFT adapter folder.

Everything is checked by our own code before any library sees a byte. Pickles are
never opened; ``base_model_name_or_path`` is never fetched; no config string is
run as a regular expression. Each refusal names the
file, the tensor or key, and the fix.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final

from veneer_registry.adapter import PROJECTIONS, AdapterManifest, BaseSpec, LoraModule
from veneer_registry.errors import AdapterCorrupt, AdapterInvalid
from veneer_registry.lora_config import CONFIG_FILE, CONFIG_LIMIT, LoraSettings, parse_config
from veneer_registry.manifest_json import manifest_from_json, manifest_to_json
from veneer_registry.regular_files import open_regular, stat_regular
from veneer_registry.safetensors_header import SafetensorsHeader, read_header
from veneer_registry.strict_json import refuse, show
from veneer_registry.tensor_names import module_path
from veneer_registry.training_manifest import (
    TRAINING_FILE,
    TRAINING_LIMIT,
    TrainingManifest,
    check_base,
    parse_training,
)
from veneer_registry.values import SERVING_BYTES, to_bfloat16
from veneer_registry.weights import (
    WEIGHTS_FILE,
    ModuleTensors,
    Pieces,
    TensorView,
    check_numbers,
    digest_weights,
    find_modules,
    mapped,
    read_pieces,
    view_tensors,
)
from veneer_registry.writer import write_adapter

__all__ = [
    "ALLOWED_FILES",
    "CONFIG_FILE",
    "README_FILE",
    "REQUIRED_FILES",
    "TEMPLATE_FILE",
    "TRAINING_FILE",
    "WEIGHTS_FILE",
    "FileSelection",
    "ModuleTensors",
    "TensorView",
    "check_adapter",
    "check_file_name",
    "check_fit",
    "manifest_from_json",
    "manifest_to_json",
    "open_stored",
    "open_unverified",
    "read_adapter",
    "read_small",
    "select_files",
    "to_bfloat16",
    "verify_weights",
    "weights_digest",
    "write_adapter",
]

TEMPLATE_FILE: Final = "chat_template.jinja"
TEMPLATE_LIMIT: Final = 64 << 10
README_FILE: Final = "README.md"
README_LIMIT: Final = 1 << 20

REQUIRED_FILES: Final = (CONFIG_FILE, WEIGHTS_FILE)

ALLOWED_FILES: Final[Mapping[str, int | None]] = MappingProxyType(
    {
        CONFIG_FILE: CONFIG_LIMIT,
        WEIGHTS_FILE: None,
        TEMPLATE_FILE: TEMPLATE_LIMIT,
        TRAINING_FILE: TRAINING_LIMIT,
        README_FILE: README_LIMIT,
    }
)
"""Files of a bundle, each with the most bytes it may have (weights: the server's limit)."""

_SERVING_ANYWHERE: Final = "float32"
"""Without a base nothing is cast; the bound on magnitudes holds all the same."""

_PICKLES: Final = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})
_HEADER_BYTES: Final = 64 << 10
"""What the header of a weights file takes, or a good part of it."""


def check_file_name(name: str) -> str:
    """Return ``name`` if a bundle may hold a file of this name.

    Raises:
        AdapterInvalid: metadata ``file``; the message says what to send instead.
    """
    if name in ALLOWED_FILES:
        return name
    shown = name[:80]
    if Path(shown).suffix.lower() in _PICKLES:
        why = (
            "is a pickle, which can run code when opened, so it is never read; save the "
            f"adapter with safe_serialization=True and send {WEIGHTS_FILE}"
        )
    else:
        why = f"does not belong in a bundle; send only {', '.join(ALLOWED_FILES)}"
    raise AdapterInvalid(f"{show(shown)} {why}", metadata={"file": shown, "why": why})


@dataclasses.dataclass(frozen=True, slots=True)
class FileSelection:
    """What of a folder is a bundle: ``files`` are sent, ``skipped`` are not."""

    files: tuple[Path, ...]
    skipped: tuple[str, ...]


def select_files(folder: Path) -> FileSelection:
    """Sort a folder's entries into bundle files and the rest.

    Trainers leave ``training_args.bin``, optimizer states and checkpoints beside an
    adapter: they are skipped, never sent.

    Only names, kinds and sizes are looked at: nothing is read before all of them are fine.

    Raises:
        AdapterInvalid: the folder or a required file is missing; where only a
            pickle is there, it is named with the way to convert it. A file of the bundle is
            empty, too large, not a regular file, or a link that leaves the folder.
    """
    if not folder.is_dir():
        refuse(show(str(folder)), "is not a folder; give the folder that PEFT saved")
    entries = sorted(folder.iterdir())
    files = tuple(path for path in entries if path.name in ALLOWED_FILES)
    skipped = tuple(path.name for path in entries if path.name not in ALLOWED_FILES)
    names = {path.name for path in files}
    if WEIGHTS_FILE not in names:
        for name in skipped:
            if Path(name).stem == "adapter_model" and Path(name).suffix.lower() in _PICKLES:
                check_file_name(name)
    for name in REQUIRED_FILES:
        if name not in names:
            refuse(name, "is missing; save the adapter with save_pretrained")
    for path in files:
        _check_size(path)
    return FileSelection(files, skipped)


def _check_size(path: Path) -> None:
    size, limit = stat_regular(path).st_size, ALLOWED_FILES[path.name]
    if not size:
        fix = "save the adapter again" if path.name in REQUIRED_FILES else "remove it"
        refuse(path.name, f"is empty; {fix}")
    if limit is not None and size > limit:
        refuse(path.name, f"is larger than {limit} bytes, it has {size}; make it smaller")


def read_adapter(folder: Path, base: BaseSpec | None) -> AdapterManifest:
    """Check an adapter folder and describe it.

    Args:
        folder: what PEFT's ``save_pretrained`` wrote. Files outside the allow-list
            are not opened.
        base: what it must fit; None leaves out shapes against the base, its layers, and
            the fingerprint. See `check_adapter` too.

    Raises:
        AdapterInvalid: metadata ``file`` and ``tensor`` or ``key``.
        BaseModelMismatch: its manifest or its config names another base; both are shown.
    """
    selection = select_files(folder)
    return _read_rest(folder, base, selection, _read_weights(folder, base))


def check_adapter(folder: Path) -> tuple[str, ...]:
    """The check of `read_adapter` without a base, and its warnings. It takes no digest.

    Raises:
        AdapterInvalid: as `read_adapter`.
    """
    selection = select_files(folder)
    with _opened_weights(folder, None) as (file, header, settings, modules):
        check_numbers(read_pieces(file), header, _SERVING_ANYWHERE)
    manifest = _manifest("", header, settings, modules, None)
    return _read_rest(folder, None, selection, manifest).warnings


def _read_rest(
    folder: Path, base: BaseSpec | None, selection: FileSelection, manifest: AdapterManifest
) -> AdapterManifest:
    """``manifest`` with what the other files of the folder say."""
    names = {path.name for path in selection.files}
    warnings = list(manifest.warnings)
    training = TrainingManifest(None, {}, ())
    if TRAINING_FILE in names:
        training = parse_training(read_small(folder, TRAINING_FILE))
        warnings += training.warnings
    if base is not None:
        warnings += check_base(training.fingerprint, base, manifest.base_name)
    template = None
    if TEMPLATE_FILE in names:
        template = _template(read_small(folder, TEMPLATE_FILE))
    return dataclasses.replace(
        manifest,
        base_fingerprint=training.fingerprint,
        chat_template=template,
        training=training.facts,
        warnings=tuple(warnings),
    )


def check_fit(folder: Path, base: BaseSpec) -> None:
    """Compare modules and shapes of stored weights with a base. Raises as `read_adapter`."""
    with _opened_weights(folder, base):
        pass


def weights_digest(folder: Path) -> str:
    """The weights digest of an adapter folder, checked as `read_adapter` does."""
    return _read_weights(folder, None).weights_digest


def verify_weights(folder: Path, digest: str) -> AdapterManifest:
    """Read the two weight files of a stored adapter and compare with ``digest``.

    Returns the manifest of these files alone (no template, no training facts), so
    that a loader learns modules and scalings from verified bytes.

    Raises:
        AdapterCorrupt: files are missing, unreadable as an adapter, or differ.
    """
    with open_stored(folder, digest) as (manifest, _):
        return manifest


@contextlib.contextmanager
def open_stored(
    folder: Path, digest: str
) -> Iterator[tuple[AdapterManifest, Sequence[ModuleTensors]]]:
    """`verify_weights`, and views of the very bytes that were verified, in the order of
    ``manifest.modules``. Copy what you keep before leaving: the views are invalid then.

    Raises:
        AdapterCorrupt: as `verify_weights`.
    """
    with open_unverified(folder, digest) as stored:
        stored.verify()
        manifest = _manifest(digest, stored.header, stored.settings, stored.modules, None)
        yield manifest, stored.tensors


@dataclasses.dataclass(frozen=True, slots=True)
class Stored:
    """An adapter of the store, opened: see `open_unverified`.

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
    """`open_stored`, but for the digest: ``verify`` compares it, and may do so in another
    thread while the caller works. Until it has returned nothing here is to be trusted.

    Raises:
        AdapterCorrupt: as `verify_weights`; also by ``verify``.
    """
    with contextlib.ExitStack() as stack:
        try:
            settings = parse_config(read_small(folder, CONFIG_FILE))
            raw = open_regular(folder / WEIGHTS_FILE)
            file = stack.enter_context(io.BufferedReader(raw, _HEADER_BYTES))
            file.peek()  # before all the rest is asked for, or it would wait for that
            stack.enter_context(_read_ahead(file.fileno()))
            header = read_header(file, WEIGHTS_FILE)
            modules = find_modules(header, settings, None)
            content = stack.enter_context(mapped(file))
        except (AdapterInvalid, OSError) as error:
            raise _damaged(digest, str(error)[:200], "files") from error

        def verify() -> None:
            pieces: Pieces = lambda tensor: (content[tensor.begin : tensor.end],)  # noqa: E731
            found = digest_weights(pieces, header, modules, None)
            if found != digest:
                raise _damaged(digest, f"its content has digest {found[:12]}", "digest")

        tensors = stack.enter_context(view_tensors(content, header, modules))
        yield Stored(settings, header, modules, tensors, verify)


@contextlib.contextmanager
def _read_ahead(fd: int) -> Iterator[None]:
    """Have the disk read all of a file meanwhile. In a thread: asking takes as long as to find
    that much memory."""
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


def _read_weights(folder: Path, base: BaseSpec | None) -> AdapterManifest:
    serving = _SERVING_ANYWHERE if base is None else base.serving_dtype
    with _opened_weights(folder, base) as (file, header, settings, modules):
        digest = digest_weights(read_pieces(file), header, modules, serving)
    return _manifest(digest, header, settings, modules, base)


_Opened = tuple[io.BufferedReader, SafetensorsHeader, LoraSettings, tuple[LoraModule, ...]]


@contextlib.contextmanager
def _opened_weights(folder: Path, base: BaseSpec | None) -> Iterator[_Opened]:
    """The two weight files, checked but for the numbers."""
    settings = parse_config(read_small(folder, CONFIG_FILE))
    with _buffered(folder / WEIGHTS_FILE) as file:
        header = read_header(file, WEIGHTS_FILE)
        yield file, header, settings, find_modules(header, settings, base)


def _manifest(
    digest: str,
    header: SafetensorsHeader,
    settings: LoraSettings,
    modules: tuple[LoraModule, ...],
    base: BaseSpec | None,
) -> AdapterManifest:
    tensors = header.tensors.values()
    parameters = sum(tensor.shape[0] * tensor.shape[1] for tensor in tensors)
    dtypes = {tensor.dtype for tensor in tensors}
    projections = {module.projection for module in modules}
    return AdapterManifest(
        weights_digest=digest,
        modules=modules,
        max_rank=max(module.rank for module in modules),
        targets=tuple(name for name in PROJECTIONS if name in projections),
        parameters=parameters,
        serving_bytes=parameters
        * SERVING_BYTES["bfloat16" if base is None else base.serving_dtype],
        file_dtype=dtypes.pop() if len(dtypes) == 1 else "mixed",
        base_name=settings.base_name,
        warnings=settings.alpha_warnings(module_path(m.layer, m.projection) for m in modules),
    )


def _buffered(path: Path) -> io.BufferedReader:
    return io.BufferedReader(open_regular(path))


def read_small(folder: Path, name: str) -> bytes:
    """All of a bundle's file other than the weights.

    Raises:
        AdapterInvalid: it is missing, too large, not a regular file, or a link that leaves
            the folder.
    """
    limit = ALLOWED_FILES[name]
    assert limit is not None, "the weights are read in pieces"
    with _buffered(folder / name) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        refuse(name, f"is larger than {limit} bytes; make it smaller")
    return data


def _template(data: bytes) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        refuse(TEMPLATE_FILE, f"is not UTF-8 at byte {error.start}; save it as UTF-8")
    if not text.strip():
        refuse(TEMPLATE_FILE, "is empty; leave it out to use the base's template")
    return text
