"""Resolves ``--base`` or ``model.path`` to the base model's folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, Final

from veneer_registry.bundled_base import BUNDLED, CACHE_DIR, CACHE_VARIABLE, bundled_folder
from veneer_registry.errors import InvalidField
from veneer_registry.terminal import Guard

_FIX: Final = (
    f"give a Hugging Face folder, a hub name or {BUNDLED} as model.path or with --base"
)


def resolve_base(path: str) -> Path:
    """Return the base's folder. The bundled base's name stands for the folder it was imported
    to, as for ``veneer-server``; a hub name (``owner/model``) is downloaded with the hub's
    library.

    Raises:
        InvalidField: there is no such folder or import, and the hub did not provide it.
    """
    if path == BUNDLED:
        return _imported()
    folder = Path(path)
    if (folder / "config.json").is_file():
        return folder
    if folder.exists() or path.count("/") != 1 or not all(path.split("/")):
        raise InvalidField(
            f"{path!r} is not a model folder (no config.json): {_FIX}",
            metadata={"field": "model.path"},
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        return Path(
            snapshot_download(  # nosec B615 # the user names the base
                path,
                allow_patterns=["*.json", "*.safetensors", "*.jinja"],
                tqdm_class=progress_bar(),
            )
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise InvalidField(
            f"{path!r} is neither a local folder nor a model on the hub: {_FIX}",
            metadata={"field": "model.path"},
        ) from error


def progress_bar() -> type[Any]:
    """Return the class of a download's progress bar.

    The bar overwrites its own line, so it bypasses a `Guard`, which would make its control
    characters visible. The hub's own class is not used: transformers switches that off with
    its other bars.
    """
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            stream = sys.stderr
            options.pop("name", None)  # the hub's
            options["file"] = stream.raw if isinstance(stream, Guard) else stream
            super().__init__(*args, **options)

    return Bar


def _imported() -> Path:
    cache = Path(os.environ.get(CACHE_VARIABLE) or CACHE_DIR).expanduser()
    folder = bundled_folder(cache)
    missing = [
        name
        for name in ("config.json", "model.safetensors", "tokenizer.json")
        if not (folder / name).is_file()
    ]
    if not missing:
        return folder
    why = (
        f"{folder} does not contain {missing[0]}"
        if folder.exists()
        else f"there is no {folder}"
    )
    raise InvalidField(
        f"{BUNDLED} is not imported yet ({why}): veneer-server model import {BUNDLED}",
        metadata={"field": "model.path"},
    )
