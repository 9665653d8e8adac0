"""The part of the registry that followers mirror: names, rows, identities, weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from veneer_registry.adapter import AdapterRef
from veneer_registry.core import Part
from veneer_registry.entry import Entry
from veneer_registry.pairing import STORE_FACT
from veneer_registry.rows import RevisionRow


class Replicating(Part):
    """The part of `Registry` that followers mirror."""

    def follow(self, changed: Callable[[str, Entry | None], None]) -> Mapping[str, Entry]:
        """See `Index.follow`: all names now, and each change from then on."""
        return self._core.index.follow(changed)

    def rows(self, name: str) -> tuple[RevisionRow, ...]:
        """Return the kept revisions of a name that have an undamaged row, newest first; none
        for a name that does not exist."""
        return self._core.catalog.revisions(name)

    @property
    def store_id(self) -> str:
        """Identity of the data folder; "" if it is damaged."""
        return self._core.catalog.fact(STORE_FACT) or ""

    @property
    def last_change(self) -> int:
        """Number of the catalog's last change. It goes back when a backup is restored."""
        return self._core.catalog.number

    @property
    def told(self) -> int:
        """See `Catalog.told`."""
        return self._core.catalog.told

    def catch_up(self, number: int) -> None:
        """Apply what other registries have changed, unless everything up to a number is there.
        From a worker thread. Raises Unavailable."""
        if self.told < number:
            with self._core.changes:
                pass

    @property
    def base_id(self) -> str:
        """Identity of the base that adapters are checked against."""
        return self._core.base_id

    async def present(self, ref: AdapterRef) -> bool:
        """Bring a leased revision's weights to this machine's disk. Returns whether they had to
        be fetched. Raises what `Lookups.fetch` does."""
        if self._core.store.is_local(ref.weights_digest):
            return False
        return await self._core.store.bring(ref.weights_digest)

    @property
    def lag_s(self) -> float:
        """See `Freshness.lag_s`."""
        return self._core.freshness.lag_s
