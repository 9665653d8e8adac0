"""Aliases, labels, rollback, history, budgets and self-test, and the caller's name."""

from __future__ import annotations

import getpass
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from veneer_client import (
    AdapterState,
    AliasTarget,
    BudgetUse,
    Client,
    EvictMode,
    Text,
)
from veneer_client.reflection import ReflectionClient
from veneer_proto.v1 import adapters_pb2 as pb
from veneer_registry.errors import (
    AdapterNotFound,
    Draining,
    EtagMismatch,
    InvalidField,
    Unimplemented,
)

from tests.refused import refused
from tests.unit.client.drivers import Driver, driver
from tests.unit.client.fake_server import FakeServer, Refusal

DRAINING = Refusal(grpc.StatusCode.UNAVAILABLE, "stopping", "DRAINING", retry_s=0.001)


def last(server: FakeServer) -> Any:
    return server.calls[-1][1]


def two(server: FakeServer) -> tuple[str, str]:
    """Two revisions of ``chat``: the older one and the current one."""
    older = server.add("chat").revision
    return older, server.replace("chat").revision


# ------------------------------------------------------------------------ aliases


def test_an_alias_moves_is_shared_out_rolled_back_and_removed(
    server: FakeServer, client: Driver
) -> None:
    older, newer = two(server)
    first = client.set_alias("chat/prod", older[:12])
    assert first.previous == ()
    assert first.alias.alias == "chat/prod"
    assert first.alias.targets == (AliasTarget(older, 1),)
    assert first.alias.updated == datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)

    shared = client.set_alias("chat/prod", targets={older: 90, newer: 10})
    assert shared.previous == first.alias.targets
    assert shared.alias.targets == (AliasTarget(older, 90), AliasTarget(newer, 10))
    assert client.list_aliases("chat") == (shared.alias,)
    assert client.list_aliases("sql") == ()
    assert client.list_aliases() == (shared.alias,)

    back = client.set_alias("chat/prod", rollback=True)
    assert back.alias.targets == first.alias.targets
    again = client.set_alias("chat/prod", targets=shared.alias.targets)
    assert again.alias.targets == shared.alias.targets, "as records, too"

    gone = client.set_alias("chat/prod", remove=True, etag=again.alias.etag)
    assert (gone.alias.targets, gone.previous) == ((), shared.alias.targets)
    assert client.list_aliases() == ()


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"revision": "1" * 12, "rollback": True},
        {"targets": {"1" * 12: 1}, "remove": True},
        {"rollback": True, "remove": True},
    ],
    ids=str,
)
def test_an_alias_means_one_thing(
    asked: dict[str, Any], server: FakeServer, client: Driver
) -> None:
    with refused(InvalidField, one_of="revision targets rollback remove"):
        client.set_alias("chat/prod", **asked)
    assert server.calls == []


def test_an_alias_that_moved_meanwhile(server: FakeServer, client: Driver) -> None:
    older, _ = two(server)
    etag = client.set_alias("chat/prod", older).alias.etag
    client.set_alias("chat/prod", older)
    with pytest.raises(EtagMismatch):
        client.set_alias("chat/prod", older, etag=etag)
    with pytest.raises(AdapterNotFound):
        client.set_alias("chat/prod", "0" * 12)


def test_a_move_is_never_repeated(server: FakeServer, client: Driver) -> None:
    """A rollback would go back to where the first of two equal moves went."""
    older, _ = two(server)
    server.refusals.append(DRAINING)
    with pytest.raises(Draining):
        client.set_alias("chat/prod", older)
    assert server.count("SetAlias") == 1


def test_a_handle_of_an_alias_stays_with_its_revision(
    server: FakeServer, client: Driver
) -> None:
    older, newer = two(server)
    client.set_alias("chat/prod", older)

    def use(handle: Any) -> str:
        server.aliases["chat/prod"][-1].targets[0].revision = newer
        return str(handle.generate(Text("hi"), session_key="ada").text)

    assert client.inside(client.adapter("chat/prod"), use) == f"chat@{older}>hi"
    assert last(server).session_key == "ada"


def test_a_session_key_goes_with_every_kind_of_call(server: FakeServer, client: Driver) -> None:
    client.generate(Text("x"), adapter="chat/prod", session_key="k1")
    client.stream(Text("x"), adapter="chat/prod", session_key="k2")
    client.chat([{"role": "user", "content": "x"}], session_key="k3")
    assert [request.session_key for _, request in server.calls] == ["k1", "k2", "k3"]


# ------------------------------------------------------------- what is said of one


