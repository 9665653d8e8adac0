"""The C interface: Python's declarations match the library."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from veneer_server.backends.native import library as interface
from veneer_server.backends.native.compiler import NativeUnavailable
from veneer_server.backends.native.library import Library, Linear, Model, Step
from veneer_server.backends.native.structs import Field, LoraMember, SampleRow, mismatch

SOURCE = Path(interface.__file__).with_name("cpp") / "library.cpp"


def exported() -> dict[str, int]:
    """The functions of library.cpp and how many arguments each takes."""
    text = SOURCE.read_text("utf-8")
    text = text[text.index('extern "C"') :]
    found = re.findall(r"^[\w ]+[\w*]+[ *]+(veneer_\w+)\(([^)]*)\) \{", text, re.MULTILINE)
    return {name: arguments.count(",") + 1 if arguments else 0 for name, arguments in found}


def test_each_function_is_declared_with_its_arguments() -> None:
    declared = {name: len(types) for name, (_, types) in interface.SIGNATURES.items()}
    assert exported() == declared


def test_an_argument_of_another_type_is_refused(library: Library) -> None:
    with pytest.raises(ctypes.ArgumentError):
        library.functions.veneer_packed_bytes(0, "32", 64)
    with pytest.raises(TypeError):
        library.functions.veneer_packed_bytes(0, 32)


def test_status_numbers_are_those_of_the_library() -> None:
    found = re.search(r"enum Status : int32_t \{([^}]*)\}", SOURCE.read_text("utf-8"))
    assert found is not None
    theirs = dict(re.findall(r"k(\w+) = (\d+)", found[1]))
    ours = {s.name.title().replace("_", ""): str(s.value) for s in interface.Status}
    assert theirs == ours


def table(library: Library) -> list[tuple[bytes | None, bytes | None, int, int]]:
    rows = library.functions.veneer_fields()
    found: list[tuple[bytes | None, bytes | None, int, int]] = []
    while rows[len(found)].struct:
        row = rows[len(found)]
        found.append((row.struct, row.name, row.offset, row.size))
    return found


def differs(rows: list[tuple[bytes | None, bytes | None, int, int]]) -> str | None:
    return mismatch((Field * (len(rows) + 1))(*rows))


def test_structs_lie_in_memory_as_the_library_s_do(library: Library) -> None:
    rows = table(library)
    assert differs(rows) is None
    assert len(rows) > 60


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            (b"SampleRow", b"top_k", 40, 8),
            "struct SampleRow: top_k of 8 bytes at 32 in Python, top_k of 8 bytes at 40 in the",
        ),
        ((b"Step", b"logits", 64, 4), "struct Step: logits of 8 bytes at 64 in Python, logits"),
        ((b"LoraMember", b"", 0, 32), "struct LoraMember: 24 bytes in Python, 32 bytes in the"),
        (
            (b"Model", b"experts", 200, 4),
            "struct Model: no field experts in Python, experts of 4 bytes at 200 in the",
        ),
        ((b"Expert", b"", 0, 8), "struct Expert: Python has none"),
    ],
)
def test_a_struct_that_differs_is_named(
    library: Library, changed: tuple[bytes, bytes, int, int], said: str
) -> None:
    rows = [row for row in table(library) if row[:2] != changed[:2]]
    found = differs([*rows, changed])
    assert found is not None
    assert found.startswith(said)


def test_a_field_or_a_struct_that_the_library_lacks_is_named(library: Library) -> None:
    rows = table(library)
    without = differs([row for row in rows if row[:2] != (b"SampleRow", b"min_p")])
    assert without == (
        "struct SampleRow: min_p of 4 bytes at 44 in Python, no field min_p in the library"
    )
    none = differs([row for row in rows if row[0] != b"Linear"])
    assert none == "struct Linear: 88 bytes in Python, no such struct in the library"


def test_a_library_with_another_struct_is_not_used(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's struct is another here, which is the same to the check."""
    fields: list[Any] = [*SampleRow._fields_, ("typical_p", ctypes.c_float)]
    other = type("SampleRow", (ctypes.Structure,), {"_fields_": fields})
    monkeypatch.setattr("veneer_server.backends.native.structs.STRUCTS", (Linear, other))
    file = Path(os.readlink(f"/proc/self/fd/{library.fd}"))
    # `NativeUnavailable` and MemoryError have words for the operator only: matched are the
    # struct, the function and the buffers that they name, here and below.
    with pytest.raises(NativeUnavailable, match="SampleRow"):
        Library(file)
    monkeypatch.setattr("veneer_server.backends.native.structs.STRUCTS", (LoraMember,))
    with pytest.raises(NativeUnavailable, match="struct Layer"):
        Library(file)


