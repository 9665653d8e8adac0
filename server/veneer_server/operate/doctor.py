"""``veneer-server doctor``: would this configuration serve here, and if not, what to do.

Every check says what it found; one that is a problem or a warning names the fix.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import pwd
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal

from veneer_registry.child_python import child_python
from veneer_registry.errors import VeneerError

from veneer_server.backends.native.chosen import find_library
from veneer_server.backends.native.compiler import NativeUnavailable, try_out
from veneer_server.config import Address, ServerConfig
from veneer_server.models.config import DecoderConfig, read_decoder_config
from veneer_server.models.source import BUNDLED, bundled_damage, bundled_folder
from veneer_server.openai import require_gateway
from veneer_server.sizing.memory_plan import plan_memory
from veneer_server.system.machine import find_gpu, host_memory, peak_bytes, usable_cores

__all__ = ["Check", "examine", "report"]

Status = Literal["ok", "warning", "problem"]

_PACKAGES: Final = (
    "torch", "transformers", "bitsandbytes", "tokenizers", "safetensors", "llguidance",
    "grpcio", "protobuf",
)  # fmt: skip
_INSTALL: Final = "pip install '.[server]' in Veneer's folder"

_LEAST_PYTHON: Final = (3, 11)
_LEAST_FREE: Final = 1 << 30
_LEAST_FILES: Final = 4096


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        found: what is there.
        fix: what to do about it; empty where all is well.
    """

    name: str
    status: Status
    found: str
    fix: str = ""


def report(config: ServerConfig, say: Callable[[str], None], *, as_json: bool) -> bool:
    """Print the checks; True where the server could start."""
    checks = list(examine(config))
    healthy = all(check.status != "problem" for check in checks)
    if as_json:
        say(json.dumps({"healthy": healthy, "checks": [asdict(c) for c in checks]}, indent=2))
        return healthy
    for check in checks:
        say(f"{check.status:8} {check.name:13} {check.found}")
        if check.fix:
            say(f"{'':8} {'':13} -> {check.fix}")
    return healthy


def examine(config: ServerConfig) -> Iterator[Check]:
    """All checks, in an order in which a first problem explains later ones."""
    yield _python()
    yield from map(_package, _PACKAGES)
    yield _no_kernels()
    yield from torch_checks(config)
    yield from _base(config)
    yield _memory(config)
    owner = _owner(config.data_dir)
    yield from _folder("data folder", "--data-dir", config.data_dir)
    if owner is not None:
        yield _running(owner, config.data_dir)
    yield from map(_only_slower, _folder("cache folder", "--cache-dir", config.cache_dir))
    for flag, address in (
        ("--listen", config.listen),
        ("--metrics-listen", config.metrics_listen),
        ("--openai-listen", config.openai_listen),
    ):
        if address is not None:
            yield _port(flag, address, running=owner is not None)
    if config.openai_listen is not None:
        yield _gateway()
    yield _open_files()
    yield _clock()


def _python() -> Check:
    found = f"{platform.python_version()} on {platform.platform()}"
    if sys.version_info >= _LEAST_PYTHON:
        return Check("python", "ok", found)
    return Check("python", "problem", found, "use Python 3.11 or newer")


def _package(name: str) -> Check:
    try:
        return Check(name, "ok", version(name))
    except PackageNotFoundError:
        return Check(name, "problem", "not installed", _INSTALL)


def _no_kernels() -> Check:
    if find_spec("kernels") is None:
        return Check("kernels", "ok", "absent, as it should be")
    return Check(
        "kernels",
        "problem",
        "installed: bitsandbytes would fetch native code from a hub through it",
        "pip uninstall kernels",
    )


