"""Conditions under which the suite must pass: instruction sets, threads, locales, users."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from veneer_server.backends.native.compiler import cpu_flags
from veneer_server.backends.native.forms import AVX2_VNNI, AVX512, AVX512_VNNI, InstructionSet

from tests.places import cache_dir

_BASES: Final = cache_dir() / "bases"


class Unavailable(Exception):
    """This machine cannot create the condition; the message says what to install."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """How to start the suite under a condition.

    Attributes:
        prefix: words before the command.
        environment: variables added to the caller's.
    """

    prefix: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


Prepare = Callable[[Path], Prepared]
"""Prepares a condition in an empty folder, which is removed afterwards."""


@dataclass(frozen=True, slots=True)
class Condition:
    """One row of the table."""

    name: str
    what: str
    prepare: Prepare


def joined(conditions: Sequence[Condition]) -> Condition:
    """Combine conditions into one; they must not affect the same things."""
    if len(conditions) == 1:
        return conditions[0]

    def prepare(scratch: Path) -> Prepared:
        each = [condition.prepare(scratch) for condition in conditions]
        prefix = tuple(word for prepared in each for word in prepared.prefix)
        environment: dict[str, str] = {}
        for prepared in each:
            assert environment.keys().isdisjoint(prepared.environment)
            environment |= prepared.environment
        return Prepared(prefix, environment)

    return Condition(
        "+".join(condition.name for condition in conditions),
        "; ".join(condition.what for condition in conditions),
        prepare,
    )


def _set(**environment: str) -> Prepare:
    return lambda _: Prepared(environment=environment)


def _umask(mask: str) -> Prepare:
    return lambda _: Prepared(prefix=("/bin/sh", "-c", f'umask {mask}; exec "$@"', "sh"))


def _locale(source: str, charmap: str) -> Prepare:
    """Compile a locale into the folder, which needs no root and does not change the system."""

    def prepare(scratch: Path) -> Prepared:
        if shutil.which("localedef") is None:
            raise Unavailable("there is no localedef (Debian: apt install libc-bin)")
        if not Path("/usr/share/i18n/locales", source).exists():
            raise Unavailable(f"there is no source of {source} (Debian: apt install locales)")
        name = f"{source}.{charmap}"
        command = ["localedef", "-i", source, "-f", charmap, str(scratch / name)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not (scratch / name).is_dir():
            raise Unavailable(f"localedef failed: {done.stderr.strip()}")
        # Otherwise Python would use UTF-8, whatever the locale.
        own = {"LC_ALL": name, "LANG": name, "LANGUAGE": "", "LOCPATH": str(scratch)}
        return Prepared(environment=own | {"PYTHONUTF8": "0"})

    return prepare


def _link(file: str, copy: str) -> None:
    try:
        os.link(file, copy)
    except OSError:  # another file system
        shutil.copy2(file, copy)


def _user(home_mode: int) -> Prepare:
    """Run as another user, with home, temporary files and caches in the folder."""

    def prepare(scratch: Path) -> Prepared:
        home, caches, temporary = (scratch / name for name in ("home", "cache", "tmp"))
        for folder in (home, caches, temporary):
            folder.mkdir()
        # As after an import of the base: without the engines' caches of it.
        shutil.copytree(_BASES, caches / "bases", copy_function=_link)
        environment = {
            "HOME": str(home),
            "TMPDIR": str(temporary),
            "VENEER_CACHE_DIR": str(caches),
            # Its default is in the checkout, which belongs to another user here.
            "HYPOTHESIS_STORAGE_DIRECTORY": str(temporary / "hypothesis"),
            "USER": "nobody",
            "LOGNAME": "nobody",
        }
        prefix: tuple[str, ...] = ()
        if os.geteuid() == 0:
            if shutil.which("setpriv") is None:
                raise Unavailable("there is no setpriv (Debian: apt install util-linux)")
            nobody = pwd.getpwnam("nobody")
            bases = caches / "bases"
            for folder in (home, caches, temporary, bases, *bases.rglob("*")):
                if not folder.is_file():
                    os.chown(folder, nobody.pw_uid, nobody.pw_gid)
            prefix = ("setpriv", f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}")
            prefix += ("--clear-groups", *_may_read(nobody.pw_uid))
        home.chmod(home_mode)
        return Prepared(prefix, environment)

    return prepare


def _may_read(user: int) -> tuple[str, ...]:
    """Return setpriv options that grant only read access, if Python is in root's home."""
    # setpriv itself still has root's access when it looks up Python, but children do not.
    again = "import subprocess, sys; subprocess.run([sys.executable, '-c', ''], check=True)"
    tried = subprocess.run(
        ["setpriv", f"--reuid={user}", "--clear-groups", sys.executable, "-c", again],
        capture_output=True,
        check=False,
    )
    if tried.returncode == 0:
        return ("--inh-caps=-all", "--bounding-set=-all")
    return ("--inh-caps=-all,+dac_read_search", "--ambient-caps=+dac_read_search")


