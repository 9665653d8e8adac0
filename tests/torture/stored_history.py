"""Play a history of stored responses and conversations, and record what was acknowledged.

Row 24 records ``python -m tests.torture.stored_history DATA --seed 7``. It writes ``begin``
before each change, and one JSON line after it: the content that must be found from then on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
from pathlib import Path

from veneer_registry.database import connect
from veneer_registry.errors import InvalidField
from veneer_server.openai.errors import HttpError
from veneer_server.openai.response_store import (
    FinishedResponse,
    ItemPage,
    ResponseDatabase,
    StoredItem,
)

from tests.torture.history import careless_sqlite, other_sqlite, say

TENANTS = ("a", "b")
NOW = 1_000_000.0

Found = dict[str, str]
"""``TENANT/ID`` of a response or conversation -> its content, with everything it continues."""


def open_database(data: Path) -> ResponseDatabase:
    """Open the database as histories and their judge do, with limits that are never reached."""
    return ResponseDatabase(
        data / "responses.sqlite", most_bytes=1 << 30, age_s=1e9, clock=lambda: NOW
    )


def found_in(database: ResponseDatabase, steps: int) -> Found:
    """Return what a history of ``steps`` steps has left, as a server reads it."""
    found = {}
    for tenant in TENANTS:
        for number in range(steps):
            response, conversation = f"r{number}", f"c{number}"
            if (body := database.response(tenant, response)) is not None:
                found[f"{tenant}/{response}"] = body.decode()
                with contextlib.suppress(InvalidField):  # the response is in a conversation
                    found[f"{tenant}/{response}"] += database.history(tenant, response).decode()
            with contextlib.suppress(HttpError):
                page = database.items(tenant, conversation, ItemPage(limit=100))
                _, metadata = database.conversation(tenant, conversation)
                found[f"{tenant}/{conversation}"] = (metadata + page).decode()
    return found


def miscounted(database: ResponseDatabase) -> str:
    """Return how the counts by tenant differ from the rows; "" if they do not."""
    with contextlib.closing(connect(database.path)) as db:
        counted = db.execute("SELECT tenant, count FROM tenants WHERE count ORDER BY tenant")
        rows = db.execute(
            "SELECT tenant, count(*) FROM (SELECT tenant FROM responses WHERE id IS NOT NULL "
            "UNION ALL SELECT tenant FROM conversations) GROUP BY tenant ORDER BY tenant"
        )
        said, true = counted.fetchall(), rows.fetchall()
        orphans = db.execute(
            "SELECT count(*) FROM items WHERE conversation NOT IN "
            "(SELECT number FROM conversations)"
        ).fetchone()[0]
    if said != true:
        return f"counts {said}, rows {true}"
    return f"{orphans} items of no conversation" if orphans else ""


class Teller:
    """Makes random changes and records what each one acknowledged."""

    def __init__(self, data: Path, rng: random.Random, steps: int) -> None:
        self.data = data
        self.rng = rng
        self.steps = steps
        self.database = open_database(data)

    def _items(self, name: str) -> list[StoredItem]:
        made = []
        for number in range(self.rng.randrange(1, 4)):
            id_ = f"{name}-{number}-{self.rng.randrange(1 << 30)}"
            text = "x" * self.rng.choice((1, 100, 5000))
            made.append(StoredItem(id_, json.dumps({"id": id_, "text": text}).encode()))
        return made

    def _one_of(self, tenant: str, kind: str) -> str | None:
        names = [
            name.partition("/")[2]
            for name in found_in(self.database, self.steps)
            if name.startswith(f"{tenant}/{kind}")
        ]
        return self.rng.choice(names) if names else None

    def step(self, number: int) -> None:
        """Make one change. The first two store, so that even the shortest history has a
        response that continues another, or a conversation."""
        database, tenant = self.database, self.rng.choice(TENANTS)
        response, conversation = self._one_of(tenant, "r"), self._one_of(tenant, "c")
        chance = self.rng.random() if number > 1 else 1.0
        if chance < 0.15 and response is not None:
            database.delete(tenant, response)
        elif chance < 0.25 and conversation is not None:
            database.delete_conversation(tenant, conversation)
        elif chance < 0.35 and conversation is not None:
            database.add_items(tenant, conversation, self._items(f"i{number}"), most=None)
        elif chance < 0.5:
            database.begin_conversation(
                tenant, f"c{number}", b'{"topic":"sea"}', self._items(f"i{number}")
            )
        else:
            within = conversation if self.rng.random() < 0.3 else None
            database.put(
                tenant,
                FinishedResponse(
                    id=f"r{number}",
                    previous=response if within is None and self.rng.random() < 0.7 else None,
                    conversation=within,
                    head=b'{"id":"r%d"}' % number,
                    input=self._items(f"in{number}"),
                    output=self._items(f"out{number}"),
                ),
            )

    def play(self) -> None:
        """Make all changes, with restarts in between."""
        say(json.dumps(found_in(self.database, self.steps)))
        for number in range(self.steps):
            say("begin")
            self.step(number)
            say(json.dumps(found_in(self.database, self.steps)))
            if number % 5 == 4:
                self.database.close()
                self.database = open_database(self.data)
        self.database.close()


PLANTED = {
    "SQLite commits without fsync": careless_sqlite,
    "each statement is a transaction": lambda: other_sqlite(
        {"BEGIN IMMEDIATE": "SELECT 1", "COMMIT": "SELECT 1"}
    ),
}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seed", default="1")
    parser.add_argument("--planted", choices=sorted(PLANTED))
    given = parser.parse_args()
    with PLANTED[given.planted]() if given.planted else contextlib.nullcontext():
        Teller(given.data, random.Random(given.seed), given.steps).play()


if __name__ == "__main__":
    main()
