"""Run a registry on PostgreSQL and S3 that publishes until it is killed, for row 23.

``python -m tests.torture.shared_worker`` reads a JSON object from standard input: the locations
of catalog and store, the adapters to publish, a seed, and a planted bug. It prints a line for
each answer: ``new NAME REVISION``, ``same NAME REVISION`` if the name had this revision
already, or ``no NAME REASON``.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psycopg
from veneer_registry.errors import VeneerError
from veneer_registry.registry import Registry
from veneer_registry.shared import mirror
from veneer_registry.shared.catalog import PostgresCatalog
from veneer_registry.shared.locations import SharedLocations
from veneer_registry.shared.objects import Objects
from veneer_registry.shared.postgres import PostgresAddress

from tests.unit.registry.kit import BASE, push

RETAIN = 1000
LOST = 0.2
"""Share of commits whose answer is lost; three times as many with the bug about lost
answers."""

PLANTED = (
    "acknowledged before the database's commit",
    "the catalog is written before the objects",
    "a lost answer counts as a commit",
)


def places(given: dict[str, Any], data: Path) -> SharedLocations:
    """Return the locations that the worker was given."""
    objects = Objects(given["store"], endpoint_url=given["endpoint"], key="test", secret="test")
    address = PostgresAddress(given["catalog"], Path(given["password_file"]), given["schema"])
    return SharedLocations(data, address, objects, cache_bytes=1 << 30)


@contextmanager
def planted(bug: str) -> Iterator[None]:
    """Run the product with one of the bugs in `PLANTED`, or without a bug."""
    with ExitStack() as stack:
        if bug == PLANTED[0]:
            stack.enter_context(patch.object(mirror, "touched", lambda *_: {}))
        elif bug == PLANTED[1]:
            stack.enter_context(patch.object(Objects, "put", lambda *_: None))
        elif bug == PLANTED[2]:
            stack.enter_context(patch.object(PostgresCatalog, "find_out", lambda *_: None))
        yield


@contextmanager
def losing(rng: random.Random, share: float) -> Iterator[None]:
    """Lose the connection at some commits, either before or after they are made."""
    real = psycopg.Connection.execute

    def execute(self: Any, query: Any, *more: Any, **options: Any) -> Any:
        if query != "COMMIT" or rng.random() >= share:
            return real(self, query, *more, **options)
        if rng.random() < 0.5:
            real(self, query)
        self.close()
        raise psycopg.OperationalError("the answer was lost")

    with patch.object(psycopg.Connection, "execute", execute):
        yield


def main() -> None:
    """Publish forever."""
    given = json.loads(sys.stdin.readline())
    rng = random.Random(given["seed"])
    adapters = [Path(path) for path in given["adapters"]]
    data = Path(given["data"])
    registry = Registry.open(data, BASE, places=places(given, data), retain_superseded=RETAIN)
    lost = LOST * 3 if given["planted"] == PLANTED[2] else LOST
    with registry, planted(given["planted"]), losing(rng, lost):
        print("ready", flush=True)
        while True:
            name = rng.choice(given["names"])
            try:
                published = push(registry, name, rng.choice(adapters), allow_replace=True)
            except VeneerError as error:
                print("no", name, error.reason, flush=True)
            else:
                kind = "new" if published.published else "same"
                print(kind, name, published.record.ref.revision, flush=True)


if __name__ == "__main__":
    main()
