"""Counts generate requests: towards limits, and as usage."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from veneer_server.quotas.quota import Account
from veneer_server.quotas.rates import Quotas, Reservation
from veneer_server.quotas.standing import rate_headers
from veneer_server.quotas.usage import UsageBook

__all__ = ["Meter", "Metered"]


class Meter:
    """Belongs to one event loop."""

    def __init__(self, quotas: Quotas, book: UsageBook) -> None:
        self.quotas = quotas
        self.book = book

    def request(
        self, accounts: Sequence[Account], tenant: str, samples: int, prompts: int = 1
    ) -> Metered:
        """Count a request, until the ``with`` that it is used in ends. Raises as
        `Quotas.admit`."""
        reserved = self.quotas.admit(accounts, samples)
        return Metered(self, reserved, accounts, tenant, prompts)


class Metered:
    """A request that is counted. Usage has it once there is an answer, or the beginning of
    one: prompts are then computed."""

    __slots__ = ("_accounts", "_book", "_counts", "_gate", "_quotas", "_reserved", "_tenant")

    def __init__(
        self,
        meter: Meter,
        reserved: Reservation,
        accounts: Sequence[Account],
        tenant: str,
        prompts: int,
    ) -> None:
        self._quotas, self._book = meter.quotas, meter.book
        self._reserved = reserved
        self._accounts = accounts
        self._tenant = tenant
        self._counts = meter.book.of(tenant)
        several = prompts > 1 and reserved.counts_tokens
        self._gate = asyncio.Barrier(prompts) if several else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._reserved.__exit__(kind, error, trace)

    async def prompt(self, tokens: int) -> None:
        """A prompt has been tokenized. Returns when all of the request's prompts have been let
        through: otherwise a request whose last one is refused would use tokens each time that
        it is tried. Raises as `Quotas.admit`."""
        self._reserved.prompt(tokens)
        if self._gate is not None:
            await self._gate.wait()

    def first_output(self, samples: int, prompt: int, cached: int) -> None:
        """The first output for a prompt has come.

        Args:
            samples: how many the prompt has.
            prompt, cached: its tokens, and those of them that the prefix cache had.
        """
        counts = self._counts
        counts.requests += self._reserved.first_output(samples)
        counts.prompt_tokens += prompt
        counts.cached_prompt_tokens += cached

    def generated(self, tokens: int) -> None:
        """New tokens have come."""
        self._reserved.generated(tokens)
        self._counts.generated_tokens += tokens
        self._book.touch(self._tenant)

    def rate_headers(self) -> tuple[tuple[str, str], ...]:
        """What is left of its caller's limits."""
        return rate_headers(self._quotas, self._accounts)
