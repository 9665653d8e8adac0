"""Inputs and outputs of a router."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Wanted:
    """The facts of a request that matter for routing.

    Attributes:
        digest: weights digest of its adapter (`copy_key` if tenants have their own copies);
            "" for the base.
        session: requests with the same session are likely to share a prefix; "" for none.
        work: expected work in any unit, the same for all requests: prompt tokens plus twice
            the output tokens, as the scheduler counts, or 1.
    """

    digest: str = ""
    session: str = ""
    work: float = 1.0


@dataclass(frozen=True, slots=True)
class RoutedTo:
    """The replica chosen for a request. Pass it to `Router.finished` at the end.

    Attributes:
        joined: distinguishes this replica from a later one with the same name.
    """

    replica: str
    joined: int


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """A replica's report of its state.

    Attributes:
        resident: weights digests of the adapters that are in memory or being loaded.
        requests: number of its running and waiting requests, from all routers.
        age_s: seconds since the state was taken.
    """

    resident: frozenset[str]
    requests: int
    age_s: float = 0.0
