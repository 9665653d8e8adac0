"""``veneer-server doctor``: what this machine offers and what is missing."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from veneer_server.config import ServerConfig

__all__ = ["report"]

_PACKAGES: Final = ("torch", "transformers", "bitsandbytes", "tokenizers", "grpcio")

# In a process of its own: the front never imports torch, and a broken CUDA
# installation may end the process that asks.
_CUDA: Final = (
    "import torch\n"
    "if torch.cuda.is_available():\n"
    "    p = torch.cuda.get_device_properties(0)\n"
    "    print(f'{p.name}, {p.total_memory >> 20} MiB, CUDA {torch.version.cuda}')\n"
)


def report(config: ServerConfig, say: Callable[[str], None]) -> bool:
    """Print one line a fact; True where the server could start."""
    problems: list[str] = []
    say(f"python        {platform.python_version()} on {platform.platform()}")
    for package in _PACKAGES:
        say(f"{package:13} {_version(package, problems)}")
    cores = len(os.sched_getaffinity(0))
    say(f"cores         {cores} usable")
    say(f"memory        {_available_mib()} MiB available")
    cuda = "" if config.device == "cpu" else _cuda()
    say(f"cuda          {cuda or ('not asked for' if config.device == 'cpu' else 'none')}")
    if config.device == "cuda" and not cuda:
        problems.append("--device cuda, but torch finds no CUDA device: use --device cpu")
    say(f"would serve   torch on {cuda if cuda else f'the CPU, {cores} cores'}")
    for flag, folder in (("--data-dir", config.data_dir), ("--cache-dir", config.cache_dir)):
        trouble = _unusable(folder)
        say(f"{flag[2:]:13} {folder} {trouble or 'is usable'}")
        if trouble:
            problems.append(f"{folder} {trouble}: choose another {flag}")
    for problem in problems:
        say(f"PROBLEM       {problem}")
    return not problems


def _version(package: str, problems: list[str]) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        problems.append(f"{package} is not installed: pip install 'veneer[server]'")
        return "missing"


def _available_mib() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20


def _cuda() -> str:
    done = subprocess.run(
        [sys.executable, "-c", _CUDA], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def _unusable(folder: Path) -> str:
    """Why the folder cannot be written, or nothing."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        return f"cannot be made: {existing} is a file"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"cannot be written: {existing} is not yours"
    return ""
