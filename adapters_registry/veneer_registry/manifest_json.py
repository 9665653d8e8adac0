"""`AdapterManifest` as canonical JSON, for the catalog."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, fields
from typing import Any, Final

from veneer_registry.adapter import AdapterManifest, BaseFingerprint, LoraModule
from veneer_registry.strict_json import canonical_json
from veneer_registry.tensor_names import tensor_keys
from veneer_registry.training_manifest import plain_word

_VERSION: Final = 1
_MODULES: Final = '"modules":[['
"""Start of the list of modules. Cannot occur in a JSON string, which would escape its quote."""


def manifest_to_json(manifest: AdapterManifest) -> str:
    """Serialize a manifest; equal manifests give the same text. Tensor names follow from layer
    and projection and are left out: 210 modules take 6 KB instead of 40. A plain ``base_word``
    (`plain_word`) is left out too, since a server older than this key refuses a manifest that
    has it."""
    print_ = manifest.base_fingerprint
    document = {
        "version": _VERSION,
        "weights_digest": manifest.weights_digest,
        "modules": [[m.layer, m.projection, m.rank, m.scaling] for m in manifest.modules],
        "max_rank": manifest.max_rank,
        "targets": list(manifest.targets),
        "parameters": manifest.parameters,
        "serving_bytes": manifest.serving_bytes,
        "file_dtype": manifest.file_dtype,
        "base_name": manifest.base_name,
        "base_fingerprint": None if print_ is None else asdict(print_),
        "chat_template": manifest.chat_template,
        "training": dict(manifest.training),
        "warnings": list(manifest.warnings),
    }
    if manifest.base_word not in ("", plain_word(print_, manifest.base_name)):
        document["base_word"] = manifest.base_word
    return canonical_json(document).decode("ascii")


def manifest_from_json(text: str) -> AdapterManifest:
    """Inverse of `manifest_to_json`, but a ``base_word`` of "" becomes the plain one.
    Ignores keys that a later version adds. Raises ValueError for text of another format."""
    begin = text.index(_MODULES) + len(_MODULES) - 2
    end = text.index("]]", begin) + 2
    document = json.loads(f"{text[:begin]}null{text[end:]}")
    if document.pop("version") != _VERSION:
        raise ValueError("the manifest was written by another version of Veneer")
    print_ = document["base_fingerprint"]
    document["modules"] = _modules(text[begin:end])
    document["targets"] = tuple(document["targets"])
    document["warnings"] = tuple(document["warnings"])
    found = None if print_ is None else BaseFingerprint(**_known(BaseFingerprint, print_))
    document["base_fingerprint"] = found
    document.setdefault("base_word", plain_word(found, document["base_name"]))
    return AdapterManifest(**_known(AdapterManifest, document))


def _known(kind: type[Any], document: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(kind)}
    return {key: value for key, value in document.items() if key in names}


@functools.lru_cache(maxsize=256)
def _modules(text: str) -> tuple[LoraModule, ...]:
    """Parse the list of modules. It is cached: modules make up nearly all of a manifest and are
    the same in most adapters of a base, so a page of adapters is read several times as fast."""
    return tuple(
        LoraModule(layer, projection, rank, scaling, *tensor_keys(layer, projection))
        for layer, projection, rank, scaling in json.loads(text)
    )
