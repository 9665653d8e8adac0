"""One noun for one thing: class names, compared with the glossary of ARCHITECTURE.md."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.places import REPOSITORY

PACKAGES = ("adapters_registry", "clients", "loadtest", "server", "training")
MIRRORS = "the client's record of what a server says of itself, field by field"
TWICE = {
    "Budgets": MIRRORS,
    "Capacity": MIRRORS,
    "Limit": MIRRORS,
    "MemoryPool": MIRRORS,
    "Provenance": MIRRORS,
    "RequestDefaults": MIRRORS,
    "SelfTest": MIRRORS,
    "Shortfall": MIRRORS,
    "Generation": "an answer: as the server makes it, and as the client gets it",
    "Sample": "one of its answers, at both ends",
    "Tool": "what a model may call, at both ends",
    "Upload": "of an adapter, at both ends",
    "Registry": "of adapters, and the Ray deployment that runs one",
    "Segment": "rows of a step with one adapter: in Python, and as the kernels have them",
}
"""Why a name may stand for two classes."""
NOUNS = {
    "Follow": ("follower/", "replication/", "roles", "replication_s", "simulation/registry"),
    "Place": ("engine_client/", "serving/uploads", "rpc/transport/"),
    "Transfer": ("serving/registering",),
    "Location": ("veneer_registry/opening", "veneer_registry/shared/", "serving/tenants"),
}
"""The beginning of a class name's word, and where that thing is."""


def classes() -> Iterator[tuple[str, str]]:
    """Name and file of every class outside tests and generated code."""
    for package in PACKAGES:
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            if "_pb2" in path.name:
                continue
            for node in ast.parse(path.read_text("utf-8")).body:
                if isinstance(node, ast.ClassDef):
                    yield node.name, str(path.relative_to(REPOSITORY))


def test_a_class_name_means_one_thing() -> None:
    files = defaultdict(list)
    for name, file in classes():
        if not name.startswith("_"):
            files[name].append(file)
    twice = {name: found for name, found in files.items() if len(found) > 1}
    unexplained = {name: found for name, found in twice.items() if name not in TWICE}
    assert not unexplained, (
        "rename one, by the glossary of ARCHITECTURE.md, or say why in TWICE"
    )


@pytest.mark.parametrize("noun", NOUNS)
def test_a_noun_is_used_for_its_thing(noun: str) -> None:
    elsewhere = [
        f"{file}: {name}"
        for name, file in classes()
        if f"{noun}s" in name or name.lstrip("_").endswith(noun) or f"{noun}er" in name
        if not any(home in file for home in NOUNS[noun])
    ]
    assert not elsewhere, "see the glossary of ARCHITECTURE.md for the other thing's noun"


def test_the_glossary_has_these_nouns() -> None:
    page = Path(REPOSITORY / "ARCHITECTURE.md").read_text("utf-8").lower()
    for noun in NOUNS:
        assert f"**{noun.lower()}" in page, noun
