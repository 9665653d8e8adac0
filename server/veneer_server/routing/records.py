"""What a router is told and what it answers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Wanted:
    """What matters of a request.

    Attributes:
        digest: weights digest of its adapter (`copy_key` where tenants have copies of their
            own); "" for the base.
        session: requests with the same one are likely to share a prefix; "" for none.
        work: expected work in any unit, the same for all requests: prompt tokens plus twice
            the output tokens, as the scheduler counts, or 1.
    """

    digest: str = ""
    session: str = ""
    work: float = 1.0


@dataclass(frozen=True, slots=True)
class RoutedTo:
    """Where a request goes. Hand it back with `Router.finished`.

    Attributes:
        joined: tells this replica from a later one with the same name.
    """

    replica: str
    joined: int


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """What a replica says of itself.

    Attributes:
        resident: weights digests of the adapters that are in memory or being loaded.
        requests: running and waiting there, whoever sent them.
        age_s: seconds since this was so.
    """

    resident: frozenset[str]
    requests: int
    age_s: float = 0.0
