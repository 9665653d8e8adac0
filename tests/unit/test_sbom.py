"""The wheel's bill of materials."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.requirements import Requirement

from tests.places import REPOSITORY

pytestmark = pytest.mark.push

PROGRAM = REPOSITORY / "deploy" / "sbom.py"
NATIVE = REPOSITORY / "server/veneer_server/backends/native/cpp"


def write(folder: Path, content: bytes, seed: str) -> str:
    """The document beside a file that stands for a wheel."""
    folder.mkdir()
    wheel = folder / "veneer-0.1.0-py3-none-any.whl"
    wheel.write_bytes(content)
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    subprocess.run([sys.executable, PROGRAM, wheel], env=environment, check=True)
    return wheel.with_suffix(".cdx.json").read_text("utf-8")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("sbom") / "one", b"wheel", "1")


@pytest.fixture(scope="module")
def told(text: str) -> Any:
    return json.loads(text)


def test_it_is_valid(text: str) -> None:
    validator = JsonStrictValidator(SchemaVersion.V1_6)
    assert validator.validate_str(text) is None
    broken = text.replace('"type": "library"', '"type": "book"', 1)
    assert validator.validate_str(broken) is not None


def test_the_same_wheel_has_the_same_bytes(text: str, tmp_path: Path) -> None:
    assert write(tmp_path / "two", b"wheel", "2") == text
    assert str(tmp_path) not in text
    assert write(tmp_path / "three", b"another", "1") != text


def test_it_names_the_wheel_and_what_is_in_it(told: Any) -> None:
    veneer = told["metadata"]["component"]
    assert veneer["hashes"] == [
        {"alg": "SHA-256", "content": hashlib.sha256(b"wheel").hexdigest()}
    ]
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    folders = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    names = {each["name"] for each in veneer["components"]}
    assert names == {folder.rpartition("/")[2] for folder in folders}
    (native,) = [each for each in told["components"] if each["name"] == "veneer-native"]
    listed = {each["name"]: each["hashes"][0]["content"] for each in native["components"]}
    sources = [p for p in NATIVE.rglob("*") if p.suffix in (".cpp", ".h")]
    assert listed == {
        str(p.relative_to(NATIVE)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sources
    }


def test_it_names_each_package_that_a_user_gets(told: Any) -> None:
    found = {each["name"]: each for each in told["components"]}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    for extra, named in {
        "": project["dependencies"],
        **project["optional-dependencies"],
    }.items():
        # DeepSpeed and Ray are installed apart, if at all: see `deploy/sbom.py`.
        if extra in ("dev", "all", "deepspeed", "ray"):
            continue
        for wanted in map(Requirement, named):
            package = found[wanted.name.lower()]
            assert package["version"] == version(wanted.name)
            properties = {(each["name"], each["value"]) for each in package["properties"]}
            assert ("veneer:range", str(wanted.specifier)) in properties
            assert (package["scope"] == "required") >= (not extra)
    assert found["cryptography"]["scope"] == "optional", "of pyjwt[crypto]"
    assert found["markdown-it-py"]["scope"] == "required", "of rich"
    assert "pytest" not in found
    assert not [name for name, each in found.items() if not each.get("licenses")]
    edges = {each["ref"]: each.get("dependsOn", []) for each in told["dependencies"]}
    reached, todo = set(), ["veneer"]
    while todo:
        if (ref := todo.pop()) not in reached:
            reached.add(ref)
            todo += edges[ref]
    assert reached == {each["bom-ref"] for each in told["components"]} | {"veneer"}
