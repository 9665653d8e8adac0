"""Adapter folders that cannot be opened, each for a different reason."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import aiohttp

from tests.attacks.case import Bug, Target

TITLE = "loops, pipes, names that are too long and other paths that cannot be opened"
FLAGS = ("--lora-root", tempfile.gettempdir())
BUG = Bug(
    "veneer_server.serving.local_folders",
    "except (OSError, ValueError) as error:\n                _check_passing(error)",
    "except FileNotFoundError as error:\n                _check_passing(error)",
)

_CODES: Final = ("invalid_field", "adapter_invalid")


async def attack(target: Target) -> list[str]:
    """Each answer blames the caller, and says which field is wrong."""
    wrong: list[str] = []
    kinds = _kinds(target)
    ends = asyncio.get_running_loop().time() + target.seconds
    async with aiohttp.ClientSession() as session:

        async def one(number: int) -> None:
            what = target.rng.choice(sorted(kinds))
            body = {"lora_name": f"odd-{number}", "lora_path": kinds[what]()}
            url = f"http://{target.openai}/v1/load_lora_adapter"
            async with session.post(url, json=body) as answer:
                said = await answer.json()
            code = said.get("error", {}).get("code")
            if answer.status != 400 or (code or _CODES[0]) not in _CODES:
                wrong.append(f"{what}: {answer.status} {said}")

        number = 0
        while asyncio.get_running_loop().time() < ends:
            await asyncio.gather(*(one(number + n) for n in range(10)))
            number += 10
    return wrong[:20]


def _kinds(target: Target) -> Mapping[str, Callable[[], str]]:
    """Return, by kind, functions that make a path below the root."""
    work, rng = target.work.resolve(), target.rng
    (work / "loop").symlink_to("pool")
    (work / "pool").symlink_to("loop")
    (work / "dangling").symlink_to("nothing")
    (work / "file").write_text("x")
    os.mkfifo(work / "pipe")
    inside = work / "inside"
    inside.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (inside / name).symlink_to(name)
    many = work
    for n in range(45):  # more links than the kernel follows
        (work / f"link{n}").symlink_to(f"link{n + 1}" if n < 44 else "inside")
        many = work / "link0"
    return {
        "a loop": lambda: str(work / rng.choice(["loop", "pool", "loop/a"])),
        "too many links": lambda: str(many),
        "a long name": lambda: str(work / ("n" * rng.randrange(256, 3000))),
        "a long path": lambda: str(work.joinpath(*["m" * 200] * rng.randrange(17, 19))),
        "a pipe": lambda: str(work / "pipe"),
        "a file in between": lambda: str(work / "file" / "x"),
        "a link to nothing": lambda: str(work / "dangling"),
        "a NUL": lambda: str(Path(f"{work}/a\0b")),
        "files that are loops": lambda: str(inside),
        "what is not there": lambda: str(work / f"{rng.randrange(10**9)}"),
    }
