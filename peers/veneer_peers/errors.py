"""Errors of peers."""

from __future__ import annotations

from veneer_client import VeneerError

__all__ = ["PeerError"]


class PeerError(VeneerError):
    """A peer could not be started, or failed."""

    code = "FAILED_PRECONDITION"
    reason = "PEER_FAILED"
