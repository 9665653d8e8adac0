"""The audit log: what it says, what it must not say, and what a full disk does to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import grpc
import httpx
from veneer_proto.v1 import adapters_pb2, inference_pb2
from veneer_registry.errors import InvalidField, PermissionDenied
from veneer_server.access.audit import Audit
from veneer_server.access.edit_keys import add_key

from tests.refused import refused
from tests.unit.server.rpc.front_harness import (
    failure,
    make_adapter,
    prompt,
    running,
    until,
    upload,
)

DELETE = "/veneer.v1.AdapterService/DeleteAdapter"
SECRETS = ("whisper this", "vn_")
KINDS = ("written", "lost")


def counted(page: str) -> tuple[int, int]:
    """Lines written and lost, by the metrics page."""
    found = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    written, lost = (float(found[f"veneer_audit_lines_{kind}_total"]) for kind in KINDS)
    return int(written), int(lost)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


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
    found = lines(file)
    assert file.stat().st_mode & 0o077 == 0
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
        ("DeleteAdapter", None, "UNAUTHENTICATED", None),
        ("DeleteAdapter", "admin-1", "NOT_FOUND", "nothing"),
        ("completions", None, "UNAUTHENTICATED", None),
        ("DeleteAdapter", "admin-1", "OK", "chat"),
    ]
    assert found[0]["revision"] == made.adapter.revision
    assert (found[0]["tenant"], found[0]["from"][:5]) == ("t1", "ipv4:")
    text = file.read_text("utf-8")
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
        audit.note(DELETE, "ipv4:1.2.3.4:5", request=request)
    audit.close()
    audit.close()
    files = sorted(tmp_path.iterdir())
    assert [each.name for each in files] == ["audit.jsonl", "audit.jsonl.1", "audit.jsonl.2"]
    for each in files:
        assert each.stat().st_size <= 2000
        assert each.stat().st_mode & 0o077 == 0
        assert lines(each)
    assert lines(file)[-1]["adapter"] == "n99"


def test_a_full_disk_stops_no_call(tmp_path: Path) -> None:
    audit = Audit(Path("/dev/full"))
    for _ in range(5):
        audit.note(DELETE, "ipv4:1.2.3.4:5", PermissionDenied("no"))
    audit.close()
    assert audit.lost == 5


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
    audit.note(DELETE, "ipv4:1.2.3.4:5", request=request)
    audit.close()
    (line,) = lines(file)
    assert len(line["adapter"]) == 200
    assert "who" not in line


def test_grpc_codes_are_names(tmp_path: Path) -> None:
    """An outcome is what a client of gRPC sees."""
    assert PermissionDenied.code in grpc.StatusCode.__members__
