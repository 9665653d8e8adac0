"""API keys, and the file that lists them.

A key is ``vn_<id>_<secret>``. The file only has the SHA-256 of the whole key: reading the file
reveals no key, and 256 random bits need no slow hash.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from veneer_registry.adapter import check_name
from veneer_registry.errors import InvalidField

from veneer_server.access.principal import DEFAULT_TENANT, ROLES, Principal, Role
from veneer_server.queues.fairness import MAX_PRIORITY, MAX_WEIGHT, MIN_WEIGHT, FairWeights
from veneer_server.quotas.quota import UNLIMITED, Account, Quota, QuotaInvalid, parse_quota

MAX_FILE: Final = 4 << 20
"""Most bytes of a keys file."""

_PREFIX: Final = "vn"
_ID: Final = re.compile(r"[0-9a-z]{8,32}")
_NAME: Final = re.compile(r"[\x21-\x7e]{1,128}")
TENANT: Final = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")
"""The form of a tenant's name."""
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_TABLES: Final = {
    "keys": "keys.ID",
    "certificates": "certificates",
    "limits": "limits",
    "tenants": "tenants.NAME",
    "objectives": "objectives.NAME",
}
"""Tables of the file, and their names in messages."""
_NOBODY: Final = hashlib.sha256(b"").digest()


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key in the file.

    Attributes:
        digest: SHA-256 of the whole key.
        expires: when it expires; None if it does not.
    """

    id: str
    digest: bytes
    principal: Principal
    expires: datetime | None = None

    def expired(self, now: datetime) -> bool:
        return self.expires is not None and now >= self.expires


@dataclass(frozen=True, slots=True)
class Identities:
    """The content of a keys file.

    Attributes:
        keys: keys by id.
        certificates: callers with a certificate, by subject alternative name.
        weights: weights of tenants, and priorities of objectives.
        defaults: limits of each caller that has none of its own.
        tenants: limits for all calls of a tenant together, by its name.
        accepts: by a tenant's name, the tenants and adapters (``TENANT`` or ``TENANT/name``)
            whose shared adapters it can call by their plain names.
    """

    keys: Mapping[str, ApiKey]
    certificates: Mapping[str, Principal]
    weights: FairWeights
    defaults: Quota = UNLIMITED
    tenants: Mapping[str, Account] = field(default_factory=dict)
    accepts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def by_key(self, key: str, now: datetime) -> Principal | None:
        """Return the caller that a key belongs to; None if the key is unknown or has expired. A
        wrong secret takes the same time as an unknown id."""
        _, _, rest = key.partition("_")
        found = self.keys.get(rest.partition("_")[0])
        digest = hashlib.sha256(key.encode()).digest()
        same = hmac.compare_digest(digest, _NOBODY if found is None else found.digest)
        if found is None or not same or found.expired(now):
            return None
        return found.principal

    def by_certificate(self, names: tuple[str, ...]) -> Principal | None:
        """Return the caller that a certificate belongs to, by the first of its subject
        alternative names that is listed; None if none is."""
        found = (self.certificates.get(name) for name in names)
        return next((each for each in found if each is not None), None)

    def limited(self, principal: Principal) -> Principal:
        """Return a caller that the file does not list (such as a token's), with the file's
        default limits and its tenant's."""
        own = [replace(account, quota=self.defaults) for account in principal.accounts]
        return _with_accounts(principal, own, self.tenants)


def make_key() -> tuple[str, str, str]:
    """Make a key. Returns it, its id, and its SHA-256 for the file, in hex."""
    id = base64.b32encode(secrets.token_bytes(10)).decode().lower()
    key = f"{_PREFIX}_{id}_{secrets.token_urlsafe(32)}"
    return key, id, hashlib.sha256(key.encode()).hexdigest()


def parse_identities(text: str, path: Path) -> Identities:
    """Parse the text of a keys file.

    Raises:
        InvalidField: it is not valid; the message names the entry and the fix.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _wrong(path, "", f"is not valid TOML ({error})") from error
    if unknown := document.keys() - {*_TABLES}:
        raise _wrong(
            path,
            sorted(unknown)[0],
            f"is unknown: use {', '.join(f'[{table}]' for table in _TABLES.values())}",
        )
    defaults = _quota(path, "limits", document.get("limits", {}))
    tenants, weights = _tenants(path, document)
    keys = {}
    for id, entry in _tables(document, "keys", path):
        at = f"keys.{id}"
        if not _ID.fullmatch(id):
            raise _wrong(path, at, "is not a key id: create keys with `veneer-server key new`")
        _check_fields(path, at, entry, {"sha256", "expires", "created"})
        digest = entry.get("sha256")
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise _wrong(path, f"{at}.sha256", "must be 64 hexadecimal digits")
        given = entry.get("expires")
        expires = None if given is None else _time(path, f"{at}.expires", given)
        principal = _limited(path, at, entry, id, f"key:{id}", defaults, tenants)
        if expires is not None:
            principal = replace(principal, until=expires.timestamp())
        keys[id] = ApiKey(id, bytes.fromhex(digest), principal, expires)
    certificates = {}
    for name, entry in _tables(document, "certificates", path):
        at = f"certificates.{name!r}"
        _check_fields(path, at, entry, set())
        certificates[name] = _limited(
            path, at, entry, name, f"certificate:{name}", defaults, tenants
        )
    accepts = {
        name: _accepts(path, f"tenants.{name}.accepts", entry.get("accepts", []))
        for name, entry in _tables(document, "tenants", path)
    }
    return Identities(keys, certificates, weights, defaults, tenants, accepts)


def _accepts(path: Path, at: str, given: object) -> tuple[str, ...]:
    listed = given if isinstance(given, list) else [None]
    for each in listed:
        tenant, slash, name = each.partition("/") if isinstance(each, str) else ("", "", "")
        try:
            wrong = TENANT.fullmatch(tenant) is None or (slash and not check_name(name))
        except InvalidField:
            wrong = True
        if wrong:
            raise _wrong(path, at, 'must be a list such as ["team-a", "team-c/code"]')
    return tuple(listed)


def _tenants(path: Path, document: Mapping[str, Any]) -> tuple[dict[str, Account], FairWeights]:
    """Parse the limits and weights of tenants, and the priorities of objectives."""
    accounts: dict[str, Account] = {}
    weights: dict[str, float] = {}
    objectives: dict[str, int] = {}
    for name, entry in _tables(document, "tenants", path):
        at = f"tenants.{name}"
        if not TENANT.fullmatch(name):
            raise _wrong(path, at, "is not a tenant's name")
        _check_known(path, at, entry, {"accepts", "limits", "weight"})
        quota = _quota(path, f"{at}.limits", entry.get("limits", {}))
        accounts[name] = Account(f"tenant:{name}", quota)
        weight = entry.get("weight", 1.0)
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not MIN_WEIGHT <= weight <= MAX_WEIGHT:
            raise _wrong(
                path,
                f"{at}.weight",
                f"must be a number from {MIN_WEIGHT:g} to {MAX_WEIGHT:g}",
            )
        weights[name] = float(weight)
    for name, entry in _tables(document, "objectives", path):
        at = f"objectives.{name}"
        _check_known(path, at, entry, {"priority"})
        priority = entry.get("priority", 0)
        whole = isinstance(priority, int) and not isinstance(priority, bool)
        if not whole or not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
            raise _wrong(
                path,
                f"{at}.priority",
                f"must be a whole number from {-MAX_PRIORITY} to {MAX_PRIORITY}",
            )
        objectives[name] = priority
    return accounts, FairWeights(weights, objectives)


def _quota(path: Path, at: str, given: object, defaults: Quota = UNLIMITED) -> Quota:
    try:
        return parse_quota(given, defaults)
    except QuotaInvalid as error:
        raise _wrong(path, f"{at}.{error.name}".rstrip("."), str(error)) from error


def _limited(
    path: Path,
    at: str,
    entry: Mapping[str, Any],
    default: str,
    account: str,
    defaults: Quota,
    tenants: Mapping[str, Account],
) -> Principal:
    """Make the principal of an entry, with its own limits and its tenant's."""
    quota = _quota(path, f"{at}.limits", entry.get("limits", {}), defaults)
    principal = _principal(path, at, entry, default)
    return _with_accounts(principal, [Account(account, quota)], tenants)


def _with_accounts(
    principal: Principal, own: list[Account], tenants: Mapping[str, Account]
) -> Principal:
    accounts = [*own, tenants.get(principal.tenant)]
    # Accounts without a limit are left out, so they cost calls nothing.
    limited = tuple(a for a in accounts if a is not None and a.quota != UNLIMITED)
    return replace(principal, accounts=limited)


def _tables(document: Mapping[str, Any], name: str, path: Path) -> list[tuple[str, Any]]:
    found = document.get(name, {})
    if not isinstance(found, dict) or not all(isinstance(e, dict) for e in found.values()):
        raise _wrong(path, name, "must hold tables, such as [keys.ID]")
    return list(found.items())


def _check_fields(path: Path, at: str, entry: Mapping[str, Any], own: set[str]) -> None:
    _check_known(path, at, entry, {"name", "tenant", "roles", "limits", "gateway", *own})


def _check_known(path: Path, at: str, entry: Mapping[str, Any], known: set[str]) -> None:
    if unknown := entry.keys() - known:
        raise _wrong(
            path, f"{at}.{sorted(unknown)[0]}", f"is unknown: use {', '.join(sorted(known))}"
        )


def _principal(path: Path, at: str, entry: Mapping[str, Any], default: str) -> Principal:
    name = entry.get("name", default)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _wrong(path, f"{at}.name", "must be 1 to 128 printable characters, no spaces")
    tenant = entry.get("tenant", DEFAULT_TENANT)
    if not isinstance(tenant, str) or not TENANT.fullmatch(tenant):
        raise _wrong(
            path,
            f"{at}.tenant",
            "must be 1 to 63 lower-case letters, digits, '.', '_' or '-', and begin and end "
            "with a letter or digit",
        )
    given = entry.get("roles")
    if not isinstance(given, list) or not given or any(r not in ROLES for r in given):
        raise _wrong(path, f"{at}.roles", f"must be a list of some of {', '.join(ROLES)}")
    roles: list[Role] = given
    gateway = entry.get("gateway", False)
    if not isinstance(gateway, bool):
        raise _wrong(path, f"{at}.gateway", "must be true or false")
    return Principal(name, tenant, frozenset(roles), gateway=gateway)


def _time(path: Path, at: str, given: object) -> datetime:
    if not isinstance(given, datetime):
        raise _wrong(path, at, "must be a time such as 2027-01-31T00:00:00Z")
    return given if given.tzinfo is not None else given.replace(tzinfo=UTC)


def _wrong(path: Path, at: str, why: str) -> InvalidField:
    where = f"{path}: {at}" if at else str(path)
    return InvalidField(f"{where} {why}", metadata={"file": str(path), "field": at})