def test_only_what_is_given_is_changed(server: FakeServer, client: Driver) -> None:
    server.add("chat").labels.update({"team": "x", "stage": "dev"})
    info = client.update_adapter("chat", labels={"team": "y"}, remove_labels=["stage"])
    assert info.labels == {"team": "y"}
    request = last(server)
    for field in ("pinned", "retain", "current", "shared"):
        assert not request.HasField(field)
    assert client.update_adapter("chat", retain=0).retain == 0
    assert last(server) == pb.UpdateAdapterRequest(name="chat", retain=0)
    client.update_adapter("chat", pinned=False)
    assert last(server) == pb.UpdateAdapterRequest(name="chat", pinned=False)
    assert client.update_adapter("chat", shared=True).shared
    assert last(server) == pb.UpdateAdapterRequest(name="chat", shared=True)
    assert not client.update_adapter("chat", shared=False).shared


def test_a_kept_revision_comes_back(server: FakeServer, client: Driver) -> None:
    older, newer = two(server)
    etag = client.get("chat").adapter.etag
    with pytest.raises(EtagMismatch):
        client.update_adapter(f"chat@{older}", current=True, etag="of before")
    info = client.update_adapter(f"chat@{older}", current=True, etag=etag)
    assert (info.revision, info.current) == (older, True)
    details = client.get("chat")
    assert details.adapter.revision == older
    assert [(r.revision, r.current) for r in details.revisions] == [
        (newer, False),
        (older, True),
    ]


@pytest.mark.parametrize(
    ("etag", "calls"), [("", 2), ("e1", 1)], ids=["repeated", "not with an etag"]
)
def test_an_update_is_repeated_where_that_is_safe(
    etag: str, calls: int, server: FakeServer, client: Driver
) -> None:
    server.add("chat")
    server.refusals.append(DRAINING)
    try:
        client.update_adapter("chat", retain=3, etag=etag)
    except Draining:
        assert etag
    assert server.count("UpdateAdapter") == calls


@pytest.mark.parametrize(
    "change", [{"retain": -1}, {"retain": 1 << 40}, {"labels": {"team": 7}}], ids=str
)
def test_values_that_fit_no_field(
    change: dict[str, Any], server: FakeServer, client: Driver
) -> None:
    with refused(InvalidField, field="request"):
        client.update_adapter("chat", **change)
    assert server.calls == []


def test_state_aliases_and_sizes_are_told(server: FakeServer, client: Driver) -> None:
    adapter = server.add("chat")
    adapter.aliases.extend(["chat/prod", "chat/beta"])
    info = client.get("chat").adapter
    assert (info.state, info.aliases) == (AdapterState.READY, ("chat/prod", "chat/beta"))
    assert (info.disk_bytes, info.retain) == (3 << 20, 2)
    assert (info.shared, info.tenant) == (False, "")
    adapter.shared, adapter.tenant = True, "team-a"
    info = client.get("chat").adapter
    assert (info.shared, info.tenant) == (True, "team-a")
    for wire, state in (
        (pb.ADAPTER_STATE_QUARANTINED, AdapterState.QUARANTINED),
        (pb.ADAPTER_STATE_OTHER_BASE, AdapterState.OTHER_BASE),
        (pb.ADAPTER_STATE_UNSPECIFIED, AdapterState.UNKNOWN),
    ):
        adapter.state = wire
        assert client.get("chat").adapter.state is state


def test_every_state_of_the_contract_has_a_record() -> None:
    names = {name.removeprefix("ADAPTER_STATE_") for name in pb.AdapterState.keys()}  # noqa: SIM118
    assert names - {"UNSPECIFIED"} == {state.name for state in AdapterState} - {"UNKNOWN"}


def test_deleting_says_what_becomes_of_requests(server: FakeServer, client: Driver) -> None:
    server.add("chat")
    client.delete("chat", mode=EvictMode.FAIL_IF_BUSY)
    assert last(server).mode == pb.EVICT_MODE_FAIL_IF_BUSY


def test_history_goes_through_all_pages(server: FakeServer, client: Driver) -> None:
    server.add("chat"), server.add("sql")
    for number in range(5):
        client.update_adapter("chat", labels={"n": str(number)})
    client.update_adapter("sql", retain=1)
    found = client.collect("history", "chat", page_size=2)
    assert [entry.event for entry in found] == ["labels"] * 5
    assert found[0].time > found[-1].time, "newest first"
    assert (found[0].name, found[0].actor, found[0].peer) == (
        "chat",
        "ada@desk",
        "ipv4:127.0.0.1:1",
    )
    assert found[0].short == f"chat@{server.adapters['chat'].revision[:12]}"
    assert server.count("GetHistory") == 3
    assert len(client.collect("history")) == 6


