"""Limits on uploads: adapters and bytes that a tenant stores, and bytes sent in a day."""

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
    """What uploads that run have reserved. Belongs to one event loop."""

    def __init__(self, stores: Stores, book: UsageBook) -> None:
        self._stores = stores
        self._book = book
        self._adapters: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        """By tenant: what running uploads may add."""
        self._sending: Counter[str] = Counter()
        """By account: what running uploads have still to send."""
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
        """Reserve what an upload may need; `UploadReservation.close` ends that.

        Args:
            accounts: all of these must allow it.
            publish: whether it is to be stored.
            resume: whether what is there already need not be sent.

        Raises:
            QuotaExceeded: it does not fit; with a time if it will tomorrow.
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
        # From here to the end nothing else runs.
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
        """What is stored, and what the upload adds."""

        def look() -> tuple[TenantStorage, TenantStorage]:
            return self._stores.stored(tenant), self._stores.adds(tenant, request)

        while True:
            ended = self._ended
            found = await asyncio.to_thread(look)
            if self._ended == ended:
                return found
            # One that has ended is no longer reserved, and may not have been stored yet when
            # we looked.

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
        """Count bytes that have arrived, of which so many were reserved."""
        for account in accounts:
            self._book.upload(account, size)
            self._sending[account] -= reserved

    def release(
        self, tenant: str, adds: TenantStorage, accounts: Sequence[str], rest: int
    ) -> None:
        """Give back what an upload has reserved and not used."""
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
    """What an upload may still use."""

    def __init__(
        self,
        quotas: UploadQuotas,
        tenant: str,
        adds: TenantStorage,
        accounts: Sequence[str],
        sending: int,
    ) -> None:
        """Args: accounts: those whose sent bytes are counted."""
        self._quotas = quotas
        self._tenant = tenant
        self._adds = adds
        self._accounts = accounts
        self._rest = sending

    def received(self, size: int) -> None:
        """Bytes have arrived; they count, whatever becomes of the upload."""
        if self._accounts:
            reserved = min(size, self._rest)
            self._quotas.received(self._accounts, size, reserved)
            self._rest -= reserved

    def close(self) -> None:
        """The upload has ended: what it stored is in the store."""
        self._quotas.release(self._tenant, self._adds, self._accounts, self._rest)
