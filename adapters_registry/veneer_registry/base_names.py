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

_ALIASES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {"smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct",)}
)
"""Other names of bundled bases."""
_CONFIG_LIMIT: Final = 1 << 20

_QUANTIZED: Final = re.compile(r"(?:-unsloth)?-bnb-4bit$")
"""The end of a quantized copy's name, whoever made it."""
_MLX: Final = re.compile(r"-(?:[3468]bit|bf16|fp16)$")
"""The end of a copy's name in mlx-community."""
_RENAMED: Final = re.compile(r"^meta-(?=llama-)")
"""A prefix that Meta's Llamas are known with and without."""
_STORED: Final = re.compile(
    r"(?:[-._](?:gguf|gptq|awq|mxfp4|marlin|autoround|quantized|int[48]|[48]-?bits?|w[48]a16"
    r"|g(?:32|64|128)|u?d?-?i?q[4-8]_(?:k(?:_(?:s|m|l|xl))?|[01]|nl|xs)|bf16|f16|f32))+$",
    re.IGNORECASE,
)
"""The end of a name that tells how weights are stored: ``-GPTQ-Int4``, ``.Q4_K_M``."""
_CARD: Final = re.compile(
    r"^base_model:[ \t]*(?:\n[ \t]*-[ \t]*)?[\"']?([\w.-]+/[\w.-]+)[\"']?[ \t]*$", re.MULTILINE
)
"""The line of a model card that names what a quantized model was made from."""
_CARD_LIMIT: Final = 64 << 10
_COPIERS: Final = frozenset({"unsloth", "mlx-community"})
"""Owners that publish copies of others' models under the original names."""

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


def declared_origin(name: str, folder: Path) -> str:
    """Return the name of the model whose weights a quantized base has in fewer bits: what its
    model card or its ``config.json`` says, else its own name ``name`` without what tells how it
    is stored. It is a claim: nothing here compares weights."""
    with contextlib.suppress(OSError), (folder / "README.md").open("rb") as file:
        card = file.read(_CARD_LIMIT).decode("utf-8", "replace")
        if card.startswith("---") and (found := _CARD.search(card.partition("\n---")[0])):
            return found[1]
    own = ""
    reading = contextlib.suppress(OSError, ValueError, AttributeError)
    with reading, (folder / "config.json").open("rb") as file:
        own = json.loads(file.read(_CONFIG_LIMIT)).get("_name_or_path") or ""
    return without_storage(_shown(own if isinstance(own, str) and own.strip() else name))


def meanings(name: str) -> tuple[str, ...]:
    """Return a name, and the hub names of the bundled base that it is."""
    return (name, *_ALIASES.get(_plain(name.strip().lower()), ()))


def without_storage(name: str) -> str:
    """Return a model's name without an end that tells how its weights are stored."""
    return _STORED.sub("", name) or name


def _shown(name: str) -> str:
    """Return a hub name unchanged, and only the model's name of a path."""
    text = name.strip().replace("\\", "/").rstrip("/")
    if cached := _CACHED.search(text):
        return f"{cached[1]}/{cached[2]}"
    local = _LOCAL.match(text.lower()) is not None or text.count("/") > 1
    return text.rpartition("/")[2] if local else text


def is_named(name: str, names: Iterable[str]) -> bool:
    """Whether ``name`` is one of ``names``, ignoring case and treating ``_`` and spaces as
    ``-``. Two hub names must have the same owner; only the last part of a path counts. A
    name without an owner counts for a hub name if ``names`` have no owner of that model. The
    logical name of a bundled base is not the model's part of a hub name: SmolLM2-135M is
    another model than the bundled one.
    """
    owner, model = _parts(name)
    owners = {other for other, other_model in map(_parts, names) if other_model == model}
    if not model or not owners:
        return False
    if not owner or owner in owners:
        return True
    return owners == {""} and model not in _ALIASES


def is_copy(name: str, names: Iterable[str]) -> bool:
    """Whether ``name`` names a copy of one of ``names``: the same model's name under any
    owner, and perhaps quantized. ``unsloth/Llama-3.2-1B-Instruct-bnb-4bit`` is a copy of
    ``meta-llama/Llama-3.2-1B-Instruct``, and not of ``meta-llama/Llama-3.2-1B``.

    Only names are compared: an owner may publish anything under a model's name. If ``names``
    has hub names, only they count, since a folder may be called anything.
    """
    names = tuple(names)
    model = _origin(name)
    hub_names = [other for other in names if _parts(other)[0]]
    return bool(model) and any(model == _origin(other) for other in hub_names or names)


def says_its_origin(name: str) -> bool:
    """Whether a copy's name can be trusted to name the original: it is a folder's name, or its
    owner publishes copies under the original names."""
    return _parts(name)[0] in {"", *_COPIERS}


def _origin(name: str) -> str:
    """Return the model's name, without the affixes that copies add."""
    owner, model = _parts(name)
    model = _QUANTIZED.sub("", model)
    if owner == "mlx-community":
        model = _MLX.sub("", model)
    return _RENAMED.sub("", model)


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