def torch_checks(config: ServerConfig) -> Iterator[Check]:
    """What only a process with torch can say."""
    done = subprocess.run(
        child_python("-m", "veneer_server.operate.doctor_probe", config.device),
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        facts: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        yield Check(
            "torch works", "problem", last, "install the torch build that fits this machine"
        )
        return
    native = None
    if facts["device"] == "cpu" and config.backend != "torch":
        native = native_check(config)
    by = "native" if native is not None and native.status == "ok" else "torch"
    cores = usable_cores()
    on = facts["cuda"] if facts["device"] == "cuda" else f"the CPU, {cores} cores"
    if config.device == "cuda" and not facts["cuda"]:
        yield Check("device", "problem", "torch finds no CUDA device", "use --device cpu")
    else:
        yield Check("would serve", "ok", f"the {by} backend on {on}")
    threads = config.threads or cores
    fix = f"--threads {cores}, or 0" if threads > cores else ""
    found = f"{threads} of {cores} usable cores, {facts['cpu']}"
    yield Check("threads", "warning" if fix else "ok", found, fix)
    if facts["four_bit"]:
        yield Check(
            "4-bit product",
            "problem",
            facts["four_bit"],
            "install a bitsandbytes for this machine, or serve --quantization none",
        )
    else:
        yield Check("4-bit product", "ok", f"agrees with the full one on {facts['device']}")
    if facts["device"] == "cpu":
        if native is not None:
            yield native
        if by == "torch":
            yield _packed(facts["packed"])


def native_check(config: ServerConfig) -> Check:
    """Whether steps are executed by the kernels; compiles them, and has a process try them."""
    fix = "see --backend; the torch backend takes several times as long"
    if config.dtype != "bfloat16":
        return Check("native step", "warning", f"not for {config.dtype}", fix)
    try:
        avx2 = "avx2" if config.native_instructions == "avx2" else ""
        library = find_library(config.cache_dir, instructions=avx2)
        instructions = try_out(library.file)
    except NativeUnavailable as reason:
        return Check("native step", "warning", str(reason), fix)
    if library.why_prebuilt:
        found = (
            f"prebuilt, and runs here ({instructions}); not compiled: {library.why_prebuilt}"
        )
        return Check("native step", "ok", found)
    return Check("native step", "ok", f"compiled for this CPU, and runs here ({instructions})")


def _packed(packed: bool) -> Check:
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    cpu = "this CPU has AVX512-BF16" if "avx512_bf16" in flags else "no AVX512-BF16"
    if packed:
        return Check("packed 4-bit", "ok", f"yes: {cpu}")
    return Check(
        "packed 4-bit",
        "warning",
        f"no: {cpu}",
        "steps take several times as long: use a CPU with AVX512-BF16, or a GPU",
    )


def _base(config: ServerConfig) -> Iterator[Check]:
    folder = _base_folder(config)
    if folder is None:
        fix = f"veneer-server model import {config.base}" if config.base == BUNDLED else ""
        if any(check.status == "problem" for check in _folder("", "", config.cache_dir)):
            found = f"{config.base} is not here, and {config.cache_dir} cannot hold it"
            yield Check(
                "base", "problem", found, "choose another --cache-dir, or give a folder"
            )
            return
        yield Check("base", "ok", f"{config.base} is not here: it is fetched at start", fix)
        return
    if config.base == BUNDLED and (damage := bundled_damage(folder)):
        found = f"{folder} is damaged: {damage}"
        yield Check("base", "warning", found, "it is fetched again at the next start")
        return
    try:
        decoder = read_decoder_config(folder)
    except (VeneerError, KeyError, ValueError) as error:
        yield Check("base", "problem", str(error), "choose another --base")
        return
    yield Check("base", "ok", f"{config.base}: {decoder.architecture}")
    yield _tokenizer(folder, decoder)


def _tokenizer(folder: Path, decoder: DecoderConfig) -> Check:
    """What the front process reads of the base: its tokenizer and its chat template."""
    try:
        # Not at the top: the doctor is who says that a package is missing.
        from veneer_server.text.templates.template import ChatTemplate, read_base_template
        from veneer_server.text.tokenizer import TextTokenizer

        tokenizer = TextTokenizer.from_folder(folder)
        template, special = read_base_template(folder)
        if template is not None:
            ChatTemplate(template, special)
    except ImportError as error:
        return Check("tokenizer", "problem", str(error), _INSTALL)
    except (VeneerError, ValueError, KeyError) as error:
        found, _, fix = str(error).partition(": ")
        return Check("tokenizer", "problem", found, fix or "choose another --base")
    chats = "a chat template" if template is not None else "no chat template"
    found = f"{tokenizer.vocab_size} tokens, {chats}"
    if tokenizer.vocab_size > decoder.vocab_size:
        return Check(
            "tokenizer",
            "warning",
            f"{found}, but the model has {decoder.vocab_size}",
            "text with the others is refused: resize the model's embeddings to serve it",
        )
    return Check("tokenizer", "ok", found)


def _gateway() -> Check:
    try:
        require_gateway()
    except VeneerError as error:
        found, _, fix = str(error).partition(": ")
        return Check("gateway", "problem", found, fix)
    return Check("gateway", "ok", "its packages are installed")


def _base_folder(config: ServerConfig) -> Path | None:
    """Where the base is, if it is on this machine or should be."""
    bundled = bundled_folder(config.cache_dir)
    if config.base == BUNDLED:
        return bundled if bundled.is_dir() else None
    folder = Path(config.base).expanduser()
    looks_local = folder.is_absolute() or config.base.startswith((".", "~"))
    return folder if folder.is_dir() or looks_local else None


def _memory(config: ServerConfig) -> Check:
    folder, host = _base_folder(config), host_memory()
    where = "this container" if host.contained else "this machine"
    free = f"{host.available >> 20} MiB of {host.limit >> 20} available in {where}"
    if folder is None:
        return Check("memory", "ok", f"{free}; the plan needs the base, which is not here")
    try:
        plan = plan_memory(read_decoder_config(folder), config, host, find_gpu(config.device))
    except VeneerError as error:
        needed, _, fix = str(error).partition(": lower")
        return Check("memory", "problem", needed, f"lower{fix}" if fix else "another --base")
    except (KeyError, ValueError):
        return Check("memory", "ok", f"{free}; no plan without a supported base")
    needs = next(pool.total for pool in plan.pools if pool.name == "host")
    if needs > host.available:
        return Check(
            "memory", "warning", f"{plan}; {free}", "stop other programs, or lower the budgets"
        )
    return Check("memory", "ok", f"{plan}; {free}")


def _folder(name: str, flag: str, folder: Path) -> Iterator[Check]:
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    fix = f"choose another {flag}"
    if not existing.is_dir():
        yield Check(name, "problem", f"{folder} cannot be made: {existing} is a file", fix)
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


def _only_slower(check: Check) -> Check:
    """Of the cache folder: without it a start prepares again what it would have kept. A base
    that is still to be fetched says itself that it cannot be."""
    if check.status != "problem":
        return check
    found = f"{check.found}: each start quantizes the base and compiles the kernels again"
    return replace(check, status="warning", found=found)


def _on_tmpfs(folder: Path) -> bool:
    """The mount that holds the folder is tmpfs."""
    path, kind, longest = str(folder.resolve()), "", -1
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        _, mount, filesystem, *_ = line.split(" ")
        inside = path == mount or path.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= longest:
            kind, longest = filesystem, len(mount)
    return kind == "tmpfs"


def _owner(data_dir: Path) -> int | None:
    """The process that owns the data folder now (see `OwnerLock`); 0 if unknown."""
    try:
        with (data_dir / "LOCK").open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return int(json.loads(file.read(200)).get("pid", 0))
    except (OSError, ValueError):
        pass
    return None


def _running(owner: int, data_dir: Path) -> Check:
    peaks = [peak_bytes(owner), *(peak_bytes(child) for child in _children(owner))]
    used = " + ".join(f"{peak >> 20}" for peak in peaks if peak)
    return Check(
        "server",
        "warning",
        f"process {owner} serves {data_dir}; peak memory of its processes {used} MiB",
        "stop it before you start another, or choose another --data-dir",
    )


def _children(pid: int) -> list[int]:
    try:
        listed = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8")
    except OSError:
        return []
    return [int(child) for child in listed.split()]


def _port(flag: str, address: Address, *, running: bool) -> Check:
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
            f"stop what uses it, or choose another {flag}",
        )
    return Check(name, "ok", f"{address} is free")


def _open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The server raises its soft limit by itself.
    if resource.RLIM_INFINITY in (soft, hard) or hard >= _LEAST_FILES:
        return Check("open files", "ok", f"at most {max(soft, hard)}")
    return Check(
        "open files",
        "warning",
        f"at most {hard}: each connection takes one",
        "raise the hard limit (ulimit -Hn 65536, or LimitNOFILE of the service)",
    )


def _clock() -> Check:
    """A clock before these files were written would sort revisions wrongly."""
    now, written = time.time(), Path(__file__).stat().st_mtime
    found = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    if now >= written - 86400:
        return Check("clock", "ok", found)
    return Check("clock", "problem", f"{found} is in the past", "set the clock (NTP)")


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"
