"""The operator's allow-list of URIs that may be fetched; without a list, none may.

An entry is a prefix of URIs, such as ``https://models.example.com/lora/`` or
``s3://bucket/prefix/``, optionally followed by private networks that its host's addresses may
be in.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from veneer_registry.errors import InvalidField

from veneer_server.adapters.fetching.addresses import Network
from veneer_server.adapters.fetching.uris import Uri, parse_uri, refuse_uri

_LOOPBACK: Final = (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128"))


@dataclass(frozen=True, slots=True)
class AllowedEntry:
    """One entry of the allow-list.

    Attributes:
        prefix: prefix of the URIs that it allows.
        networks: private networks that the host's addresses may be in.
    """

    prefix: Uri
    networks: tuple[Network, ...]

    @classmethod
    def parse(cls, text: str) -> AllowedEntry:
        """Parse ``PREFIX [NETWORK...]``. Raises InvalidField or ValueError."""
        first, *rest = text.split()
        prefix = parse_uri(first, prefix=True)
        if prefix.scheme == "file":
            raise ValueError("file:// is allowed by --lora-root")
        networks: list[Network] = [ipaddress.ip_network(each) for each in rest]
        if prefix.scheme == "https":
            networks += named_by(prefix.origin.host)
        return cls(prefix, tuple(networks))


class AllowList:
    """The list of allowed URI prefixes."""

    def __init__(self, entries: Iterable[str]) -> None:
        """Raises InvalidField for a malformed entry (metadata ``key``)."""
        self.texts: Sequence[str] = tuple(entries)
        found = []
        for text in self.texts:
            try:
                found.append(AllowedEntry.parse(text))
            except (InvalidField, ValueError) as error:
                why = str(error).removeprefix("uri: ")
                raise InvalidField(
                    f"--fetch-allow {text[:200]!r} is not allowed: {why}; give a URI prefix, "
                    "such as https://models.example.com/lora/, optionally followed by a "
                    "space and a private network of its host",
                    metadata={"key": "fetch_allow"},
                ) from error
        self._entries = tuple(found)

    def entry(self, uri: Uri) -> AllowedEntry | None:
        """Return the first entry that allows ``uri``, or None."""
        return next((each for each in self._entries if each.prefix.covers(uri)), None)

    def check(self, uri: Uri) -> AllowedEntry:
        """Return the first entry that allows ``uri``. Raises InvalidField if there is none."""
        found = self.entry(uri)
        if found is None:
            refuse_uri(
                "this server may not fetch from there: push the files with `veneer adapter "
                "push FOLDER`, or ask its operator to add the location to --fetch-allow",
                cause="not_allowed",
            )
        return found


def named_by(host: str) -> list[Network]:
    """Return the networks that a host names directly: its own address if it is written as one,
    the loopback networks for localhost."""
    if host == "localhost":
        return list(_LOOPBACK)
    try:
        return [ipaddress.ip_network(host)]
    except ValueError:
        return []
