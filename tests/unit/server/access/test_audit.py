"""The audit log: what it says, what it must not say, and what a full disk does to it."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from veneer_proto.v1 import adapters_pb2, inference_pb2
from veneer_registry.errors import (
    AdapterNotFound,
    Cancelled,
    InvalidField,
    PermissionDenied,
    RateLimitExceeded,
    Unauthenticated,
    VeneerError,
)
from veneer_server.access.audit import Audit
from veneer_server.access.caller import Caller
from veneer_server.access.edit_keys import add_key
from veneer_server.access.principal import ANYONE, Principal
from veneer_server.quotas.quota import UNLIMITED, Account

from tests.refused import refused
from tests.unit.server.rpc.front_harness import (
    failure,
    make_adapter,
    prompt,
    running,
    until,
    upload,
)

GENERATE = "/veneer.v1.InferenceService/Generate"
DELETE = "/veneer.v1.AdapterService/DeleteAdapter"
DELETES = Caller(method=DELETE, peer="ipv4:1.2.3.4:5")
SECRETS = ("whisper this", "vn_")
KINDS = ("written", "lost")


def counted(page: str) -> tuple[int, int]:
    """Lines written and lost, by the metrics page."""
    found = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    written, lost = (float(found[f"veneer_audit_lines_{kind}_total"]) for kind in KINDS)
    return int(written), int(lost)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


@pytest.mark.push
async def test_changes_and_refusals_are_noted_with_who_and_what(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    keys_file, data = tmp_path / "keys.toml", tmp_path / "front"
    keys = {
        role: add_key(keys_file, name=f"{role}-1", tenant="t1", roles=[role], expires=None).key
        for role in ("inference", "admin")
    }

    def bearer(role: str) -> Any:
        return (("authorization", f"Bearer {keys[role]}"),)

    folder = make_adapter(tmp_path / "a")
    async with running(
        base_folder, front_cache, data, keys_file=str(keys_file), openai_listen="127.0.0.1:0"
    ) as front:
        made = await front.adapters.UploadAdapter(
            upload(folder, "chat"), metadata=bearer("admin")
        )
        await front.inference.Generate(prompt("whisper this"), metadata=bearer("inference"))
        delete = adapters_pb2.DeleteAdapterRequest(name="chat")
        await failure(front.adapters.DeleteAdapter(delete, metadata=bearer("inference")))
        await failure(front.adapters.DeleteAdapter(delete))
        missing = adapters_pb2.DeleteAdapterRequest(name="nothing")
        await failure(front.adapters.DeleteAdapter(missing, metadata=bearer("admin")))
        async with httpx.AsyncClient(trust_env=False) as http:
            url = f"http://{front.addresses['openai']}/v1/completions"
            body = {"model": "smollm2-135m", "prompt": "whisper this"}
            await http.post(url, json=body, headers={"authorization": "Bearer vn_x_y"})
        await front.adapters.DeleteAdapter(delete, metadata=bearer("admin"))
    file = data / "data" / "audit.jsonl"
    strangers = data / "data" / "audit.refused.jsonl"
    found = [*lines(file), *lines(strangers)]
    assert (file.stat().st_mode | strangers.stat().st_mode) & 0o077 == 0
    told = [
        (
            each["method"].rpartition("/")[2],
            each.get("who"),
            each["outcome"],
            each.get("adapter"),
        )
        for each in found
    ]
    assert told == [
        ("UploadAdapter", "admin-1", "OK", "chat"),
        ("DeleteAdapter", "inference-1", "PERMISSION_DENIED", None),
        ("DeleteAdapter", "admin-1", "NOT_FOUND", "nothing"),
        ("DeleteAdapter", "admin-1", "OK", "chat"),
        ("DeleteAdapter", None, "UNAUTHENTICATED", None),
        ("completions", None, "UNAUTHENTICATED", None),
    ]
    assert found[0]["revision"] == made.adapter.revision
    assert (found[0]["tenant"], found[0]["from"][:5]) == ("t1", "ipv4:")
    text = file.read_text("utf-8") + strangers.read_text("utf-8")
    for secret in (*SECRETS, *keys.values(), str(tmp_path)):
        assert secret not in text


async def test_a_change_whose_caller_leaves_is_noted(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    """It may have taken effect."""
    log = tmp_path / "audit.jsonl"
    folder = make_adapter(tmp_path / "a")
    async with running(
        base_folder, front_cache, tmp_path / "front", audit_log=str(log)
    ) as front:
        call = front.adapters.UploadAdapter()
        await call.write(next(iter(upload(folder, "chat"))))
        await until(lambda: front.calls == 1)
        call.cancel()
        await until(lambda: front.calls == 0)
    assert [(each["method"][-13:], each["outcome"]) for each in lines(log)] == [
        ("UploadAdapter", "CANCELLED")
    ]


@pytest.mark.push
async def test_without_keys_there_is_none_unless_it_is_asked_for(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    log = tmp_path / "audit.jsonl"
    async with running(base_folder, front_cache, tmp_path / "one") as front:
        await failure(front.adapters.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(name="x")))
    assert not (tmp_path / "one" / "data" / "audit.jsonl").exists()
    async with running(base_folder, front_cache, tmp_path / "two", audit_log=str(log)) as front:
        await failure(front.adapters.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(name="x")))
        await front.inference.Generate(
            prompt(stopping=inference_pb2.StoppingOptions(max_tokens=1))
        )
    assert [each["outcome"] for each in lines(log)] == ["NOT_FOUND"]


def test_the_file_is_rotated_and_stays_private(tmp_path: Path) -> None:
    file = tmp_path / "audit.jsonl"
    audit = Audit(file, most_bytes=2000, kept=2)
    for number in range(100):
        request = adapters_pb2.DeleteAdapterRequest(name=f"n{number}")
        audit.note(DELETES, request=request)
    audit.close()
    audit.close()
    files = sorted(tmp_path.iterdir())
    assert [each.name for each in files] == ["audit.jsonl", "audit.jsonl.1", "audit.jsonl.2"]
    for each in files:
        assert each.stat().st_size <= 2000
        assert each.stat().st_mode & 0o077 == 0
        assert lines(each)
    assert lines(file)[-1]["adapter"] == "n99"


def of(directory: Path, name: str = "") -> list[dict[str, Any]]:
    """All lines of a history that are left."""
    suffixes = (*(f".{n}" for n in range(9, 0, -1)), "")
    files = [directory / f"audit{name}.jsonl{suffix}" for suffix in suffixes]
    return [line for file in files if file.exists() for line in lines(file)]


def size(directory: Path) -> int:
    return sum(each.stat().st_size for each in directory.iterdir())


class Log:
    """An audit log of a server with keys, with a clock that is set."""

    def __init__(self, directory: Path) -> None:
        self.now = 0.0
        self.directory = directory
        self.audit = Audit(
            directory / "audit.jsonl", keyed=True, most_bytes=300_000, clock=lambda: self.now
        )

    def note(
        self,
        who: Principal,
        error: VeneerError | None = None,
        *,
        method: str = DELETE,
        peer: str = "ipv4:1.2.3.4:5",
        name: str = "x",
    ) -> None:
        request = adapters_pb2.DeleteAdapterRequest(name=name)
        self.audit.note(Caller(who, method=method, peer=peer), error, request=request)
        while self.audit._lines.qsize() > 4000:  # private: as slow callers would
            pass


ADMIN = Principal("ann", "t1", frozenset({"admin"}), (Account("key:a", UNLIMITED),))
LOW = Principal("bob", "t1", frozenset({"inference"}), (Account("key:b", UNLIMITED),))
PUBLISHER = Principal("eve", "t2", frozenset({"publisher"}), (Account("key:c", UNLIMITED),))
FLOODS: dict[str, tuple[Principal, VeneerError | None, tuple[str, ...]]] = {
    "no key": (ANYONE, Unauthenticated("no"), (DELETE, GENERATE)),
    "no key, left at once": (ANYONE, Cancelled("left"), (DELETE,)),
    "low, admin calls": (LOW, PermissionDenied("no"), (DELETE,)),
    "low, over its limit": (LOW, RateLimitExceeded("no"), (GENERATE,)),
    "changes": (PUBLISHER, None, (DELETE,)),
    "nothing found": (PUBLISHER, AdapterNotFound("no"), (DELETE,)),
}


@pytest.mark.push
@pytest.mark.parametrize("flood", FLOODS)
def test_no_caller_flushes_what_others_changed(tmp_path: Path, flood: str) -> None:
    """Two hours of 3 to 6 calls a second, from hosts and with names at random; files are
    0.3 MB here, of 64."""
    rng = random.Random(seed := random.randrange(2**32))
    print(f"{seed=}")
    log = Log(tmp_path)
    rate = rng.uniform(3, 6)
    hosts = [f"ipv4:10.0.{rng.randrange(256)}.{n}" for n in range(rng.choice([1, 40, 250]))]
    who, error, methods = FLOODS[flood]
    log.note(ADMIN, name="before")
    for _ in range(sent := int(7200 * rate)):
        log.now += 1 / rate
        peer = f"{rng.choice(hosts)}:{rng.randrange(1024, 65536)}"
        name = f"n{rng.randrange(1000)}"
        log.note(who, error, method=rng.choice(methods), peer=peer, name=name)
    log.note(ADMIN, name="after")
    log.note(LOW, PermissionDenied("no"), name="refused")
    log.audit.close()
    kept = of(tmp_path)
    print(f"{sent} calls, {size(tmp_path)} bytes, {len(kept)} lines of changes")
    assert log.audit.lost == 0
    assert [line["adapter"] for line in kept if line["who"] == "ann"] == ["before", "after"]
    # A known caller's changes fill at most their share, two hours of it here.
    assert len(json.dumps(kept)) <= 16 * 1024 * (120 + 17) * 1.1
    refused = of(tmp_path, ".refused")
    assert any(line.get("left_out") for line in refused) or flood == "changes"
    if error is None:
        assert log.audit.left_out == 0, "each change has its line, if not among the others"
        assert of(tmp_path, ".frequent")


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    """The lines and the counts together are the calls."""
    log = Log(tmp_path)
    for number in range(5000):
        log.now += 0.05
        log.note(ANYONE, Unauthenticated("no"), peer=f"ipv4:10.0.0.{number % 3}:1")
    log.audit.close()
    found = of(tmp_path, ".refused")
    told = [line["left_out"] for line in found if "left_out" in line]
    assert len(told) == 250 // 60 + 1, "a line a minute"
    assert sum(told) == log.audit.left_out
    assert sum(told) + len(found) - len(told) == 5000


def test_a_stranger_s_flood_hides_no_other_host_and_no_caller(tmp_path: Path) -> None:
    log = Log(tmp_path)
    for _ in range(2000):
        log.note(ANYONE, Unauthenticated("no"), method=GENERATE, peer="ipv4:6.6.6.6:1")
    log.note(ANYONE, Unauthenticated("no"), method=DELETE, peer="ipv4:7.7.7.7:1")
    log.note(LOW, RateLimitExceeded("no"), method=GENERATE, peer="ipv4:8.8.8.8:1")
    log.audit.close()
    found = of(tmp_path, ".refused")
    assert {"ipv4:7.7.7.7:1", "ipv4:8.8.8.8:1"} <= {line.get("from") for line in found}
    assert of(tmp_path) == []


@pytest.mark.parametrize("form", ["ipv6:%5B2001:db8:0:{}::{:x}%5D:1", "2001:db8:0:{}::{:x}:1"])
def test_a_network_of_ipv6_is_one_host(tmp_path: Path, form: str) -> None:
    """One machine has 2**64 addresses; all of them have the share of one."""
    log = Log(tmp_path)
    for n in range(1, 2000):
        log.note(ANYONE, Unauthenticated("no"), method=GENERATE, peer=form.format(6, n))
    log.note(ANYONE, Unauthenticated("no"), method=GENERATE, peer=form.format(7, 1))
    log.audit.close()
    assert form.format(7, 1) in [line.get("from") for line in of(tmp_path, ".refused")]


def test_callers_of_two_tenants_with_one_name_have_a_share_each(tmp_path: Path) -> None:
    """Names such as "ci" are common, and a tenant's key may be called like another's."""
    log = Log(tmp_path)
    ours, theirs = (Principal("ci", tenant, frozenset({"admin"})) for tenant in ("t1", "t2"))
    for _ in range(2500):
        log.note(theirs)
    log.note(ours, name="ours")
    for _ in range(2500):
        log.note(theirs, AdapterNotFound("no"))
    log.note(ours, PermissionDenied("no"), name="refused")
    log.audit.close()
    assert of(tmp_path, ".frequent"), "theirs"
    assert [line["adapter"] for line in of(tmp_path) if line["tenant"] == "t1"] == [
        "ours",
        "refused",
    ]


def test_a_change_whose_call_was_ended_is_kept_beyond_the_share(tmp_path: Path) -> None:
    """It may have taken effect, though its key was revoked meanwhile."""
    log = Log(tmp_path)
    for _ in range(5000):
        log.note(PUBLISHER, AdapterNotFound("no"))
    for ended in (True, False):
        log.note(
            PUBLISHER,
            Unauthenticated("no", metadata={"ended": "true"} if ended else {}),
            name=f"ended {ended}",
        )
    log.audit.close()
    (kept,) = of(tmp_path, ".frequent")
    assert (kept["adapter"], kept["ended"]) == ("ended True", True)


def test_a_device_gets_every_history(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    audit = Audit(Path(f"/proc/self/fd/{writing}"), keyed=True)
    audit.note(DELETES, Unauthenticated("no"))
    audit.close()
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert json.loads(pipe.read())["outcome"] == "UNAUTHENTICATED"


def test_no_history_is_given_up_where_no_new_file_can_be_made(tmp_path: Path) -> None:
    """The disk has no room for another file: rotation fails at each line."""
    log = Log(tmp_path)
    for _ in range(5):
        log.note(ADMIN, name="n" * 150)
    (tmp_path / "audit.jsonl.new").mkdir()
    log.audit.files[next(iter(log.audit.files))].most = 2000  # private: no 64 MiB
    for _ in range(50):
        log.note(ADMIN, name="m" * 150)
    log.audit.close()
    assert log.audit.lost > 40
    assert [line["adapter"][0] for line in of(tmp_path)][:5] == ["n"] * 5


def test_a_full_disk_stops_no_call(tmp_path: Path) -> None:
    audit = Audit(Path("/dev/full"))
    for _ in range(5):
        audit.note(DELETES, PermissionDenied("no"))
    audit.close()
    assert audit.lost == 5


@pytest.mark.push
async def test_lost_and_written_lines_are_metrics(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    for log, told in (("/dev/full", (0, 3)), (str(tmp_path / "audit.jsonl"), (3, 0))):
        async with running(
            base_folder, front_cache, tmp_path / "front", audit_log=log
        ) as front:
            for name in ("x", "y", "z"):
                gone = adapters_pb2.DeleteAdapterRequest(name=name)
                await failure(front.adapters.DeleteAdapter(gone))
            # Lines are written by a thread of their own.
            while counted(await front.metrics()) != told:
                pass


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with refused(InvalidField, key="audit_log"):
        Audit(tmp_path / "missing" / "audit.jsonl")


def test_what_a_caller_writes_stays_in_its_line(tmp_path: Path) -> None:
    file = tmp_path / "audit.jsonl"
    audit = Audit(file)
    request = adapters_pb2.DeleteAdapterRequest(name='x"}\n{"who": "admin' + "y" * 10_000)
    audit.note(DELETES, request=request)
    audit.close()
    (line,) = lines(file)
    assert len(line["adapter"]) == 200
    assert "who" not in line


def test_grpc_codes_are_names(tmp_path: Path) -> None:
    """An outcome is what a client of gRPC sees."""
    assert PermissionDenied.code in grpc.StatusCode.__members__
