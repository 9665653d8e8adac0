"""Source folders: where the files of a URI are, and how to download one of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import IO, Final, Protocol

from veneer_server.adapters.fetching.addresses import Network
from veneer_server.adapters.fetching.allowed import AllowedEntry, AllowList, named_by
from veneer_server.adapters.fetching.uris import Uri, parse_uri
from veneer_server.adapters.fetching.web import Hop, WebClient, parse_hop

_HUB: Final = "huggingface.co"
_HUB_STORAGE: Final = (".huggingface.co", ".hf.co")
"""Domains where the hub keeps large files: its responses redirect there."""
_CACHE: Final = ("api", "resolve-cache", "models")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")


class SourceFolder(Protocol):
    """A folder to fetch files from."""

    def get(self, file: str, into: IO[bytes], most: int) -> None:
        """Write a file's content to ``into``; at most ``most`` bytes. Raises the errors of
        `WebClient.get`."""
        ...


class WebFolder:
    """An ``https`` folder."""

    def __init__(
        self, uri: Uri, allowed: AllowList, tokens: Mapping[str, str], least_rate: int
    ) -> None:
        self._uri = uri
        self._allowed = allowed
        self._tokens = _parsed(tokens)
        self._web = WebClient(self._permit, self._token, least_rate)

    def get(self, file: str, into: IO[bytes], most: int) -> None:
        """See `SourceFolder`."""
        self._web.get(f"{self._uri}/{file}", into, most=most, file=file)

    def _permit(self, hop: Hop) -> tuple[Network, ...] | None:
        entry = self._allowed.entry(_uri_of(hop)) if hop.secure else None
        return None if entry is None else entry.networks

    def _token(self, hop: Hop) -> str:
        return _token_for(_uri_of(hop), self._tokens)


class HubFolder:
    """An ``hf`` folder. All files come from the same commit as the first one, even if the
    branch moves meanwhile."""

    def __init__(
        self,
        uri: Uri,
        entry: AllowedEntry,
        allowed: AllowList,
        tokens: Mapping[str, str],
        least_rate: int,
        endpoint: str,
    ) -> None:
        """Args: endpoint: the hub's URL, from the operator."""
        self._uri = uri
        self._entry = entry
        self._allowed = allowed
        self._endpoint = endpoint.removesuffix("/")
        self._own = parse_hop(self._endpoint + "/")
        self._bearer = _token_for(uri, _parsed(tokens))
        self._revision = uri.revision or "main"
        self._web = WebClient(self._permit, lambda hop: self._bearer, least_rate)

    def get(self, file: str, into: IO[bytes], most: int) -> None:
        """See `SourceFolder`."""
        organisation, repository, *below = self._uri.parts
        path = "/".join([organisation, repository, "resolve", self._revision, *below, file])
        headers = self._web.get(f"{self._endpoint}/{path}", into, most=most, file=file)
        if _COMMIT.fullmatch(commit := headers.get("x-repo-commit", "")):
            self._revision = commit

    def _permit(self, hop: Hop) -> tuple[Network, ...] | None:
        if (hop.origin, hop.secure) == (self._own.origin, self._own.secure):
            return self._permit_own(hop)
        if not hop.secure:
            return None
        if self._own.origin.host == _HUB and hop.origin.host.endswith(_HUB_STORAGE):
            return ()
        entry = self._allowed.entry(_uri_of(hop))
        return None if entry is None else entry.networks

    def _permit_own(self, hop: Hop) -> tuple[Network, ...] | None:
        """Permit a hop within the hub. The hub redirects to its cache, and from a renamed
        repository to the new name, which must be allowed too."""
        parts = tuple(hop.path.strip("/").split("/"))
        if parts[: len(_CACHE)] == _CACHE:
            parts = parts[len(_CACHE) :]
        if self._allowed.entry(Uri("hf", "", parts[:2], self._uri.revision)) is None:
            return None
        return (*self._entry.networks, *named_by(self._own.origin.host))


def _uri_of(hop: Hop) -> Uri:
    parts = hop.path.strip("/")
    return Uri("https", hop.origin.written(443), tuple(parts.split("/")) if parts else ())


def _parsed(tokens: Mapping[str, str]) -> tuple[tuple[Uri, str], ...]:
    return tuple((parse_uri(prefix, prefix=True), token) for prefix, token in tokens.items())


def _token_for(uri: Uri, tokens: tuple[tuple[Uri, str], ...]) -> str:
    """Return the Authorization header for a URI, with the token of the longest matching prefix;
    "" for none."""
    fitting = [(prefix, token) for prefix, token in tokens if prefix.covers(uri)]
    if not fitting:
        return ""
    return f"Bearer {max(fitting, key=lambda each: len(each[0].parts))[1]}"
