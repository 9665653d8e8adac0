"""JSON Web Tokens of an issuer on this machine, over real HTTP."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import itertools
import json
import time
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from veneer_registry.errors import InvalidField, PermissionDenied, Unauthenticated, Unavailable
from veneer_server.access import lasting
from veneer_server.access import tokens as tokens_module
from veneer_server.access.authenticate import Access, Credentials
from veneer_server.access.edit_keys import add_key
from veneer_server.access.identity_file import IdentityFile
from veneer_server.access.tokens import TokenSettings, TokenVerifier

from tests.refused import refused

GENERATE = "/veneer.v1.InferenceService/Generate"
WATCH = "/veneer.v1.AdapterService/WatchAdapters"


class Issuer:
    """An OpenID Connect issuer as far as a server needs one: discovery and keys."""

    def __init__(self) -> None:
        self.signers: dict[str, Any] = {}
        self.asked: list[str] = []
        self.up = True
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                body = outer.answer(self.path)
                self.send_response(200 if body is not None and outer.up else 503)
                self.end_headers()
                if body is not None and outer.up:
                    self.wfile.write(body)

            def do_POST(self) -> None:
                form = self.rfile.read(int(self.headers["content-length"])).decode()
                body = outer.grant(self.path, self.headers.get("authorization", ""), form)
                self.send_response(200 if body is not None else 401)
                self.end_headers()
                self.wfile.write(body or b"{}")

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/realm"
        Thread(target=self.server.serve_forever, daemon=True).start()
        self.rotate("first")

    def rotate(self, id: str) -> None:
        """Sign with a new key, and list only that one."""
        self.signers = {id: rsa.generate_private_key(public_exponent=65537, key_size=2048)}

    def grant(self, path: str, authorization: str, form: str) -> bytes | None:
        """The token endpoint's answer; None refuses. See `test_oidc`."""
        return None

    def answer(self, path: str) -> bytes | None:
        if path == "/realm/.well-known/openid-configuration":
            return json.dumps({"issuer": self.url, "jwks_uri": f"{self.url}/keys"}).encode()
        return self.keys() if path == "/realm/keys" else None

    def keys(self) -> bytes:
        listed = []
        for id, signer in self.signers.items():
            key = jwt.algorithms.RSAAlgorithm.to_jwk(signer.public_key(), as_dict=True)
            listed.append({**key, "kid": id, "use": "sig"})
        return json.dumps({"keys": listed}).encode()

    def token(self, *, headers: dict[str, Any] | None = None, **claims: Any) -> str:
        """A valid token, but for what is given; None leaves a claim out."""
        ((id, signer),) = self.signers.items()
        all_ = {
            "iss": self.url,
            "aud": "veneer",
            "sub": "alice",
            "exp": time.time() + 60,
            "roles": ["inference"],
            **claims,
        }
        given = {name: value for name, value in all_.items() if value is not None}
        return jwt.encode(given, signer, "RS256", {"kid": id, **(headers or {})})


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    made = Issuer()
    yield made
    made.server.shutdown()
    made.server.server_close()


def access_of(issuer: Issuer, **settings: str) -> Access:
    return Access(tokens=TokenVerifier(TokenSettings(issuer.url, "veneer", **settings)))


async def admit(access: Access, token: str, method: str = GENERATE) -> Any:
    return await access.admit(method, Credentials(f"Bearer {token}"))


async def test_a_token_says_who_calls(issuer: Issuer) -> None:
    access = access_of(issuer)
    found = await admit(access, issuer.token(tenant="team-a", roles="publisher inference x"))
    assert (found.name, found.tenant) == ("alice", "team-a")
    assert found.roles == {"publisher", "inference"}
    assert (await admit(access, issuer.token())).tenant == "default"
    assert issuer.asked == ["/realm/.well-known/openid-configuration", "/realm/keys"]
    with refused(PermissionDenied, cause="role"):
        await admit(access, issuer.token(roles=None))
    with refused(PermissionDenied, cause="role"):
        await admit(access, issuer.token(roles=["king"]))


