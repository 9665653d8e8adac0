"""A whole OpenID Connect flow against an issuer on this machine, over HTTPS: a client gets a
token by its own credentials, and calls a server with it by gRPC and HTTP."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import ssl
import time
import urllib.parse
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import httpx
import jwt
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives import serialization
from veneer_client import AsyncClient, RetryPolicy, Text, VeneerError
from veneer_registry.errors import PermissionDenied, Unavailable
from veneer_server.access import tokens as tokens_module
from veneer_server.access.authenticate import Access
from veneer_server.access.tokens import TokenSettings, TokenVerifier

from tests.pki import Pki
from tests.refused import refused
from tests.unit.server.access.test_tokens import Issuer, admit
from tests.unit.server.rpc.front_harness import Front, make_adapter, running

CLIENTS = {"app": ("s3cret", ["inference"]), "trainer": ("t0psecret", ["publisher"])}


class Realm(Issuer):
    """`Issuer` over HTTPS, with a token endpoint for clients' own credentials."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.pki = Pki(folder)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.pki.cert, self.pki.key)
        # Handshakes in the threads of the connections, and no word of those that fail.
        self.server.socket = context.wrap_socket(
            self.server.socket, server_side=True, do_handshake_on_connect=False
        )
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.url = self.url.replace("http://", "https://")

    def answer(self, path: str) -> bytes | None:
        if path == "/realm/.well-known/openid-configuration":
            ends = {"jwks_uri": "keys", "token_endpoint": "token"}
            told = {name: f"{self.url}/{end}" for name, end in ends.items()}
            return json.dumps({"issuer": self.url, **told}).encode()
        return super().answer(path)

    def grant(self, path: str, authorization: str, form: str) -> bytes | None:
        name, _, secret = base64.b64decode(authorization[6:]).decode().partition(":")
        asked = urllib.parse.parse_qs(form)
        known, roles = CLIENTS.get(name, ("", []))
        if (path, asked["grant_type"], secret) != (
            "/realm/token",
            ["client_credentials"],
            known,
        ):
            return None
        token = self.token(sub=name, roles=roles, tenant="team-a", aud=asked["audience"])
        return json.dumps({"access_token": token, "token_type": "Bearer"}).encode()

    async def issue(self, client: str) -> str:
        """A token, as a client gets it: discovery, then the token endpoint."""
        async with httpx.AsyncClient(verify=self.pki.ca_file, trust_env=False) as http:
            found = await http.get(f"{self.url}/.well-known/openid-configuration")
            answer = await http.post(
                found.json()["token_endpoint"],
                auth=(client, CLIENTS[client][0]),
                data={"grant_type": "client_credentials", "audience": "veneer"},
            )
            token: str = answer.raise_for_status().json()["access_token"]
            return token


@pytest.fixture
def realm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Realm]:
    made = Realm(tmp_path / "realm")
    monkeypatch.setenv("SSL_CERT_FILE", made.pki.ca_file)
    monkeypatch.setattr(tokens_module, "FETCH_S", 0.0)  # private: time passes
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest_asyncio.fixture
async def front(
    base_folder: Path, front_cache: Path, tmp_path: Path, realm: Realm
) -> AsyncIterator[Front]:
    async with running(
        base_folder,
        front_cache,
        tmp_path / "front",
        openai_listen="127.0.0.1:0",
        jwt_issuer=realm.url,
        refusal_rate="0",
    ) as made:
        yield made


async def grpc_told(front: Front, token: str) -> str:
    """ "yes", or the reason and the cause of the refusal."""
    once = RetryPolicy(attempts=1)
    async with AsyncClient(front.addresses["grpc"], api_key=token, retry=once) as client:
        try:
            await client.generate(Text("Hello"), max_tokens=1)
        except VeneerError as error:
            leaks = " and shows the token" if token in str(error) else ""
            return f"{error.reason} {error.metadata.get('cause')}{leaks}"
    return "yes"


async def http_told(front: Front, token: str) -> tuple[int, str]:
    body = {"model": "smollm2-135m", "prompt": "Hi", "max_tokens": 1}
    headers = {"authorization": f"Bearer {token}"}
    async with httpx.AsyncClient(trust_env=False) as http:
        url = f"http://{front.addresses['openai']}/v1/completions"
        answer = await http.post(url, json=body, headers=headers)
    assert token not in answer.text
    return answer.status_code, answer.text


async def scrape_told(front: Front, token: str) -> int:
    headers = {"authorization": f"Bearer {token}"}
    async with httpx.AsyncClient(trust_env=False) as http:
        url = f"http://{front.addresses['metrics']}/metrics"
        return (await http.get(url, headers=headers)).status_code


@pytest.mark.push
async def test_a_client_calls_with_a_token_of_the_issuer(
    front: Front, realm: Realm, tmp_path: Path
) -> None:
    app, trainer = await realm.issue("app"), await realm.issue("trainer")
    assert await grpc_told(front, app) == "yes"
    assert (await http_told(front, app))[0] == 200
    assert {request.cache_scope for request in front.engine.submitted} == {"team-a"}
    folder = make_adapter(tmp_path / "a")
    async with AsyncClient(front.addresses["grpc"], api_key=trainer) as client:
        assert (await client.push(folder, "mine")).published
    async with AsyncClient(front.addresses["grpc"], api_key=app) as client:
        with refused(PermissionDenied, cause="role"):
            await client.push(folder, "other")
    assert await grpc_told(front, trainer) == "PERMISSION_DENIED role"
    assert (await http_told(front, trainer))[0] == 403


