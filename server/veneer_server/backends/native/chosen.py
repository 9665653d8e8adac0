"""Chooses the kernel library: one compiled here, or else a prebuilt one from the wheel.

Prebuilt libraries exist for some instruction sets (`native.forms`). They must pass the same
checks as compiled ones before they are loaded: see `native.kept`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from veneer_server.backends.native import kept
from veneer_server.backends.native.compiler import (
    NativeUnavailable,
    NotPermitted,
    build,
    check_instructions,
    cpu_flags,
    try_out,
)
from veneer_server.backends.native.forms import FORMS, digest_sources

PREBUILT: Final = Path(__file__).with_name("prebuilt")
"""Exists in a wheel for Linux on x86-64 or ARM, but not in a clone."""

_FIX: Final = "install Veneer's wheel again, as this user or root, with umask 022"


@dataclass(frozen=True, slots=True)
class UsableLibrary:
    """A library that runs on this machine.

    Attributes:
        why_prebuilt: why a prebuilt library is used; empty if it was compiled here.
    """

    file: Path
    why_prebuilt: str = ""


def find_library(cache_dir: Path, instructions: str = "auto") -> UsableLibrary:
    """Return the library from `build`, or else a prebuilt one. Either is tried in a separate
    process first.

    Args:
        cache_dir, instructions: as for `build`.

    Raises:
        NativeUnavailable: the CPU lacks the instructions, or neither library runs here.
    """
    flags = cpu_flags()
    check_instructions(flags, instructions)
    try:
        return UsableLibrary(build(cache_dir, instructions))
    except NativeUnavailable as reason:
        why = reason
    try:
        return UsableLibrary(_prebuilt(flags, instructions), str(why))
    except NativeUnavailable as reason:
        raise NativeUnavailable(f"{why}; {reason}") from why


def _prebuilt(flags: frozenset[str], instructions: str) -> Path:
    """Return the prebuilt library for the best instruction set that this CPU has and the
    operating system allows."""
    wanted = [form for form in FORMS if instructions in ("auto", form.name)]
    names = [form.name for form in wanted if form.needs <= flags]
    if not names:
        raise NativeUnavailable(f"this CPU does not support {instructions}")
    for name in names[:-1]:
        try:
            return _prebuilt_form(name)
        except NotPermitted:
            continue
    return _prebuilt_form(names[-1])


def _prebuilt_form(name: str) -> Path:
    # It must be built from exactly these sources: otherwise structs may differ from Python's.
    sources = digest_sources(Path(__file__).with_name("cpp"))
    file = next(iter(sorted(PREBUILT.glob(f"{name}-{sources}-*.so"))), None)
    if file is None:
        raise NativeUnavailable(f"no prebuilt kernels for {name} are installed")
    try:
        kept.check_folder(PREBUILT)
    except (kept.FileRefused, OSError) as reason:
        raise NativeUnavailable(
            f"prebuilt kernels in {PREBUILT} not loaded: {reason}; {_FIX}"
        ) from None
    try_out(file, fix=_FIX)
    return file
