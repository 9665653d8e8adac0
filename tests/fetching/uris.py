"""Mutated URIs, and redirects to mutated places."""

from __future__ import annotations

import contextlib
import random
import shutil
from collections.abc import Iterator
from typing import Final

from veneer_registry.errors import VeneerError
from veneer_server.adapters.fetching.process import fetch
from veneer_server.adapters.fetching.uris import parse_uri

from tests.fetching.world import CONFIG, MARK, WEIGHTS, World
from tests.web_folder import Answer

_PIECES: Final = (
    "..",
    ".",
    "/",
    "//",
    "\\",
    "%2e%2e",
    "%2f",
    "%00",
    "\0",
    "\n",
    " ",
    "\t",
    "@",
    ":",
    "#",
    "?",
    "/../else",
    "/../../else",
    "/..",
    "/../../secret",
    "/out",
    "/up",
    "/chain",
    "/loop",
    "/in",
    "/mixed",
    "/relative",
    "/fifo",
    "user:pass@",
    "@evil.example.com",
    ":1",
    ":443",
    ":99999",
    "[::1]",
    "127.0.0.1",
    "localhost",
    "é",
    "．．",
    "／",
    "\u202e",
    "xn--",
    "file://",
    "https://",
    "hf://",
    "/else",
    "@main",
    "@../x",
)


def mutated(random_: random.Random, seeds: tuple[str, ...]) -> str:
    """A URI after up to four changes; sometimes none."""
    text = random_.choice(seeds)
    for _ in range(random_.choice((0, 1, 1, 1, 2, 2, 3, 4))):
        text = _changed(random_, text, seeds)
    return text


def _changed(random_: random.Random, text: str, seeds: tuple[str, ...]) -> str:
    at, to = sorted(random_.choices(range(len(text) + 1), k=2))
    piece = random_.choice(_PIECES)
    return random_.choice(
        (
            text[:at] + piece + text[at:],
            text + piece,
            text.rstrip("/") + "/" + piece.lstrip("/"),
            text[:at] + text[to:],
            text[:at] + text[at : at + 1].swapcase() + text[at + 1 :],
            text.partition("://")[0] + "://" + random_.choice(seeds).partition("://")[2],
            text.replace("/sql", piece, 1),
            text.replace("example.com", piece, 1),
            text[:at] + text[at:to] * random_.choice((2, 50)) + text[to:],
            text.rpartition("/")[0],
        )
    )


def uri_case(world: World, random_: random.Random) -> bool:
    """Register one mutated URI. Returns whether something was fetched."""
    world.answer_well()
    text = mutated(random_, world.seeds)
    found = _fetched(world, text)
    if found and not _same(world, text):
        world.broken.append(f"something else came out of {text[:200]!r}")
    return found


def redirect_case(world: World, random_: random.Random) -> bool:
    """Fetch from servers that lead elsewhere. Returns whether something was fetched."""
    world.answer_well()
    for server in (world.web, world.cdn, world.hub):
        for path in [*server.answers]:
            if random_.random() < 0.15:
                where = world.evil(random_)
                if random_.random() < 0.2:
                    where = mutated(random_, (where,))
                where = "".join(char for char in where if "\x20" <= char < "\x7f")
                server.answers[path] = Answer(
                    status=random_.choice((301, 302, 303, 307, 308)),
                    headers={"location": where},
                )
    seeds = [seed for seed in world.seeds if seed.startswith(("https", "hf"))]
    return _fetched(world, random_.choice(seeds))


def _fetched(world: World, text: str) -> bool:
    shutil.rmtree(world.staging, ignore_errors=True)
    world.staging.mkdir()
    found = False
    try:
        with world.watched():
            uri = parse_uri(text)
            if uri.scheme == "file":
                found = any(_local(world, "/" + "/".join(uri.parts)))
            elif uri.scheme in ("https", "hf"):  # buckets need a process of their own
                fetch(world.fetch(str(uri)))
                found = True
    except VeneerError:
        pass
    except Exception as error:  # a caller would get INTERNAL
        world.broken.append(f"{type(error).__name__}: {error}")
    for path in world.staging.iterdir():
        if path.is_symlink() or MARK in path.read_bytes():
            world.broken.append(f"{path.name} of the secret folder came out")
    world.look_at_requests()
    return found


def _local(world: World, given: str) -> Iterator[bool]:
    with world.local.open(given) as files:
        for file in files:
            world.look_at(file.descriptor)
            yield True


def _same(world: World, text: str) -> bool:
    if text.startswith("file:"):
        return True
    with contextlib.suppress(FileNotFoundError):
        return all(
            (world.staging / name).read_bytes() == (world.root / "sql" / name).read_bytes()
            for name in (CONFIG, WEIGHTS)
        )
    return False
