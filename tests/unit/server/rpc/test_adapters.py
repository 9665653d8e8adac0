"""AdapterService over a real socket: all-or-nothing uploads, pages, tiers, deletes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from veneer_proto.v1 import adapters_pb2 as pb
from veneer_proto.v1 import inference_pb2, server_pb2
from veneer_registry.errors import AdapterNotFound
from veneer_server.wire.messages import AdapterSource

from tests.unit.server.rpc.front_harness import (
    Front,
    failure,
    make_adapter,
    prompt,
    until,
    upload,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def names(front: Front) -> list[str]:
    listed = await front.adapters.ListAdapters(pb.ListAdaptersRequest())
    return [adapter.name for adapter in listed.adapters]


def staging(front: Front) -> list[Path]:
    store = front.data_dir / "store"
    return [*(store / "staging").iterdir(), *(store / "uploads").iterdir()]


async def test_an_upload_says_what_was_published(front: Front, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", rank=3, template="{{ messages }}")
    (folder / "training_manifest.json").write_text('{"metrics": {"loss": 0.5}}')
    reply = await front.push(folder, "style", labels={"team": "x"}, chunk=1000)
    adapter = reply.adapter
    assert (reply.published, reply.replaced) == (True, False)
    assert (adapter.name, adapter.rank, list(adapter.targets)) == ("style", 3, ["q_proj"])
    assert len(adapter.revision) == len(adapter.weights_digest) == 64
    assert adapter.parameters == 2 * 3 * 576
    assert adapter.bytes == 2 * adapter.parameters
    assert adapter.tier == inference_pb2.TIER_DISK
    assert adapter.has_chat_template
    assert adapter.current
    assert dict(adapter.labels) == {"team": "x"}
    assert adapter.created.seconds > 1_600_000_000
    assert not adapter.HasField("last_used")
    await front.inference.Generate(prompt(adapter="style"))
    got = (await front.adapters.GetAdapter(pb.GetAdapterRequest(name="style"))).adapter
    assert got.last_used.seconds >= adapter.created.seconds
    assert got.etag == adapter.etag


async def test_whose_word_was_taken_for_the_base_is_recorded(
    front: Front, tmp_path: Path
) -> None:
    def named(name: str) -> Path:
        folder = make_adapter(tmp_path / "a")
        config = json.loads((folder / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = name
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    copy = await front.push(named("unsloth/SmolLM2-135M-Instruct-bnb-4bit"), "copy")
    assert copy.adapter.base_word == "rule"
    assert any("unsloth" in warning for warning in copy.warnings)
    for name in ("unsloth/SmolLM2-135M-bnb-4bit", "stranger/SmolLM2-135M-Instruct"):
        refused = await failure(front.push(named(name), "word"))
        assert refused.reason == "BASE_MODEL_MISMATCH"
        assert "`same_base`" in refused.message
        assert refused.metadata["adapter_base"] == name
    said = await front.push(named("stranger/SmolLM2-135M-Instruct"), "word", same_base=True)
    assert said.adapter.base_word == "publisher"
    got = await front.adapters.GetAdapter(pb.GetAdapterRequest(name="word"))
    assert got.adapter.base_word == "publisher"
    history = await front.adapters.GetHistory(pb.GetHistoryRequest(name="word"))
    assert "publisher says" in history.entries[0].detail
    bad = await failure(front.push(named("x/y"), "bad", vocabulary="no digest"))
    assert (bad.reason, bad.metadata["field"]) == ("INVALID_FIELD", "spec.vocabulary")


async def test_facts_of_a_manifest_have_no_control_characters(
    front: Front, tmp_path: Path
) -> None:
    """Also for clients that write them to a terminal as they are."""
    folder = make_adapter(tmp_path / "a")
    facts = {"a\x1b[2J": "x\x1b]52;c;eA==\x07\u202ey\n", "b": {"c": "\x9b2J\x7f\r"}}
    (folder / "training_manifest.json").write_text(json.dumps(facts))
    await front.push(folder, "style")
    got = await front.adapters.GetAdapter(pb.GetAdapterRequest(name="style"))
    assert dict(got.adapter.training) == {
        "a\\u001b[2J": "x\\u001b]52;c;eA==\\u0007\\u202ey\n",
        "b.c": "\\u009b2J\\u007f\\r",
    }


async def test_same_content_again_succeeds_and_other_content_needs_allow_replace(
    front: Front, tmp_path: Path
) -> None:
    first = make_adapter(tmp_path / "a", seed=1)
    second = make_adapter(tmp_path / "b", seed=2)
    one = await front.push(first, "style")
    again = await front.push(first, "style")
    assert (again.published, again.adapter.revision) == (False, one.adapter.revision)
    failed = await failure(front.push(second, "style"))
    assert (failed.code, failed.reason) == (grpc.StatusCode.ALREADY_EXISTS, "ADAPTER_EXISTS")
    two = await front.push(second, "style", allow_replace=True)
    assert two.replaced
    assert two.adapter.etag != one.adapter.etag
    got = await front.adapters.GetAdapter(pb.GetAdapterRequest(name="style"))
    assert [r.revision for r in got.revisions] == [two.adapter.revision, one.adapter.revision]
    assert [r.current for r in got.revisions] == [True, False]


async def test_validate_only_publishes_nothing(front: Front, tmp_path: Path) -> None:
    reply = await front.push(make_adapter(tmp_path / "a"), "style", validate_only=True)
    assert not reply.published
    assert reply.adapter.revision
    assert await names(front) == []
    assert staging(front) == []


async def test_activate_brings_it_to_the_device(front: Front, tmp_path: Path) -> None:
    reply = await front.push(make_adapter(tmp_path / "a"), "style", activate=True)
    assert reply.adapter.tier == inference_pb2.TIER_DEVICE
    info = await front.server.GetServerInfo(server_pb2.GetServerInfoRequest())
    assert (info.adapters_registered, info.adapters_on_device) == (1, 1)


Tamper = Callable[[list[pb.UploadAdapterRequest]], list[pb.UploadAdapterRequest]]


def _edit(change: Callable[[Any], Any]) -> Tamper:
    def tamper(messages: list[pb.UploadAdapterRequest]) -> list[pb.UploadAdapterRequest]:
        change(messages)
        return messages

    return tamper


def _flip(messages: list[pb.UploadAdapterRequest]) -> None:
    data = bytearray(messages[-1].chunk.data)
    data[-1] ^= 1
    messages[-1].chunk.data = bytes(data)


BAD_UPLOADS: list[tuple[str, str, Tamper]] = [
    ("INVALID_FIELD", "spec", lambda m: []),
    ("INVALID_FIELD", "spec", lambda m: m[1:]),
    ("INVALID_FIELD", "chunk", lambda m: [m[0], m[0]]),
    ("INVALID_FIELD", "chunk", lambda m: [m[0], pb.UploadAdapterRequest()]),
    ("INVALID_FIELD", "bytes arrived", lambda m: m[:-1]),
    ("INVALID_FIELD", "in order", lambda m: [*m[:2], m[3], m[2], *m[4:]]),
    ("INVALID_FIELD", "announced", _edit(lambda m: setattr(m[1].chunk, "file", "../../x"))),
    ("INVALID_FIELD", "more than", _edit(lambda m: setattr(m[0].spec.files[0], "size", 3))),
    ("INVALID_FIELD", "64 hex", _edit(lambda m: setattr(m[0].spec.files[0], "sha256", "?"))),
    ("INVALID_FIELD", "name", _edit(lambda m: setattr(m[0].spec, "name", "../escape"))),
    ("INVALID_FIELD", "spec.files", _edit(lambda m: m[0].spec.ClearField("files"))),
    ("INVALID_FIELD", "set one", _edit(lambda m: (
        setattr(m[0].spec, "validate_only", True), setattr(m[0].spec, "activate", True)))),
    ("INVALID_FIELD", "labels", _edit(lambda m: m[0].spec.labels.update(
        {str(n): "x" for n in range(65)}))),
    ("ADAPTER_INVALID", ".bin", _edit(lambda m: setattr(
        m[0].spec.files[1], "name", "adapter_model.bin"))),
    ("ADAPTER_INVALID", "size", _edit(lambda m: setattr(m[0].spec.files[1], "size", 1 << 60))),
    ("CHECKSUM_MISMATCH", "adapter_model.safetensors", _edit(_flip)),
]  # fmt: skip


async def test_bad_uploads_say_why_and_leave_nothing(front: Front, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a")
    for reason, words, tamper in BAD_UPLOADS:
        messages = tamper(list(upload(folder, "style", chunk=1000)))
        failed = await failure(front.adapters.UploadAdapter(iter(messages)))
        assert failed.reason == reason, (words, failed.message)
        told = failed.message + str(failed.metadata)
        assert words in told
        assert failed.code is grpc.StatusCode.INVALID_ARGUMENT
        assert failed.details["BadRequest"].field_violations[0].description
        # An upload that only ended too early can be resumed.
        left = 1 if words == "bytes arrived" else 0
        await until(lambda left=left: len(staging(front)) == left)  # type: ignore[misc]
    assert await names(front) == []
    assert (await front.push(folder, "style")).published


async def test_a_client_that_goes_away_can_come_back(front: Front, tmp_path: Path) -> None:
    messages = list(upload(make_adapter(tmp_path / "a"), "style", chunk=1000))
    spec = messages[0].spec
    written = asyncio.Event()

    async def some() -> AsyncIterator[pb.UploadAdapterRequest]:
        for message in messages[:3]:
            yield message
        written.set()
        await asyncio.Event().wait()

    call = front.adapters.UploadAdapter(some())
    await written.wait()

    async def committed() -> dict[str, int]:
        reply = await front.adapters.GetUpload(pb.GetUploadRequest(spec=spec))
        return dict(reply.committed)

    sent = sum(len(message.chunk.data) for message in messages[:3])
    while sum((there := await committed()).values()) < sent:  # noqa: ASYNC110 - see `until`
        await asyncio.sleep(0.005)
    call.cancel()
    await until(lambda: len(staging(front)) == 1)
    assert await committed() == there
    assert await names(front) == []
    spec.resume = True
    skipped = messages[1:3]
    rest = [m for m in messages if m not in skipped]
    reply = await front.adapters.UploadAdapter(iter(rest))
    assert reply.published
    assert staging(front) == []


async def test_the_largest_page(front: Front, tmp_path: Path) -> None:
    await front.push(make_adapter(tmp_path / "a"), "a")
    listed = await front.adapters.ListAdapters(pb.ListAdaptersRequest(page_size=1000))
    assert [adapter.name for adapter in listed.adapters] == ["a"]
    past = await failure(front.adapters.ListAdapters(pb.ListAdaptersRequest(page_size=1001)))
    assert past.metadata["field"] == "page_size"


async def test_pages_are_in_name_order_and_filtered(front: Front, tmp_path: Path) -> None:
    for n in range(5):
        labels = {"parity": "odd" if n % 2 else "even"}
        await front.push(make_adapter(tmp_path / str(n), seed=n), f"a{n}", labels=labels)
    await front.push(make_adapter(tmp_path / "z", seed=9), "z", activate=True)

    async def pages(**fields: Any) -> list[list[str]]:
        found, token = [], ""
        while True:
            page = await front.adapters.ListAdapters(
                pb.ListAdaptersRequest(page_token=token, **fields)
            )
            found.append([adapter.name for adapter in page.adapters])
            if not (token := page.next_page_token):
                return found

    assert await pages(page_size=4) == [["a0", "a1", "a2", "a3"], ["a4", "z"]]
    assert await pages(page_size=3) == [["a0", "a1", "a2"], ["a3", "a4", "z"]]
    assert await pages(name_prefix="a", page_size=5) == [["a0", "a1", "a2", "a3", "a4"]]
    assert await pages(labels={"parity": "odd"}, page_size=1) == [["a1"], ["a3"]]
    assert await pages(tier=inference_pb2.TIER_DEVICE, page_size=1) == [["z"]]
    assert await pages(tier=inference_pb2.TIER_DISK, page_size=2) == [
        ["a0", "a1"], ["a2", "a3"], ["a4"],
    ]  # fmt: skip


async def test_bad_admin_calls(front: Front, tmp_path: Path) -> None:
    await front.push(make_adapter(tmp_path / "a"), "style")
    adapters = front.adapters
    bad = [
        ("page_size", adapters.ListAdapters(pb.ListAdaptersRequest(page_size=1001))),
        ("page_token", adapters.ListAdapters(pb.ListAdaptersRequest(page_token="%"))),
        ("tier", adapters.ListAdapters(pb.ListAdaptersRequest(tier=77))),  # type: ignore[arg-type]
        ("tier", adapters.ActivateAdapter(
            pb.ActivateAdapterRequest(name="style", tier=inference_pb2.TIER_REMOTE))),
        ("mode", adapters.EvictAdapter(pb.EvictAdapterRequest(name="style", mode=9))),  # type: ignore[arg-type]
    ]  # fmt: skip
    for field, call in bad:
        failed = await failure(call)
        assert (failed.reason, failed.metadata["field"]) == ("INVALID_FIELD", field)
    for call in (
        adapters.GetAdapter(pb.GetAdapterRequest(name="nothing")),
        adapters.ActivateAdapter(pb.ActivateAdapterRequest(name="nothing")),
        adapters.EvictAdapter(pb.EvictAdapterRequest(name="style@" + "0" * 12)),
        adapters.DeleteAdapter(pb.DeleteAdapterRequest(name="nothing")),
    ):
        assert (await failure(call)).reason == "ADAPTER_NOT_FOUND"


async def test_activate_pin_and_evict(front: Front, tmp_path: Path) -> None:
    await front.push(make_adapter(tmp_path / "a"), "style")
    activate = pb.ActivateAdapterRequest(name="style", tier=inference_pb2.TIER_HOST, pin=True)
    adapter = (await front.adapters.ActivateAdapter(activate)).adapter
    assert (adapter.tier, adapter.pinned) == (inference_pb2.TIER_HOST, True)
    reply = await front.adapters.EvictAdapter(pb.EvictAdapterRequest(name="style", unpin=True))
    assert (reply.evicted, reply.freed_bytes) == (True, 10)
    front.engine.pace = asyncio.Semaphore(1)
    call = front.inference.GenerateStream(prompt(adapter="style"))
    await anext(aiter(call))
    busy = pb.EvictAdapterRequest(name="style", mode=pb.EVICT_MODE_FAIL_IF_BUSY)
    failed = await failure(front.adapters.EvictAdapter(busy))
    assert (failed.code, failed.reason) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "ADAPTER_IN_USE",
    )
    assert failed.details["PreconditionFailure"].violations[0].type == "ADAPTER_IN_USE"
    call.cancel()
    await until(lambda: front.engine.in_flight == 0)


async def test_delete_is_guarded_and_frees_memory(front: Front, tmp_path: Path) -> None:
    one = (await front.push(make_adapter(tmp_path / "a", seed=1), "style")).adapter
    two = (
        await front.push(
            make_adapter(tmp_path / "b", seed=2), "style", allow_replace=True, activate=True
        )
    ).adapter
    stale = pb.DeleteAdapterRequest(name="style", etag=one.etag)
    failed = await failure(front.adapters.DeleteAdapter(stale))
    assert failed.reason == "ETAG_MISMATCH"
    by_revision = pb.DeleteAdapterRequest(name=f"style@{one.revision[:12]}")
    assert list((await front.adapters.DeleteAdapter(by_revision)).revisions) == [one.revision]
    assert front.engine.tier(two.weights_digest) is not None
    reply = await front.adapters.DeleteAdapter(pb.DeleteAdapterRequest(name="style"))
    assert list(reply.revisions) == [two.revision]
    assert front.engine.tier(two.weights_digest) is None
    assert await names(front) == []


async def test_weights_that_another_name_has_are_left_when_one_is_deleted(
    front: Front, tmp_path: Path
) -> None:
    folder = make_adapter(tmp_path / "a")
    await front.push(folder, "one")
    digest = (await front.push(folder, "two")).adapter.weights_digest
    await front.adapters.UpdateAdapter(pb.UpdateAdapterRequest(name="two", pinned=True))
    # By this name the engine knows them, and would ask for them after a restart.
    one = await front.adapters.ActivateAdapter(pb.ActivateAdapterRequest(name="one", pin=True))
    await front.adapters.DeleteAdapter(pb.DeleteAdapterRequest(name="one"))
    two = (await front.adapters.GetAdapter(pb.GetAdapterRequest(name="two"))).adapter
    assert (two.pinned, two.tier) == (True, inference_pb2.TIER_DEVICE)
    source = AdapterSource(digest, "", 1, f"one@{one.adapter.revision[:12]}")
    with front.engine.hold(source):
        held = (await front.adapters.GetAdapter(pb.GetAdapterRequest(name="two"))).adapter
        assert held.leases == 1
    await front.adapters.DeleteAdapter(pb.DeleteAdapterRequest(name="two"))
    assert front.engine.tier(digest) is None
    with pytest.raises(AdapterNotFound), front.engine.hold(source):
        pytest.fail("nobody has these weights")


async def test_nothing_is_left_of_a_revision_that_was_superseded_too_often(
    front: Front, tmp_path: Path
) -> None:
    """The server keeps two behind the current one."""
    folders = [make_adapter(tmp_path / str(seed), seed=seed) for seed in range(4)]
    first = (await front.push(folders[0], "style")).adapter
    await front.push(folders[0], "same")
    await front.inference.Generate(prompt(adapter="style"))
    await front.adapters.UpdateAdapter(pb.UpdateAdapterRequest(name="style", pinned=True))

    async def last_used(name: str) -> bool:
        request = pb.GetAdapterRequest(name=name)
        return (await front.adapters.GetAdapter(request)).adapter.HasField("last_used")

    assert await last_used("style")
    assert not await last_used("same"), "that name was not asked for"
    await front.adapters.DeleteAdapter(pb.DeleteAdapterRequest(name="same"))
    for folder in folders[1:]:
        assert front.engine.tier(first.weights_digest) is not None
        await front.push(folder, "style", allow_replace=True)
    assert front.engine.tier(first.weights_digest) is None, "pinned, and nobody can unpin it"
    await front.push(folders[0], "style", allow_replace=True)
    assert not await last_used("style"), "it was forgotten when it was removed"


async def test_a_pin_is_set_and_removed_without_moving_the_weights(
    front: Front, tmp_path: Path
) -> None:
    adapter = (await front.push(make_adapter(tmp_path / "a"), "style")).adapter
    update = front.adapters.UpdateAdapter
    pinned = (await update(pb.UpdateAdapterRequest(name="style", pinned=True))).adapter
    assert (pinned.pinned, pinned.tier) == (True, inference_pb2.TIER_DEVICE)
    free = (await update(pb.UpdateAdapterRequest(name="style", pinned=False))).adapter
    assert (free.pinned, free.tier) == (False, inference_pb2.TIER_DEVICE)
    assert free.weights_digest == adapter.weights_digest
    nothing = await failure(update(pb.UpdateAdapterRequest(name="style")))
    assert (nothing.reason, nothing.metadata["field"]) == ("INVALID_FIELD", "pinned")
