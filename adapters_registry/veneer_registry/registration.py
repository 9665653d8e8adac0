"""The store's copy of a revision's row: ``registered-<hash>.json`` beside its bundle, one for
each name that has the revision.

The bundle says what a revision consists of, not what it is called. With this file
``veneer-server store recover`` can rebuild a catalog from the store alone. It is written
with the revision, before the catalog's row, and removed when the name no longer has the
revision. It contains its own digest; a file that does not match is ignored.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any, Final

from veneer_registry.adapter import check_name
from veneer_registry.errors import InvalidField
from veneer_registry.manifest_json import manifest_from_json
from veneer_registry.rows import RevisionRow
from veneer_registry.store import REGISTRATION
from veneer_registry.strict_json import canonical_json

_FORMAT: Final = 1


def file_name(name: str) -> str:
    """File name for an adapter's name: a digest, since paths never contain a caller's text."""
    return f"{REGISTRATION}{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"


def write(row: RevisionRow) -> tuple[str, bytes]:
    """(file name, content) of a row's registration."""
    row_facts = {
        "format": _FORMAT,
        "name": row.name,
        "revision": row.revision,
        "weights": row.weights,
        "base": row.base,
        "manifest": row.manifest,
        "created": float(row.created),
        "labels": dict(row.labels),
        "bytes": row.bytes,
    }
    sha256 = hashlib.sha256(canonical_json(row_facts)).hexdigest()
    return file_name(row.name), canonical_json({"row": row_facts, "sha256": sha256}) + b"\n"


def read(data: bytes) -> RevisionRow:
    """Inverse of `write`. Raises ValueError for damaged content."""
    try:
        document: dict[str, Any] = json.loads(data)
        facts = document["row"]
        if hashlib.sha256(canonical_json(facts)).hexdigest() != document["sha256"]:
            raise ValueError("it is damaged")
        if facts.pop("format") != _FORMAT:
            raise ValueError("it is from another version of Veneer")
        row = RevisionRow(**facts)
        check_name(row.name)
        manifest_from_json(row.manifest)
        if not math.isfinite(row.created):
            raise ValueError("it has no time")
    except (KeyError, TypeError, AttributeError, RecursionError, InvalidField) as error:
        raise ValueError(f"it is not a registration ({error})") from error
    return row
