"""URIs of adapters, parsed strictly: a URI that could be read in two ways is refused.

A URI names a folder. Its path has plain segments only, without ``..``, percent-encoding or
query, so that the path that is checked is the path that is fetched.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Final, Literal, NoReturn, get_args

from veneer_registry.errors import InvalidField

Scheme = Literal["https", "hf", "s3", "gs", "file"]

LONGEST: Final = 2048
_SCHEMES: Final = get_args(Scheme)
_SEGMENT: Final = re.compile(r"[A-Za-z0-9._~+=,:-]{1,255}")
_REVISION: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_BUCKET: Final = re.compile(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]")
_LABEL: Final = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")


@dataclass(frozen=True, slots=True)
class Origin:
    """Host and port of a connection. A token is for one origin."""

    host: str
    port: int

    def __str__(self) -> str:
        return self.written(0)

    def written(self, default: int) -> str:
        """The origin as written in a URL, without the port if it is ``default``."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == default else f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Uri:
    """A URI of a folder, or the beginning of one.

    Attributes:
        place: host and port, or bucket; "" for ``hf`` and ``file``.
        parts: segments of the path; for ``hf`` organisation, repository, subfolders.
        revision: for ``hf``, a branch, tag or commit; "" if none is given.
    """

    scheme: Scheme
    place: str
    parts: tuple[str, ...]
    revision: str = ""

    def __str__(self) -> str:
        parts = list(self.parts)
        if self.revision:
            parts[1] += f"@{self.revision}"
        middle = f"{self.place}/" if self.scheme != "hf" else ""
        return f"{self.scheme}://{middle}{'/'.join(parts)}"

    @property
    def origin(self) -> Origin:
        """Host and port of an ``https`` URI."""
        return parse_origin(self.place)

    def covers(self, other: Uri) -> bool:
        """Whether the other URI is this folder, or below it."""
        return (
            self.scheme == other.scheme
            and self.place == other.place
            and other.parts[: len(self.parts)] == self.parts
            and self.revision in ("", other.revision)
        )


def refuse_uri(why: str, *, cause: str = "malformed", detail: str = "") -> NoReturn:
    """Raise the error for a URI that cannot be fetched."""
    raise InvalidField(f"uri: {why}", metadata={"field": "uri", "cause": cause}, detail=detail)


def parse_uri(text: str, *, prefix: bool = False) -> Uri:
    """Parse a URI.

    Args:
        prefix: also accept the beginning of a URI, such as ``hf://`` or ``hf://org/``.

    Raises:
        InvalidField: metadata ``field`` and ``cause`` (``scheme`` or ``malformed``).
    """
    if len(text) > LONGEST:
        refuse_uri(f"it has {len(text)} characters: at most {LONGEST} are allowed")
    scheme, separator, rest = text.partition("://")
    known: Scheme | None = next((each for each in _SCHEMES if each == scheme), None)
    if not separator or known is None:
        refuse_uri(
            "it does not start with https://, hf://, s3://, gs:// or file://: give the URI "
            "of a folder, such as hf://org/repo",
            cause="scheme",
        )
    if known == "hf":
        return _hub(rest, prefix)
    place, _, path = rest.partition("/")
    parts = _parts(path)
    if known == "file":
        if place:
            refuse_uri("file:// takes an absolute path: file:///srv/adapters/sql")
        return Uri(known, "", parts)
    if known == "https":
        place = parse_origin(place).written(443)
    elif not _BUCKET.fullmatch(place):
        refuse_uri(f"its bucket's name is malformed: give {known}://BUCKET/PREFIX")
    return Uri(known, place, parts)


def _hub(rest: str, prefix: bool) -> Uri:
    parts = list(_parts(rest, "@"))
    revision = ""
    if len(parts) > 1:
        parts[1], at, revision = parts[1].partition("@")
        if at and not _REVISION.fullmatch(revision):
            refuse_uri(
                "the part after @ is not a branch, tag or commit: give hf://org/repo@main"
            )
    if any("@" in part for part in parts) or not all(map(_SEGMENT.fullmatch, parts)):
        refuse_uri("@ marks the revision: give hf://org/repo@revision/subfolder")
    if len(parts) < 2 and not prefix:
        refuse_uri(
            "it does not name a repository: give hf://org/repo, or hf://org/repo@revision"
        )
    return Uri("hf", "", tuple(parts), revision)


def _parts(path: str, more: str = "") -> tuple[str, ...]:
    parts = path.removesuffix("/").split("/") if path.removesuffix("/") else []
    for part in parts:
        plain = part.replace("@", "") if more else part
        if part in (".", "..") or not _SEGMENT.fullmatch(plain):
            refuse_uri(
                "its path has a component that is not allowed: use letters, digits and "
                "._~+=,:- without '..', percent-encoding or a query"
            )
    return tuple(parts)


def parse_origin(text: str) -> Origin:
    """Parse ``HOST`` or ``HOST:PORT`` of an https URI. Raises InvalidField."""
    if "@" in text:
        refuse_uri(
            "it contains a user or password: the operator sets credentials with --fetch-token"
        )
    match = re.fullmatch(
        r"(?:\[([0-9A-Fa-f:.]{2,45})\]|([^:\[\]]{1,253}))(?::([0-9]{1,5}))?", text
    )
    if match is None or not 0 < int(match[3] or 443) < 65536:
        refuse_uri("its host or port is malformed: give https://HOST/PATH")
    host = (match[1] or match[2]).lower()
    if match[1]:
        try:
            host = str(ipaddress.IPv6Address(host))
        except ValueError:
            refuse_uri("its IPv6 address is malformed")
    elif not all(map(_LABEL.fullmatch, host.split("."))):
        refuse_uri("its host's name is malformed: give https://HOST/PATH")
    return Origin(host, int(match[3] or 443))