def test_a_function_that_is_missing_is_named(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {**interface.SIGNATURES, "veneer_rewind": (None, ())}
    monkeypatch.setattr(interface, "SIGNATURES", more)
    with pytest.raises(NativeUnavailable, match="veneer_rewind"):
        Library(Path(os.readlink(f"/proc/self/fd/{library.fd}")))


# ------------------------------------------------------------------------ what fails


def model() -> Model:
    return Model(hidden=64, intermediate=64, heads=1, kv_heads=1, dim=64, block_size=16)


@pytest.mark.skipif(
    "asan" in os.environ.get("LD_PRELOAD", ""), reason="ASan ends where new fails"
)
def test_a_step_without_memory_says_so_and_the_next_goes_on(library: Library) -> None:
    base = model()
    engine = library.create(base, 1)
    with pytest.raises(MemoryError, match="not enough memory for the buffers of a step"):
        library.step(engine, Step(logit_count=1 << 45))
    library.step(engine, Step())
    library.destroy(engine)


@pytest.mark.skipif(
    "asan" in os.environ.get("LD_PRELOAD", ""), reason="ASan ends where new fails"
)
@pytest.mark.parametrize("threads", [0, 1, 3])
def test_sampling_without_memory_says_so(library: Library, threads: int) -> None:
    """On the caller's thread (0) and on an engine's, whose threads go on."""
    base = model()
    engine = library.create(base, threads) if threads else None
    draws = (SampleRow * 5)(*[SampleRow(temperature=1, top_p=1)] * 5)
    with pytest.raises(
        MemoryError, match="not enough memory for the buffers of sampling tokens"
    ):
        library.sample(engine, draws, 1 << 45)
    logits = (ctypes.c_float * 16)(*range(16))
    library.sample(engine, (SampleRow * 1)(SampleRow(ctypes.addressof(logits), top_p=1)), 16)
    if engine:
        library.destroy(engine)


def test_an_engine_that_cannot_be_created_says_why(library: Library) -> None:
    said = "not enough memory for the buffers of a decoder on -1 threads"
    with pytest.raises(NativeUnavailable, match=said):
        library.create(model(), -1)


FAILURES = [status for status in interface.Status if status != interface.Status.OK]


def test_each_failure_has_a_sentence_of_its_own() -> None:
    assert set(interface.SENTENCES) == set(FAILURES)
    assert len(set(interface.SENTENCES.values())) == len(FAILURES)


@pytest.mark.parametrize("status", FAILURES)
def test_a_status_is_raised_as_its_sentence(status: interface.Status) -> None:
    interface.check(interface.Status.OK, "sampling")
    error = MemoryError if status == interface.Status.NO_MEMORY else RuntimeError
    with pytest.raises(error) as raised:
        interface.check(status, "sampling")
    assert str(raised.value) == interface.SENTENCES[status].format("sampling")


@pytest.mark.parametrize("status", FAILURES)
def test_a_status_of_create_is_raised_as_its_sentence(
    library: Library, monkeypatch: pytest.MonkeyPatch, status: interface.Status
) -> None:
    """FAKE: the function of the library is replaced by one that fails."""
    functions = SimpleNamespace(veneer_create=lambda *_: int(status))
    monkeypatch.setattr(library, "functions", functions)
    with pytest.raises(NativeUnavailable) as raised:
        library.create(model(), 2)
    assert str(raised.value) == interface.SENTENCES[status].format("a decoder on 2 threads")
