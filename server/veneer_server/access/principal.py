"""A caller that has proved who it is, and its roles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Final, Literal, get_args

from veneer_registry.errors import PermissionDenied

from veneer_server.quotas.quota import Account

Role = Literal["inference", "publisher", "admin", "operator", "metrics"]

ROLES: Final[tuple[Role, ...]] = get_args(Role)

DEFAULT_TENANT: Final = "default"

_INCLUDES: Final[Mapping[Role, frozenset[Role]]] = {
    "admin": frozenset({"inference", "publisher"}),
    "operator": frozenset({"inference", "publisher", "admin", "metrics"}),
}


@dataclass(frozen=True, slots=True)
class Principal:
    """Who a call is from.

    Attributes:
        name: for the audit log; empty where callers need not say who they are.
        tenant: whose adapters it sees, beside shared ones.
        roles: those that were given; see `has`.
        accounts: whose limits its calls count towards.
        visiting: it is an operator of another tenant, who named this one.
        gateway: whether it may say whom it calls for, see `fairness`.
        until: when what it showed expires, in Unix seconds.
    """

    name: str
    tenant: str
    roles: frozenset[Role]
    accounts: tuple[Account, ...] = ()
    visiting: bool = False
    gateway: bool = False
    until: float = field(default=math.inf, compare=False)

    def has(self, any_of: Set[Role]) -> bool:
        """Whether one of these roles is among its own, or included in one of them: an admin is
        a publisher too, an operator everything."""
        included = (_INCLUDES.get(role, frozenset[Role]()) for role in self.roles)
        return not any_of.isdisjoint(self.roles.union(*included))


def require(any_of: Set[Role], principal: Principal, what: str) -> None:
    """For what takes more than the method's own role.

    Args:
        what: is refused, as the beginning of a sentence.

    Raises:
        PermissionDenied: the caller has none of these roles.
    """
    if not principal.has(any_of):
        raise denied(any_of, principal, what, what)


def denied(any_of: Set[Role], principal: Principal, what: str, method: str) -> PermissionDenied:
    """The error for a caller that has none of these roles."""
    wanted = sorted(any_of)
    return PermissionDenied(
        f"{what} requires the role {' or '.join(wanted)}, but this caller has "
        f"{', '.join(sorted(principal.roles)) or 'none'}: ask for a key with that role",
        metadata={"method": method, "roles": " ".join(wanted), "cause": "role"},
    )


ANYONE: Final = Principal("", DEFAULT_TENANT, frozenset(ROLES))
"""Every caller of a server without authentication."""
