"""``python -m tests.docs [PAGE ...]``: runs the commands of the pages, including slow ones.

Exit status 1 if a page is wrong. With ``--quick``, only what the suite runs.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from tests.docs.check import check_page
from tests.docs.pages import REPOSITORY, pages
from tests.docs.session import busy_ports


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.docs", description=__doc__)
    parser.add_argument("pages", nargs="*", type=Path, help="all of them by default")
    parser.add_argument("--quick", action="store_true", help="leave slow commands out")
    given = parser.parse_args()
    for page in given.pages:
        if not page.is_file():
            parser.error(f"no such page: {page}")
    if busy := busy_ports():
        sys.exit(f"ports {busy} are taken, and `unshare --net` does not work here")
    cache = Path(os.environ.get("VENEER_CACHE_DIR", REPOSITORY / ".cache" / "veneer"))
    untrue = []
    for path in [page.resolve() for page in given.pages] or pages():
        untrue += check_page(
            path, cache, slow=not given.quick, tell=lambda line: print(line, flush=True)
        )
    for sentence in untrue:
        print(sentence)
    return 1 if untrue else 0


if __name__ == "__main__":
    sys.exit(main())