# ------------------------------------------------------------------------ the server


def test_budgets_are_read_and_changed(server: FakeServer, client: Driver) -> None:
    assert client.update_budgets() == BudgetUse(4096, 2048, 1024, 4096)
    assert last(server) == pb.UpdateBudgetsRequest()
    assert client.update_budgets(host_cache_bytes=0).host_cache_bytes == 0
    assert last(server) == pb.UpdateBudgetsRequest(host_cache_bytes=0)
    assert client.update_budgets(device_adapter_bytes=1 << 40).device_adapter_bytes == 1 << 40
    with pytest.raises(InvalidField):
        client.update_budgets(host_cache_bytes=-1)


def test_self_test(server: FakeServer, client: Driver) -> None:
    server.add("chat"), server.add("sql")
    test = client.self_test(["chat", "sql"])
    assert (test.passed, test.adapters_mixed) == (True, 2)
    assert [result.adapter.partition("@")[0] for result in test.results] == ["", "chat", "sql"]
    server.wrong.add("sql")
    wrong = client.self_test(["chat", "sql"])
    assert [result.passed for result in wrong.results] == [True, True, False]
    assert not wrong.passed
    assert wrong.results[-1].max_difference == pytest.approx(0.5)
    assert wrong.results[-1].detail == "answers as chat does"


def test_a_self_test_takes_the_time_it_takes(kind: str, server: FakeServer) -> None:
    """References are computed: the client's own deadline is for short calls."""
    seen: list[float | None] = []
    self_test = server.SelfTest

    def noted(request: Any, context: grpc.ServicerContext) -> Any:
        seen.append(context.time_remaining())
        return self_test(request, context)

    server.SelfTest = noted  # type: ignore[method-assign]
    server.restart()
    with driver(kind, server.address, timeout_s=7.0) as client:
        client.self_test()
        client.self_test(timeout_s=5.0)
    longest, short = seen
    assert longest is None or longest > 1e6
    assert short is not None
    assert short < 6.0, "its own, if given"


# ------------------------------------------------------------------------- the actor


def every_kind_of_call(client: Driver, folder: Path) -> None:
    client.generate(Text("x"))
    client.stream(Text("x"))
    client.push(folder, "chat")
    client.get("chat")
    client.take(client.watch(), 1)
    client.health()


@pytest.mark.parametrize(
    ("given", "variable", "actor"),
    [
        (None, None, f"{getpass.getuser()}@{socket.gethostname()}"),
        (None, "ci@runner", "ci@runner"),
        ("ada", "ci@runner", "ada"),
        ("Zoë 👩\n", None, "Zo? ?"),
        ("", "  ", f"{getpass.getuser()}@{socket.gethostname()}"),
        ("x" * 999, None, "x" * 128),
    ],
    ids=["user and host", "variable", "argument", "not ASCII", "nothing", "long"],
)
def test_every_call_says_who_calls(
    given: str | None,
    variable: str | None,
    actor: str,
    kind: str,
    server: FakeServer,
    adapter_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("VENEER_ACTOR", raising=False)
    if variable is not None:
        monkeypatch.setenv("VENEER_ACTOR", variable)
    server.watches.append([pb.WatchAdaptersResponse(event=pb.ADAPTER_EVENT_SYNCED)])
    with driver(kind, server.address, actor=given) as client:
        every_kind_of_call(client, adapter_folder)
    assert server.actors == [actor] * len(server.calls)


def test_calls_by_name_say_it_too(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENEER_ACTOR", "ada")
    with ReflectionClient(server.address) as client:
        list(client.call("GetServerInfo", ""))
    assert server.actors == ["ada"]


def test_a_user_without_a_name(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under a bare number."""

    def nameless() -> str:
        raise KeyError("uid not found")

    monkeypatch.delenv("VENEER_ACTOR", raising=False)
    monkeypatch.setattr(getpass, "getuser", nameless)
    with Client(server.address) as client:
        client.info()
    assert server.actors == [f"unknown@{socket.gethostname()}"]


def test_an_older_server_says_what_it_does_not_know(server: FakeServer, client: Driver) -> None:
    server.refusals.append(
        Refusal(grpc.StatusCode.UNIMPLEMENTED, "SetAlias comes later", "UNIMPLEMENTED")
    )
    with refused(Unimplemented):
        client.set_alias("chat/prod", "1" * 12)
