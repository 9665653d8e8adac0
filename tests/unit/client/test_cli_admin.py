"""``veneer adapter alias|label|history ...``, ``budgets`` and ``self-test``, and a resumed
push, against the fake server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from veneer_client import calls
from veneer_proto.v1 import adapters_pb2 as pb

from tests.foreign_adapters import EXAMPLE, write_mlx
from tests.unit.client.fake_server import FakeServer
from tests.unit.client.test_cli import complete

Run = Callable[..., Any]


def one_line(failed: Any) -> str:
    """What an error says: one line, and no success."""
    assert failed.exit_code == 1, failed.output
    assert len(failed.stderr.strip().splitlines()) == 1, failed.stderr
    return str(failed.stderr)


def two(server: FakeServer) -> tuple[str, str]:
    """The older and the current revision of ``chat``, in short."""
    older = server.add("chat").revision
    return older[:12], server.replace("chat").revision[:12]


# ------------------------------------------------------------------------ convert


def test_an_mlx_adapter_is_named_converted_and_pushed(
    server: FakeServer, run: Run, tmp_path: Path
) -> None:
    source, out = write_mlx(EXAMPLE, tmp_path / "mlx"), tmp_path / "out"
    said = one_line(run("adapter", "push", str(source), "--name", "chat"))
    assert "veneer adapter convert" in said
    assert server.calls == []
    done = run("adapter", "convert", str(source), str(out))
    assert done.exit_code == 0, done.output
    assert "210 modules, rank 8" in done.stdout
    assert server.calls == [], "no server is needed"
    assert run("push", str(out), "--name", "chat", "--same-base").exit_code == 0
    assert server.uploads[-1].spec.same_base
    assert "exists" in one_line(run("adapter", "convert", str(source), str(out)))


# --------------------------------------------------------------------------- push


def test_push_says_where_it_went_on(server: FakeServer, run: Run, adapter_folder: Path) -> None:
    server.breaks.append(1 << 20)
    done = run("adapter", "push", str(adapter_folder), "--name", "chat")
    assert done.exit_code == 0, done.output
    assert "interrupted; resumed at 1.0 MiB of 2.5 MiB" in done.stderr
    assert done.stdout.startswith("published: chat@")


def test_push_again_goes_on(
    server: FakeServer, run: Run, adapter_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "RECONNECT_S", 0.02)  # this one does not come back
    push = ("adapter", "push", str(adapter_folder), "--name", "chat")
    server.breaks.extend([1 << 20] * 2)
    server.on_break = server.close
    assert "push again to resume" in one_line(run(*push, env={"VENEER_ACTOR": "ada"}))
    server.breaks.clear()
    server.start()
    done = run(*push, "--json", env={"VENEER_ACTOR": "ada"})
    assert "1.0 MiB of 2.5 MiB already on the server" in done.stderr
    assert "interrupted" not in done.stderr
    pushed = json.loads(done.stdout)
    assert (pushed["skipped_bytes"], pushed["resumes"]) == (1 << 20, 0)
    assert set(server.actors) == {"ada"}


def test_push_of_what_is_there(server: FakeServer, run: Run, adapter_folder: Path) -> None:
    run("adapter", "push", str(adapter_folder), "--name", "one")
    done = run("adapter", "push", str(adapter_folder), "--name", "two", "--etag", "e9")
    assert "2.5 MiB already on the server" in done.stderr
    assert server.uploads[-1].spec.etag == "e9"


def test_push_of_damaged_parts(server: FakeServer, run: Run, adapter_folder: Path) -> None:
    def spoil() -> None:
        for files in server.staged.values():
            files["adapter_model.safetensors"][0] ^= 1
        server.restart()

    server.breaks.append(1 << 20)
    server.on_break = spoil
    done = run("adapter", "push", str(adapter_folder), "--name", "chat")
    assert "was damaged: sending all 2.5 MiB again" in done.stderr
    assert done.exit_code == 0


# ------------------------------------------------------------------------- aliases


def test_alias_moves(server: FakeServer, run: Run) -> None:
    older, newer = two(server)
    done = run("adapter", "alias", "chat/prod", older)
    assert done.stdout == f"chat/prod now points to {older}\n"
    shared = ("--canary", f"{older}=90", "--canary", f"chat@{newer}=10")
    assert run("adapter", "alias", "chat/prod", *shared).stdout == (
        f"chat/prod now points to {older}=90 {newer}=10 (before: {older})\n"
    )
    listed = run("adapter", "aliases").stdout
    assert f"chat/prod  {older}=90 {newer}=10" in listed
    assert json.loads(run("adapter", "aliases", "chat", "--json").stdout)[0]["etag"] == "a2"
    back = run("adapter", "rollback", "chat/prod").stdout
    assert back == f"chat/prod now points to {older} (before: {older}=90 {newer}=10)\n"
    gone = run("adapter", "alias", "chat/prod", "--remove", "--etag", "a3", "--json")
    assert json.loads(gone.stdout)["alias"]["targets"] == []
    assert "no aliases of chat: set one" in run("adapter", "aliases", "chat").stdout


def test_alias_rollback_flag(server: FakeServer, run: Run) -> None:
    older, newer = two(server)
    run("adapter", "alias", "chat/prod", older)
    run("adapter", "alias", "chat/prod", f"chat@{newer}")
    done = run("adapter", "alias", "chat/prod", "--rollback")
    assert done.stdout == f"chat/prod now points to {older} (before: {newer})\n"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("alias", "chat/prod"), "needs one of REVISION, --canary"),
        (("alias", "chat/prod", "1" * 12, "--remove"), "needs one of REVISION, --canary"),
        (("alias", "chat/prod", "--canary", "1234"), "is not REVISION=WEIGHT"),
        (("alias", "chat/prod", "--canary", "1234=x"), "is not REVISION=WEIGHT"),
        (("rollback", "chat/prod", "1" * 12), "veneer adapter alias chat/prod 1111"),
        (("rm", "chat/prod"), "veneer adapter alias chat/prod --remove"),
        (("label", "chat"), "veneer adapter label chat KEY=VALUE"),
        (("label", "chat", "team"), "for example veneer adapter label chat team=data"),
        (("evict", "chat", "--mode", "now"), "give drain, fail-if-busy or abort"),
        (("rm", "chat", "--mode", "now"), "give drain, fail-if-busy or abort"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_makes_no_sense_is_told_without_the_server(
    args: tuple[str, ...], says: str, server: FakeServer, run: Run
) -> None:
    assert says in one_line(run("adapter", *args))
    assert server.calls == []


# ------------------------------------------------------------------------ rollback


def test_rollback_goes_one_back_at_a_time(server: FakeServer, run: Run) -> None:
    """From a revision that came back, to the one before it: never forth."""
    oldest, middle = two(server)
    server.replace("chat")
    done = run("adapter", "rollback", "chat")
    assert done.stdout == f"chat now points to chat@{middle}\n"
    assert run("adapter", "rollback", "chat").stdout == f"chat now points to chat@{oldest}\n"
    assert "no earlier revision" in one_line(run("adapter", "rollback", "chat"))


def test_rollback_is_of_what_was_seen(server: FakeServer, run: Run) -> None:
    """Something is published between looking and rolling back."""
    two(server)
    get_adapter = server.GetAdapter

    def publish_after(request: Any, context: Any) -> Any:
        answer = pb.GetAdapterResponse.FromString(
            get_adapter(request, context).SerializeToString()
        )
        server.replace("chat")
        return answer

    server.GetAdapter = publish_after  # type: ignore[method-assign]
    server.restart()
    assert "has changed" in one_line(run("adapter", "rollback", "chat"))


def test_rollback_to_one_that_is_named(server: FakeServer, run: Run) -> None:
    older, newer = two(server)
    server.replace("chat")
    assert older in run("adapter", "rollback", "chat", older).stdout
    assert newer in run("adapter", "rollback", f"chat@{newer}").stdout
    assert json.loads(run("adapter", "rollback", "chat", older, "--json").stdout)["current"]
    assert server.adapters["chat"].revision.startswith(older)


# ------------------------------------------------------------- labels and history


def test_label(server: FakeServer, run: Run) -> None:
    server.add("chat").labels["old"] = "x"
    done = run("adapter", "label", "chat", "team=a=b", "stage=prod", "--remove", "old")
    (adapter,) = server.adapters.values()
    assert dict(adapter.labels) == {"team": "a=b", "stage": "prod"}
    assert done.stdout.startswith("chat@")
    assert "stage=prod" in done.stdout
    run("adapter", "label", "chat", "--remove", "team", "--remove", "stage")
    assert dict(adapter.labels) == {}


def test_retain(server: FakeServer, run: Run) -> None:
    server.add("chat")
    done = run("adapter", "retain", "chat", "5")
    assert done.stdout == "chat keeps 5 superseded revisions\n"
    assert json.loads(run("adapter", "retain", "chat", "0", "--json").stdout)["retain"] == 0


def test_share(server: FakeServer, run: Run) -> None:
    server.add("chat")
    assert run("adapter", "share", "chat").stdout == "chat: all tenants can use it\n"
    assert "(shared)" in run("ls").stdout
    assert "with all tenants" in run("adapter", "show", "chat").stdout
    stopped = run("adapter", "share", "chat", "--stop")
    assert stopped.stdout == "chat: only its own tenant can use it\n"
    server.adapters["chat"].tenant = "team-a"
    assert "(of team-a)" in run("ls").stdout
    assert " 0 " not in run("ls").stdout, "how much others use it is not told"
    assert "team-a (shared by that tenant)" in run("adapter", "show", "chat").stdout


def test_history(server: FakeServer, run: Run) -> None:
    assert "no changes under the name chat yet" in (run("adapter", "history", "chat").stdout)
    server.add("chat"), server.add("sql")
    run("adapter", "retain", "chat", "5")
    run("adapter", "label", "chat", "team=x")
    run("adapter", "retain", "sql", "1")
    table = run("adapter", "history", "chat", env={"COLUMNS": "40"}).stdout.splitlines()
    assert [line.split()[2] for line in table[1:]] == ["labels", "retention"]
    assert table[1].split()[3:6] == ["chat@636861746368", "ada@desk", "ipv4:127.0.0.1:1"]
    found = json.loads(run("adapter", "history", "--limit", "2", "--json").stdout)
    assert [(one["name"], one["event"]) for one in found] == [
        ("sql", "retention"),
        ("chat", "labels"),
    ]


def test_history_shortens_revisions_for_a_reader_alone(server: FakeServer, run: Run) -> None:
    server.add("chat")
    run("adapter", "label", "chat", "team=x")
    server.changes[-1].detail = f"before: {'ab12' * 16}=80"
    assert "before: ab12ab12ab12=80" in run("adapter", "history", "chat").stdout
    assert "ab12" * 16 in run("adapter", "history", "chat", "--json").stdout


def test_show_and_ls_tell_state(server: FakeServer, run: Run) -> None:
    two(server)
    (adapter,) = server.adapters.values()
    adapter.aliases.append("chat/prod")
    (older,) = server.older["chat"]
    assert "quarantined" not in run("adapter", "ls").stdout
    adapter.state = pb.ADAPTER_STATE_QUARANTINED
    adapter.pinned = True
    assert "disk (pinned, quarantined)" in run("adapter", "ls").stdout
    shown = run("adapter", "show", "chat", "--full").stdout
    rows = {line.split("  ")[0].strip(): line for line in shown.splitlines()}
    assert "quarantined" in rows["state"]
    assert "chat/prod" in rows["aliases"]
    assert "2 superseded revisions" in rows["retain"]
    assert "3.0 MiB on disk" in rows["size"]
    assert "(current, chat/prod)" in rows["revisions"]
    assert older.revision[:12] in shown
    found = json.loads(run("adapter", "show", "chat", "--json").stdout)
    assert (found["adapter"]["state"], len(found["revisions"])) == ("quarantined", 2)


def test_modes(server: FakeServer, run: Run) -> None:
    server.add("chat")
    for typed in ("fail-if-busy", "fail_if_busy"):
        assert run("adapter", "evict", "chat", "--mode", typed).exit_code == 0
        assert server.calls[-1][1].mode == pb.EVICT_MODE_FAIL_IF_BUSY
    assert run("adapter", "rm", "chat", "--mode", "abort").exit_code == 0
    assert server.calls[-1][1].mode == pb.EVICT_MODE_ABORT


# ---------------------------------------------------------------------- the server


def test_budgets(server: FakeServer, run: Run) -> None:
    device, host = (line.strip() for line in run("budgets").stdout.splitlines())
    assert device == "device  4.0 KiB of 2.0 KiB (over budget until running requests end)"
    assert host == "host    1.0 KiB of 4.0 KiB"
    assert server.calls[-1][1] == pb.UpdateBudgetsRequest()
    done = run("budgets", "--host", "1.5GiB", "--device", "2GB", "--json")
    assert json.loads(done.stdout)["host_cache_bytes"] == 3 << 29
    assert server.calls[-1][1].device_adapter_bytes == 2 * 10**9


@pytest.mark.parametrize("size", ["1.5.2GiB", "12 parsecs", "-1", "MiB", "1GiBs"])
def test_a_size_that_is_none(size: str, server: FakeServer, run: Run) -> None:
    failed = run("budgets", f"--host={size}")
    assert "give bytes, such as 1073741824, 512MiB or 2GB" in one_line(failed)
    assert server.calls == []


def test_self_test_is_an_exit_status_too(server: FakeServer, run: Run) -> None:
    server.add("chat"), server.add("sql")
    fine = run("self-test", "chat", "sql")
    assert fine.exit_code == 0, fine.output
    assert "passed (2 adapters mixed with others in a batch)" in fine.stdout
    assert "base" in fine.stdout
    server.wrong.add("sql")
    wrong = run("self-test", "chat", "sql")
    assert wrong.exit_code == 1
    assert "FAILED" in wrong.stdout
    assert "answers as chat does" in wrong.stdout
    as_json = run("self-test", "sql", "--json")
    assert (as_json.exit_code, json.loads(as_json.stdout)["passed"]) == (1, False)


@pytest.mark.parametrize("passed", [True, False])
def test_a_self_test_of_no_adapter_says_so(passed: bool, server: FakeServer, run: Run) -> None:
    server.self_test_note = "" if passed else "none of 3 adapters could be tested: no room"
    done = run("self-test")
    assert done.exit_code == (0 if passed else 1)
    told = "passed: no adapter was tested" if passed else "INCONCLUSIVE: none of 3 adapters"
    assert told in done.stdout
    assert "in a batch" not in done.stdout


# --------------------------------------------------------- sessions and completion


def test_generate_with_a_session(server: FakeServer, run: Run) -> None:
    run("generate", "-a", "chat/prod", "hi", "--session", "user-42")
    assert server.calls[-1][1].session_key == "user-42"
    run("generate", "-a", "chat/prod", "hi")
    assert server.calls[-1][1].session_key == ""


def test_generate_with_a_priority(server: FakeServer, run: Run) -> None:
    run("generate", "hi", "--priority", "-3")
    assert server.calls[-1][1].priority == -3
    assert run("generate", "hi", "--priority", "101").exit_code == 2


def sessions(server: FakeServer) -> list[str]:
    return [r.session_key for name, r in server.calls if name == "GenerateStream"]


def test_a_chat_stays_with_its_share(server: FakeServer, run: Run) -> None:
    older, _ = two(server)
    run("adapter", "alias", "chat/prod", older)
    run("chat", "-a", "chat/prod", input="one\ntwo\n")
    run("chat", "-a", "chat/prod", input="three\n")
    first, second, third = sessions(server)
    assert first == second != third
    run("chat", "-a", "chat/prod", "--session", "ada", input="four\n")
    run("chat", "-a", "chat", input="five\n")
    assert sessions(server)[3:] == ["ada", ""], "a name means one revision"


@pytest.mark.push
def test_aliases_and_revisions_are_completed(server: FakeServer, run: Run) -> None:
    older, newer = two(server)
    run("adapter", "alias", "chat/prod", older)
    run("adapter", "alias", "chat/beta", newer)
    address = server.address
    assert complete(address, "generate", "-a", "chat/") == ["chat/beta", "chat/prod"]
    assert complete(address, "adapter", "alias", "chat/p") == ["chat/prod"]
    assert complete(address, "adapter", "alias", "chat/prod", older[:3]) == [older]
    assert set(complete(address, "adapter", "rollback", "chat", "")) == {older, newer}
    assert complete(address, "adapter", "evict", "chat", "--mode", "f") == ["fail-if-busy"]
