"""Quarantine in the object store: content stays where it is, and is deleted later."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Final

from veneer_registry.bundle_files import REQUIRED_FILES
from veneer_registry.quarantine import Quarantine, Removal
from veneer_registry.shared.marks import ASIDE, UNNEEDED, ContentMarks
from veneer_registry.shared.objects import Objects
from veneer_registry.store_folders import StoreFolders

GRACE_S: Final = 3600.0
"""How long unneeded content stays: another registry may be about to read it."""


class ObjectQuarantine(Quarantine):
    """The quarantine of an `ObjectStore`. Damaged weights stay, and the next push overwrites
    them; intact content that no name has is marked."""

    def __init__(self, folders: StoreFolders, objects: Objects, marks: ContentMarks) -> None:
        super().__init__(folders)
        self._objects = objects
        self._marks = marks
        self.needed: Callable[[str], bool] = lambda digest: True

    @property
    def place(self) -> str:
        """See `Quarantine`."""
        return "the table `marks` of the catalog"

    def add(self, weights: str) -> None:
        """Do nothing: the catalog says that they are damaged."""

    def set_aside(self, weights: Iterable[str], revisions: Iterable[str]) -> None:
        """See `Quarantine`. The content is marked, not moved."""
        self._marks.mark(ASIDE, "weights", weights)
        self._marks.mark(ASIDE, "revisions", revisions)

    def bring_back(self, weights: Iterable[str], revisions: Iterable[str]) -> int:
        """See `Quarantine`. Nothing to do: content that was set aside was not moved."""
        return 0

    def choose(self, most_bytes: int, older_than: float) -> list[Removal]:
        """See `Quarantine`; also content that has been unneeded for `GRACE_S`. Its size is not
        limited."""
        marks = self._marks.marked()
        needed = [mark.digest for mark in marks if self.needed(mark.digest)]
        if needed:
            self._marks.forget(needed)
        least_s = {UNNEEDED: GRACE_S, ASIDE: time.time() - older_than}
        due = {
            mark.digest: mark.kind
            for mark in marks
            if mark.age_s > least_s[mark.why] and mark.digest not in needed
        }
        free = self._marks.begin_deleting(due) if due else set()
        return [Removal(f"{due[digest]}/{digest}") for digest in due if digest in free]

    def remove(self, chosen: Iterable[Removal]) -> list[tuple[str, int]]:
        """See `Quarantine`."""
        left = [each.name for each in chosen]
        removed = []
        while left:
            name = left[-1]
            found = self._objects.list(name)
            # The file that makes the folder count as present goes first.
            last = [key for key in found if key.endswith(("bundle.json", REQUIRED_FILES[-1]))]
            for keys in (last, set(found) - set(last)):
                # Before each request: this process may have been paused.
                self._marks.go_on_deleting(each.partition("/")[2] for each in left)
                self._objects.delete(keys)
            self._marks.deleted(name.partition("/")[2])
            removed.append((name, sum(stat.size for stat in found.values())))
            left.pop()
        return removed
