"""Limits on generate requests: requests per minute, tokens per minute, and requests at once.

Requests and tokens are counted in token buckets, as OpenAI counts them: a bucket holds as much
as the limit and is refilled evenly, so that it is full again a minute after it was empty. In
any T seconds at most ``limit * (1 + T / 60)`` are let through: twice the limit in a minute
that begins with a full bucket, the limit itself in the long run.

A prompt's tokens are taken when it has been tokenized, an answer's tokens as they are
generated. So an answer that has begun always finishes, and the next request waits until the
bucket has been refilled. Tokens from the prefix cache count like others.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from time import monotonic
from types import TracebackType
from typing import Final, Self

from veneer_registry.errors import QuotaExceeded, RateLimitExceeded, VeneerError

from veneer_server.quotas.quota import Account

MAX_ACCOUNTS: Final = 32_768
"""Maximum number of accounts whose use is remembered: more than a keys file can list. If there
are more (subjects of tokens), the least recently used ones are forgotten."""

_MINUTE_S: Final = 60.0
_BUSY_RETRY_S: Final = 1.0


class Bucket:
    """A token bucket: the amount that was used and has not been refilled yet. The limit is an
    argument of each method, since it may change at any time."""

    __slots__ = ("_at", "_used")

    def __init__(self, now: float) -> None:
        self._used, self._at = 0.0, now

    def used(self, limit: int, now: float) -> float:
        """The amount missing from a full bucket."""
        refilled = (now - self._at) * limit / _MINUTE_S
        self._used = max(0.0, self._used - refilled)
        self._at = now
        return self._used

    def take(self, count: int, limit: int, now: float) -> None:
        """Take ``count``, even if that overdraws the bucket."""
        self._used = self.used(limit, now) + count

    def give_back(self, count: int, limit: int, taken: float, now: float) -> None:
        """Undo a `take` made at the time ``taken``. The amount refilled since then is not given
        back: otherwise more than the limit could be taken at once."""
        rest = count - (now - taken) * limit / _MINUTE_S
        self._used = max(0.0, self.used(limit, now) - max(0.0, rest))


class _Use:
    """An account's use of its limits, and its requests in progress."""

    __slots__ = ("requests", "running", "tokens", "waiting")

    def __init__(self, now: float) -> None:
        self.requests, self.tokens = Bucket(now), Bucket(now)
        self.running = self.waiting = 0


class Quotas:
    """The use of all accounts. Belongs to one event loop: nothing else runs between a check and
    the counting of the request."""

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        """Args: clock: monotonic seconds, by default `time.monotonic`."""
        self._clock = clock or monotonic
        self._uses: OrderedDict[str, _Use] = OrderedDict()

    @property
    def remembered(self) -> int:
        """Number of accounts whose use is remembered."""
        return len(self._uses)

    def admit(self, accounts: Sequence[Account], samples: int = 1) -> Reservation:
        """Count a request. Use the result in a ``with`` statement, which ends it.

        Args:
            accounts: all of these must allow the request.
            samples: number of answers that it asks for, over all its prompts.

        Raises:
            RateLimitExceeded: the request may succeed later.
            QuotaExceeded: it asks for more than an account may ever use.
        """
        now = self._clock() if accounts else 0.0
        held = [(account, self._use(account, now)) for account in accounts]
        for account, use in held:
            self._check(account, use, samples, now)
        for account, use in held:
            if (limit := account.quota.requests_per_minute) is not None:
                use.requests.take(1, limit, now)
            use.running += samples
            use.waiting += samples
        return Reservation(self, held, samples, now)

    def left(self, accounts: Sequence[Account]) -> dict[str, tuple[int, int, float]]:
        """Limit, remaining amount, and seconds until the bucket is full again, by ``requests``
        and ``tokens``. Each is of the account with the least remaining, and is left out if no
        account has such a limit."""
        found: dict[str, tuple[int, int, float]] = {}
        if not accounts:
            return found
        now = self._clock()
        for account in accounts:
            use = self._use(account, now)
            for name, limit, bucket in (
                ("requests", account.quota.requests_per_minute, use.requests),
                ("tokens", account.quota.tokens_per_minute, use.tokens),
            ):
                if limit is None:
                    continue
                used = bucket.used(limit, now)
                rest = max(0, math.floor(limit - used))
                if name not in found or rest < found[name][1]:
                    found[name] = (limit, rest, used * _MINUTE_S / limit)
        return found

    def now(self) -> float:
        """The clock's time."""
        return self._clock()

    def check_prompt(
        self, held: Sequence[tuple[Account, _Use]], count: int, others: int
    ) -> None:
        """Check that the limits allow a prompt's tokens. Raises as `admit`.

        Args:
            count: tokens of the prompt.
            others: tokens that the request's other prompts have taken.
        """
        now = self._clock()
        for account, use in held:
            limit = account.quota.tokens_per_minute
            if limit is None:
                continue
            if others + count > limit:
                raise QuotaExceeded(
                    f"the prompt has {others + count} tokens, but {_who(account)} may use "
                    f"{limit} a minute, so it can never be served: shorten it, or ask for a "
                    "higher limit",
                    metadata=_facts(account, "tokens_per_minute", limit),
                )
            used = use.tokens.used(limit, now)
            if used + count > limit:
                raise _later(account, "tokens_per_minute", limit, used, count)

    def _check(self, account: Account, use: _Use, samples: int, now: float) -> None:
        quota = account.quota
        if (limit := quota.requests_per_minute) is not None:
            used = use.requests.used(limit, now)
            if used + 1 > limit:
                raise _later(account, "requests_per_minute", limit, used, 1)
        if (limit := quota.tokens_per_minute) is not None:
            used = use.tokens.used(limit, now)
            if used + 1 > limit:  # before the prompt is tokenized
                raise _later(account, "tokens_per_minute", limit, used, 1)
        for name, limit, busy, doing in (
            ("running_requests", quota.running_requests, use.running, "running or queued"),
            ("waiting_requests", quota.waiting_requests, use.waiting, "queued"),
        ):
            if limit is None or busy + samples <= limit:
                continue
            facts = _facts(account, name, limit)
            if samples > limit:
                raise QuotaExceeded(
                    f"the request asks for {samples} answers, and {_who(account)} may have at "
                    f"most {limit} {doing}: ask for fewer",
                    metadata=facts,
                )
            raise RateLimitExceeded(
                f"{_who(account)} has {busy} requests {doing}, and the limit is {limit}: "
                "retry when one has ended",
                metadata=facts,
                retry_after_s=_BUSY_RETRY_S,
            )

    def _use(self, account: Account, now: float) -> _Use:
        use = self._uses.get(account.id)
        if use is None:
            use = self._uses[account.id] = _Use(now)
            self._forget()
        else:
            self._uses.move_to_end(account.id)
        return use

    def _forget(self) -> None:
        """Drop the least recently used accounts, but keep those with running requests; the
        server's places bound their number."""
        over = len(self._uses) - MAX_ACCOUNTS
        for _ in range(max(0, over)):
            id, use = next(iter(self._uses.items()))
            if use.running:
                self._uses.move_to_end(id)
            else:
                del self._uses[id]


