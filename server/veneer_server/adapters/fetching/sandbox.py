"""The sandbox of the fetching process: drops the rights that it does not need.

With Landlock (Linux 5.13), the process can write only to its staging folder, and read only
Python, the system's libraries and the named files: it cannot open the store, keys or logs,
whatever a source sends. If the kernel has no Landlock, the resource limits remain.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import struct
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

_CREATE: Final = 444
_ADD_RULE: Final = 445
_RESTRICT: Final = 446
_PR_SET_DUMPABLE: Final = 4
_PR_SET_NO_NEW_PRIVS: Final = 38

_RIGHTS: Final = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF, 5: 0xFFFF}
"""File system rights that Landlock handles, by the first Landlock version that has them."""
_READ: Final = 0x1 | 0x4 | 0x8
"""Execute, read files, read folders."""
_OF_FILES: Final = 0x1 | 0x2 | 0x4 | 0x4000 | 0x8000
_SCOPED: Final = (6, 0x3)
"""(Landlock version, scopes): from this version on, no abstract sockets and no signals outside
the sandbox."""

_SYSTEM: Final = ("/usr", "/lib", "/lib32", "/lib64", "/etc", "/dev", "/opt/lib")
_RESOLVER: Final = "/etc/resolv.conf"
_MEMORY: Final = 2 << 30


def limit(*, file_bytes: int, cpu_s: int) -> None:
    """Limit the process's resources: bytes of a file, CPU time, memory, open files."""
    for what, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_DATA, _MEMORY),
        (resource.RLIMIT_NOFILE, 128),
    ):
        hard = resource.getrlimit(what)[1]
        if hard != resource.RLIM_INFINITY:
            most = min(most, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(what, (most, most))


def confine(writable: Path, readable: Iterable[Path]) -> bool:
    """Confine this thread, and the threads that it starts, to one folder to write and some
    files and folders to read. Return whether the kernel does so.

    Args:
        readable: files and folders to read besides Python and the system's libraries; paths
            that do not exist are left out.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    version = libc.syscall(_CREATE, None, 0, 1)
    if version < 1:
        return False
    rights = max(rights for first, rights in _RIGHTS.items() if first <= version)
    scoped = _SCOPED[1] if version >= _SCOPED[0] else 0
    # Later versions have more attributes: file system, network, scopes.
    size = 8 if version < 4 else 16 if version < _SCOPED[0] else 24
    attributes = struct.pack("=QQQ", rights, 0, scoped)[:size]
    rules = libc.syscall(_CREATE, attributes, len(attributes), 0)
    if rules < 0:
        return False
    try:
        for path in {*_python(), *readable}:
            _allow(libc, rules, path, _READ & rights)
        _allow(libc, rules, writable, rights)
        return bool(libc.syscall(_RESTRICT, rules, 0) == 0)
    finally:
        os.close(rules)


def _python() -> Iterable[Path]:
    """Yield the paths that a program needs for imports, host name resolution and
    certificates."""
    yield from map(Path, _SYSTEM)
    yield from map(Path, (sys.prefix, sys.base_prefix, sys.exec_prefix))
    yield from (Path(entry) for entry in sys.path if entry)
    yield Path(os.path.realpath(_RESOLVER)).parent
    for variable in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        if found := os.environ.get(variable):
            yield Path(os.path.realpath(found))


def _allow(libc: ctypes.CDLL, rules: int, path: Path, rights: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not path.is_dir():
            rights &= _OF_FILES
        rule = struct.pack("=Qi", rights, descriptor)
        libc.syscall(_ADD_RULE, rules, 1, rule, 0)
    finally:
        os.close(descriptor)
