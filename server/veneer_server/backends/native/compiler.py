"""Compiles the C++ of this package for the machine it runs on, once.

Like PyTorch's inductor and Triton, it uses the system's compiler, the CPU's own instructions,
and a cache keyed by everything that changes the result. Without a compiler, a prebuilt
library is used (`native.chosen`).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Final

from veneer_registry.child_python import child_python

from veneer_server.backends.native import kept
from veneer_server.backends.native.forms import (
    AMX,
    AVX2,
    AVX2_VNNI,
    AVX512,
    AVX512_BF16,
    AVX512_VNNI,
    FLAGS,
    FORMS,
    HEX,
    SOFTWARE_MATRIX,
    best_form,
    digest_sources,
    forms_of,
    knows,
)
from veneer_server.progress import stage

log = logging.getLogger(__name__)

COMPILE_SECONDS: Final = 900.0
"""Compiling takes 20 s on an idle core, and many times that on a slow or busy one."""

_ASK_SECONDS: Final = 60.0
_LEAST_FREE: Final = 16 << 20
NOT_PERMITTED: Final = 3
"""Exit status of the trial if `veneer_permit` returns 0."""
CPUINFO: Final = Path("/proc/cpuinfo")
_TRIAL: Final = Path(__file__).with_name("trial.py")


_FLAGS: Final = {
    "auto": ("-march=native",),
    AMX.name: ("-march=native",),
    AVX512_BF16.name: ("-march=native", "-DVENEER_NO_MATRIX"),
    # Not native: that would bring back what a form does without.
    **{f.name: f.flags for f in (AVX512_VNNI, AVX512, AVX2_VNNI, AVX2, SOFTWARE_MATRIX)},
}
"""The compiler's flags on x86-64, by requested form. On ARM the flags of the `InstructionSet`
are used, with which it is tested."""


class NativeUnavailable(Exception):
    """The native backend cannot serve here; the message tells an operator why."""


class NotPermitted(NativeUnavailable):
    """The operating system does not let this process use the matrix registers."""


def build(cache_dir: Path, instructions: str = "auto") -> Path:
    """Return the shared library, which is compiled if need be, and tried in a separate process.

    Args:
        cache_dir: the library is kept in its subfolder ``native``, or elsewhere if that folder
            cannot be written or trusted; see `kept.places`.
        instructions: the name of a form; ``auto`` selects the best one that the CPU has and
            the operating system allows.

    Raises:
        NativeUnavailable: there is no compiler, the CPU lacks the instructions, or the library
            does not run here.
    """
    try:
        return _build(cache_dir, instructions)
    except NotPermitted as reason:
        if instructions != "auto":
            raise
        log.info("building the kernels without matrix registers: %s", reason)
        return _build(cache_dir, AVX512_BF16.name)


def _build(cache_dir: Path, instructions: str) -> Path:
    flags = cpu_flags()
    check_instructions(flags, instructions)
    compiler = _compiler()
    command = [*compiler, *FLAGS, *_form_flags(compiler, flags, instructions)]
    sources = resources.files("veneer_server.backends.native") / "cpp"
    with resources.as_file(sources) as folder:
        key = _key(folder, command, flags)
        # Absolute, since the compiler runs in another folder.
        places = kept.places(cache_dir.absolute())
        found = next((file for place in places if (file := kept.find(place, key))), None)
        if (file := found) is None:
            with stage("compiling the kernels"):
                file = _compile(command, folder / "library.cpp", places, key)
    try_out(file)
    return file


def cpu_flags() -> frozenset[str]:
    """Return the names of the CPU's instruction sets, as Linux reports them.

    Raises:
        NativeUnavailable: there are no kernels for this CPU.
    """
    try:
        lines = CPUINFO.read_text("utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    # "Features" on ARM.
    found = (line.split()[2:] for line in lines if line.startswith(("flags", "Features")))
    flags = frozenset(flag for line in found for flag in line)
    if best_form(flags) is not None:
        return flags
    raise NativeUnavailable(
        "the CPU supports neither AVX512 nor AVX2 with FMA"
        if platform.machine() in ("x86_64", "AMD64")
        else f"there are no kernels for {platform.machine()} CPUs"
    )


def check_instructions(flags: frozenset[str], instructions: str) -> None:
    """Raise NativeUnavailable if a CPU with these flags cannot run a form."""
    best = best_form(flags)
    known = (*FORMS, SOFTWARE_MATRIX)
    wanted = next((form for form in known if form.name == instructions), None)
    if best is not None and wanted is not None and not wanted.needs <= flags:
        raise NativeUnavailable(
            f"this CPU supports at most {best.name}, not --native-instructions {instructions}"
        )


def _form_flags(
    compiler: list[str], flags: frozenset[str], instructions: str
) -> tuple[str, ...]:
    """Return the compiler's flags for a form that this CPU runs; "auto" means the best one."""
    best = best_form(flags)
    if best is None or best.machine == AVX2.machine:
        return _FLAGS[instructions]
    runs = [form for form in forms_of(best.machine) if form.needs <= flags]
    if instructions != "auto":
        return next(form.flags for form in runs if form.name == instructions)
    try:
        return next((form.flags for form in runs[:-1] if knows(compiler, form)), runs[-1].flags)
    except OSError as error:
        raise NativeUnavailable(f"the compiler {compiler[0]} does not run: {error}") from error