async def test_what_is_not_valid_is_refused(issuer: Issuer) -> None:
    access = access_of(issuer)
    now, good = time.time(), issuer.token()
    head, body, signature = good.split(".")
    other = Issuer()
    other.url = issuer.url
    other.signers = {"first": other.signers["first"]}
    elliptic = ec.generate_private_key(ec.SECP256R1())
    ((_, signer),) = issuer.signers.items()
    public = signer.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    wrong = {
        "expired": issuer.token(exp=now - 60),
        "not yet": issuer.token(nbf=now + 600),
        "another audience": issuer.token(aud="other"),
        "another issuer": issuer.token(iss="https://example.org"),
        "no expiry": issuer.token(exp=None),
        "no audience": issuer.token(aud=None),
        "no issuer": issuer.token(iss=None),
        "another signer": other.token(),
        "unknown key": issuer.token(headers={"kid": "nobody"}),
        "no signature": f"{head}.{body}.",
        "a changed signature": f"{head}.{body}.{signature[::-1]}",
        "algorithm none": jwt.encode({"sub": "x"}, None, "none"),
        "another algorithm": jwt.encode({"sub": "x"}, elliptic, "ES256", {"kid": "first"}),
        "a bad tenant": issuer.token(tenant="A/b"),
        "a bad list": issuer.token(roles=3),
        "nonsense": "a.b.c",
        "no token": "nonsense",
    }

    # Signed with the public key as if it were a shared secret.
    def part(data: bytes) -> str:
        return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

    start = part(b'{"alg":"HS256","kid":"first"}') + "." + body
    made = hmac.new(public, start.encode(), hashlib.sha256).digest()
    wrong["the public key as a secret"] = f"{start}.{part(made)}"
    assert (await admit(access, good)).name == "alice"
    for what, token in wrong.items():
        with pytest.raises(Unauthenticated) as caught:
            await admit(access, token)
        assert caught.value.metadata == {"cause": "token"}, what
        assert token not in caught.value.message
    other.server.shutdown()
    other.server.server_close()


