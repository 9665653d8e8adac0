"""What a registry keeps in PostgreSQL and an object store, as its tests look at it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from veneer_registry.shared.locations import SharedLocations
from veneer_registry.shared.marks import UNNEEDED, ContentMarks

from tests.shared_services import Services
from tests.unit.registry.kit import Kept


class KeptElsewhere(Kept):
    """Each data folder has a catalog and a store of its own."""

    local = "cache"

    def __init__(self, data: Path, services: Services) -> None:
        super().__init__(data)
        self.services = services

    def name(self, data: Path) -> str:
        """Of a data folder's catalog and store."""
        return hashlib.sha256(str(data).encode()).hexdigest()[:16]

    def places(self, data: Path) -> SharedLocations:
        """Those of a data folder."""
        return self.services.places(self.name(data), data)

    def stored(self, kind: str) -> set[str]:
        """See `Kept`: objects that are not marked as unneeded."""
        name = self.name(self.data)
        marks = ContentMarks(self.services.address(name))
        marked = {mark.digest for mark in marks.marked() if mark.why == UNNEEDED}
        marks.close()
        return {key.split("/")[1] for key in self.services.s3.objects(name).list(kind)} - marked
