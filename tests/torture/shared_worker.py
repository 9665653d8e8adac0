"""A registry on PostgreSQL and S3 that publishes until it is killed, for row 23.

``python -m tests.torture.shared_worker``, with a JSON object on standard input: where catalog
and store are, the adapters to publish, a seed, and a planted bug. Prints a line for each
answer: ``ok NAME REVISION``, or ``no NAME REASON``.
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

from veneer_registry.errors import VeneerError
from veneer_registry.registry import Registry
from veneer_registry.shared.catalog import PostgresCatalog
from veneer_registry.shared.object_store import ObjectStore
from veneer_registry.shared.objects import Objects
from veneer_registry.shared.places import SharedPlaces
from veneer_registry.shared.postgres import Address

from tests.unit.registry.kit import BASE, push

RETAIN = 1000

PLANTED = (
    "acknowledged before the database's commit",
    "the catalog is written before the objects",
    "a lost answer counts as a commit",
)


def places(given: dict[str, Any], data: Path) -> SharedPlaces:
    """Those that the worker was given."""
    objects = Objects(given["store"], endpoint_url=given["endpoint"], key="test", secret="test")
    address = Address(given["catalog"], Path(given["password_file"]), given["schema"])
    return SharedPlaces(data, address, objects, cache_bytes=1 << 30)


@contextmanager
def planted(bug: str) -> Iterator[None]:
    """The product with one of `PLANTED`, or without."""
    with ExitStack() as stack:
        if bug == PLANTED[0]:

            def keep_local(self: Any, number: int) -> None:
                self._sent = (number, "0" * 32)

            stack.enter_context(patch.object(PostgresCatalog, "_before_commit", keep_local))
            stack.enter_context(patch.object(PostgresCatalog, "_catch_up", lambda *_: None))
        elif bug == PLANTED[1]:
            real = ObjectStore._send  # private: the order of two steps

            def only_documents(self: Any, source: Path, bundle: Any) -> bool:
                with patch.object(ObjectStore, "_put", lambda *_: True):
                    return real(self, source, bundle)

            stack.enter_context(patch.object(ObjectStore, "_send", only_documents))
        elif bug == PLANTED[2]:
            stack.enter_context(patch.object(PostgresCatalog, "_find_out", lambda *_: None))
        yield


def main() -> None:
    """Publish for ever."""
    given = json.loads(sys.stdin.readline())
    rng = random.Random(given["seed"])
    adapters = [Path(path) for path in given["adapters"]]
    data = Path(given["data"])
    registry = Registry.open(data, BASE, places=places(given, data), retain_superseded=RETAIN)
    with registry, planted(given["planted"]):
        print("ready", flush=True)
        while True:
            name = rng.choice(given["names"])
            try:
                record = push(registry, name, rng.choice(adapters), allow_replace=True).record
            except VeneerError as error:
                print("no", name, error.reason, flush=True)
            else:
                print("ok", name, record.ref.revision, flush=True)


if __name__ == "__main__":
    main()
