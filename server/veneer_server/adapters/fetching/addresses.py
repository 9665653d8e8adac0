"""Connects to a host by an address that has been checked.

A name is resolved only once, and the connection goes to the address that was checked, so a name
server gains nothing by answering differently the second time.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from typing import Final

from veneer_registry.errors import Aborted

from veneer_server.adapters.fetching.uris import Origin, refuse_uri

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_IPV4_REFUSED: Final = tuple(
    map(
        ipaddress.IPv4Network,
        (
            "0.0.0.0/8",
            "10.0.0.0/8",
            "100.64.0.0/10",
            "127.0.0.0/8",
            "169.254.0.0/16",
            "172.16.0.0/12",
            "192.0.0.0/24",
            "192.0.2.0/24",
            "192.88.99.0/24",
            "192.168.0.0/16",
            "198.18.0.0/15",
            "198.51.100.0/24",
            "203.0.113.0/24",
            "224.0.0.0/4",
            "240.0.0.0/4",
        ),
    )
)
"""Networks that IANA's IPv4 Special-Purpose Address Registry (by public copies, 2026-11) does
not list as globally reachable, and multicast. Python's `is_global` misses some of them, and
differs between versions. 192.0.0.0/24 is refused as a whole: the two "global" addresses in it
are anycast and lead to the nearest router, in this server's own network."""

_IPV6_GLOBAL: Final = ipaddress.IPv6Network("2000::/3")
"""The only global unicast addresses that IANA has allocated."""

_IPV6_REFUSED: Final = tuple(
    map(
        ipaddress.IPv6Network,
        ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),
    )
)
"""Networks within `_IPV6_GLOBAL` that IANA's IPv6 Special-Purpose Address Registry (by public
copies, 2026-11; the newest entry is RFC 9780's) does not list as globally reachable. Its other
entries are refused because they are outside `_IPV6_GLOBAL` (::/8, 64:ff9b:1::/48, 100::/64,
100:0:0:1::/64, 5f00::/16, fc00::/7, fe80::/10; also fec0::/10 and multicast). 2001::/23
(Teredo, benchmarks, ORCHID, anycast) is refused as a whole: its "global" parts have no hosts
with adapters."""

_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")


def may_contact(text: str, named: Iterable[Network]) -> bool:
    """Whether an address is public, or in a network that the operator has named.

    An IPv4 address inside an IPv6 address that a gateway or this machine would unwrap (mapped,
    NAT64) is checked as the IPv4 address. Other tunnels (6to4, Teredo) are refused.
    """
    try:
        address: Address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None:
            return False
        if address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        elif address in _NAT64:
            address = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if any(address.version == net.version and address in net for net in named):
        return True
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in net for net in _IPV4_REFUSED)
    return address in _IPV6_GLOBAL and not any(address in net for net in _IPV6_REFUSED)


def connect(origin: Origin, named: Iterable[Network], timeout_s: float) -> socket.socket:
    """Connect to the first of the host's addresses that may be contacted and answers.

    Raises:
        InvalidField: no address may be contacted (metadata ``cause``: ``address``).
        Aborted: the host does not resolve, or no address answers (``cause``: ``unreachable``).
    """
    named = tuple(named)
    try:
        found = socket.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise _unreachable(origin, f"it does not resolve ({error})") from error
    checked = [each for each in found if may_contact(str(each[4][0]), named)]
    if not checked:
        refuse_uri(
            "its host resolves only to addresses that this server may not contact: the "
            "operator can allow a private network in the --fetch-allow entry",
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
        "the URI's host does not respond: check the URI, and try again",
        metadata={"field": "uri", "cause": "unreachable"},
        detail=f"{origin}: {why}",
    )
