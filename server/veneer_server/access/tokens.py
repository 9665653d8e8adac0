"""Verifies JSON Web Tokens of an OpenID Connect issuer, and identifies callers by their claims.

The issuer's public keys come from a file or a URL. Keys from a URL are fetched again

- when a token names an unknown key, but at most every `FETCH_S`, since strangers can send such
  tokens;
- when they are older than `FRESH_S`, in the background of the call that notices it; if they are
  older than twice that, the call waits for the fetch. So a key that the issuer has withdrawn is
  refused by then.

While the issuer does not answer, known keys stay in use until they are `KEPT_S` old.
"""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jwt
from veneer_registry.errors import InvalidField, Unauthenticated, Unavailable

from veneer_server.access.keys import TENANT
from veneer_server.access.principal import DEFAULT_TENANT, ROLES, Principal, Role
from veneer_server.logs import get_logger
from veneer_server.quotas.quota import UNLIMITED, Account

_ALGORITHMS: Final = (
    "RS256",
    "RS384",
    "RS512",
    "PS256",
    "PS384",
    "PS512",
    "ES256",
    "ES384",
    "ES512",
    "EdDSA",
)
"""Public-key algorithms only: with a shared secret, anyone who can check a token can forge
one."""

_LEEWAY_S: Final = 30.0
"""How far the issuer's clock may differ."""
FRESH_S: Final = 300.0
"""Age in seconds after which the issuer's keys are fetched again."""
KEPT_S: Final = 86_400.0
"""Age in seconds after which the keys are dropped, if the issuer does not answer."""
FETCH_S: Final = 5.0
"""Least time between two fetches of the issuer's keys."""
_RETRY_S: Final = 30.0
"""As `FETCH_S`, if the keys are only old and the last fetch has failed."""
_TIMEOUT_S: Final = 5.0
"""How long the issuer may be silent."""
_WHOLE_S: Final = 15.0
"""Seconds that a fetch may take in total."""
_MOST_BYTES: Final = 1 << 20
_DISCOVERY: Final = "/.well-known/openid-configuration"

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class TokenSettings:
    """Attributes:
    issuer, audience: the required ``iss`` and ``aud`` of a token.
    keys: file or URL of the issuer's keys (JWKS); empty to ask the issuer for the URL.
    tenant_claim: claim that names the tenant; a token without it is for `DEFAULT_TENANT`.
    roles_claim: claim with the roles, a list or words; roles not in `ROLES` are ignored.
    """

    issuer: str
    audience: str
    keys: str = ""
    tenant_claim: str = "tenant"
    roles_claim: str = "roles"


