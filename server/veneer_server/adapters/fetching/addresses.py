"""Connects to a host by an address that has been checked.

A name is resolved once, and the connection goes to what was checked: a name server that
answers differently the second time gains nothing.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable, Sequence
from typing import Final

from veneer_registry.errors import Aborted

from veneer_server.adapters.fetching.uris import Origin, refuse_uri

__all__ = ["Network", "connect", "may_contact"]

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
_COMPATIBLE: Final = ipaddress.IPv6Network("::/96")


def may_contact(text: str, named: Iterable[Network]) -> bool:
    """Whether an address is public, or in a network that the operator has named.

    An IPv4 address inside an IPv6 one counts as itself: a gateway would lead to it.
    """
    try:
        address: Address = ipaddress.ip_address(text)
    except ValueError:
        return False  # such as one with a zone
    named = tuple(named)
    # The address itself need not be public where it only wraps another.
    return all(
        _public(each) or any(each.version == net.version and each in net for net in named)
        for each in _meant(address)
    )


def _meant(address: Address) -> Sequence[Address]:
    """The addresses inside an address; itself, if there are none."""
    if isinstance(address, ipaddress.IPv4Address):
        return [address]
    if address.ipv4_mapped is not None:
        return [address.ipv4_mapped]
    if address.sixtofour is not None:
        return [address.sixtofour]
    if address.teredo is not None:
        return list(address.teredo)
    if address in _NAT64 or (address in _COMPATIBLE and int(address) > 1):
        return [ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)]
    return [address]


def _public(address: Address) -> bool:
    return (
        address.is_global
        and not address.is_multicast
        and not address.is_reserved
        and not address.is_unspecified
        and not address.is_loopback
        and not address.is_link_local
    )


def connect(origin: Origin, named: Iterable[Network], timeout_s: float) -> socket.socket:
    """A connection to the first of the host's addresses that may be contacted and answers.

    Raises:
        InvalidField: none may be contacted (metadata ``cause``: ``address``).
        Aborted: it does not resolve, or none answers (``cause``: ``unreachable``).
    """
    named = tuple(named)
    try:
        found = socket.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise _unreachable(origin, f"it does not resolve ({error})") from error
    checked = [each for each in found if may_contact(str(each[4][0]), named)]
    if not checked:
        refuse_uri(
            "its host has only addresses that this server may not contact: the operator can "
            "name a private network behind the entry of --fetch-allow",
            cause="address",
            detail=f"{origin}: {', '.join(sorted({str(each[4][0]) for each in found}))}",
        )
    why = ""
    for family, kind, protocol, _, address in checked:
        attempt = socket.socket(family, kind, protocol)
        try:
            attempt.settimeout(timeout_s)
            attempt.connect(address)
        except OSError as error:
            attempt.close()
            why = str(error)
        except BaseException:
            attempt.close()
            raise
        else:
            return attempt
    raise _unreachable(origin, why)


def _unreachable(origin: Origin, why: str) -> Aborted:
    return Aborted(
        "the URI's host does not answer: check the URI, and try again",
        metadata={"field": "uri", "cause": "unreachable"},
        detail=f"{origin}: {why}",
    )
