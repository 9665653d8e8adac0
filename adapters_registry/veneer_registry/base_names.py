"""Whether two names mean the same base model.

A config's ``base_model_name_or_path`` is whatever the trainer loaded: a hub name, a folder,
or a folder of the hub's cache. We only compare it; nothing opens it.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

__all__ = ["is_named", "known_names"]

_ALIASES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {"smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct",)}
)
"""Other names of bundled bases."""
_CONFIG_LIMIT: Final = 1 << 20

_CACHED: Final = re.compile(r"(?:^|/)models--([^/]+?)--([^/]+)/snapshots/[^/]+$")
"""A folder of the hub's cache: its path holds owner and model, and ends in a commit."""
_LOCAL: Final = re.compile(r"[/.~]|[a-z]:/")


def known_names(name: str, folder: Path, *more: str) -> tuple[str, ...]:
    """Names that an adapter's config may use for the base in ``folder``: its logical name
    ``name``, the folder's name, the name in its own ``config.json``, a bundled base's hub name,
    and ``more``. Each once, none empty. Errors show them to callers, so none is a path."""
    names = [name, *_ALIASES.get(name, ()), _shown(str(folder)), _shown(str(folder.resolve()))]
    with contextlib.suppress(OSError, ValueError, AttributeError):
        with (folder / "config.json").open("rb") as file:
            own = json.loads(file.read(_CONFIG_LIMIT)).get("_name_or_path")
        if isinstance(own, str):
            names.append(_shown(own))
    return tuple(dict.fromkeys(each for each in (*names, *more) if each.strip()))


def _shown(name: str) -> str:
    """A hub name unchanged; the model's name if it is a path."""
    text = name.strip().replace("\\", "/").rstrip("/")
    if cached := _CACHED.search(text):
        return f"{cached[1]}/{cached[2]}"
    local = _LOCAL.match(text.lower()) is not None or text.count("/") > 1
    return text.rpartition("/")[2] if local else text


def is_named(name: str, names: Iterable[str]) -> bool:
    """Whether ``name`` is one of ``names``, ignoring case and treating ``_`` and spaces as
    ``-``. Two hub names must have the same owner; only the last part of a path counts.
    """
    owner, model = _parts(name)
    return any(
        model == other_model and (not owner or not other_owner or owner == other_owner)
        for other_owner, other_model in map(_parts, names)
        if model
    )


def _parts(name: str) -> tuple[str, str]:
    """(owner or "", model) of a hub name or a path."""
    text = name.strip().replace("\\", "/").lower()
    local = _LOCAL.match(text) is not None or text.endswith("/")
    text = text.rstrip("/")
    if cached := _CACHED.search(text):
        return _plain(cached[1]), _plain(cached[2])
    *before, model = text.split("/")
    owner = before[0] if len(before) == 1 and not local else ""
    return _plain(owner), _plain(model)


def _plain(part: str) -> str:
    return re.sub(r"[\s_]+", "-", part)