@pytest.mark.push
async def test_the_issuer_rotates_its_keys_and_goes_away(front: Front, realm: Realm) -> None:
    old = await realm.issue("app")
    assert await grpc_told(front, old) == "yes"
    realm.rotate("second")
    new = await realm.issue("app")
    assert await grpc_told(front, new) == "yes"
    assert await grpc_told(front, old) == "UNAUTHENTICATED token"
    realm.up = False
    assert await grpc_told(front, new) == "yes"
    assert (await http_told(front, new))[0] == 200
    realm.rotate("third")
    unknown = realm.token()
    assert await grpc_told(front, unknown) == "UNAUTHENTICATED token"
    status, text = await http_told(front, unknown)
    assert (status, "a key that its issuer does not publish" in text) == (401, True)
    realm.up = True
    assert await grpc_told(front, unknown) == "yes"


@pytest.mark.push
async def test_an_issuer_that_was_never_there_is_told(front: Front, realm: Realm) -> None:
    token = await realm.issue("app")
    realm.up = False
    assert await grpc_told(front, token) == "UNAVAILABLE issuer"
    status, text = await http_told(front, token)
    assert (status, "their issuer does not answer" in text) == (503, True)
    assert await scrape_told(front, token) == 503
    realm.up = True
    assert (await http_told(front, token))[0] == 200
    assert await scrape_told(front, token) == 403


def forged(realm: Realm) -> dict[str, str]:
    """Tokens that nobody may call with."""
    now, good = time.time(), realm.token()
    ((id_, signer),) = realm.signers.items()
    public = signer.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    body = good.split(".")[1]

    def part(data: bytes) -> str:
        return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

    start = part(json.dumps({"alg": "HS256", "kid": id_}).encode()) + "." + body
    signed = hmac.new(public, start.encode(), hashlib.sha256).digest()
    none = part(json.dumps({"alg": "none", "kid": id_}).encode())
    wrong = {
        "algorithm none": f"{none}.{body}.",
        "the public key as a secret": f"{start}.{part(signed)}",
        "another audience": realm.token(aud="other"),
        "another issuer": realm.token(iss="https://example.org"),
        "expired": realm.token(exp=now - 60),
        "no expiry": realm.token(exp=None),
        "its own key in the header": jwt.encode(
            jwt.decode(good, options={"verify_signature": False}),
            "x" * 64,
            "HS256",
            {"jwk": {"kty": "oct", "k": "eHh4"}, "kid": id_},
        ),
    }
    for kid in (
        "../../../../../../dev/null",
        "/dev/null",
        "first/../first",
        "",
        "first\x00",
        "k" * 2000,
        "' UNION SELECT 'x",
        "file:///etc/passwd",
        f"{realm.url}/keys",
        "FIRST",
    ):
        wrong[f"kid {kid[:40]!r}"] = realm.token(headers={"kid": kid})
    return wrong


@pytest.mark.push
async def test_forged_tokens_are_refused_at_both_doors(front: Front, realm: Realm) -> None:
    assert await grpc_told(front, realm.token()) == "yes"
    for what, token in forged(realm).items():
        assert await grpc_told(front, token) == "UNAUTHENTICATED token", what
        assert (await http_told(front, token))[0] == 401, what
    assert set(realm.asked) == {"/realm/.well-known/openid-configuration", "/realm/keys"}


async def test_an_issuer_whose_certificate_is_not_trusted_is_not_believed(
    realm: Realm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = Pki(tmp_path / "other")
    monkeypatch.setenv("SSL_CERT_FILE", other.ca_file)
    access = Access(tokens=TokenVerifier(TokenSettings(realm.url, "veneer")))
    for _ in range(2):  # the keys are not asked for again so soon
        with refused(Unavailable, cause="issuer"):
            await admit(access, realm.token())


async def test_a_discovery_document_of_another_issuer_is_not_believed(realm: Realm) -> None:
    """One that a proxy or a wrong address answers with; its keys may be anybody's."""
    url = realm.url
    access = Access(tokens=TokenVerifier(TokenSettings(url, "veneer")))
    realm.url = url.replace("/realm", "/other")
    with refused(Unavailable, cause="issuer"):
        await admit(access, realm.token(iss=url))
    realm.url = url
    assert (await admit(access, realm.token())).name == "alice"


@pytest.fixture
def redirecting() -> Iterator[ThreadingHTTPServer]:
    """Sends everybody to an address that others could change."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302)
            self.send_header("location", "http://keys.example.org/keys")
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


async def test_keys_are_not_fetched_from_where_a_redirect_leads_without_tls(
    realm: Realm, redirecting: ThreadingHTTPServer, caplog: pytest.LogCaptureFixture
) -> None:
    where = f"http://127.0.0.1:{redirecting.server_address[1]}/keys"
    access = Access(tokens=TokenVerifier(TokenSettings(realm.url, "veneer", keys=where)))
    with refused(Unavailable, cause="issuer"):
        await admit(access, realm.token())
    fields = [vars(record)["veneer_fields"] for record in caplog.records]
    assert any("must be https://" in str(each.get("why")) for each in fields)


async def test_a_document_that_is_none_is_told(realm: Realm) -> None:
    for document in (b"[]", b"{", b"3", b'{"issuer": 1}', b"\xff"):
        realm.answer = lambda path, document=document: document  # type: ignore[method-assign]
        access = Access(tokens=TokenVerifier(TokenSettings(realm.url, "veneer")))
        with refused(Unavailable, cause="issuer"):
            await admit(access, realm.token())
