"""The files of a bundle: which are allowed, their size limits, and reading the small ones."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final

from veneer_registry.errors import AdapterInvalid
from veneer_registry.lora_config import CONFIG_FILE, CONFIG_LIMIT
from veneer_registry.regular_files import open_regular, stat_regular
from veneer_registry.strict_json import refuse, show
from veneer_registry.training_manifest import TRAINING_FILE, TRAINING_LIMIT
from veneer_registry.weights import WEIGHTS_FILE

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
"""Files of a bundle, each with its size limit in bytes (for weights, the server's limit)."""

MLX_FILE: Final = "adapters.safetensors"
"""Where mlx-lm writes an adapter's weights."""
_CONVERT: Final = "`veneer adapter convert IN OUT`, and push OUT"
_PICKLES: Final = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})


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
    """The bundle files of a folder: ``files`` are sent, ``skipped`` are not."""

    files: tuple[Path, ...]
    skipped: tuple[str, ...]


def select_files(folder: Path) -> FileSelection:
    """Sort a folder's entries into bundle files and the rest.

    Trainers leave ``training_args.bin``, optimizer states and checkpoints beside an
    adapter: they are skipped, never sent.

    Checks only names, kinds and sizes; reads no content.

    Raises:
        AdapterInvalid: the folder or a required file is missing (if there is only a pickle,
            the message names it and says how to convert it); or a file of the bundle is
            empty, too large, not a regular file, or a link that leaves the folder.
    """
    if folder.suffix.lower() == ".gguf" and folder.is_file():
        refuse(
            show(str(folder)),
            f"is a GGUF file: make it a PEFT folder with {_CONVERT}",
            cause="gguf",
        )
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
    if WEIGHTS_FILE not in names:
        _check_trainer(entries)
    for name in REQUIRED_FILES:
        if name not in names:
            refuse(name, f"is missing{_instead(entries)}")
    for path in files:
        _check_size(path)
    return FileSelection(files, skipped)


def _check_trainer(entries: Sequence[Path]) -> None:
    """Refuse an adapter that `converting.convert_adapter` can turn into a PEFT folder."""
    for path in entries:
        if path.name == MLX_FILE:
            refuse(
                path.name,
                f"is an mlx-lm adapter's: make it a PEFT folder with {_CONVERT}",
                cause="mlx",
            )
    for path in entries:
        if path.suffix.lower() == ".gguf":
            refuse(
                show(path.name),
                f"is a GGUF file: make it a PEFT folder with {_CONVERT}",
                cause="gguf",
            )


def _instead(entries: Sequence[Path]) -> str:
    """Say what a folder without an adapter may be, and what to do."""
    below = [path for path in entries if (path / REQUIRED_FILES[0]).is_file()]
    if below:
        return f", but the folder {show(below[0].name)} in it has one: give that"
    if any(path.name == "config.json" for path in entries):
        return (
            ", and the folder holds a whole model: give the folder of a LoRA adapter; a model "
            "is served by `veneer-server --base FOLDER`"
        )
    return "; save the adapter with save_pretrained"


def _check_size(path: Path) -> None:
    size, limit = stat_regular(path).st_size, ALLOWED_FILES[path.name]
    if not size:
        fix = "save the adapter again" if path.name in REQUIRED_FILES else "remove it"
        refuse(path.name, f"is empty; {fix}")
    if limit is not None and size > limit:
        refuse(path.name, f"is larger than {limit} bytes (it has {size}); make it smaller")


def open_file(folder: Path, name: str) -> io.BufferedReader:
    """Open a file of a bundle for reading. Raises AdapterInvalid as `read_small`."""
    return io.BufferedReader(open_regular(folder / name))


def read_small(folder: Path, name: str) -> bytes:
    """Read a whole file of a bundle, other than the weights.

    Raises:
        AdapterInvalid: it is missing, too large, not a regular file, or a link that leaves
            the folder.
    """
    limit = ALLOWED_FILES[name]
    assert limit is not None, "weights are read in chunks"
    with open_file(folder, name) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        refuse(name, f"is larger than {limit} bytes; make it smaller")
    return data
