"""The content of a revision, and the document whose SHA-256 names it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from veneer_registry.strict_json import canonical_json


@dataclass(frozen=True, slots=True)
class Bundle:
    """The content of a revision: weights and other files, by digest.

    Attributes:
        weights: the weights digest.
        files: name -> SHA-256 of every other file that counts.
    """

    weights: str
    files: Mapping[str, str]

    @property
    def document(self) -> bytes:
        """Text of ``bundle.json``."""
        return canonical_json({"files": dict(self.files), "weights": self.weights})

    @property
    def revision(self) -> str:
        """SHA-256 of `document`."""
        return hashlib.sha256(self.document).hexdigest()
