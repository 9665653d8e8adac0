"""A caller's remaining limits, as the headers that OpenAI's clients know."""

from __future__ import annotations

import math
from collections.abc import Sequence

from veneer_server.quotas.quota import Account
from veneer_server.quotas.rates import Quotas


def rate_headers(quotas: Quotas, accounts: Sequence[Account]) -> tuple[tuple[str, str], ...]:
    """``x-ratelimit-{limit,remaining,reset}-{requests,tokens}``, as HTTP headers or gRPC
    metadata. Empty if no account has a limit per minute."""
    return tuple(
        (f"x-ratelimit-{kind}-{name}", value)
        for name, (limit, rest, reset_s) in quotas.left(accounts).items()
        for kind, value in (
            ("limit", str(limit)),
            ("remaining", str(rest)),
            ("reset", duration(reset_s)),
        )
    )


def duration(seconds: float) -> str:
    """Format a duration as OpenAI does: ``12ms``, ``8.64s``, ``6m0s``, ``1h0m0s``; rounded up
    to ms."""
    milliseconds = math.ceil(seconds * 1000)
    if 0 < milliseconds < 1000:
        return f"{milliseconds}ms"
    whole, rest = divmod(milliseconds, 1000)
    minutes, whole = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    fraction = f".{rest:03d}".rstrip("0") if rest else ""
    text = f"{whole}{fraction}s"
    if hours:
        return f"{hours}h{minutes}m{text}"
    return f"{minutes}m{text}" if minutes else text
