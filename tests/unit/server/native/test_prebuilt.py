"""The libraries in a wheel: when one is used, and what is never loaded.

They are compiled here as for a wheel, and put where a wheel has them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from veneer_server.backends.native import chosen, compiler
from veneer_server.backends.native.chosen import find_library
from veneer_server.backends.native.compiler import NativeUnavailable
from veneer_server.backends.native.forms import (
    AMX,
    AVX512,
    FORMS,
    HEX,
    compile_forms,
    forms_of,
    symbol_versions,
    too_new,
)
from veneer_server.backends.native.library import Library
from veneer_server.config import load_config
from veneer_server.operate.doctor import backends

from tests.backends_ran import native_possible
from tests.kernels_once import forms_built
from tests.unit.server.native.test_kept_library import broken, for_a_group

pytestmark = [
    pytest.mark.verify,
    pytest.mark.skipif(not native_possible(), reason="no AVX2 or no compiler"),
]

ROOT = os.geteuid() == 0
SOMEBODY = 54321
SOURCES = Path(compiler.__file__).with_name("cpp")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the libraries of a wheel, which tests copy."""
    return forms_built(tmp_path_factory)


@pytest.fixture
def prebuilt(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel's folder, on a machine without a compiler."""
    folder = tmp_path / "prebuilt"
    shutil.copytree(made, folder)
    monkeypatch.setattr(chosen, "PREBUILT", folder)
    monkeypatch.setenv("CXX", "/nowhere/c++")
    return folder


def best(folder: Path) -> Path:
    """Of this CPU's."""
    form = next(form for form in FORMS if form.needs <= compiler.cpu_flags())
    return next(file for file in folder.glob("*.so") if form_of(file) == form.name)


def form_of(file: Path) -> str:
    """The form's name, before two digests."""
    return file.name.rsplit("-", 2)[0]


def with_cpu(monkeypatch: pytest.MonkeyPatch, flags: frozenset[str]) -> None:
    """A FAKE CPU, which has these alone."""
    monkeypatch.setattr(chosen, "cpu_flags", lambda: flags)


def test_without_a_compiler_it_serves_and_says_why(prebuilt: Path, tmp_path: Path) -> None:
    found = find_library(tmp_path / "cache")
    assert found.file == best(prebuilt)
    assert "/nowhere/c++ cannot be run" in found.why_prebuilt
    assert found.file.name.startswith(f"{Library(found.file).instructions}-")


def test_a_compiler_goes_first(
    prebuilt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A FAKE one, which gives what is there."""
    sound = best(prebuilt)
    fake = tmp_path / "c++"
    fake.write_text(
        '#!/bin/sh\ncase " $* " in *" -### "*) exit 0;; esac\n'
        f'while [ $# -gt 0 ]; do [ "$1" = -o ] && out=$2; shift; done\ncp {sound} "$out"\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    found = find_library(tmp_path / "cache")
    assert found.why_prebuilt == ""
    assert found.file.is_relative_to(tmp_path / "cache")


def test_a_compiler_that_fails(
    prebuilt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "c++ --no-such-option")
    found = find_library(tmp_path / "cache")
    assert found.file == best(prebuilt)
    assert "no-such-option" in found.why_prebuilt


def test_no_folder_to_compile_in(
    prebuilt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are files here, which stops root too."""
    monkeypatch.setenv("CXX", "c++")
    (tmp_path / "cache").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "cache"))
    found = find_library(tmp_path / "cache")
    assert found.file == best(prebuilt)
    assert "no folder to compile" in found.why_prebuilt


