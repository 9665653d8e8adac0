"""See the package. Exit status 1 if something was touched, or a planted bug was not found.

python -m tests.fetching                      10,000 cases, some minutes
python -m tests.fetching --cases 300          the short form, as in the suite
python -m tests.fetching --seed S --only N    one case
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Final

from veneer_server.adapters.fetching import addresses, uris, web
from veneer_server.serving import local_folders, watched

from tests import seeds
from tests.fetching.drops import Drops
from tests.fetching.uris import redirect_case, uri_case
from tests.fetching.world import World, world
from tests.planted import planted

KINDS: Final = ("uri", "uri", "redirect", "drop")

PLANTED: Final[Mapping[str, tuple[str, ModuleType, str, str]]] = {
    "siblings are allowed": (
        "uri", uris, "and other.parts[: len(self.parts)] == self.parts", "and True",
    ),
    "links are followed out": (
        "uri", local_folders,
        "self._open_below(str(real), _FOLDER)",
        "os.open(folder, os.O_RDONLY)",
    ),
    "any address is contacted": (
        "redirect", addresses, "if may_contact(str(each[4][0]), named)]", "]",
    ),
    "redirects are not checked": (
        "redirect", web, "= self.permit(hop)", "= self.permit(hop) or self.permit(first)",
    ),
    "tokens go everywhere": ("redirect", web, "if own else", "if True else"),
    "disguised paths pass": ("redirect", web, "if _DISGUISED.search(found.path):", "if False:"),
    "one look is enough": (
        "drop", watched, "seen.signature and before.get(name) == seen", "seen.signature",
    ),
    "writers are not seen": (
        "drop",
        watched,
        "if any(_is_written(file.descriptor) for file in files):",
        "if False:",
    ),
    "lengths are not compared": (
        "drop", watched, "read_header(file, WEIGHTS_FILE)", "pass",
    ),
}  # fmt: skip
"""Bug -> kind of cases that find it, and its edit."""


class Runner:
    """Runs cases by number."""

    def __init__(self, here: World, drops: Drops, seed: int) -> None:
        self._world, self._drops, self._seed = here, drops, seed
        self.counts = Counter[str]()

    async def case(self, number: int, kind: str) -> list[str]:
        """Run one; returns what it touched."""
        random_ = random.Random(f"{self._seed}:{number}")
        self._world.broken.clear()
        if kind == "drop":
            done = await self._drops.case(random_)
        else:
            case = uri_case if kind == "uri" else redirect_case
            done = case(self._world, random_)
        self.counts[kind] += 1
        self.counts[f"{kind} that succeeded"] += done
        return list(self._world.broken)


async def run(cases: int, seed: int, only: int | None, tries: int) -> int:
    """All cases, then the planted bugs."""
    failed = 0
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        here = stack.enter_context(world(folder))
        drops = Drops(here, folder / "drops")
        stack.callback(drops.close)
        runner, began = Runner(here, drops, seed), time.monotonic()
        for number in range(cases) if only is None else [only]:
            if number % 1000 == 999:
                print(f"{number + 1} cases after {time.monotonic() - began:.0f} s", flush=True)
            broken = await runner.case(number, KINDS[number % len(KINDS)])
            if broken:
                failed += 1
                print(f"seed {seed}, case {number}: {'; '.join(broken[:3])}")
        took = time.monotonic() - began
        count = sum(runner.counts[kind] for kind in set(KINDS))
        print(f"{count} cases in {took:.0f} s: {dict(runner.counts)}")
        for kind in set(KINDS) if only is None else ():
            if not runner.counts[f"{kind} that succeeded"]:
                print(f"no case of kind {kind} succeeded: nothing was tried")
                failed += 1
        for name, (kind, module, old, new) in PLANTED.items() if only is None else ():
            with planted(module, old, new):
                hit = await _first(runner, kind, tries)
            told = "NOT FOUND" if hit is None else f"found by case {hit}"
            print(f"planted: {name}: {told}")
            failed += hit is None
    return failed


async def _first(runner: Runner, kind: str, tries: int) -> int | None:
    for number in range(tries):
        if await runner.case(number, kind):
            return number
    return None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fetching")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=seeds.seed())
    parser.add_argument("--only", type=int)
    parser.add_argument("--tries", type=int, default=5000, help="cases that may find a bug")
    given = parser.parse_args()
    print(f"seed {given.seed}")
    logging.disable()  # of refused folders
    return 1 if asyncio.run(run(given.cases, given.seed, given.only, given.tries)) else 0


if __name__ == "__main__":
    sys.exit(main())
