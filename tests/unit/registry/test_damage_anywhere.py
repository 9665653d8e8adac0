"""Any file of a data folder removed, emptied, halved, or with a flipped bit: nothing wrong is
served, no adapter's content is deleted, and if a start is refused, one command repairs it."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from veneer_registry import rebuild
from veneer_registry.errors import AdapterCorrupt, AdapterNotFound, VeneerError
from veneer_registry.records import AdapterRecord
from veneer_registry.registry import Registry
from veneer_registry.stored_adapter import verify_weights
from veneer_registry.weights import WEIGHTS_FILE

from tests.unit.registry.kit import BASE, push
from tests.unit.registry.test_missing_sides import end_without_closing

CASES = 60
"""``python -m pytest -k anywhere`` takes seconds; the scoreboard's 500 are run by hand."""


@pytest.fixture
def filled(data: Path, adapters: Callable[[int], Path]) -> Path:
    """A folder whose last owner was killed, so that some of it is in the log alone."""
    with Registry.open(data, BASE) as registry:
        old = push(registry, "chat", adapters(1)).record.ref
        push(registry, "chat", adapters(2), allow_replace=True)
        registry.set_alias("chat/prod", [(old.revision, 1)])
        push(registry, "code", adapters(3))
    end_without_closing(data, adapters(4))
    return data


def spoil(path: Path, how: str, draw: random.Random) -> None:
    content = path.read_bytes()
    if how == "removed":
        path.unlink()
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "halved":
        path.write_bytes(content[: len(content) // 2])
    elif content:
        flipped = bytearray(content)
        flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)


def weights(data: Path) -> set[bytes]:
    return {path.read_bytes() for path in (data / "store").rglob(WEIGHTS_FILE)}


def serve(data: Path, good: dict[str, AdapterRecord], seen: Counter[str]) -> str:
    """Start, ask for everything; the reason why it did not start, or nothing."""
    try:
        registry = Registry.open(data, BASE)
    except VeneerError as error:
        fixes = ("store recover", "mount")
        return error.reason if any(f in error.message.lower() for f in fixes) else f"? {error}"
    with registry:
        for spec, record in good.items():
            try:
                with registry.acquire(spec) as lease:
                    found = lease.record
                    folder = registry.weights_folder(found.ref)
                    verify_weights(folder, found.ref.weights_digest)
                assert (found.ref, found.manifest) == (record.ref, record.manifest), spec
                seen["served"] += 1
            except (AdapterCorrupt, AdapterNotFound) as error:
                seen[error.code] += 1
    return ""


def damage_anywhere(filled: Path, scratch: Path, cases: int, seed: int) -> Counter[str]:
    draw, seen = random.Random(seed), Counter[str]()
    shutil.copytree(filled, scratch / "good")
    with Registry.open(scratch / "good", BASE) as registry:
        specs = ("chat", "chat/prod", "code", "killed-0")
        good = {spec: registry.get(spec) for spec in specs}
    files = sorted(path.relative_to(filled) for path in filled.rglob("*") if path.is_file())
    stored = weights(filled)
    for number in range(cases):
        data = scratch / f"{number}"
        shutil.copytree(filled, data)
        file, how = draw.choice(files), draw.choice(["removed", "emptied", "halved", "flipped"])
        if number == 0:  # so that no seed goes without a start that is refused
            file, how = Path("catalog.sqlite"), "removed"
        case = f"case {number} of seed {seed}: {file} {how}"
        spoil(data / file, how, draw)
        kept = weights(data)
        refused = {serve(data, good, seen) for _ in range(2)}
        assert len(refused) == 1, f"{case}: another answer at the second start"
        assert not any(why.startswith("?") for why in refused), f"{case}: {refused}"
        assert weights(data) >= kept & stored, f"{case}: content was deleted"
        if refused != {""}:
            seen["refused to start"] += 1
            rebuild.recover(data)
            assert serve(data, good, seen) == "", case
        assert weights(data) >= kept & stored, f"{case}: content was deleted by recovery"
        shutil.rmtree(data)
    return seen


@pytest.mark.push
def test_damage_anywhere(filled: Path, tmp_path: Path) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    seen = damage_anywhere(filled, tmp_path / "cases", CASES, seed)
    print(dict(seen))
    assert seen["served"] > CASES
    assert seen["refused to start"]
