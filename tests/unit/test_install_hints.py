"""What pages, errors and Dockerfiles say to install can be installed today: nothing of ours is
on a package index, so it is a folder of the checkout or a wheel as `make wheel` names it."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.utils import canonicalize_name
from veneer_registry import extras
from veneer_registry.extras import install_extra
from veneer_server.backends.native.forms import PLATFORM

from tests.places import REPOSITORY

OURS = {"veneer"}
INSTALL = re.compile(r"\b(?:pip3?|uv) install +([^\n`;|&]+)|(\bveneer\[[\w, -]+\])")
WORD = re.compile(r"'[^'\n]*'|\"[^\"\n]*\"|[^\s'\"]+")
NAMED = re.compile(r"(?P<what>.*?)(?:\[(?P<extras>[\w, -]+)\])?")
READ = (
    "*.md",
    "*.py",
    "*.toml",
    "*.yaml",
    "*.yml",
    "*Dockerfile*",
    "Makefile",
    "*.txt",
    "*.sh",
)


def texts() -> Iterator[tuple[str, str]]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *READ],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        # Tests expect hints; extras name each other.
        if not name.startswith("tests/unit/") and name != "pyproject.toml":
            yield name, (REPOSITORY / name).read_text("utf-8")


def project(folder: Path) -> dict[str, object]:
    return dict(tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["project"])


def wheels() -> list[str]:
    """The names that `make wheel` and `make wheel-arm` give."""
    version = project(REPOSITORY)["version"]
    return [f"veneer-{version}-py3-none-{PLATFORM}_{cpu}.whl" for cpu in ("x86_64", "aarch64")]


def wrong(text: str) -> list[str]:
    """What a text says to install that cannot be."""
    found = []
    for arguments, bare in INSTALL.findall(text):
        command = re.split(r" in Veneer\b| #", arguments)[0]
        words = [bare] if bare else [word.strip("'\"") for word in WORD.findall(command)]
        for word in words:
            match = NAMED.fullmatch(word.rstrip(".,:)"))
            assert match is not None
            what, asked = match["what"], match["extras"]
            if canonicalize_name(re.split(r"[=<>~!]", what)[0]) in OURS:
                found.append(f"{word}: on no package index")
                continue
            folder = REPOSITORY
            if what.endswith(".whl"):
                if not any(fnmatch(name, Path(what).name) for name in wheels()):
                    found.append(f"{word}: the wheels are {wheels()}")
            elif re.fullmatch(r"\.(/[\w/-]+)?", what):
                folder = REPOSITORY / what
                if not (folder / "pyproject.toml").exists():
                    found.append(f"{word}: no such project")
                    continue
            else:
                continue  # somebody else's
            known = project(folder).get("optional-dependencies", {})
            assert isinstance(known, dict)
            unknown = {each.strip() for each in (asked or "").split(",")} - {"", *known}
            found += [f"{word}: no extra {each}" for each in sorted(unknown)]
    return found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pip install 'veneer[server]'", "veneer[server]: on no package index"),
        ("RUN pip install --no-cache-dir veneer==0.1.0", "veneer==0.1.0: on no package index"),
        ("install\nveneer[remote] there", "veneer[remote]: on no package index"),
        ("`pip install ./clients`", "./clients: no such project"),
        ("pip install '.[serve]'", ".[serve]: no extra serve"),
        (
            "pip install 'dist/veneer-0.1.0-py3-none-linux_x86_64.whl[server]'",
            "veneer-0.1.0-py3-none-linux_x86_64.whl[server]: the wheels are",
        ),
    ],
)
def test_hints_that_nobody_can_follow_are_found(text: str, said: str) -> None:
    (line,) = wrong(text)
    assert said in line


def test_every_hint_can_be_followed() -> None:
    told = list(texts())
    assert sum(len(INSTALL.findall(text)) for _, text in told) > 20
    assert {name: lines for name, text in told if (lines := wrong(text))} == {}


@pytest.mark.parametrize("editable", [False, True])
def test_the_command_names_what_was_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, editable: bool
) -> None:
    """The metadata are pip's own form (PEP 610); only where they lie is FAKE."""
    place = tmp_path / "a folder"
    place.mkdir()
    told = {"url": place.as_uri(), "dir_info": {"editable": editable}}
    found = SimpleNamespace(read_text=lambda name: json.dumps(told))
    monkeypatch.setattr(extras.metadata, "distribution", lambda name: found)
    assert install_extra("server") == f"pip install {'-e ' * editable}'{place}[server]'"
    place.rmdir()  # as in an image, whose wheel was built from a folder that it lacks
    assert install_extra("server").startswith("pip install '.[server]' in Veneer's folder")


@pytest.mark.parametrize(
    "told", [None, "{}", "[]", "no JSON", '{"url": "https://x.org/v.whl"}']
)
def test_without_an_origin_on_this_machine_it_names_both_ways(
    monkeypatch: pytest.MonkeyPatch, told: str | None
) -> None:
    found = SimpleNamespace(read_text=lambda name: told)
    monkeypatch.setattr(extras.metadata, "distribution", lambda name: found)
    both = "pip install '.[train]' in Veneer's folder, or 'WHEEL[train]' with its wheel"
    assert install_extra("train") == both
