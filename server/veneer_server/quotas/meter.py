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


class Meter:
    """Counts requests in `Quotas` and `UsageBook`. Belongs to one event loop."""

    def __init__(self, quotas: Quotas, book: UsageBook) -> None:
        self.quotas = quotas
        self.book = book

    def request(
        self, accounts: Sequence[Account], tenant: str, samples: int, prompts: int = 1
    ) -> Metered:
        """Count a request. Use the result in a ``with`` statement, which ends it. Raises as
        `Quotas.admit`."""
        reserved = self.quotas.admit(accounts, samples)
        return Metered(self, reserved, accounts, tenant, prompts)


class Metered:
    """A counted request. It appears in usage once something has been computed for it."""

    __slots__ = ("_accounts", "_gate", "_quotas", "book", "counts", "reserved", "tenant")

    def __init__(
        self,
        meter: Meter,
        reserved: Reservation,
        accounts: Sequence[Account],
        tenant: str,
        prompts: int,
    ) -> None:
        self._quotas, self.book = meter.quotas, meter.book
        self.reserved = reserved
        self._accounts = accounts
        self.tenant = tenant
        self.counts = meter.book.of(tenant)
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
        self.reserved.__exit__(kind, error, trace)

    async def prompt(self, tokens: int, samples: int) -> Counted:
        """Count a tokenized prompt. Returns when all of the request's prompts are allowed:
        otherwise a request whose last prompt is refused would use tokens each time that it is
        tried. Raises as `Quotas.admit`.

        Args:
            samples: number of answers for this prompt.
        """
        self.reserved.prompt(tokens)
        if self._gate is not None:
            await self._gate.wait()
        return Counted(self, tokens, samples)

    def rate_headers(self) -> tuple[tuple[str, str], ...]:
        """Headers with the caller's remaining limits."""
        return rate_headers(self._quotas, self._accounts)


class Counted:
    """One prompt of a request, and its answers. Computed tokens count at once, even if the
    caller has left; nothing counts twice."""

    __slots__ = ("_computed", "_left", "_of", "_prompt", "_samples")

    def __init__(self, of: Metered, prompt: int, samples: int) -> None:
        """Args: prompt: number of tokens in the prompt."""
        self._of = of
        self._prompt = prompt
        self._samples = samples
        self._computed = 0
        self._left = False

    def left(self) -> None:
        """Note that the caller has left before the end of the answers."""
        self._left = True

    def prefilled(self, tokens: int, cached: int) -> None:
        """Count computed tokens.

        Args:
            tokens: leading tokens of the prompt that are computed so far. Fewer than before
                after a preemption; recomputed tokens are not counted again.
            cached: how many of them the prefix cache had.
        """
        more = tokens - self._computed
        if more <= 0:
            return
        of, counts = self._of, self._of.counts
        counts.requests += of.reserved.computed(more)
        counts.prompt_tokens += more
        if not self._computed:
            counts.cached_prompt_tokens += cached
        self._computed = tokens
        of.book.touch(of.tenant)

    def first_output(self, cached: int) -> None:
        """Note the first output for the prompt."""
        self.prefilled(self._prompt, cached)
        self._of.reserved.first_output(self._samples)

    def generated(self, tokens: int) -> None:
        """Count new tokens of an answer."""
        of = self._of
        of.reserved.generated(tokens)
        of.counts.generated_tokens += tokens
        of.book.touch(of.tenant)

    def unread(self, tokens: int) -> None:
        """Count new tokens that nobody reads if the caller has left. Otherwise they come after
        a stop string, are not part of the answer, and do not count."""
        if self._left:
            self.generated(tokens)

    def rate_headers(self) -> tuple[tuple[str, str], ...]:
        """Headers with the caller's remaining limits."""
        return self._of.rate_headers()