async def test_keys_are_fetched_when_the_issuer_rotates_them(
    issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = access_of(issuer)
    old = issuer.token()
    await admit(access, old)
    issuer.rotate("second")
    new = issuer.token()
    with refused(Unauthenticated, cause="token"):
        await admit(access, new)  # fetched a moment ago
    monkeypatch.setattr(tokens_module, "FETCH_S", 0.0)  # private: time passes
    assert (await admit(access, new)).name == "alice"
    with refused(Unauthenticated, cause="token"):
        await admit(access, old)


async def test_an_issuer_that_is_down_stops_nobody_whose_key_is_known(
    issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens_module, "FETCH_S", 0.0)  # private: time passes
    issuer.up = False
    access = access_of(issuer)
    with refused(Unavailable, cause="issuer"):
        await admit(access, issuer.token())
    issuer.up = True
    assert (await admit(access, issuer.token())).name == "alice"
    issuer.up = False
    assert (await admit(access, issuer.token())).name == "alice"
    with refused(Unauthenticated, cause="token"):
        await admit(access, issuer.token(headers={"kid": "nobody"}))


async def turns() -> AsyncIterator[None]:
    """Endless; other tasks run in between."""
    for _ in itertools.count():
        await asyncio.sleep(0.01)
        yield


def aged(issuer: Issuer) -> tuple[Access, list[float]]:
    """Access by this issuer's tokens, and a clock that tests set."""
    now = [1000.0]
    made = TokenVerifier(TokenSettings(issuer.url, "veneer"), clock=lambda: now[0])
    return Access(tokens=made), now


async def test_a_withdrawn_key_ends_although_nobody_names_another(issuer: Issuer) -> None:
    access, now = aged(issuer)
    old = issuer.token()
    await admit(access, old)
    issuer.rotate("second")
    now[0] += tokens_module.FRESH_S - 1
    await admit(access, old)
    assert len(issuer.asked) == 2
    now[0] += 2  # fetched beside this call, which does not wait
    await admit(access, old)
    with refused(Unauthenticated, cause="token"):
        async for _ in turns():
            await admit(access, old)
    assert len(issuer.asked) == 4


async def test_a_withdrawn_key_ends_open_calls_though_nobody_calls(
    issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lasting, "LOOK_S", 0.01)
    access, now = aged(issuer)
    given = Credentials(f"Bearer {issuer.token()}")

    async def watch() -> None:
        principal = await access.admit(WATCH, given)
        with access.while_admitted(WATCH, principal, given):
            await asyncio.Event().wait()

    watching = asyncio.create_task(watch())
    async for _ in turns():
        if issuer.asked:
            break
    issuer.rotate("second")
    now[0] += tokens_module.FRESH_S + 1
    with refused(Unauthenticated, cause="token"):
        async with asyncio.timeout(30):
            await watching


async def test_while_the_issuer_is_down_open_calls_go_on_and_it_is_asked_seldom(
    issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    access, now = aged(issuer)
    tokens = access.tokens  # private: what `Lasting` calls every second
    assert tokens is not None
    await tokens.refresh()
    assert not issuer.asked, "no token was shown yet"
    await admit(access, issuer.token())
    issuer.up = False
    before, known = len(issuer.asked), tokens.keys
    now[0] += tokens_module.FRESH_S + 1
    for _ in range(60):
        now[0] += 1
        await tokens.refresh()
        if (fetching := tokens.fetching) is not None:  # type: ignore[attr-defined]
            await asyncio.wait({fetching})
    assert len(issuer.asked) - before <= 3
    assert tokens.keys is known
    now[0] += tokens_module.KEPT_S
    await tokens.refresh()
    gone = tokens.keys
    await tokens.refresh()
    assert gone == {}
    assert tokens.keys is gone, "or all calls are checked every second"


async def test_after_a_pause_a_withdrawn_key_does_not_count_even_once(issuer: Issuer) -> None:
    access, now = aged(issuer)
    old = issuer.token()
    await admit(access, old)
    now[0] += 2 * tokens_module.FRESH_S + 1
    issuer.rotate("second")
    found = await asyncio.gather(
        *(admit(access, old) for _ in range(20)), return_exceptions=True
    )
    assert {type(each) for each in found} == {Unauthenticated}
    assert len(issuer.asked) == 4, "one fetch for all"


async def test_an_issuer_may_withdraw_all_its_keys(issuer: Issuer) -> None:
    access, now = aged(issuer)
    old = issuer.token()
    await admit(access, old)
    now[0] += 2 * tokens_module.FRESH_S + 1
    issuer.signers = {}
    with refused(Unauthenticated, cause="token"):
        await admit(access, old)


async def test_keys_outlive_an_issuer_that_is_down_by_a_day(issuer: Issuer) -> None:
    access, now = aged(issuer)
    token = issuer.token(exp=time.time() + 1e6)
    await admit(access, token)
    issuer.up = False
    began = now[0]
    while now[0] - began < tokens_module.KEPT_S - 600:
        now[0] += 600
        assert (await admit(access, token)).name == "alice"
    assert len(issuer.asked) < 2 + 24 * 6 * 2
    now[0] = began + tokens_module.KEPT_S + 1
    with refused(Unavailable, cause="issuer"):
        await admit(access, token)
    issuer.up = True
    now[0] += 30
    assert (await admit(access, token)).name == "alice"


async def test_strangers_cannot_make_the_server_ask_the_issuer_over_and_over(
    issuer: Issuer,
) -> None:
    access = access_of(issuer)
    for number in range(50):
        with pytest.raises(Unauthenticated):
            await admit(access, issuer.token(headers={"kid": f"k{number}"}))
    assert len(issuer.asked) == 2


async def test_keys_from_a_file_follow_the_file(issuer: Issuer, tmp_path: Path) -> None:
    file = tmp_path / "jwks.json"
    file.write_bytes(issuer.keys())
    access = access_of(issuer, keys=str(file))
    assert (await admit(access, issuer.token())).name == "alice"
    issuer.rotate("second")
    file.write_bytes(issuer.keys())
    assert (await admit(access, issuer.token())).name == "alice"
    file.write_text("{")
    assert (await admit(access, issuer.token())).name == "alice"
    assert not issuer.asked


async def test_keys_and_tokens_side_by_side(issuer: Issuer, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    key = add_key(file, name="app", tenant="default", roles=["inference"], expires=None).key
    access = Access(IdentityFile(file), TokenVerifier(TokenSettings(issuer.url, "veneer")))
    assert (await admit(access, key)).name == "app"
    assert (await admit(access, issuer.token())).name == "alice"
    with refused(Unauthenticated, cause="key"):
        await admit(access, key + "x")


@pytest.mark.parametrize("url", ["http://example.org/keys", "ftp://x/y", "file:///etc/passwd"])
def test_an_address_that_others_can_change_is_refused(url: str) -> None:
    with refused(InvalidField, key="jwt_keys"):
        TokenVerifier(TokenSettings("https://example.org", "veneer", keys=url))


@pytest.mark.parametrize(
    "content", [None, "", "{}", '{"keys": []}', '{"keys": [{"kty": "x"}]}']
)
def test_a_file_without_keys_is_refused(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "jwks.json"
    if content is not None:
        file.write_text(content)
    with refused(InvalidField, key="jwt_keys"):
        TokenVerifier(TokenSettings("https://example.org", "veneer", keys=str(file)))
