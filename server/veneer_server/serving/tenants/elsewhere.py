"""Events for what other servers change in a shared catalog."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from veneer_registry.adapter import AdapterManifest, AdapterRef
from veneer_registry.errors import AdapterNotFound, VeneerError
from veneer_registry.records import AdapterRecord, Published
from veneer_registry.rows import HistoryRow

from veneer_server.logs import get_logger
from veneer_server.serving.adapters.events import AdapterEvents
from veneer_server.serving.tenants.registry import AdapterRegistry

__all__ = ["tell_of_others"]

_REVISION: Final = re.compile(r"[0-9a-f]{64}")
_UPDATES: Final = ("labels", "retention", "shared", "unshared")

_log = get_logger(__name__)


def tell_of_others(registry: AdapterRegistry, events: AdapterEvents) -> None:
    """From now on, add an event for each line of the history that another server wrote. Call it
    on the event loop that the events belong to."""
    loop = asyncio.get_running_loop()

    def told(lines: Sequence[HistoryRow]) -> None:
        """Called in a thread of the registry's, which may read rows."""
        for line in lines:
            try:
                event = _event(registry, events, line)
            except VeneerError as error:
                _log.error("event of another server skipped", line=line.event, why=str(error))
                continue
            if event is not None:
                loop.call_soon_threadsafe(event)

    registry.watch(told)


def _event(
    registry: AdapterRegistry, events: AdapterEvents, line: HistoryRow
) -> Callable[[], None] | None:
    """What to call for a line; None if watchers are not told of it."""
    match line.event:
        case "published" | "replaced":
            record = _record(registry, line, line.revision)
            published = Published(record, True, line.event == "replaced", ())
            return partial(events.published, published)
        case "made_current":
            return partial(events.made_current, _record(registry, line, line.revision))
        case event if event in _UPDATES:
            return partial(events.updated, _record(registry, line, line.revision))
        case "alias_set" | "alias_removed":
            alias, _, targets = line.detail.partition(": ")
            revision = line.revision or (_REVISION.findall(targets) or [""])[0]
            record = _record(registry, line, revision)
            return partial(events.alias_changed, record, f"{line.name}/{alias}")
        case "quarantined":
            record = _record(registry, line, line.revision)
            return partial(events.quarantined, (record,), line.detail)
        case "deleted" | "superseded":
            return partial(events.deleted, (_gone(line),))
    return None


def _record(registry: AdapterRegistry, line: HistoryRow, revision: str) -> AdapterRecord:
    """The revision as it is now, which may be gone again."""
    try:
        return registry.get(f"{line.name}@{revision}" if revision else line.name)
    except AdapterNotFound:
        return _gone(line)


def _gone(line: HistoryRow) -> AdapterRecord:
    """Of a revision whose rows are gone, only the name and the digest are known."""
    nothing = AdapterManifest("", (), 0, (), 0, 0, "", "")
    ref = AdapterRef(line.name, line.revision, "")
    return AdapterRecord(ref, nothing, line.time, {}, False, "", 0)
