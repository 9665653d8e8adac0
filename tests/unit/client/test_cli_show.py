"""``veneer adapter show``: main facts first, everything with ``--full``, JSON unchanged."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from veneer_proto.v1 import inference_pb2

from tests.unit.client.fake_server import FakeServer

Run = Callable[..., Any]


@pytest.fixture
def adapter(server: FakeServer) -> Any:
    made = server.add("sql")
    made.leases, made.bytes, made.pinned = 2, 5 << 20, True
    made.tier = inference_pb2.TIER_DEVICE
    made.aliases.append("sql/prod")
    made.labels["team"] = "data"
    made.training.update(
        {"config.lora.alpha": "16.0", "metrics.loss": "0.04", "note": "[red]x"}
    )
    return made


def rows(text: str) -> dict[str, str]:
    pairs = (line.split("  ", 1) for line in text.splitlines() if not line.startswith(" "))
    return {label.strip(): rest.strip() for label, rest in pairs}


def test_it_starts_with_the_facts(adapter: Any, run: Run) -> None:
    found = rows(run("adapter", "show", "sql").stdout)
    assert list(found)[:12] == [
        "name",
        "revision",
        "state",
        "rank",
        "alpha",
        "targets",
        "size",
        "base model",
        "created",
        "aliases",
        "resident",
        "in use",
    ]
    assert found["name"] == "sql"
    assert found["revision"] == adapter.revision
    assert (found["rank"], found["alpha"], found["targets"]) == ("4", "16.0", "q_proj")
    assert found["size"] == "5.0 MiB in memory, 3.0 MiB on disk"
    assert found["aliases"] == "sql/prod"
    assert found["resident"] == "in device memory, pinned"
    assert found["in use"].startswith("2 requests, last used ")
    assert found["label team"] == "data"
    assert (
        found["manifest"]
        == f"3 facts: `veneer adapter show sql@{adapter.revision[:12]} --full`"
    )
    assert not [label for label in found if label.startswith("training")]


def test_full_has_the_manifest_too(adapter: Any, run: Run) -> None:
    brief = rows(run("adapter", "show", "sql").stdout)
    full = rows(run("adapter", "show", "sql", "--full").stdout)
    assert brief.items() - full.items() == {("manifest", brief["manifest"])}
    assert full["etag"] == "e1"
    assert full["weights"] == adapter.weights_digest
    assert full["training metrics.loss"] == "0.04"
    assert full["training note"] == "[red]x"


def test_where_it_is_when_it_is_in_no_memory(server: FakeServer, run: Run) -> None:
    server.add("sql")
    found = rows(run("adapter", "show", "sql").stdout)
    assert found["resident"] == "not in memory, on disk only"
    assert found["in use"].startswith("0 requests")
    assert found["alpha"] == "not in its training manifest"
    assert "manifest" not in found


def test_json_is_the_whole_record_with_and_without_full(adapter: Any, run: Run) -> None:
    brief, full = (
        run("adapter", "show", "sql", "--json", *more).stdout for more in ((), ("--full",))
    )
    assert brief == full
    assert json.loads(brief)["adapter"]["training"]["metrics.loss"] == "0.04"
