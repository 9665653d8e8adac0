"""Which library serves: one that is compiled here, else one that the wheel brought.

The prebuilt ones are made for some sets of instructions (`native.forms`). They are loaded under
the same rules as compiled ones: see `native.kept`.
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
    cpu_flags,
    try_out,
)
from veneer_server.backends.native.forms import FORMS, digest_sources

__all__ = ["Found", "find_library"]

PREBUILT: Final = Path(__file__).with_name("prebuilt")
"""A wheel for Linux x86-64 has it, a clone has not."""

_FIX: Final = "install Veneer's wheel again, as this user or root, with umask 022"


@dataclass(frozen=True, slots=True)
class Found:
    """A library that runs here.

    Attributes:
        why_prebuilt: why it is one that the wheel brought; empty where it was compiled here.
    """

    file: Path
    why_prebuilt: str = ""


def find_library(cache_dir: Path, instructions: str = "auto") -> Found:
    """The library that `build` gives, else a prebuilt one, tried in a process of its own.

    Args:
        cache_dir, instructions: as for `build`.

    Raises:
        NativeUnavailable: the CPU has not the instructions, or neither runs here.
    """
    flags = cpu_flags()
    try:
        return Found(build(cache_dir, instructions))
    except NativeUnavailable as reason:
        why = reason
    try:
        return Found(_prebuilt(flags, instructions), str(why))
    except NativeUnavailable as reason:
        raise NativeUnavailable(f"{why}; {reason}") from why


def _prebuilt(flags: frozenset[str], instructions: str) -> Path:
    """That for the most instructions that this CPU has and the operating system allows."""
    wanted = [form for form in FORMS if instructions in ("auto", form.name)]
    names = [form.name for form in wanted if form.needs <= flags]
    if not names:
        raise NativeUnavailable(f"this CPU does not have {instructions}")
    for name in names[:-1]:
        try:
            return _prebuilt_form(name)
        except NotPermitted:
            continue
    return _prebuilt_form(names[-1])


def _prebuilt_form(name: str) -> Path:
    # Of these very sources: with others, structs may differ from those of Python.
    sources = digest_sources(Path(__file__).with_name("cpp"))
    file = next(iter(sorted(PREBUILT.glob(f"{name}-{sources}-*.so"))), None)
    if file is None:
        raise NativeUnavailable(f"no prebuilt kernels for {name} are installed")
    try:
        kept.check_folder(PREBUILT)
    except (kept.Refused, OSError) as reason:
        raise NativeUnavailable(
            f"nothing is loaded from {PREBUILT}: {reason}; {_FIX}"
        ) from None
    try_out(file, fix=_FIX)
    return file
