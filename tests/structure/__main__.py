"""Print figures about the code's structure, for a reader to judge: ``make structure``.

Nothing here is a limit: the exit status is 0 unless the figures cannot be computed. It prints

- handwritten source files outside tests, and their lines
- names that two or more classes have, with their files
- the longest files, and the folders with the most files
- the files that name one sampling option: a similar new option would touch the same files
- the code that a warm gRPC generate, a warm chat over HTTP and a warm upload enter in the
  processes of a server (`tests.structure.calls`)

``--json`` writes everything, with the names of the counted items.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from tests.structure.calls import Entered, warm_calls
from tests.structure.sources import Figures, figures

REPOSITORY: Final = Path(__file__).resolve().parents[2]
SHOWN: Final = 10
"""Number of files and of folders to print."""


def print_sources(found: Figures) -> None:
    print(f"{len(found.python)} files of Python, {sum(found.python.values())} lines")
    print(f"{len(found.lines)} source files in all, {sum(found.lines.values())} lines")
    _print_most("longest files", found.lines)
    _print_most("folders with the most files", found.folders)
    server, everywhere = found.twice("server/"), found.twice()
    print(f"\nclass names used twice: {len(server)} in server/, {len(everywhere)} in all:")
    for name, paths in everywhere.items():
        print(f"  {name}: {', '.join(paths)}")
    print(f"\nfiles that name a sampling option: {len(found.option)}")
    for path in found.option:
        print(f"  {path}")


def _print_most(what: str, counts: Mapping[str, int]) -> None:
    print(f"\n{what}:")
    for path, count in Counter(counts).most_common(SHOWN):
        print(f"  {count:5} {path}")


def print_calls(found: Mapping[str, Entered]) -> None:
    print(f"\n{'a warm call enters':20} files  functions  classes  processes")
    for name, entered in found.items():
        counts = len(entered.files), len(entered.functions), len(entered.classes)
        print("{:20} {:5}  {:9}  {:7}  {:9}".format(name, *counts, entered.processes))


def as_json(sources: Figures, calls: Mapping[str, Entered]) -> str:
    record = {
        "lines": sources.lines,
        "classes_twice": {"server": sources.twice("server/"), "repository": sources.twice()},
        "sampling_option": sources.option,
        "calls": {
            name: {
                "files": sorted(entered.files),
                "functions": sorted(entered.functions),
                "classes": sorted(entered.classes),
                "processes": entered.processes,
            }
            for name, entered in calls.items()
        },
    }
    return json.dumps(record, indent=1) + "\n"


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.structure",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all of it there")
    parser.add_argument("--no-calls", action="store_true", help="start no server")
    parser.add_argument(
        "--of", type=Path, default=REPOSITORY, metavar="FOLDER", help="another checkout"
    )
    given = parser.parse_args()
    repository = given.of.resolve()
    sources = figures(repository)
    print_sources(sources)
    calls: dict[str, Entered] = {}
    if not given.no_calls:
        calls = asyncio.run(warm_calls(repository))
        print_calls(calls)
    if given.json is not None:
        given.json.write_text(as_json(sources, calls), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
