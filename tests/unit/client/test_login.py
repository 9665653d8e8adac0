"""Where a client finds its server, its key and what it trusts."""

from __future__ import annotations

from pathlib import Path

import pytest
import trustme
from typer.testing import CliRunner
from veneer_client.cli.main import cli
from veneer_client.login import Login, find_login, forget_profile, save_profile
from veneer_registry.errors import InvalidField

from tests.refused import refused


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in ("SERVER", "API_KEY", "CA", "CERT", "KEY", "PROFILE"):
        monkeypatch.delenv(f"VENEER_{name}", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path / "veneer" / "profiles.toml"


@pytest.fixture
def ca(tmp_path: Path) -> str:
    file = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(file)
    return str(file)


def bearer(login: Login) -> str:
    return dict(login.metadata).get("authorization", "")


def test_nothing_set_is_plain_text_without_a_key() -> None:
    login = find_login()
    assert (login.address, login.credentials, login.metadata) == ("127.0.0.1:50051", None, ())


@pytest.mark.parametrize(
    "address", ["https://gpu1:50051", "HTTPS://gpu1", "grpcs://gpu1:50051/"]
)
def test_the_address_says_that_there_is_tls(address: str) -> None:
    login = find_login(address)
    assert login.address == "gpu1:50051"
    assert login.credentials is not None


@pytest.mark.parametrize("address", ["http://gpu1:50051", "grpc://gpu1"])
def test_an_address_may_say_that_there_is_none(
    monkeypatch: pytest.MonkeyPatch, ca: str, address: str
) -> None:
    """As that of a server that this program starts, beside a VENEER_CA for another one."""
    monkeypatch.setenv("VENEER_CA", ca)
    assert find_login(address).credentials is None
    assert find_login("gpu1:50051").credentials is not None


def test_what_is_given_precedes_variables_and_they_precede_the_profile(
    monkeypatch: pytest.MonkeyPatch, ca: str
) -> None:
    save_profile("default", {"server": "https://one", "api_key": "vn_profile", "ca": ca})
    assert (find_login().address, bearer(find_login())) == ("one:50051", "Bearer vn_profile")
    assert find_login().credentials is not None
    monkeypatch.setenv("VENEER_API_KEY", "vn_variable")
    assert bearer(find_login()) == "Bearer vn_variable"
    assert bearer(find_login(api_key="vn_given")) == "Bearer vn_given"


def test_a_profiles_key_goes_to_its_own_server_only(monkeypatch: pytest.MonkeyPatch) -> None:
    save_profile("default", {"server": "https://one", "api_key": "vn_secret"})
    save_profile("team", {"server": "two:1", "api_key": "vn_two"})
    assert bearer(find_login("one:50051")) == "Bearer vn_secret"
    assert find_login("other:50051").metadata == ()
    monkeypatch.setenv("VENEER_SERVER", "other")
    assert find_login().metadata == ()
    monkeypatch.delenv("VENEER_SERVER")
    monkeypatch.setenv("VENEER_PROFILE", "team")
    assert (find_login().address, bearer(find_login())) == ("two:1", "Bearer vn_two")
    assert find_login("one:50051").metadata == ()


def test_an_operator_names_a_tenant(monkeypatch: pytest.MonkeyPatch) -> None:
    save_profile("default", {"server": "one", "api_key": "vn_x"})
    assert "veneer-tenant" not in dict(find_login().metadata)
    monkeypatch.setenv("VENEER_TENANT", "team-b")
    assert dict(find_login().metadata)["veneer-tenant"] == "team-b"
    assert dict(find_login(tenant="team-a").metadata)["veneer-tenant"] == "team-a"
    for wrong in ("Team", "..", "a/b", "a" * 64):
        with refused(InvalidField, field="tenant"):
            find_login(tenant=wrong)


def test_a_key_is_not_in_what_is_printed() -> None:
    assert "vn_secret" not in repr(find_login(api_key="vn_secret"))


@pytest.mark.parametrize("key", ["vn_\nx", "vn_\u00e9", "a\x00b"])
def test_a_key_with_odd_characters_is_refused(key: str) -> None:
    with refused(InvalidField, field="api_key"):
        find_login(api_key=key)


def test_files_that_cannot_be_used_are_named(tmp_path: Path, ca: str) -> None:
    with refused(InvalidField, field="ca"):
        find_login(ca=tmp_path / "missing.pem")
    (tmp_path / "not.pem").write_text("hello")
    with refused(InvalidField, field="ca"):
        find_login(ca=tmp_path / "not.pem")
    with refused(InvalidField, field="cert"):
        find_login(cert=ca)


def test_profiles_are_private_and_go_when_told(nothing_set: Path) -> None:
    save_profile("default", {"server": "one", "api_key": 'a"b\\c', "ca": ""})
    save_profile("other", {"server": "two"})
    assert nothing_set.stat().st_mode & 0o777 == 0o600
    assert bearer(find_login()) == 'Bearer a"b\\c'
    assert forget_profile("default")
    assert not forget_profile("default")
    assert find_login().metadata == ()
    assert "two" in nothing_set.read_text()


@pytest.mark.parametrize("text", ["not toml [", "profiles = 3", "[profiles.x]\nserver = 3"])
def test_a_broken_file_is_named(nothing_set: Path, text: str) -> None:
    nothing_set.parent.mkdir()
    nothing_set.write_text(text)
    with refused(InvalidField, field="profile"):
        find_login()


def test_a_profile_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENEER_PROFILE", "team")
    with refused(InvalidField, field="profile"):
        find_login()


def test_login_keeps_nothing_that_the_server_has_not_taken(nothing_set: Path) -> None:
    result = CliRunner().invoke(cli, ["login", "127.0.0.1:1"], input="vn_x_y\n")
    assert result.exit_code == 1
    assert not nothing_set.exists()
    assert CliRunner().invoke(cli, ["logout"]).exit_code == 1
