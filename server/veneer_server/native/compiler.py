"""Compiles the C++ of this package for the machine it runs on, once.

As PyTorch's inductor and Triton do: the system's compiler, the CPU's own instructions, a
cache keyed by everything that changes the result. A wheel would have to be built for the
least of all CPUs.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from importlib import resources
from pathlib import Path
from typing import Final

__all__ = ["NativeUnavailable", "build"]

FLAGS: Final = (
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-fno-math-errno"),
    # Products may be fused with sums, as the reference's are; nothing else is reordered, and
    # NaN and infinity stay what they are: they tell that an adapter is broken.
    "-ffp-contract=fast",
)
_NEEDED: Final = (
    frozenset({"avx512_bf16", "avx512bw", "avx512vl"}),
    frozenset({"avx2", "fma"}),
)


class NativeUnavailable(Exception):
    """Why the native backend cannot serve here, in words for an operator."""


def build(cache_dir: Path, *, instructions: str = "") -> Path:
    """The shared library, compiled if it is not there yet.

    Args:
        cache_dir: it is kept in ``native`` there.
        instructions: ``avx2`` does without AVX512; empty is the best the CPU has.

    Raises:
        NativeUnavailable: no compiler, or a CPU without the instructions.
    """
    flags = _cpu_flags()
    if not any(needed <= flags for needed in _NEEDED):
        raise NativeUnavailable(
            "the CPU has neither AVX512-BF16 nor AVX2 with FMA"
            if platform.machine() in ("x86_64", "AMD64")
            else f"there are no kernels for {platform.machine()} CPUs"
        )
    compiler = shlex.split(os.environ.get("CXX", "")) or [_found_compiler()]
    chosen = ["-march=native"] if not instructions else ["-mavx2", "-mfma", "-mf16c"]
    command = [*compiler, *FLAGS, *chosen]
    sources = resources.files("veneer_server.native") / "cpp"
    with resources.as_file(sources) as folder:
        target = cache_dir / "native" / f"{_key(folder, command, flags)}.so"
        if not target.is_file():
            _compile(command, folder / "library.cpp", target)
    return target


def _cpu_flags() -> frozenset[str]:
    """As Linux names them; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(
        flag for line in lines if line.startswith("flags") for flag in line.split()[2:]
    )


def _found_compiler() -> str:
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return path
    raise NativeUnavailable(
        "there is no C++ compiler: install one (Debian: apt install g++), or name it in CXX"
    )


def _key(folder: Path, command: list[str], flags: frozenset[str]) -> str:
    """Of the sources, the command, the compiler's version and the CPU's instructions."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    try:
        version = subprocess.run(
            [command[0], "--version"], capture_output=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise NativeUnavailable(f"the compiler {command[0]} does not run: {error}") from error
    digest.update("\0".join(command[1:]).encode() + b"\0" + version)
    digest.update(" ".join(sorted(flags)).encode())
    return digest.hexdigest()[:32]


def _compile(command: list[str], source: Path, target: Path) -> None:
    """It appears by one rename: two servers that start together do no harm."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as scratch:
            draft = Path(scratch) / "library.so"
            done = subprocess.run(
                [*command, "-o", str(draft), str(source)],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                told = done.stderr.strip().splitlines()
                raise NativeUnavailable(
                    f"{command[0]} failed: {told[0] if told else done.returncode}"
                )
            draft.replace(target)
    except OSError as error:
        raise NativeUnavailable(f"the kernels cannot be compiled: {error}") from error
