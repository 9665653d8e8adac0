"""The gate over our code and the packages that it runs with. The database of vulnerabilities is
a FAKE."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests import audit

BAD = {"id": "GHSA-1", "aliases": ["CVE-1"], "fix_versions": ["2.0"], "description": "..."}


class Database:
    """FAKE answers of pip-audit: what is vulnerable, by name."""

    def __init__(self, bad: dict[str, Any]) -> None:
        self.bad = {"jinja2==2.4.1": [BAD], **bad}

    def __call__(self, packages: list[str]) -> list[dict[str, Any]]:
        found = []
        for package in packages:
            name, _, version = package.partition("==")
            vulns = self.bad.get(package, [])
            found.append({"name": name, "version": version, "vulns": vulns})
        return found


def unreachable(packages: list[str]) -> list[dict[str, Any]]:
    """As pip-audit answers without a network, and as where an index has no such pages."""
    return [{"name": package, "vulns": [], "skip_reason": "not found"} for package in packages]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    def run_with(ask: Any, *flags: str) -> int:
        monkeypatch.setattr(audit, "look_up", ask)
        monkeypatch.setattr(audit, "run_bandit", lambda paths: False)
        monkeypatch.setattr(audit, "installed", lambda: ["good==1.0", "bad==1.0"])
        monkeypatch.setattr(sys, "argv", ["audit", *flags])
        return audit.main()

    return run_with


def test_a_vulnerable_package_is_named(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Database({})) == 0
    assert capsys.readouterr().out == ""
    for flags, status in (((), 0), (("--strict",), 1)):
        assert run(Database({"bad==1.0": [BAD]}), *flags) == status
        assert "bad 1.0: GHSA-1, fixed in 2.0" in capsys.readouterr().out


def test_one_that_does_not_concern_us_may_be_listed(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for id_ in ("GHSA-1", "CVE-1"):
        monkeypatch.setattr(audit, "ignored", lambda id_=id_: {id_: "why"})
        assert run(Database({"bad==1.0": [BAD]}), "--strict") == 0


@pytest.mark.parametrize("ask", [unreachable, lambda packages: []])
def test_without_a_database_it_says_that_nothing_was_audited(
    run: Any, capsys: pytest.CaptureFixture[str], ask: Any
) -> None:
    assert run(ask) == 0
    assert "NOTHING WAS AUDITED" in capsys.readouterr().out
    assert run(ask, "--strict") == 1


def test_bandit_finds_what_is_planted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "planted.py"
    file.write_text("import subprocess\n\nsubprocess.run('ls ' + input(), shell=True)\n")
    assert audit.run_bandit([file])
    assert "B602" in capsys.readouterr().out
    file.write_text("assert True\n")
    assert not audit.run_bandit([file])
    assert capsys.readouterr().out == ""


def test_all_that_users_install_is_looked_at() -> None:
    names = {path.name for path in audit.shipped()}
    assert {"veneer_server", "veneer_client", "veneer_registry", "hatch_build.py"} <= names
    assert all(path.exists() for path in audit.shipped())
    assert any(package.startswith("grpcio==") for package in audit.installed())
    assert not any("veneer" in package for package in audit.installed())
