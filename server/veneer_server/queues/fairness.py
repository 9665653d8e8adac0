"""Whose service a call counts as, and how urgent it is: see docs/security.md, "Fairness"."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

MIN_WEIGHT: Final = 0.001
MAX_WEIGHT: Final = 1000.0
"""Weights of tenants."""

MAX_PRIORITY: Final = 100
"""Priorities of requests are from minus this to this; lower starts earlier."""

_FAIRNESS_ID: Final = (
    "x-llm-d-inference-fairness-id",
    "x-gateway-inference-fairness-id",
)
_OBJECTIVE: Final = (
    "x-llm-d-inference-objective",
    "x-gateway-inference-objective",
)
"""Headers, or gRPC metadata, of gateways: llm-d's, and the older names of Kubernetes' Gateway
API Inference Extension."""

GATEWAY_HEADERS: Final = (*_FAIRNESS_ID, *_OBJECTIVE)

_USABLE: Final = re.compile(r"[\x21-\x7e]{1,128}")


@dataclass(frozen=True, slots=True)
class Routed:
    """What a gateway says about a call.

    Attributes:
        fairness_id: whom it calls for; "" if it does not say.
        objective: name of the objective that the call has; "" if none.
    """

    fairness_id: str = ""
    objective: str = ""

    @classmethod
    def of_headers(cls, headers: Mapping[str, str]) -> Routed:
        """From HTTP headers or gRPC metadata, by lower-case name. What is no name of 1 to 128
        printable characters is ignored."""
        return cls(_first(headers, _FAIRNESS_ID), _first(headers, _OBJECTIVE))


@dataclass(frozen=True, slots=True)
class FairWeights:
    """What the keys file says about shares.

    Attributes:
        tenants: weights by tenant; 1 for others.
        objectives: priorities by objective; 0 for others.
    """

    tenants: Mapping[str, float]
    objectives: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Fairness:
    """Whose service a call counts as.

    Attributes:
        tenant: its tenant's, in proportion to the weight.
        fairness_id: whom a gateway calls for; "" for the tenant itself.
        weight: the tenant's.
        priority: of requests that have none of their own.
    """

    tenant: str = ""
    fairness_id: str = ""
    weight: float = 1.0
    priority: int = 0


class Sender(NamedTuple):
    """Whose turn a call uses, from the outside in: tenants take turns, in each tenant its keys,
    for each key its users, for each user the connections. Whoever opens many connections has
    one turn.

    Attributes:
        tenant: the caller's.
        key: name of its key or certificate, or the subject of its token. On a server without
            keys, the caller's host, an IPv6 network of 64 bits being one host.
        user: the one a gateway calls for; "" if it does not say.
        connection: the caller's; "" if ``user`` is set, since a gateway's connections carry
            the calls of all its users.
    """

    tenant: str = ""
    key: str = ""
    user: str = ""
    connection: str = ""

    @property
    def party(self) -> tuple[str, str, str]:
        """The sender without the connection, which anybody can have more of."""
        return self[:3]


NOBODY: Final = Sender()
"""The server itself."""


def fairness_of(
    tenant: str, gateway: bool, routed: Routed, weights: FairWeights | None
) -> Fairness:
    """Of a caller's call. What it says counts only if it is a gateway, else anybody could take
    another's share."""
    weight = 1.0 if weights is None else weights.tenants.get(tenant, 1.0)
    if not gateway:
        return Fairness(tenant, weight=weight)
    priority = 0 if weights is None else weights.objectives.get(routed.objective, 0)
    return Fairness(tenant, routed.fairness_id, weight, priority)


def _first(headers: Mapping[str, str], names: tuple[str, ...]) -> str:
    found = next((headers[name] for name in names if name in headers), "")
    return found if _USABLE.fullmatch(found) else ""
