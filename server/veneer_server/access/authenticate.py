"""Decides whether a call is admitted: identifies the caller, and checks its roles."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Final, Protocol

from veneer_registry.errors import InvalidField, PermissionDenied, Unauthenticated

from veneer_server.access.certificates import NOT_SHOWN, ShownCertificate
from veneer_server.access.identity_file import IdentityFile
from veneer_server.access.keys import TENANT
from veneer_server.access.lasting import Lasting
from veneer_server.access.methods import OPEN, roles_for
from veneer_server.access.principal import ANYONE, Principal, denied
from veneer_server.queues.fairness import GATEWAY_HEADERS, Fairness, Routed, fairness_of

PASSED_ON: Final = "veneer-passed-on"
"""Metadata of a call that a follower passes on: the tenant of the original caller."""

_BEARER: Final = "bearer "
_MAX_CREDENTIAL: Final = 8192
ONCE: Final = frozenset(
    (
        "authorization",
        "x-api-key",
        "api-key",
        "veneer-tenant",
        "x-veneer-tenant",
        "origin",
        "sec-fetch-site",
        PASSED_ON,
        *GATEWAY_HEADERS,
    )
)
"""Headers or gRPC metadata that identify the caller. Each may be sent only once: of two values,
a proxy might read one and this server the other."""
_KEY: Final = "vn_"


@dataclass(frozen=True, slots=True)
class Credentials:
    """The credentials of a call.

    Attributes:
        authorization: the header of this name, or gRPC metadata.
        api_key: the header ``x-api-key``.
        certificate: the client's certificate, which TLS has verified.
        tenant: the header ``x-veneer-tenant``, or gRPC metadata ``veneer-tenant``: the tenant
            in which an operator acts. Empty: the caller's own tenant.
        routed: a gateway's metadata about the call.
        passed_on: gRPC metadata ``veneer-passed-on``: a follower passes the call on for a
            caller of this tenant, so the connection's certificate is the follower's and is not
            used. Empty: the caller calls directly.
        azure_key: the header ``api-key``, in which Azure's clients send a key.
    """

    authorization: str = ""
    api_key: str = ""
    certificate: ShownCertificate = NOT_SHOWN
    tenant: str = ""
    routed: Routed = field(default_factory=Routed)
    passed_on: str = ""
    azure_key: str = ""

    @classmethod
    def of_headers(
        cls, headers: Mapping[str, str], certificate: ShownCertificate = NOT_SHOWN
    ) -> Credentials:
        """Read the credentials from HTTP headers or gRPC metadata, by lower-case name.

        Raises:
            InvalidField: they name two tenants, or one of them has two values.
        """
        authorization = headers.get("authorization", "")
        api_key, azure = headers.get("x-api-key", ""), headers.get("api-key", "")
        tenant, other = headers.get("veneer-tenant", ""), headers.get("x-veneer-tenant", "")
        if tenant and other and tenant != other:
            raise InvalidField(
                "veneer-tenant and x-veneer-tenant name different tenants: send one of them",
                metadata={"field": "x-veneer-tenant"},
            )
        bearer = authorization if authorization[:7].lower() == _BEARER else ""
        passed_on = headers.get(PASSED_ON, "")
        for name, value in (
            ("authorization", bearer),
            ("x-api-key", api_key),
            ("api-key", azure),
            ("veneer-tenant", tenant),
            ("x-veneer-tenant", other),
            (PASSED_ON, passed_on),
        ):
            if "," in value:  # some proxies join a repeated header with commas
                raise repeated(name)
        return cls(
            authorization,
            api_key,
            NOT_SHOWN if passed_on else certificate,
            tenant or other,
            Routed.of_headers(headers),
            passed_on,
            azure,
        )

    @property
    def secret(self) -> str:
        """The key or token; empty if there is none."""
        if self.authorization[: len(_BEARER)].lower() == _BEARER:
            return self.authorization[len(_BEARER) :].strip()
        return "" if self.authorization else self.api_key.strip() or self.azure_key.strip()


class TokenCheck(Protocol):
    """Verifies JSON Web Tokens."""

    @property
    def keys(self) -> object:
        """The keys that verify tokens; the same object as long as they have not changed."""

    async def principal(self, token: str) -> Principal:
        """Verify a token, and return the caller that it belongs to. Raises Unauthenticated."""

    async def refresh(self) -> None:
        """Update the keys if that is cheap."""


class Access:
    """Admits calls. Without identities and tokens, every caller is `ANYONE`."""

    def __init__(
        self, identities: IdentityFile | None = None, tokens: TokenCheck | None = None
    ) -> None:
        self._identities = identities
        self.tokens = tokens
        self.lasting = Lasting(self._keys, self._refresh)

    @property
    def asks(self) -> bool:
        """Whether callers must authenticate."""
        return self._identities is not None or self.tokens is not None

    def accepts(self, tenant: str) -> Sequence[str]:
        """The tenants and adapters whose shared adapters a tenant can call by their plain
        names; see `Identities`."""
        if self._identities is None:
            return ()
        return self._identities.latest.accepts.get(tenant, ())

    async def admit(
        self, method: str, credentials: Credentials, elsewhere: Set[str] = frozenset()
    ) -> Principal:
        """Admit a call, and return its caller. Raises as `identify` and `check`."""
        principal = await self.identify(method, credentials)
        self.check(method, principal, credentials, elsewhere)
        return principal

    async def identify(self, method: str, credentials: Credentials) -> Principal:
        """Identify the caller, without checking whether it may call the method. An operator who
        names another tenant acts in that tenant.

        Args:
            method: the method's name, as in `methods.METHODS`.

        Raises:
            Unauthenticated: the call has no credential, or an invalid one.
            InvalidField: the call has two different keys.
            PermissionDenied: nobody may call the method.
        """
        roles = roles_for(method)
        if roles is None:
            raise PermissionDenied(
                f"{method} is not available to callers",
                metadata={"method": method, "cause": "method"},
            )
        if roles is OPEN:
            return ANYONE
        principal = await self._principal(credentials) if self.asks else ANYONE
        named = credentials.tenant
        if named and named != principal.tenant and _may_visit(principal, named) is None:
            return replace(principal, tenant=named, visiting=True)
        return principal

    def check(
        self,
        method: str,
        principal: Principal,
        credentials: Credentials,
        elsewhere: Set[str] = frozenset(),
    ) -> None:
        """Check that the caller found by `identify` may call the method.

        Args:
            elsewhere: methods that only another port answers.

        Raises:
            PermissionDenied: the caller has no role for the method, it may not act in the
                tenant that it names, a follower passed the call on for a tenant that the
                caller does not belong to, or the method is on another port.
        """
        roles = roles_for(method)
        if roles is OPEN:
            return
        assert roles is not None, "`identify` has refused it"
        if not principal.has(roles):
            raise denied(roles, principal, method.rpartition("/")[2] or method, method)
        named = credentials.tenant
        if named and named != principal.tenant:
            refused = _may_visit(principal, named)
            assert refused is not None, "`identify` has let it"
            raise refused
        if credentials.passed_on and credentials.passed_on != principal.tenant:
            raise PermissionDenied(
                f"a follower forwarded this call for tenant {credentials.passed_on[:80]!r}, "
                f"but its caller belongs to {principal.tenant!r} here: give the follower the "
                "same --keys-file or --jwt-issuer as its registry",
                metadata={"cause": "passed_on"},
            )
        if method in elsewhere:
            raise PermissionDenied(
                f"{method.rpartition('/')[2]} is available only on this server's admin port: "
                "ask its operator for the address",
                metadata={"method": method, "cause": "admin_port"},
            )

    def fairness(self, principal: Principal, credentials: Credentials) -> Fairness:
        """The tenant, and the gateway's user, whose share of the service the call uses."""
        weights = None if self._identities is None else self._identities.latest.weights
        return fairness_of(principal.tenant, principal.gateway, credentials.routed, weights)

    def while_admitted(
        self,
        method: str,
        principal: Principal,
        credentials: Credentials,
        elsewhere: Set[str] = frozenset(),
    ) -> AbstractContextManager[None]:
        """Return a context manager for a call that `admit` has just admitted with the same
        arguments. Its block is cancelled, and raises what `admit` would raise, once the call
        would no longer be admitted: a key was revoked, or has another tenant or fewer roles, or
        the credential has expired."""
        if not self.asks or roles_for(method) is OPEN:
            return nullcontext()

        async def check() -> Principal:
            return await self.admit(method, credentials, elsewhere)

        return self.lasting.call(principal, check)

    def _keys(self) -> tuple[object, object]:
        return (
            None if self._identities is None else self._identities.latest,
            None if self.tokens is None else self.tokens.keys,
        )

    async def _refresh(self) -> bool:
        """Update the keys. Returns False if they may be about to change again: a file that is
        being written may be read while it is empty, or has only the first keys."""
        if self.tokens is not None:
            await self.tokens.refresh()
        if self._identities is None:
            return True
        await self._identities.current()
        return self._identities.settled or not self._identities.usable

    async def _principal(self, credentials: Credentials) -> Principal:
        identities = None if self._identities is None else await self._identities.current()
        secret = credentials.secret
        for name, key in (
            ("x-api-key", credentials.api_key.strip()),
            ("api-key", credentials.azure_key.strip()),
        ):
            if secret and key not in ("", secret):
                raise InvalidField(
                    f"{name} and another header carry different keys: send one of them",
                    metadata={"field": name},
                )
        if len(secret) > _MAX_CREDENTIAL:
            raise _refused("the credential is longer than 8192 bytes", "credential_size")
        if not secret:
            if credentials.authorization:
                raise _refused("the authorization header must be `Bearer KEY`", "scheme")
            shown = credentials.certificate
            found = identities and identities.by_certificate(shown.names)
            if found:
                if shown.until <= time.time():  # it was valid when the client connected
                    raise _refused("the client's certificate has expired", "certificate")
                return replace(found, until=shown.until)
            raise _refused("authentication required", "no_credential")
        if self.tokens is not None and not secret.startswith(_KEY):
            found = await self.tokens.principal(secret)
            return found if identities is None else identities.limited(found)
        found = identities and identities.by_key(secret, datetime.now(UTC))
        if not found:
            raise _refused("the API key is unknown, was revoked or has expired", "key")
        return found


def repeated(name: str) -> InvalidField:
    """The error for a call that has two values for a header or metadata in `ONCE`."""
    return InvalidField(
        f"{name} is sent more than once, or has more than one value: send it once, and check "
        "that no proxy adds another",
        metadata={"field": name},
    )


def _may_visit(principal: Principal, tenant: str) -> PermissionDenied | None:
    """The error for a caller that may not act in another tenant; None if it may."""
    if not principal.has({"operator"}):
        return PermissionDenied(
            "only an operator may act in another tenant: leave out the header "
            "x-veneer-tenant (or metadata veneer-tenant)",
            metadata={"roles": "operator", "cause": "tenant"},
        )
    if not TENANT.fullmatch(tenant):
        return PermissionDenied(
            f"{tenant[:80]!r} is not a tenant's name: use 1 to 63 lower-case letters, digits, "
            "'.', '_' or '-', with a letter or digit at both ends",
            metadata={"cause": "tenant_name"},
        )
    return None


def _refused(why: str, cause: str) -> Unauthenticated:
    return Unauthenticated(
        f"{why}: run `veneer login` or set VENEER_API_KEY (other clients send the header "
        "`authorization: Bearer KEY`)",
        metadata={"cause": cause},
    )
