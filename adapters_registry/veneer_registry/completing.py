"""Upgrades what an older Veneer stored, once per data folder and while serving: adds a
registration for each revision (`registration`), and makes files and folders private."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from typing import Final

from veneer_registry import registration
from veneer_registry.core import Core
from veneer_registry.rows import SERVER

COMPLETED: Final = "completed"
"""Fact of a catalog for which nothing is left to do."""


class Completing:
    """One pass over all names. One thread at a time."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._names: Iterator[str] | None = None
        self._written = False

    def more(self, limit: int) -> bool:
        """Process up to ``limit`` more names; False once all are done."""
        core = self._core
        if self._names is None:
            if core.catalog.fact(COMPLETED) is not None:
                return False
            self._names = iter(core.index.names())
        for name in islice(self._names, limit):
            with core.changes:
                for row in core.catalog.revisions(name):
                    file, data = registration.write(row)
                    core.store.complete(row.weights, row.revision, file, data)
                    self._written = True
            limit -= 1
        if limit == 0:
            return True
        if self._written:
            os.sync()  # one for all files: they are needed only if the catalog is lost
        with core.changes, core.change(SERVER) as change:
            change.set_fact(COMPLETED, "1")
        return False
