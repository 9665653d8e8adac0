"""docs/limits.md names every bound, with the value that the code has."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import veneer_registry
import veneer_server
from veneer_registry import errors
from veneer_server.config import OPTIONS, load_config
from veneer_server.rpc.transport import channel

PAGE = Path(__file__).parents[2] / "docs" / "limits.md"
ROW = re.compile(
    r"\| (?P<what>[^|]+) \| (?P<default>[^|]+) \| (?P<by>[^|]+) \| (?P<gets>[^|]*)\|"
)
VALUE = re.compile(r"(?P<number>[\d.,]+) ?(?P<unit>KiB|MiB|GiB|s|hours)?")
REASON = re.compile(r"`([A-Z]+_[A-Z_]+)`")
PASSED_ON = {"constraint_bytes", "constraint_seconds"}
"""Bounds that are looked at under another name."""
UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "s": 1, "hours": 1, None: 1}
DOORS = ("rpc", "openai", "text", "constraints")
"""Packages in which a constant called MAX_... bounds a caller."""
ELSEWHERE = {
    # Ranges of a value, in the proto's comments, and sizes that follow from another bound.
    "MAX_BIAS",
    "MAX_SESSION_KEY",
    "MAX_ERROR",
    "MAX_ANSWER",
    # What a server says of itself.
    "MAX_LORA_RANK",
    "MAX_VALUE",
    # The defaults of flags.
    "MAX_BROKEN",
    "MAX_BROKEN_BYTES",
    "MAX_WATCHERS",
}


def rows() -> Iterator[tuple[str, str, str]]:
    for line in PAGE.read_text("utf-8").splitlines():
        match = ROW.fullmatch(line)
        if match and not match["what"].startswith(("what", "---")):
            yield match["what"], match["default"], match["by"].strip("`")


def constant(path: str) -> float:
    module, _, name = path.rpartition(".")
    return float(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize(("what", "default", "by"), rows(), ids=lambda value: str(value)[:40])
def test_the_page_has_the_value_of_the_code(what: str, default: str, by: str) -> None:
    if by.startswith("--"):
        (option,) = (option for option in OPTIONS if option.flag == by)
        real = getattr(load_config({}, {}), option.name)
        if isinstance(real, tuple):
            assert not real, "a list of names is empty by default"
            return
    elif re.fullmatch(r"[\w.]+\.[A-Z_]+", by):
        real = constant(by)
    else:
        assert by.startswith("the base"), f"{what}: no flag and no constant"
        return
    match = VALUE.fullmatch(default)
    assert match is not None, f"{what}: {default}"
    assert float(match["number"].replace(",", "")) * UNITS[match["unit"]] == real


def sources() -> Iterator[str]:
    for package in (veneer_server, veneer_registry):
        (folder,) = package.__path__
        for path in Path(folder).rglob("*.py"):
            if path.name not in ("record.py", "app.py", "errors.py"):
                yield path.read_text("utf-8")


def reasons() -> Iterator[tuple[str, str]]:
    """What bounds, and a reason that the page gives for it."""
    for line in PAGE.read_text("utf-8").splitlines():
        if match := ROW.fullmatch(line):
            for reason in REASON.findall(match["gets"]):
                yield match["by"].strip("`"), reason


@pytest.mark.parametrize(("by", "reason"), reasons())
def test_a_reason_is_raised_where_the_bound_is_looked_at(by: str, reason: str) -> None:
    (raised,) = (name for name in errors.__all__ if reason_of(name) == reason)
    name = by[2:].replace("-", "_") if by.startswith("--") else by.rpartition(".")[2]
    if by.startswith("the base") or name in PASSED_ON:
        return
    bound = re.compile(rf"\b{name}\b|{re.escape(by)}\b")
    error = re.compile(rf"\b{raised}\b")
    assert any(bound.search(source) and error.search(source) for source in sources())


def reason_of(name: str) -> str:
    return str(getattr(getattr(errors, name), "reason", ""))


def modules() -> Iterator[ModuleType]:
    for door in DOORS:
        package = importlib.import_module(f"{veneer_server.__name__}.{door}")
        yield package
        for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            if not found.name.endswith("process"):
                yield importlib.import_module(found.name)


def test_every_bound_of_the_doors_is_on_the_page() -> None:
    named = {by.rpartition(".")[2] for _, _, by in rows()}
    bounds = {name for module in modules() for name in vars(module) if name.startswith("MAX_")}
    assert bounds - named - ELSEWHERE == set()


def test_every_bound_of_grpcs_own_is_on_the_page() -> None:
    named = {by.rpartition(".")[2] for _, _, by in rows()}
    bounds = {name for name, value in vars(channel).items() if isinstance(value, int | float)}
    assert {name for name in bounds if not name.startswith("_")} <= named
