"""``python -m tests.audit``: bandit over our code, pip-audit over the packages it runs with.

Bandit must find nothing. pip-audit asks a database of known vulnerabilities over the network,
and what it finds is printed: a new entry there is no fault of the change that is checked, so
only ``--strict`` (`make audit`) exits with 1 for it. If the database cannot be reached, this
says so in a line of its own and exits with 0; with ``--strict`` with 1. To find out whether it
can be reached, this asks about a release that is known to be vulnerable, since pip-audit itself
reports packages that it cannot look up as "no known vulnerabilities found".
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
KNOWN_BAD: Final = "jinja2==2.4.1"
"""A release with vulnerabilities that every database lists."""
_SHOWN: Final = "{relpath}:{line}: {test_id} {msg}"
_NOISE: Final = "nosec encountered"
"""Bandit warns with this about a ``nosec`` mark if only one of several parts of its line has
the finding."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.audit", description=__doc__)
    parser.add_argument(
        "--strict",
        action="store_true",
        help="fail for vulnerabilities, and if nothing can be looked up",
    )
    strict = parser.parse_args().strict
    failed = run_bandit(shipped())
    found, audited = run_pip_audit(installed(), ignored())
    for line in found:
        print(line)
    if not audited:
        print(
            "pip-audit: SKIPPED, NOTHING WAS AUDITED: no database of vulnerabilities can be "
            "reached from here; run `make audit` where there is a network"
        )
    return int(failed or (strict and (bool(found) or not audited)))


def shipped() -> list[Path]:
    """Return the code that users install, and the script that builds it."""
    build = _project()["tool"]["hatch"]["build"]["targets"]["wheel"]
    return [*(ROOT / each for each in build["packages"]), ROOT / "hatch_build.py"]


def ignored() -> dict[str, str]:
    """Return vulnerabilities that do not concern us, from pyproject.toml: id -> why."""
    found: dict[str, str] = _project()["tool"]["veneer-audit"]["ignore"]
    return found


def installed() -> list[str]:
    """Return ``NAME==VERSION`` of every package in this environment except our own."""
    found = set()
    for each in metadata.distributions():
        name = re.sub(r"[-_.]+", "-", each.metadata["Name"]).lower()
        if not name.startswith("veneer"):
            found.add(f"{name}=={each.version.partition('+')[0]}")
    return sorted(found)


def run_bandit(paths: list[Path]) -> bool:
    """Run bandit and print its findings; return whether there are any."""
    settings = ("-q", "-c", str(ROOT / "pyproject.toml"), "-f", "custom")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "bandit",
            *settings,
            "--msg-template",
            _SHOWN,
            *("-r", *map(str, paths)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    told = [line for line in done.stderr.splitlines() if _NOISE not in line and line]
    for line in (*done.stdout.splitlines(), *(told if done.returncode else ())):
        print(line)
    return done.returncode != 0


def run_pip_audit(packages: list[str], ignore: dict[str, str]) -> tuple[list[str], bool]:
    """Return the vulnerabilities, one line each, and whether they could be looked up."""
    if not any(each["vulns"] for each in look_up([KNOWN_BAD])):
        return [], False
    wrong = []
    for package in look_up(packages):
        named = f"{package['name']} {package.get('version', '')}"
        if "skip_reason" in package:
            print(f"pip-audit: {named.strip()} was not looked up: {package['skip_reason']}")
        for each in package.get("vulns", ()):
            if not {each["id"], *each.get("aliases", ())} & ignore.keys():
                fixed = ", ".join(each["fix_versions"]) or "no release"
                wrong.append(f"pip-audit: {named}: {each['id']}, fixed in {fixed}")
    return wrong, True


def look_up(packages: list[str]) -> list[dict[str, Any]]:
    """Return pip-audit's answer for each package; empty if it gave no answer."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "packages.txt"
        file.write_text("\n".join(packages))
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pip_audit",
                "-r",
                str(file),
                "--no-deps",
                *("--disable-pip", "--progress-spinner", "off", "--timeout", "5"),
                *("--format", "json"),
            ],
            capture_output=True,
            text=True,
            env={**os.environ, "PIP_AUDIT_CACHE_DIR": folder},
            check=False,
        )
    try:
        answers: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except ValueError:
        return []
    return [{"vulns": [], **each} for each in answers]


def _project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


if __name__ == "__main__":
    raise SystemExit(main())