def _instructions(form: InstructionSet) -> Prepare:
    """Choose the instruction set of the kernels, if the CPU has it."""

    def prepare(_: Path) -> Prepared:
        if not form.needs <= cpu_flags():
            raise Unavailable(f"this CPU has no {form.name}")
        return Prepared(environment={"VENEER_NATIVE_INSTRUCTIONS": form.name})

    return prepare


_OTHER_CPU: Final = {"VENEER_NATIVE_INSTRUCTIONS": "avx2", "ATEN_CPU_CAPABILITY": "avx2"}

CONDITIONS: Final = (
    Condition("plain", "as `make test` runs it", _set()),
    Condition(
        "avx2",
        "native kernels, torch and oneDNN with AVX2 at most",
        _set(**_OTHER_CPU, ONEDNN_MAX_CPU_ISA="AVX2", MKL_ENABLE_INSTRUCTIONS="AVX2"),
    ),
    *(
        Condition(
            form.name,
            f"native kernels with {form.name} at most",
            _instructions(form),
        )
        for form in (AVX512_VNNI, AVX512, AVX2_VNNI)
    ),
    Condition("torch", "torch serves", _set(VENEER_BACKEND="torch")),
    Condition(
        "torch-avx512",
        "torch serves, with AVX512 but without bfloat16 or matrix units",
        _set(
            VENEER_BACKEND="torch",
            ATEN_CPU_CAPABILITY="avx512",
            ONEDNN_MAX_CPU_ISA="AVX512_CORE",
        ),
    ),
    Condition(
        "torch-avx2",
        "torch serves, with AVX2 at most",
        _set(
            VENEER_BACKEND="torch",
            ATEN_CPU_CAPABILITY="avx2",
            ONEDNN_MAX_CPU_ISA="AVX2",
            MKL_ENABLE_INSTRUCTIONS="AVX2",
        ),
    ),
    Condition(
        "torch-oldest",
        "torch serves, without AVX",
        _set(
            VENEER_BACKEND="torch",
            ATEN_CPU_CAPABILITY="default",
            ONEDNN_MAX_CPU_ISA="SSE41",
            MKL_ENABLE_INSTRUCTIONS="SSE4_2",
        ),
    ),
    Condition("threads-1", "one thread", _set(VENEER_THREADS="1", OMP_NUM_THREADS="1")),
    Condition("threads-4", "four threads", _set(VENEER_THREADS="4", OMP_NUM_THREADS="4")),
    Condition("locale-turkish", "tr_TR.UTF-8", _locale("tr_TR", "UTF-8")),
    Condition("locale-latin1", "de_DE in ISO-8859-1", _locale("de_DE", "ISO-8859-1")),
    Condition("umask-000", "new files are everybody's", _umask("000")),
    Condition("umask-077", "new files are the user's alone", _umask("077")),
    Condition("user", "a user who is not root", _user(0o755)),
    Condition("read-only-home", "a user whose home cannot be written to", _user(0o555)),
)
