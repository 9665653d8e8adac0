"""What goes wrong with a peer."""

from __future__ import annotations

from veneer_client import VeneerError

__all__ = ["PeerError"]


class PeerError(VeneerError):
    """The peer could not be started or gave up."""

    code = "FAILED_PRECONDITION"
    reason = "PEER_FAILED"
