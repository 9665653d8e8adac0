"""Limits on uploads: adapters and bytes that a tenant stores, and bytes sent per day."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Final

from veneer_registry.errors import QuotaExceeded
from veneer_registry.records import UploadRequest

from veneer_server.quotas.quota import Account
from veneer_server.quotas.stores import Stores, TenantStorage
from veneer_server.quotas.usage import UsageBook

_NOTHING: Final = TenantStorage(0, 0)


class UploadQuotas:
    """The reservations of running uploads. Belongs to one event loop."""

    def __init__(self, stores: Stores, book: UsageBook) -> None:
        self._stores = stores
        self._book = book
        self._adapters: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        """Bytes that running uploads may add, by tenant; `_adapters` has the adapters."""
        self._sending: Counter[str] = Counter()
        """Bytes that running uploads still have to send, by account."""
        self._ended = 0
        """Uploads that have ended so far."""

    async def reserve(
        self,
        accounts: Sequence[Account],
        tenant: str,
        request: UploadRequest,
        *,
        publish: bool,
        resume: bool,
    ) -> UploadReservation:
        """Reserve what an upload may need; `UploadReservation.close` ends the reservation.

        Args:
            accounts: all of these must allow the upload.
            publish: whether it will be stored.
            resume: whether bytes that the server already has need not be sent.

        Raises:
            QuotaExceeded: it exceeds a limit; with a retry-after if it will fit tomorrow.
        """
        by_day = [a for a in accounts if a.quota.upload_bytes_per_day is not None]
        by_store = [
            a
            for a in accounts
            if a.quota.adapters is not None or a.quota.adapter_bytes is not None
        ]
        sending = sum(file.size for file in request.files) if by_day else 0
        if by_day and resume:
            sending -= await asyncio.to_thread(self._stores.there, tenant, request)
        stored = adds = _NOTHING
        if publish and by_store:
            stored, adds = await self._look(tenant, request)
        # No other task runs from here to the end: there is no await.
        for account in by_store if publish else ():
            self._check_stored(account, tenant, stored, adds)
        for account in by_day:
            self._check_sent(account, sending)
        self._adapters[tenant] += adds.adapters
        self._bytes[tenant] += adds.bytes
        for account in by_day:
            self._sending[account.id] += sending
        return UploadReservation(self, tenant, adds, [a.id for a in by_day], sending)

    async def _look(
        self, tenant: str, request: UploadRequest
    ) -> tuple[TenantStorage, TenantStorage]:
        """Return what is stored, and what the upload adds."""

        def look() -> tuple[TenantStorage, TenantStorage]:
            return self._stores.stored(tenant), self._stores.adds(tenant, request)

        while True:
            ended = self._ended
            found = await asyncio.to_thread(look)
            if self._ended == ended:
                return found
            # Look again: an upload that ended meanwhile is no longer reserved, and may not have
            # been stored yet when we looked.

    def _check_stored(
        self, account: Account, tenant: str, stored: TenantStorage, adds: TenantStorage
    ) -> None:
        for name, limit, has, more, what in (
            (
                "adapters",
                account.quota.adapters,
                stored.adapters + self._adapters[tenant],
                adds.adapters,
                "adapters",
            ),
            (
                "adapter_bytes",
                account.quota.adapter_bytes,
                stored.bytes + self._bytes[tenant],
                adds.bytes,
                "bytes of adapters",
            ),
        ):
            if limit is not None and more and has + more > limit:
                raise QuotaExceeded(
                    f"the tenant has {has} {what} (including running uploads), this upload "
                    f"adds {more}, and the limit is {limit}: delete some, or ask for a higher "
                    "limit",
                    metadata={
                        "account": account.id,
                        "limit": name,
                        "allowed": str(limit),
                        "used": str(has),
                    },
                )

    def _check_sent(self, account: Account, sending: int) -> None:
        limit = account.quota.upload_bytes_per_day
        assert limit is not None, "the caller has looked"
        used = self._book.uploaded(account.id) + self._sending[account.id]
        if used + sending <= limit:
            return
        never = sending > limit
        fix = "ask for a higher limit" if never else "resume tomorrow (UTC)"
        raise QuotaExceeded(
            f"the upload has {sending} bytes to send, but {used} of the {limit} bytes allowed "
            f"per day are used: {fix}",
            metadata={
                "account": account.id,
                "limit": "upload_bytes_per_day",
                "allowed": str(limit),
                "used": str(used),
            },
            retry_after_s=None if never else self._book.day_ends_s,
        )

    def received(self, accounts: Sequence[str], size: int, reserved: int) -> None:
        """Count bytes that have arrived; ``reserved`` of them were reserved."""
        for account in accounts:
            self._book.upload(account, size)
            self._sending[account] -= reserved

    def release(
        self, tenant: str, adds: TenantStorage, accounts: Sequence[str], rest: int
    ) -> None:
        """Give back an upload's reservation; ``rest`` is its number of unsent bytes."""
        self._ended += 1
        for counter, key, count in (
            (self._adapters, tenant, adds.adapters),
            (self._bytes, tenant, adds.bytes),
            *((self._sending, account, rest) for account in accounts),
        ):
            counter[key] -= count
            if not counter[key]:
                del counter[key]


class UploadReservation:
    """An upload's reservation in `UploadQuotas`."""

    def __init__(
        self,
        quotas: UploadQuotas,
        tenant: str,
        adds: TenantStorage,
        accounts: Sequence[str],
        sending: int,
    ) -> None:
        """Args: accounts: ids of the accounts whose sent bytes are counted."""
        self._quotas = quotas
        self._tenant = tenant
        self._adds = adds
        self._accounts = accounts
        self._rest = sending

    def received(self, size: int) -> None:
        """Count arrived bytes; they count even if the upload fails."""
        if self._accounts:
            reserved = min(size, self._rest)
            self._quotas.received(self._accounts, size, reserved)
            self._rest -= reserved

    def close(self) -> None:
        """End the reservation: anything that the upload stored is in the store by now."""
        self._quotas.release(self._tenant, self._adds, self._accounts, self._rest)
