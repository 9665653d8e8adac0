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
    """The identity of a caller.

    Attributes:
        name: name for the audit log; empty on servers without authentication.
        tenant: the tenant whose adapters it sees, besides shared ones.
        roles: the roles that it was given, without those that they include; see `has`.
        accounts: the accounts whose limits its calls count towards.
        visiting: it is an operator of another tenant that acts in this one.
        gateway: whether it may name the user that it calls for, see `fairness`.
        until: when its credential expires, in Unix seconds.
    """

    name: str
    tenant: str
    roles: frozenset[Role]
    accounts: tuple[Account, ...] = ()
    visiting: bool = False
    gateway: bool = False
    until: float = field(default=math.inf, compare=False)

    def has(self, any_of: Set[Role]) -> bool:
        """Whether it has one of these roles, or a role that includes one of them: an admin is
        also a publisher, an operator has all roles."""
        included = (_INCLUDES.get(role, frozenset[Role]()) for role in self.roles)
        return not any_of.isdisjoint(self.roles.union(*included))


def require(any_of: Set[Role], principal: Principal, what: str) -> None:
    """Check a role for an operation that requires more than the method's own roles.

    Args:
        what: the operation, as the beginning of a sentence.

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
"""The identity of every caller of a server without authentication."""