def _compiler() -> list[str]:
    """Return the command in CXX, as words, or the system's compiler. The first word is an
    absolute path."""
    words = shlex.split(os.environ.get("CXX", ""))
    # Skips empty and relative entries of PATH, which depend on the current folder.
    folders = [f for f in os.get_exec_path() if os.path.isabs(f)]
    for name in words[:1] or ("c++", "g++", "clang++"):
        if path := shutil.which(name, path=os.pathsep.join(folders)):
            return [os.path.abspath(path), *words[1:]]
    if words:
        raise NativeUnavailable(f"the compiler {words[0]} cannot be run: no such program")
    raise NativeUnavailable(
        "there is no C++ compiler: install one (Debian: apt install g++), or name it in CXX"
    )


def _key(folder: Path, command: list[str], flags: frozenset[str]) -> str:
    """Return the cache key: a digest of the sources, the command, the compiler that the command
    runs, and the CPU's instructions."""
    digest = hashlib.sha256(digest_sources(folder).encode())
    digest.update("\0".join(command[1:]).encode() + b"\0" + _identity(command))
    digest.update(" ".join(sorted(flags)).encode())
    return digest.hexdigest()[:HEX]


def _identity(command: list[str]) -> bytes:
    """Describe the programs that the command would run, and their files.

    The command itself may be a wrapper (ccache, distcc), whose version says nothing. With
    ``-###`` GCC and Clang print version, target and the command of the compiler proper, with
    ``-march=native`` spelt out, and run nothing.
    """
    asked = [*command, "-###", "-S", "-x", "c++", os.devnull, "-o", os.devnull]
    try:
        # In a fixed folder, because Clang prints the current one.
        done = subprocess.run(asked, cwd="/", capture_output=True, timeout=_ASK_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        raise NativeUnavailable(f"the compiler {command[0]} does not run: {error}") from error
    lines = (done.stdout + done.stderr).decode(errors="replace").splitlines()
    if done.returncode:
        told = next((line for line in lines if "error" in line), f"status {done.returncode}")
        raise NativeUnavailable(f"{command[0]} failed: {told}")
    programs = {line.split()[0].strip('"') for line in lines if line.startswith((" /", ' "/'))}
    facts = []
    for program in sorted(programs or {command[0]}):
        with contextlib.suppress(OSError):
            path = Path(program).resolve()
            status = path.stat()
            facts.append(f"{path} {status.st_size} {status.st_mtime_ns}")
    return "\n".join((*lines, *facts)).encode()


def _compile(command: list[str], source: Path, places: Iterable[Path], key: str) -> Path:
    """Compile the library and move it to its place in one rename, since several servers may
    start at the same time."""
    why: Exception | None = None
    for place in places:
        try:
            with kept.scratch(place) as folder:
                draft = folder / "library.so"
                _run([*command, "-o", str(draft), str(source)], folder)
                made = kept.keep(place, key, draft)
        except (OSError, kept.FileRefused) as error:
            why = error
            log.warning("compiled kernels cannot be saved in %s: %s", place, error)
            continue
        log.info("compiled the kernels: %s", made)
        return made
    raise NativeUnavailable(f"no folder to compile the kernels in: {why}") from why


def _run(command: list[str], folder: Path) -> None:
    """Run the compiler in ``folder``, which has no files that it could read by accident.

    Raises:
        NativeUnavailable: it failed, or took too long.
        OSError: the disk is full.
    """
    with (folder / "errors").open("w+b") as told:
        # A process group, so that the compiler proper, the command's child, is killed too.
        compiler = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=told,
            stderr=told,
            start_new_session=True,
        )
        try:
            status = compiler.wait(COMPILE_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise NativeUnavailable(
                f"{command[0]} did not compile the kernels within {COMPILE_SECONDS:g} s"
            ) from error
        finally:
            if compiler.poll() is None:
                os.killpg(compiler.pid, signal.SIGKILL)
                compiler.wait()
        if status == 0:
            return
        if shutil.disk_usage(folder).free < _LEAST_FREE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        told.seek(0)
        lines = told.read().decode(errors="replace").strip().splitlines()
        raise NativeUnavailable(f"{command[0]} failed: {lines[0] if lines else status}")


def try_out(file: Path, fix: str = "") -> str:
    """Load the library in a separate process and run small GEMMs, so that an unsupported
    instruction or a crash in the library only ends that process. Takes 40 ms.

    Args:
        fix: what the user should do if it does not run; empty advises to recompile it.

    Returns:
        The name of the instruction set that it uses.

    Raises:
        NotPermitted: the operating system denies the matrix registers to this process.
        NativeUnavailable: it does not run here, or others could have written it.
    """
    made = "prebuilt" if fix else "compiled"
    fix = fix or f"remove {file} to recompile it, or use --backend torch"
    try:
        fd = kept.open_checked(file)
    except (kept.FileRefused, OSError) as reason:
        raise NativeUnavailable(
            f"the {made} kernels {file} are not loaded: {reason}; {fix}"
        ) from None
    try:
        done = subprocess.run(
            child_python("-I", "-S", str(_TRIAL), str(fd)),
            pass_fds=[fd],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=_ASK_SECONDS,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise NativeUnavailable(f"the {made} kernels could not be tried: {error}") from error
    finally:
        os.close(fd)
    if done.returncode == NOT_PERMITTED:
        raise NotPermitted("the operating system denies matrix registers to this process")
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise NativeUnavailable(f"the {made} kernels crash with {name}; {fix}")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise NativeUnavailable(f"the {made} kernels do not run here: {last}; {fix}")
    return done.stdout.strip()
