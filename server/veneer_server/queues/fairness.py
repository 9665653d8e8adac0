"""The tenant and user that a call is charged to, and its priority: see docs/security.md,
"Fairness"."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

MIN_WEIGHT: Final = 0.001
MAX_WEIGHT: Final = 1000.0
"""Range of tenants' weights."""

MAX_PRIORITY: Final = 100
"""Requests' priorities range from minus this to this; lower starts earlier."""

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
    """A gateway's headers about a call.

    Attributes:
        fairness_id: the user whom it calls for; "" if it does not say.
        objective: name of the call's objective; "" for none.
    """

    fairness_id: str = ""
    objective: str = ""

    @classmethod
    def of_headers(cls, headers: Mapping[str, str]) -> Routed:
        """Read HTTP headers or gRPC metadata, given by lower-case name. Values that are not 1
        to 128 printable characters are ignored."""
        return cls(_first(headers, _FAIRNESS_ID), _first(headers, _OBJECTIVE))


@dataclass(frozen=True, slots=True)
class FairWeights:
    """The keys file's weights and priorities.

    Attributes:
        tenants: weights by tenant; 1 for others.
        objectives: priorities by objective; 0 for others.
    """

    tenants: Mapping[str, float]
    objectives: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Fairness:
    """The tenant and user that a call is charged to.

    Attributes:
        tenant: the tenant; tenants share the server in proportion to their weights.
        fairness_id: the user whom a gateway calls for; "" for the tenant itself.
        weight: the tenant's weight.
        priority: priority of requests that set none.
    """

    tenant: str = ""
    fairness_id: str = ""
    weight: float = 1.0
    priority: int = 0


class Sender(NamedTuple):
    """The sender whose turn a call uses, outermost part first: tenants take turns, then the
    keys within a tenant, the users within a key, and the connections within a user. So a caller
    that opens many connections gets no more turns.

    Attributes:
        tenant: the caller's tenant.
        key: name of its key or certificate, or the subject of its token. On a server without
            keys, the caller's host; an IPv6 network of 64 bits counts as one host.
        user: the user whom a gateway calls for; "" if it does not say.
        connection: the caller's connection; "" if ``user`` is set, since a gateway's
            connections carry the calls of all its users.
    """

    tenant: str = ""
    key: str = ""
    user: str = ""
    connection: str = ""

    @property
    def party(self) -> tuple[str, str, str]:
        """The sender without the connection: anybody can open more connections."""
        return self[:3]


NOBODY: Final = Sender()
"""The server itself."""


def fairness_of(
    tenant: str, gateway: bool, routed: Routed, weights: FairWeights | None
) -> Fairness:
    """The fairness of a caller's call. Its headers count only if the caller is a gateway:
    otherwise anybody could take another's share."""
    weight = 1.0 if weights is None else weights.tenants.get(tenant, 1.0)
    if not gateway:
        return Fairness(tenant, weight=weight)
    priority = 0 if weights is None else weights.objectives.get(routed.objective, 0)
    return Fairness(tenant, routed.fairness_id, weight, priority)


def _first(headers: Mapping[str, str], names: tuple[str, ...]) -> str:
    found = next((headers[name] for name in names if name in headers), "")
    return found if _USABLE.fullmatch(found) else ""