class Reservation:
    """A request's share of its accounts' limits. If the request is refused or fails before its
    first output, the part that was not computed is given back; a caller that leaves gets
    nothing back."""

    __slots__ = (
        "_computed",
        "_held",
        "_prompts",
        "_quotas",
        "_samples",
        "_taken",
        "_waiting",
        "begun",
    )

    def __init__(
        self, quotas: Quotas, held: Sequence[tuple[Account, _Use]], samples: int, taken: float
    ) -> None:
        """Args: taken: time of the reservation by the clock of ``quotas``."""
        self.begun = False
        """Whether there was any output."""
        self._quotas = quotas
        self._held = held
        self._samples = self._waiting = samples
        self._taken = taken
        self._prompts = self._computed = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for _, use in self._held:
            use.running -= self._samples
            use.waiting -= self._waiting
        if self._held and isinstance(error, VeneerError) and not self.begun:
            self._give_back()

    @property
    def counts_tokens(self) -> bool:
        """Whether an account limits tokens."""
        return any(account.quota.tokens_per_minute for account, _ in self._held)

    def prompt(self, tokens: int) -> None:
        """Count a prompt. Raises as `Quotas.admit`."""
        if self._held:
            self._quotas.check_prompt(self._held, tokens, self._prompts)
            self._take_tokens(tokens)
            self._prompts += tokens

    def computed(self, tokens: int) -> bool:
        """Count computed tokens of the request's prompts; return whether they are the first."""
        first = not self._computed
        self._computed += tokens
        return first

    def first_output(self, samples: int) -> None:
        """Note the first output for one of the prompts: its samples no longer wait."""
        for _, use in self._held:
            use.waiting -= samples
        self._waiting -= samples
        self.begun = True

    def generated(self, tokens: int) -> None:
        """Count new tokens of an answer."""
        if self._held:
            self._take_tokens(tokens)

    def _take_tokens(self, count: int) -> None:
        now = self._quotas.now()
        for account, use in self._held:
            if (limit := account.quota.tokens_per_minute) is not None:
                use.tokens.take(count, limit, now)

    def _give_back(self) -> None:
        now = self._quotas.now()
        for account, use in self._held:
            if (limit := account.quota.requests_per_minute) is not None and not self._computed:
                use.requests.give_back(1, limit, self._taken, now)
            if (limit := account.quota.tokens_per_minute) is not None:
                rest = max(0, self._prompts - self._computed)
                use.tokens.give_back(rest, limit, self._taken, now)


def _later(
    account: Account, name: str, limit: int, used: float, count: int
) -> RateLimitExceeded:
    # Rounded up, so that a client that waits this long is not refused again.
    wait_s = math.ceil((used + count - limit) * _MINUTE_S / limit * 1000) / 1000
    what = name.partition("_")[0]
    asked = f"; this one needs {count}" if count > 1 else ""
    return RateLimitExceeded(
        f"{_who(account)} may use {limit} {what} a minute and has used "
        f"{math.ceil(used)}{asked}: retry in {wait_s:g} s",
        metadata=_facts(account, name, limit) | {"used": str(math.ceil(used))},
        retry_after_s=wait_s,
    )


def _who(account: Account) -> str:
    kind, _, name = account.id.partition(":")
    return f"tenant {name}" if kind == "tenant" else f"this {kind}"


def _facts(account: Account, name: str, limit: int) -> dict[str, str]:
    return {"account": account.id, "limit": name, "allowed": str(limit)}
