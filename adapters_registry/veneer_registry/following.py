"""Brings the index up to date with what other processes changed in the catalog."""

from __future__ import annotations

import logging
from itertools import islice
from typing import Final

from veneer_registry.core import Core
from veneer_registry.recovery import entry_of
from veneer_registry.rows import Foreign

_log = logging.getLogger(__name__)

_AT_ONCE: Final = 500
"""Names in one query of the catalog."""


def follow_changes(core: Core, foreign: Foreign) -> None:
    """Update the index for the names that other processes changed, then call the watchers."""
    names = iter(sorted(foreign.names))
    while chosen := tuple(islice(names, _AT_ONCE)):
        rows = {row.name: row for row in core.catalog.names(chosen)}
        for name in chosen:
            row = rows.get(name)
            if row is None:
                if core.index.entry(name) is not None:
                    core.index.remove(name)
                core.index.set_damaged(name, 0)
                continue
            entry = entry_of(row, core.base_id)
            core.index.put(name, entry)
            core.index.set_damaged(name, row.damaged)
            for ref in entry.revisions:
                core.index.found(ref)  # its publisher has stored it
    core.index.set_quarantined(core.catalog.quarantined())
    for watcher in tuple(core.watchers) if foreign.lines else ():
        try:
            watcher(foreign.lines)
        except Exception:  # the index is up to date already
            _log.exception("a watcher of the registry failed")
