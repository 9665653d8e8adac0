"""The store of a follower's tenant: weights are in the follower's cache, or fetched to it."""

from __future__ import annotations

from pathlib import Path

from veneer_registry.bundle import Bundle
from veneer_registry.errors import Unavailable
from veneer_registry.registry_copy import Refuse
from veneer_registry.store import Store
from veneer_registry.weights_cache import WeightsCache

from veneer_server.follower.fetching import Fetching


class FetchedStore(Store):
    """Weights of all tenants are in one cache, by digest; the folders below ``root`` stay
    empty."""

    def __init__(
        self, root: Path, tenant: str, cache: WeightsCache, fetching: Fetching, refuse: Refuse
    ) -> None:
        """Args: tenant: in whose name the registry is asked for weights."""
        super().__init__(root)
        self._tenant = tenant
        self._cache = cache
        self._fetching = fetching
        self._refuse = refuse

    def weights_folder(self, digest: str) -> Path:
        """See `WeightsCache.weights_folder`."""
        return self._cache.weights_folder(digest)

    def is_local(self, weights: str) -> bool:
        """See `Store`. False also for weights of an earlier run that are not verified yet."""
        return self._cache.use(weights) is True

    async def bring(self, weights: str) -> bool:
        """See `Fetching.present`."""
        return await self._fetching.present(self._tenant, weights)

    def fetch(self, weights: str) -> bool:
        """Verify weights that an earlier run left. Unavailable if there are none: this is for
        the start, when the registry is not connected yet."""
        if self._cache.has(weights):
            return False
        raise Unavailable("they are not on this server's disk")

    def heal(self, weights: str) -> bool:
        """Drop damaged weights; the next request fetches them again."""
        self._cache.drop(weights, "they were found damaged when they were loaded")
        return True

    def bundle(self, revision: str) -> Bundle:
        """Refuse: downloads are forwarded to the registry."""
        self._refuse("a download")
