"""The forms of the kernels, one for each instruction set, and how a wheel's are compiled.

A wheel contains them for machines without a compiler. This file imports only the standard
library and nothing of the package, since ``hatch_build.py`` loads it where Veneer is not
installed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

FLAGS: Final = (
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-fno-math-errno"),
    # Multiplications may be fused with additions, as in the reference; nothing else is
    # reordered, and NaN and infinity are kept: they reveal a broken adapter.
    "-ffp-contract=fast",
)


@dataclass(frozen=True)
class InstructionSet:
    """One instruction set.

    Attributes:
        name: as the library reports it.
        flags: the compiler's flags.
        needs: CPU features that the flags allow the compiler to use, as Linux names them.
        machine: the CPUs' architecture, as `platform.machine` returns it.
    """

    name: str
    flags: tuple[str, ...]
    needs: frozenset[str]
    machine: str = "x86_64"


AVX2: Final = InstructionSet(
    "avx2", ("-mavx2", "-mfma", "-mf16c"), frozenset({"avx2", "fma", "f16c"})
)
AVX2_VNNI: Final = InstructionSet(
    "avx2-vnni", (*AVX2.flags, "-mavxvnni"), AVX2.needs | {"avx_vnni"}
)
"""Intel's Alder Lake and N-series, AMD's Zen 5 in laptops."""
AVX512: Final = InstructionSet(
    "avx512",
    ("-march=x86-64-v4",),
    AVX2.needs
    | {"bmi1", "bmi2", "abm", "movbe"}
    | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
)
"""Intel's Skylake Xeons."""
AVX512_VNNI: Final = InstructionSet(
    "avx512-vnni", (*AVX512.flags, "-mavx512vnni"), AVX512.needs | {"avx512_vnni"}
)
"""Intel's Xeons from Cascade Lake to Ice Lake."""
AVX512_BF16: Final = InstructionSet(
    "avx512-bf16",
    (*AVX512_VNNI.flags, "-mavx512bf16"),
    AVX512_VNNI.needs | {"avx512_bf16"},
)
AMX: Final = InstructionSet(
    "amx-bf16",
    (*AVX512_BF16.flags, "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
    AVX512_BF16.needs | {"amx_tile", "amx_bf16", "amx_int8"},
)
NEON: Final = InstructionSet("neon", ("-march=armv8-a",), frozenset({"fp", "asimd"}), "aarch64")
"""Every 64-bit ARM CPU: Graviton 2, Raspberry Pi."""
NEON_BF16: Final = InstructionSet(
    "neon-bf16",
    ("-march=armv8.2-a+bf16",),
    NEON.needs | {"crc32", "atomics", "asimdrdm", "bf16"},
    "aarch64",
)
"""Graviton 3 and 4, Apple's M2 and later."""
FORMS: Final = (AMX, AVX512_BF16, AVX512_VNNI, AVX512, AVX2_VNNI, AVX2, NEON_BF16, NEON)
"""For each architecture the fastest form is first, and one that every compiler knows last."""

SOFTWARE_MATRIX: Final = InstructionSet(
    "software-matrix", (*AVX2.flags, "-DVENEER_SOFTWARE_MATRIX"), AVX2.needs
)
"""For tests: runs the kernels for matrix registers on any CPU with AVX2. Not in any wheel."""

PLATFORM: Final = "manylinux_2_28"
"""The wheel's platform, the same as PyTorch's: Debian 10, RHEL 8, Ubuntu 20.04 and later."""
SYMBOLS: Final[Mapping[str, tuple[int, ...]]] = {
    "GLIBC": (2, 28),
    "GLIBCXX": (3, 4, 24),
    "CXXABI": (1, 3, 11),
    "GCC": (7, 0, 0),
}
"""The newest symbol versions that `PLATFORM` has, according to ``auditwheel``."""
_VERSION: Final = re.compile(
    rb"\0(%s)_(\d+(?:\.\d+)*)(?=\0)" % "|".join(SYMBOLS).encode(), re.ASCII
)

HEX: Final = 32
"""Digits of a digest in a file's name."""


def digest_sources(folder: Path) -> str:
    """Return a digest of the names and contents of all files in ``folder`` and its
    subfolders."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        digest.update(name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:HEX]


def best_form(flags: frozenset[str]) -> InstructionSet | None:
    """Return the fastest form for a CPU with these features, or None if there is none."""
    return next((form for form in FORMS if form.needs <= flags), None)


def forms_of(machine: str) -> list[InstructionSet]:
    """Return the forms for an architecture, the fastest one first."""
    return [form for form in FORMS if form.machine == machine]


def target(command: Sequence[str]) -> str:
    """Return the architecture that a compiler compiles for; this machine's if it names none.

    Raises:
        OSError: the compiler does not run.
    """
    asked = [*command, "-dumpmachine"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    return done.stdout.partition("-")[0].strip() or platform.machine()


def compile_forms(command: Sequence[str], sources: Path, out: Path) -> list[Path]:
    """Compile each form of the compiler's architecture into ``out``, as
    ``<form>-<sources>-<SHA-256>.so``. Forms whose flags the compiler does not know are skipped:
    GCC 10 does not know AMX, GCC 9 does not know ARM's BF16.

    The C++ runtime is linked dynamically, since torch needs it too. ``cpp/isa/symbols.h`` keeps
    to old symbols.

    Raises:
        OSError: the compiler does not run.
        subprocess.CalledProcessError: compiling fails; ``stderr`` has the compiler's messages.
    """
    key = digest_sources(sources)
    made = []
    for form in (forms := forms_of(target(command))):
        if form is not forms[-1] and not knows(command, form):
            continue
        draft = out / f"{form.name}.so"
        subprocess.run(
            [*command, *FLAGS, *form.flags, "-o", draft, sources / "library.cpp"],
            check=True,
            capture_output=True,
            text=True,
        )
        draft.chmod(0o644)  # whatever the umask: files that others can write to are refused
        digest = hashlib.sha256(draft.read_bytes()).hexdigest()[:HEX]
        made.append(draft.rename(out / f"{form.name}-{key}-{digest}.so"))
    return made


def knows(command: Sequence[str], form: InstructionSet) -> bool:
    """Return True if the compiler accepts a form's flags. Not needed for an architecture's last
    form: every compiler must know it, and if one does not, compiling fails and says why."""
    asked = [*command, *form.flags, "-E", "-x", "c++", os.devnull]
    return subprocess.run(asked, capture_output=True, check=False).returncode == 0


def symbol_versions(file: Path) -> frozenset[str]:
    """Return the symbol versions of system libraries that a library refers to, such as
    ``GLIBC_2.14``. They are strings in its symbol table. With musl there are none."""
    found = _VERSION.findall(file.read_bytes())
    return frozenset(f"{kind.decode()}_{number.decode()}" for kind, number in found)


def too_new(versions: Iterable[str]) -> list[str]:
    """Return the symbol versions that `PLATFORM` lacks."""
    newer = []
    for version in sorted(versions):
        kind, _, number = version.rpartition("_")
        if tuple(map(int, number.split("."))) > SYMBOLS[kind]:
            newer.append(version)
    return newer
