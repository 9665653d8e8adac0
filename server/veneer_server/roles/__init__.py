"""A server's parts that differ by role: `owning` has a registry, `following` mirrors one."""

from __future__ import annotations

from veneer_server.config import ServerConfig
from veneer_server.roles.following import FollowerRole
from veneer_server.roles.owning import Owning, RegistryOnly
from veneer_server.roles.role import Role

__all__ = ["Role", "role_of"]


def role_of(config: ServerConfig) -> Role:
    """Create the configured role."""
    match config.role:
        case "registry":
            return RegistryOnly(config)
        case "engine":
            return FollowerRole(config)
        case _:
            return Owning(config)