def test_the_cpu_s_instructions_choose(
    prebuilt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AVX2 runs wherever these tests do."""
    assert find_library(tmp_path, "avx2").file.name.startswith("avx2-")
    # As Knights Landing has it: AVX512, and not what the kernels need of it.
    with_cpu(monkeypatch, AVX512.needs - {"avx512bw"})
    assert find_library(tmp_path).file.name.startswith("avx2-")
    for form in forms_of("x86_64"):
        if form.needs <= compiler.cpu_flags() and form is not AMX:
            with_cpu(monkeypatch, form.needs)
            assert form_of(find_library(tmp_path).file) == form.name


def test_a_compiler_that_knows_no_amx_leaves_that_form_out(tmp_path: Path) -> None:
    """As GCC 10. A FAKE one, which refuses the flag and else copies nothing."""
    fake = tmp_path / "c++"
    fake.write_text(
        '#!/bin/sh\ncase " $* " in *" -mamx-tile "*) exit 1;; esac\n'
        'while [ $# -gt 0 ]; do [ "$1" = -o ] && out=$2; shift; done\n'
        '[ -z "$out" ] || : > "$out"\n'
    )
    fake.chmod(0o755)
    (out := tmp_path / "out").mkdir()
    made = compile_forms([str(fake)], SOURCES, out)
    without_amx = ["avx512-bf16", "avx512-vnni", "avx512", "avx2-vnni", "avx2"]
    assert [form_of(file) for file in made] == without_amx


def test_they_load_wherever_the_wheel_s_tag_lets_pip_install_them(made: Path) -> None:
    """Of whatever age the compiler and the C library here are. `make wheel-check` has it
    judged by auditwheel, which reads files in another way."""
    for file in made.glob("*.so"):
        versions = symbol_versions(file)
        assert {"GLIBC_2.14", "GLIBCXX_3.4"} <= versions, file.name
        assert too_new(versions) == [], file.name


def test_symbols_that_the_tag_does_not_promise_are_noticed(tmp_path: Path) -> None:
    names = (
        "log",
        "GLIBC_2.29",
        "GLIBC_2.4",
        "GLIBCXX_3.4.24",
        "GLIBCXX_3.4.29",
        "CXXABI_1.3.15",
        "CXXABI_1.3.9",
        "GCC_3.0",
        "GCC_12.0.0",
        "NOT_GLIBC_2.99",
    )
    (tmp_path / "a.so").write_bytes(b"\0" + b"\0".join(map(str.encode, names)) + b"\0")
    versions = symbol_versions(tmp_path / "a.so")
    assert versions == set(names) - {"log", "NOT_GLIBC_2.99"}
    newer = ["CXXABI_1.3.15", "GCC_12.0.0", "GLIBCXX_3.4.29", "GLIBC_2.29"]
    assert too_new(versions) == newer


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def link(file: Path) -> None:
    moved = file.parents[1] / "moved"
    file.rename(moved)
    file.symlink_to(moved)


def of_other_sources(file: Path) -> None:
    name, _, digest = file.name.rsplit("-", 2)
    file.rename(file.with_name(f"{name}-{'0' * HEX}-{digest}"))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit is flipped": (flip, "it is damaged"),
    "cut": (lambda file: os.truncate(file, 1000), "it is damaged"),
    "all may write": (lambda file: file.chmod(0o646), "others can write to it"),
    "a group may write": (for_a_group, "others can write to it"),
    "another's": (lambda file: os.chown(file, SOMEBODY, -1), "belongs to user 54321"),
    "a link": (link, "symbolic links"),
    "a folder of all": (lambda file: file.parent.chmod(0o777), "others can write to it"),
    "removed": (lambda file: file.unlink(), "no prebuilt kernels for"),
    "no folder": (lambda file: shutil.rmtree(file.parent), "no prebuilt kernels for"),
    "of other sources": (of_other_sources, "no prebuilt kernels for"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_what_is_broken_or_may_be_anybodys_is_not_loaded(
    prebuilt: Path, tmp_path: Path, how: str
) -> None:
    """Both reasons are told: the compiler's, and the library's with what to do."""
    if how in ("another's", "a group may write") and not ROOT:
        pytest.skip("only root gives files away")
    do, said = BROKEN[how]
    do(best(prebuilt))
    # Words for the operator, which is what is tested: the doctor says the same.
    with pytest.raises(NativeUnavailable, match=said) as raised:
        find_library(tmp_path / "cache")
    assert "/nowhere/c++ cannot be run" in str(raised.value)
    if "no prebuilt" not in said:
        assert "install Veneer's wheel again" in str(raised.value)
    config = load_config({"cache_dir": str(tmp_path / "cache"), "device": "cpu"}, {})
    check = backends.native_check(config)
    assert check.status == "warning"
    assert said in check.found


def test_one_that_this_cpu_does_not_run(prebuilt: Path, tmp_path: Path) -> None:
    """Whatever its flags promise: a process of its own ends by it."""
    (broken_folder := tmp_path / "broken").mkdir()
    file = best(prebuilt)
    content = broken(broken_folder, '__asm__("ud2");').read_bytes()
    file.unlink()
    start = file.name.rpartition("-")[0]
    file = prebuilt / f"{start}-{hashlib.sha256(content).hexdigest()[:HEX]}.so"
    file.write_bytes(content)
    file.chmod(0o644)
    with pytest.raises(NativeUnavailable, match="prebuilt kernels crash with SIGILL"):
        find_library(tmp_path / "cache")


def test_the_doctor_says_which_serves(prebuilt: Path, tmp_path: Path) -> None:
    config = load_config({"cache_dir": str(tmp_path / "cache"), "device": "cpu"}, {})
    check = backends.native_check(config)
    assert check.status == "ok"
    assert check.found.startswith("prebuilt, and runs here")
    assert "/nowhere/c++ cannot be run" in check.found