class TokenVerifier:
    """Verifies tokens; belongs to one event loop."""

    def __init__(
        self, settings: TokenSettings, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Args:
        clock: returns seconds.

        Raises:
            InvalidField: the file with keys cannot be used, or the URL is not safe.
        """
        self._settings = settings
        self._clock = clock
        self._keys: dict[str | None, jwt.PyJWK] = {}
        self.fetching: asyncio.Task[None] | None = None
        self._fetched: float | None = None
        """When the last fetch began."""
        self._as_of = 0.0
        """When the fetch of the known keys began."""
        self._failing = False
        """Whether the last fetch has failed."""
        source = settings.keys or settings.issuer
        self._file = None
        if "://" not in source:
            self._file = Path(source).expanduser()
            self._keys = _read(self._file)
            self._modified = self._file.stat().st_mtime_ns
        else:
            _check_url(source)

    async def principal(self, token: str) -> Principal:
        """Verify a token, and return the caller that it belongs to.

        Raises:
            Unauthenticated: it is not valid.
            Unavailable: the issuer does not answer, and none of its keys is known.
        """
        try:
            header = jwt.get_unverified_header(token)
        except jwt.InvalidTokenError as error:
            raise _refused("the credential is neither an API key nor a token") from error
        if header.get("alg") not in _ALGORITHMS:
            raise _refused("the token is not signed with an allowed algorithm")
        key = await self._key(header.get("kid"))
        if key is None and self._failing and not self._keys:
            raise _unavailable()
        if key is None:
            raise _refused("the token is signed with a key that its issuer does not publish")
        try:
            claims = jwt.decode(
                token,
                key,
                algorithms=list(_ALGORITHMS),
                audience=self._settings.audience,
                issuer=self._settings.issuer,
                leeway=_LEEWAY_S,
                options={"require": ["exp", "iss", "aud"]},
            )
        except jwt.ExpiredSignatureError as error:
            raise _refused("the token has expired") from error
        except (jwt.InvalidTokenError, ValueError, TypeError) as error:
            raise _refused(f"the token is not valid ({type(error).__name__})") from error
        return self._of(claims)

    def _of(self, claims: Mapping[str, Any]) -> Principal:
        tenant = claims.get(self._settings.tenant_claim, DEFAULT_TENANT)
        if not isinstance(tenant, str) or not TENANT.fullmatch(tenant):
            raise _refused(f"the token's {self._settings.tenant_claim} is not a tenant's name")
        given = claims.get(self._settings.roles_claim, [])
        words = given.split() if isinstance(given, str) else given
        if not isinstance(words, list):
            raise _refused(f"the token's {self._settings.roles_claim} is not a list")
        roles: list[Role] = [role for role in ROLES if role in words]
        name = claims.get("sub")
        text = name if isinstance(name, str) and name.isprintable() else "token"
        # Every subject has an account of its own; long or odd names are hashed.
        plain = text == name and 0 < len(text) <= 128
        own = text if plain else hashlib.sha256(repr(name).encode()).hexdigest()
        account = Account(f"token:{tenant}/{own}", UNLIMITED)
        until = float(claims["exp"]) + _LEEWAY_S
        return Principal(
            text[:128] or "token", tenant, frozenset(roles), (account,), until=until
        )

    @property
    def keys(self) -> object:
        """The issuer's keys; a new object whenever they have changed."""
        return self._keys

    async def refresh(self) -> None:
        """Update the keys: read a changed file again now, or, once an issuer's keys are old,
        start to fetch them in the background."""
        if self._file is not None:
            await self._follow_file(self._file)
        elif self._fetched is not None and self._age() > FRESH_S:
            self._start(self._least_s)

    async def _key(self, id: str | None) -> jwt.PyJWK | None:
        if self._file is not None:
            await self._follow_file(self._file)
        else:
            age = self._age()
            if id not in self._keys or (age > 2 * FRESH_S and not self._failing):
                await self._fetch(FETCH_S)
            elif age > FRESH_S:
                self._start(self._least_s)
        return self._keys.get(id)

    def _age(self) -> float:
        """The age of the issuer's keys in seconds. Drops keys that are too old."""
        age = self._clock() - self._as_of
        if age > KEPT_S and self._keys:
            self._keys = {}
        return age

    @property
    def _least_s(self) -> float:
        """Least time between two fetches of keys that are merely old."""
        return _RETRY_S if self._failing else FETCH_S

    async def _follow_file(self, file: Path) -> None:
        try:
            modified = os.stat(file).st_mtime_ns  # quick enough for the event loop
            if modified == self._modified:
                return
            self._modified = modified
            self._keys = await asyncio.to_thread(_read, file)
        except (OSError, InvalidField) as error:
            _log.warning("token keys rejected, keeping the previous ones", why=str(error))

    async def _fetch(self, least_s: float) -> None:
        """As `_start`, but wait until the fetch is done."""
        if (fetching := self._start(least_s)) is not None:
            await asyncio.shield(fetching)

    def _start(self, least_s: float) -> asyncio.Task[None] | None:
        """Start to fetch the keys, unless the last fetch began less than ``least_s`` ago.
        Concurrent callers share a fetch."""
        if self.fetching is None:
            now = self._clock()
            if self._fetched is not None and now - self._fetched < least_s:
                return None
            self._fetched = now
            self.fetching = asyncio.create_task(self._fetch_once(now))
            # Mark an error as seen, in case nobody waits for the fetch.
            self.fetching.add_done_callback(lambda task: task.cancelled() or task.exception())
        return self.fetching

    async def _fetch_once(self, began: float) -> None:
        settings = self._settings
        try:
            async with asyncio.timeout(_WHOLE_S):
                self._keys = await asyncio.to_thread(_download, settings.keys, settings.issuer)
            self._as_of, self._failing = began, False
        except (OSError, ValueError, InvalidField, http.client.HTTPException) as error:
            self._failing = True
            _log.warning("the token issuer's keys cannot be fetched", why=str(error))
            if not self._keys:
                raise _unavailable() from error
        finally:
            self.fetching = None


def _download(keys: str, issuer: str) -> dict[str | None, jwt.PyJWK]:
    if not keys:
        told = json.loads(_get(issuer.rstrip("/") + _DISCOVERY))
        named = told.get("issuer") if isinstance(told, dict) else None
        if named != issuer:
            raise ValueError(f"it names itself {named!r}, not {issuer}")
        keys = str(told.get("jwks_uri", ""))
        _check_url(keys)
    data = _get(keys)
    # An issuer may withdraw all its keys; but a file without keys is a mistake.
    return {} if json.loads(data) == {"keys": []} else _parse(data, keys)


class _NoUnsafeRedirect(urllib.request.HTTPRedirectHandler):
    """Follows redirects only to addresses that could also be configured."""

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        try:
            _check_url(newurl)
        except InvalidField:
            fp.close()
            raise
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _get(url: str) -> bytes:
    try:
        # This uses the certificates that OpenSSL trusts: SSL_CERT_FILE can name others.
        opener = urllib.request.build_opener(_NoUnsafeRedirect)
        with opener.open(url, timeout=_TIMEOUT_S) as answer:
            data, began = b"", time.monotonic()
            while len(data) <= _MOST_BYTES and (piece := answer.read1(_MOST_BYTES)):
                data += piece
                if time.monotonic() - began > _WHOLE_S:
                    raise TimeoutError(f"{url} answers too slowly")
    except urllib.error.HTTPError as error:
        error.close()
        raise ValueError(f"{url} answers {error.code}") from None
    if len(data) > _MOST_BYTES:
        raise ValueError(f"{url} answers with more than {_MOST_BYTES} bytes")
    return data


def _read(file: Path) -> dict[str | None, jwt.PyJWK]:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise InvalidField(
            f"--jwt-keys {file} cannot be read: {error.strerror or error}",
            metadata={"key": "jwt_keys"},
        ) from error
    return _parse(data, str(file))


def _parse(data: bytes, where: str) -> dict[str | None, jwt.PyJWK]:
    """Parse a key set. Returns the keys that may sign, by id."""
    try:
        found = jwt.PyJWKSet.from_json(data.decode()).keys
    except (jwt.PyJWTError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidField(
            f"{where} is not a set of keys (JWKS): {error}", metadata={"key": "jwt_keys"}
        ) from error
    keys: dict[str | None, jwt.PyJWK] = {
        key.key_id: key
        for key in found
        if key.public_key_use in (None, "sig") and key.key_type != "oct"
    }
    return keys


def _check_url(url: str) -> None:
    parts = urllib.parse.urlsplit(url)
    local = parts.hostname in ("localhost", "127.0.0.1", "::1")
    if parts.scheme != "https" and not (parts.scheme == "http" and local):
        raise InvalidField(
            f"the token issuer's address {url!r} must be https://, or http:// on this "
            "machine: anyone who can tamper with its answers could call this server",
            metadata={"key": "jwt_keys"},
        )


def _unavailable() -> Unavailable:
    return Unavailable(
        "tokens cannot be verified because their issuer does not answer: retry",
        retry_after_s=FETCH_S,
        metadata={"cause": "issuer"},
    )


def _refused(why: str) -> Unauthenticated:
    return Unauthenticated(
        f"{why}: get a new token and send it as `authorization: Bearer TOKEN`",
        metadata={"cause": "token"},
    )
