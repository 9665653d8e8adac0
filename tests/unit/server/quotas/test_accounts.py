"""Whose limits a call counts towards, by the keys file and the command that edits it."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from pathlib import Path

import jwt
import pytest
from click.testing import Result
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm
from typer.testing import CliRunner
from veneer_registry.errors import InvalidField
from veneer_server.access.authenticate import Access, Credentials
from veneer_server.access.edit_keys import add_key, list_keys
from veneer_server.access.identity_file import IdentityFile
from veneer_server.access.keys import MAX_FILE, parse_identities
from veneer_server.access.principal import Principal
from veneer_server.access.tokens import TokenSettings, TokenVerifier
from veneer_server.operate.key_cli import key_cli
from veneer_server.quotas.quota import Account, Quota

from tests.refused import refused

KEY = f'[keys.abcdefgh]\nroles = ["inference"]\nsha256 = "{"0" * 64}"\n'
PATH = Path("keys.toml")


@pytest.mark.parametrize(
    ("text", "field"),
    [
        (KEY + "limits = 3", "keys.abcdefgh.limits"),
        (KEY + "limits = {rpm = 3}", "keys.abcdefgh.limits.rpm"),
        (KEY + "limits = {adapters = 0}", "keys.abcdefgh.limits.adapters"),
        (KEY + "limits = {adapters = -1}", "keys.abcdefgh.limits.adapters"),
        (KEY + "limits = {adapters = 1e30}", "keys.abcdefgh.limits.adapters"),
        (KEY + "limits = {adapters = inf}", "keys.abcdefgh.limits.adapters"),
        (KEY + 'limits = {adapters = "many"}', "keys.abcdefgh.limits.adapters"),
        ("limits = []", "limits"),
        ("[limits]\nrequests = 3", "limits.requests"),
        ("[tenants.a]\nlimit = {adapters = 3}", "tenants.a.limit"),
        ("[tenants.a.limits]\nadapter = 3", "tenants.a.limits.adapter"),
        ("[tenants.A]", "tenants.A"),
        ("tenants = 3", "tenants"),
    ],
)
def test_a_wrong_limit_is_named(text: str, field: str) -> None:
    with refused(InvalidField, field=field):
        parse_identities(text, PATH)


def test_keys_certificates_and_tenants() -> None:
    found = parse_identities(
        KEY + 'limits = {requests_per_minute = 5}\ntenant = "a"\n'
        '[certificates."x.example"]\nroles = ["inference"]\ntenant = "b"\n'
        'limits = {requests_per_minute = "none"}\n'
        "[limits]\nrequests_per_minute = 9\nadapters = 2\n"
        "[tenants.a.limits]\ntokens_per_minute = 7\n",
        PATH,
    )
    assert found.keys["abcdefgh"].principal.accounts == (
        Account("key:abcdefgh", Quota(requests_per_minute=5, adapters=2)),
        Account("tenant:a", Quota(tokens_per_minute=7)),
    )
    assert found.certificates["x.example"].accounts == (
        Account("certificate:x.example", Quota(adapters=2)),
    )
    other = found.limited(Principal("s", "a", frozenset(), (Account("token:a/s", Quota()),)))
    assert other.accounts == (
        Account("token:a/s", Quota(requests_per_minute=9, adapters=2)),
        Account("tenant:a", Quota(tokens_per_minute=7)),
    )


def test_without_limits_a_call_has_no_accounts() -> None:
    found = parse_identities(KEY + "[tenants.a.limits]\nadapters = 1\n", PATH)
    assert found.keys["abcdefgh"].principal.accounts == ()


async def test_each_subject_of_tokens_has_an_account_of_its_own(tmp_path: Path) -> None:
    secret = ec.generate_private_key(ec.SECP256R1())
    public = json.loads(ECAlgorithm.to_jwk(secret.public_key()))
    keys = tmp_path / "jwks.json"
    keys.write_text(json.dumps({"keys": [{**public, "kid": "k", "use": "sig"}]}))
    tokens = TokenVerifier(TokenSettings("https://idp.example", "veneer", str(keys)))
    subjects = [
        "ann",
        "bob",
        "",
        "token",
        "x" * 128,
        "x" * 129,
        "x" * 130,
        "a\nb",
        "a\rb",
        None,
    ]
    ids = set()
    for tenant in ("a", "b"):
        for subject in subjects:
            claims = {"iss": "https://idp.example", "aud": "veneer", "exp": time.time() + 99}
            claims |= {"tenant": tenant, "roles": ["inference"]}
            claims |= {} if subject is None else {"sub": subject}
            token = jwt.encode(claims, secret, "ES256", {"kid": "k"})
            (account,) = (await tokens.principal(token)).accounts
            ids.add(account.id)
    assert len(ids) == 2 * len(subjects)
    assert max(map(len, ids)) < 200
    assert all(id.isprintable() for id in ids)


class Issuer:
    """FAKE check of tokens: every token is ann's."""

    keys = None

    async def refresh(self) -> None:
        pass

    async def principal(self, token: str) -> Principal:
        return Principal(
            "ann", "a", frozenset({"inference"}), (Account("token:a/ann", Quota()),)
        )


async def test_a_token_has_the_limits_of_the_file_as_it_is_now(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text("[limits]\nadapters = 3\n")
    access = Access(IdentityFile(file), Issuer())

    async def limits() -> list[tuple[str, Quota]]:
        found = await access.admit("POST /v1/completions", Credentials("Bearer e.y.J"))
        return [(account.id, account.quota) for account in found.accounts]

    assert await limits() == [("token:a/ann", Quota(adapters=3))]
    file.write_text("[limits]\nadapters = 4\n[tenants.a.limits]\nadapters = 5\n")
    assert await limits() == [
        ("token:a/ann", Quota(adapters=4)),
        ("tenant:a", Quota(adapters=5)),
    ]
    file.write_text("")
    assert await limits() == []


def test_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(key_cli, [*arguments, "--keys-file", str(file)])

    limits = ("--limit", "requests-per-minute=60", "--limit", "adapter_bytes=2GiB")
    assert run("new", "--name", "app", *limits).exit_code == 0
    (key,) = json.loads(run("ls", "--json").stdout)
    assert key["limits"] == {"requests_per_minute": 60, "adapter_bytes": 2 << 30}
    assert "requests-per-minute=60" in run("ls").stdout
    (listed,) = list_keys(file)
    assert listed.principal.accounts[0].quota == Quota(
        requests_per_minute=60, adapter_bytes=2 << 30
    )
    before = file.read_text()
    for wrong in ("rpm=3", "adapters", "adapters=0", "adapters=1e30", "adapters=-3", "=4"):
        failed = run("new", "--limit", wrong)
        assert (failed.exit_code, failed.stdout) == (1, ""), wrong
        assert len(failed.stderr.splitlines()) == 1
    assert "did you mean" in run("new", "--limit", "token-per-minute=3").stderr
    assert file.read_text() == before


def test_a_file_with_a_hundred_thousand_keys_is_refused_by_its_size(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    add_key(
        file,
        name="app",
        tenant="a",
        roles=["inference"],
        expires=datetime.now(UTC),
        limits={"requests_per_minute": 60},
    )
    entry = file.read_text()
    file.write_text(entry * 100_000)
    with pytest.raises(InvalidField) as caught:
        IdentityFile(file)
    assert str(MAX_FILE) in caught.value.message
