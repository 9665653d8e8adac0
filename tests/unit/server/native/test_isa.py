"""Only one folder of the C++ names instruction sets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from veneer_server.backends.native import forms

CPP = Path(forms.__file__).with_name("cpp")
NAMED = re.compile(
    r"\b_mm\d*_|\b__m(?:128|256|512|mask)|_MM_|\b__rdtsc|\b_?_?builtin_ia32"
    r"|\b(?:__)?asm(?:__)?\b|cpuid|\b__builtin_cpu_|\b__target|\btarget\("
    r"|\bv[a-z]\w*_[fsu]\d+\b|__ARM_|__aarch64__"
    r"|\w*intrin\.h|\barm_neon\.h|(?<![a-z])(?:avx|sse|amx|neon|sve|fma3|x86)(?![a-z])"
    r"|isa/(?!isa\.h)",
    re.IGNORECASE,
)


def named(text: str) -> list[str]:
    return [line for line in text.splitlines() if NAMED.search(line)]


def test_only_isa_names_an_instruction_set() -> None:
    files = [f for f in CPP.rglob("*") if f.is_file() and f.parent != CPP / "isa"]
    assert len(files) > 10
    assert {f.name: lines for f in files if (lines := named(f.read_text("utf-8")))} == {}


@pytest.mark.parametrize(
    "file", ["amx.h", "arm.h", "avx512.h", "avx2.h", "isa.h", "neon.h", "x86.h"]
)
def test_the_pattern_finds_those_that_do(file: str) -> None:
    assert named((CPP / "isa" / file).read_text("utf-8"))


@pytest.mark.parametrize(
    "line",
    [
        'asm volatile("pause");',
        "__cpuid(1, a, b, c, d);",
        '__builtin_cpu_supports("fma")',
        '__attribute__((target("fma")))',
        "#ifdef __AVX512BF16__",
        "#ifdef __ARM_FEATURE_BF16",
        "sums = vfmaq_f32(sums, a, b);",
    ],
)
def test_the_pattern_finds_other_ways_to_name_one(line: str) -> None:
    assert named(line)


@pytest.mark.parametrize("form", forms.FORMS, ids=lambda form: form.name)
def test_each_form_has_the_name_that_its_header_gives(form: forms.InstructionSet) -> None:
    headers = [f.read_text("utf-8") for f in (CPP / "isa").glob("*.h")]
    named = re.compile(rf'(?:kInstructions|kName)\[\] = "{form.name}"')
    assert sum(bool(named.search(text)) for text in headers) == 1


def test_a_file_in_a_folder_changes_the_digest(tmp_path: Path) -> None:
    (tmp_path / "isa").mkdir()
    file = tmp_path / "isa" / "a.h"
    file.write_text("1")
    first = forms.digest_sources(tmp_path)
    file.write_text("2")
    assert forms.digest_sources(tmp_path) != first
