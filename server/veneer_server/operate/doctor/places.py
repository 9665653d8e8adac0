"""Checks of folders and ports, and of a server that already uses them."""

from __future__ import annotations

import fcntl
import json
import os
import pwd
import shutil
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

from veneer_server.config import Address
from veneer_server.operate.doctor.check import Check
from veneer_server.system.machine import peak_bytes

_LEAST_FREE: Final = 1 << 30


def folder_checks(name: str, flag: str, folder: Path) -> Iterator[Check]:
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    fix = f"choose another {flag}"
    if not existing.is_dir():
        yield Check(name, "problem", f"{folder} cannot be created: {existing} is a file", fix)
        return
    if not os.access(existing, os.W_OK | os.X_OK):
        whose = _user(existing.stat().st_uid)
        yield Check(
            name, "problem", f"{folder} cannot be written: {existing} belongs to {whose}", fix
        )
        return
    free = shutil.disk_usage(existing).free
    found = f"{folder}: {free >> 20} MiB free"
    if _on_tmpfs(existing):
        yield Check(name, "warning", f"{found}, in memory (tmpfs): gone after a restart", fix)
    elif free < _LEAST_FREE:
        yield Check(name, "warning", found, f"free some disk, or {fix}")
    else:
        yield Check(name, "ok", found)


def only_slower(check: Check) -> Check:
    """Turn a problem of the cache folder into a warning: without it, each start only repeats
    work. If a base cannot be fetched for this reason, the base check says so."""
    if check.status != "problem":
        return check
    found = f"{check.found}: every start will quantize the base and compile the kernels again"
    return replace(check, status="warning", found=found)


def _on_tmpfs(folder: Path) -> bool:
    """Whether the folder is on a tmpfs mount."""
    path, kind, longest = str(folder.resolve()), "", -1
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        _, mount, filesystem, *_ = line.split(" ")
        inside = path == mount or path.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= longest:
            kind, longest = filesystem, len(mount)
    return kind == "tmpfs"


def owner_of(data_dir: Path) -> int | None:
    """Id of the process that owns the data folder now (see `OwnerLock`); 0 if unknown, None if
    there is none."""
    try:
        with (data_dir / "LOCK").open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return int(json.loads(file.read(200)).get("pid", 0))
    except (OSError, ValueError):
        pass
    return None


def running_check(owner: int, data_dir: Path) -> Check:
    peaks = [peak_bytes(owner), *(peak_bytes(child) for child in _children(owner))]
    used = " + ".join(f"{peak >> 20}" for peak in peaks if peak)
    return Check(
        "server",
        "warning",
        f"process {owner} serves {data_dir}; peak memory of its processes {used} MiB",
        "stop it before starting another server, or choose another --data-dir",
    )


def _children(pid: int) -> list[int]:
    try:
        listed = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8")
    except OSError:
        return []
    return [int(child) for child in listed.split()]


def port_check(flag: str, address: Address, *, running: bool) -> Check:
    name = flag.removeprefix("--").replace("-", " ")
    try:
        family, _, _, _, where = socket.getaddrinfo(address.host, address.port)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
    except OSError as error:
        return Check(
            name,
            "warning" if running else "problem",
            f"{address}: {error.strerror or error}",
            f"stop the program that uses it, or choose another {flag}",
        )
    return Check(name, "ok", f"{address} is free")


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"
