"""A push over broken connections and restarts: only what the server lacks is sent."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from veneer_client import AsyncClient, Resumed, RetryPolicy, ServerUnreachable, VeneerError
from veneer_client.failures import Attempts
from veneer_registry.errors import (
    Aborted,
    AdapterExists,
    ChecksumMismatch,
    Draining,
    EtagMismatch,
    InternalError,
    QuotaExceeded,
)

from tests.refused import refused
from tests.unit.client.drivers import Driver, driver
from tests.unit.client.fake_server import FakeServer, Refusal
from tests.unit.client.fake_uploads import NO_METHOD, UNIMPLEMENTED
from tests.unit.client.wire import Wire

MIB = 1 << 20
WEIGHTS = "adapter_model.safetensors"
QUICK = RetryPolicy(attempts=4, longest_wait_s=0.05)


@pytest.fixture
def quick(kind: str, server: FakeServer) -> Any:
    with driver(kind, server.address, retry=QUICK) as made:
        yield made


def total_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("adapter_*"))


def arrived(server: FakeServer, folder: Path) -> bool:
    """Whether the server has every byte of the bundle."""
    files = (path.read_bytes() for path in folder.glob("adapter_*"))
    return all(server.stored.get(hashlib.sha256(data).hexdigest()) == data for data in files)


def resumes(server: FakeServer) -> list[bool]:
    return [upload.spec.resume for upload in server.uploads]


def spoil(server: FakeServer) -> None:
    """One byte of what is kept of the weights changes."""
    ((_, files),) = server.staged.items()
    files[WEIGHTS][0] ^= 1


def once(make: Callable[[], Any]) -> Callable[[int, int], None]:
    """A progress function that does something between GetUpload and UploadAdapter of the
    first attempt."""
    left = [make]

    def progress(done: int, total: int) -> None:
        if left:
            left.pop()()

    return progress


# ------------------------------------------------------------------ interruptions


@pytest.mark.parametrize("at", [1, 100, MIB, MIB + 1, 2_500_000, None], ids=str)
def test_goes_on_where_the_connection_broke(
    at: int | None, server: FakeServer, quick: Driver, adapter_folder: Path
) -> None:
    """``None`` is after the last byte: only the answer was lost."""
    total = total_of(adapter_folder)
    at = total if at is None else at
    server.breaks.append(at)
    told: list[Resumed] = []
    done: list[tuple[int, int]] = []
    pushed = quick.push(
        adapter_folder,
        "chat",
        labels={"team": "x"},
        on_resume=told.append,
        progress=lambda *state: done.append(state),
    )
    assert arrived(server, adapter_folder)
    assert pushed.published
    second = server.uploads[1]
    assert resumes(server) == [False, True]
    assert server.received(second) == total - at
    assert dict(second.spec.labels) == {"team": "x"}
    assert (pushed.resumes, pushed.skipped_bytes) == (1, 0)
    assert total <= pushed.sent_bytes <= 2 * total - at
    ((place, all_, after),) = [(one.at, one.total, one.after) for one in told]
    assert (place, all_) == (at, total)
    assert isinstance(after, ServerUnreachable)
    assert (at, total) in done, "the bar goes back to what has arrived"
    assert done[-1] == (total, total)


def test_goes_on_as_long_as_it_gets_further(
    server: FakeServer, quick: Driver, adapter_folder: Path
) -> None:
    """More interruptions than there are attempts without progress."""
    server.breaks.extend(range(200_000, 2_600_000, 200_000))
    assert len(server.breaks) > 2 * QUICK.attempts
    pushed = quick.push(adapter_folder, "chat")
    assert pushed.resumes == len(range(200_000, 2_600_000, 200_000))
    assert arrived(server, adapter_folder)


def test_gives_up_without_progress_and_goes_on_when_asked_again(
    server: FakeServer, quick: Driver, adapter_folder: Path
) -> None:
    server.breaks.extend([MIB] * 99)
    with refused(ServerUnreachable, fix="push again"):
        quick.push(adapter_folder, "chat")
    # The first attempt brought a mebibyte; those after it nothing.
    assert len(server.uploads) == 1 + QUICK.attempts
    server.breaks.clear()
    told: list[Resumed] = []
    pushed = quick.push(adapter_folder, "chat", on_resume=told.append)
    total = total_of(adapter_folder)
    assert (pushed.sent_bytes, pushed.skipped_bytes) == (total - MIB, MIB)
    assert told == [Resumed(at=MIB, total=total, after=None)]
    assert pushed.resumes == 0
    assert arrived(server, adapter_folder)


def test_a_dropped_connection_is_one_more_interruption(
    kind: str, server: FakeServer, wire: Wire, adapter_folder: Path
) -> None:
    server.on_break = wire.drop
    server.breaks.append(MIB)
    with driver(kind, wire.address, retry=QUICK) as client:
        pushed = client.push(adapter_folder, "chat")
    assert (pushed.resumes, resumes(server)) == (1, [False, True])
    assert arrived(server, adapter_folder)


@pytest.mark.push
def test_a_server_that_is_away_for_a_while_is_waited_for(
    kind: str, server: FakeServer, adapter_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is back when the third attempt begins."""
    server.on_break = server.close
    server.breaks.append(MIB)
    waits: list[float] = []
    wait_s = Attempts.wait_s

    def back_after_two(self: Attempts, error: VeneerError) -> float | None:
        wait = wait_s(self, error)
        assert wait is not None
        waits.append(wait)
        if len(waits) == 2:
            server.start()
        return wait

    monkeypatch.setattr(Attempts, "wait_s", back_after_two)
    with driver(kind, server.address, retry=RetryPolicy(longest_wait_s=0.5)) as client:
        pushed = client.push(adapter_folder, "chat")
    assert len(waits) >= 2
    assert arrived(server, adapter_folder)
    assert pushed.resumes == 1, "attempts that never got through are none"


async def test_a_write_that_broke_off_is_an_interruption(
    server: FakeServer, adapter_folder: Path
) -> None:
    """grpc.aio says INTERNAL then, and not what the server said; no test can time that."""
    bare = Refusal(grpc.StatusCode.INTERNAL, "Internal error from Core")
    refuse = once(lambda: server.refusals.append(bare))
    async with AsyncClient(server.address, retry=QUICK) as client:
        pushed = await client.push(adapter_folder, "chat", progress=refuse)
    assert pushed.resumes == 1
    told = Refusal(grpc.StatusCode.INTERNAL, "a bug", "INTERNAL")
    refuse = once(lambda: server.refusals.append(told))
    async with AsyncClient(server.address, retry=QUICK) as client:
        # Words of the FAKE server, which the client must pass on.
        with pytest.raises(InternalError, match="a bug"):
            await client.push(adapter_folder, "other", progress=refuse)


def test_a_server_that_never_was_there_is_not_waited_for(
    server: FakeServer, client: Driver, adapter_folder: Path
) -> None:
    server.refusals.append(Refusal(grpc.StatusCode.UNAVAILABLE, "the socket closed"))
    with pytest.raises(ServerUnreachable) as caught:
        client.push(adapter_folder, "chat")
    assert "push again" not in str(caught.value), "nothing was begun"
    assert [name for name, _ in server.calls] == ["GetUpload"]


# ------------------------------------------------------------- what the server says


@pytest.mark.parametrize(
    ("refusal", "cls"),
    [
        (Refusal(grpc.StatusCode.UNAVAILABLE, "stopping", "DRAINING", retry_s=0.01), Draining),
        (
            Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "8", "QUOTA_EXCEEDED", retry_s=0.01),
            QuotaExceeded,
        ),
        (Refusal(grpc.StatusCode.ABORTED, "idle for 30 s", "ABORTED", retry_s=0.0), Aborted),
    ],
    ids=lambda value: getattr(value, "reason", None),
)
def test_waits_as_told(
    refusal: Refusal,
    cls: type[VeneerError],
    server: FakeServer,
    quick: Driver,
    adapter_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[type, float]] = []
    wait_s = Attempts.wait_s

    def noted(self: Attempts, error: VeneerError) -> float | None:
        wait = wait_s(self, error)
        seen.append((type(error), -1.0 if wait is None else wait))
        return wait

    monkeypatch.setattr(Attempts, "wait_s", noted)
    refuse = once(lambda: server.refusals.append(refusal))
    assert quick.push(adapter_folder, "chat", progress=refuse).published
    ((error, wait),) = seen
    assert error is cls
    assert wait >= (refusal.retry_s or 0.0)
    assert (server.count("GetUpload"), server.count("UploadAdapter")) == (2, 2)


@pytest.mark.parametrize(
    ("refusal", "cls"),
    [
        (
            Refusal(grpc.StatusCode.ALREADY_EXISTS, "other content", "ADAPTER_EXISTS"),
            AdapterExists,
        ),
        (Refusal(grpc.StatusCode.FAILED_PRECONDITION, "moved", "ETAG_MISMATCH"), EtagMismatch),
        # Were the one that was ended to come back, both would end each other for ever.
        (Refusal(grpc.StatusCode.ABORTED, "another sends the same", "ABORTED"), Aborted),
        (
            Refusal(grpc.StatusCode.INVALID_ARGUMENT, "sha", "CHECKSUM_MISMATCH"),
            ChecksumMismatch,
        ),
    ],
    ids=lambda value: getattr(value, "reason", None),
)
def test_a_refusal_without_a_when_is_final(
    refusal: Refusal,
    cls: type[VeneerError],
    server: FakeServer,
    quick: Driver,
    adapter_folder: Path,
) -> None:
    refuse = once(lambda: server.refusals.append(refusal))
    with pytest.raises(cls):
        quick.push(adapter_folder, "chat", progress=refuse)
    assert server.count("UploadAdapter") == 1


@pytest.mark.parametrize("answer", [UNIMPLEMENTED, NO_METHOD], ids=["says so", "no method"])
def test_an_older_server_gets_the_whole_upload(
    answer: Refusal, server: FakeServer, quick: Driver, adapter_folder: Path
) -> None:
    server.no_get_upload = answer
    total = total_of(adapter_folder)
    pushed = quick.push(adapter_folder, "chat")
    assert (pushed.sent_bytes, pushed.skipped_bytes) == (total, 0)
    server.breaks.append(MIB)
    again = quick.push(adapter_folder, "again")
    assert again.resumes == 1
    assert resumes(server) == [False, False, False]
    assert server.received(server.uploads[-1]) == total, "from the start, as it must be"
    assert server.count("GetUpload") == 2, "asked once a push"


def test_an_older_server_is_not_tried_for_ever(
    server: FakeServer, quick: Driver, adapter_folder: Path
) -> None:
    server.no_get_upload = UNIMPLEMENTED
    server.breaks.extend([MIB] * 99)
    with pytest.raises(ServerUnreachable):
        quick.push(adapter_folder, "chat")
    assert len(server.uploads) == QUICK.attempts


def test_damage_in_what_the_server_kept_costs_one_upload_from_the_start(
    server: FakeServer, quick: Driver, adapter_folder: Path
) -> None:
    def break_and_spoil() -> None:
        spoil(server)
        server.restart()

    server.on_break = break_and_spoil
    server.breaks.append(MIB)
    told: list[Resumed] = []
    pushed = quick.push(adapter_folder, "chat", on_resume=told.append)
    assert resumes(server) == [False, True, False]
    assert server.received(server.uploads[-1]) == total_of(adapter_folder)
    assert server.count("GetUpload") == 2, "there is nothing to ask before the third"
    assert arrived(server, adapter_folder)
    assert [one.at for one in told] == [MIB, 0]
    assert isinstance(told[-1].after, ChecksumMismatch)
    assert pushed.resumes == 2


def test_damage_that_comes_back_is_an_error(
    server: FakeServer, quick: Driver, adapter_folder: Path
) -> None:
    """A disk that spoils what it keeps: once from the start, not for ever."""

    def break_and_spoil() -> None:
        spoil(server)
        server.restart()

    def progress(done: int, total: int) -> None:
        if done == 0:  # whatever is sent from its start breaks off
            server.breaks.append(MIB)

    server.on_break = break_and_spoil
    with pytest.raises(ChecksumMismatch):
        quick.push(adapter_folder, "chat", progress=progress)
    assert resumes(server) == [False, True, False, True]


def test_damage_again_is_an_error(
    server: FakeServer, quick: Driver, adapter_folder: Path
) -> None:
    """It is then the sender's: the file was changed after it was hashed."""

    def change_file() -> None:
        with (adapter_folder / WEIGHTS).open("r+b") as weights:  # of the same size throughout
            weights.seek(-1, 2)
            last = weights.read(1)[0]
            weights.seek(-1, 2)
            weights.write(bytes([last ^ 1]))
        server.restart()

    server.on_break = change_file
    server.breaks.append(MIB)
    with pytest.raises(ChecksumMismatch):
        quick.push(adapter_folder, "chat")
    assert resumes(server) == [False, True, False]


def test_a_server_that_took_in_more_meanwhile_is_asked_again(
    server: FakeServer, quick: Driver, adapter_folder: Path
) -> None:
    """What was under way on the connection of before arrived after GetUpload's answer."""
    content = (adapter_folder / WEIGHTS).read_bytes()

    def resumed(place: Resumed) -> None:
        if server.count("GetUpload") == 2:
            ((_, files),) = server.staged.items()
            have = len(files[WEIGHTS])
            files[WEIGHTS] += content[have : have + 1000]

    server.breaks.append(MIB)
    pushed = quick.push(adapter_folder, "chat", on_resume=resumed)
    assert server.count("GetUpload") == 3
    assert pushed.resumes == 2
    assert arrived(server, adapter_folder)


def test_a_server_that_lost_meanwhile_what_it_had_is_asked_again(
    server: FakeServer, quick: Driver, adapter_folder: Path
) -> None:
    """It had the files when it was asked, and put them into quarantine before the upload."""
    quick.push(adapter_folder, "one")

    def resumed(place: Resumed) -> None:
        server.stored.clear()

    pushed = quick.push(adapter_folder, "two", on_resume=resumed)
    assert pushed.published
    assert pushed.sent_bytes == total_of(adapter_folder)
    assert arrived(server, adapter_folder)


# --------------------------------------------------------------- nothing to be sent


def test_what_is_there_already_is_not_sent(
    server: FakeServer, client: Driver, adapter_folder: Path
) -> None:
    client.push(adapter_folder, "one")
    (adapter_folder / "README.md").write_text("new")
    told: list[Resumed] = []
    pushed = client.push(adapter_folder, "two", on_resume=told.append, etag="e7")
    there = total_of(adapter_folder)
    assert {chunk.file for chunk in server.uploads[-1].chunks} == {"README.md"}
    assert (pushed.sent_bytes, pushed.skipped_bytes) == (3, there)
    assert told == [Resumed(at=there, total=there + 3, after=None)]
    assert server.uploads[-1].spec.etag == "e7"
    again = client.push(adapter_folder, "three")
    assert (again.sent_bytes, again.skipped_bytes) == (0, there + 3)
    assert server.uploads[-1].chunks == []


def test_a_file_that_is_there_is_not_read_again(
    server: FakeServer, client: Driver, adapter_folder: Path
) -> None:
    client.push(adapter_folder, "one")
    lose = once((adapter_folder / WEIGHTS).unlink)
    assert client.push(adapter_folder, "two", progress=lose).sent_bytes == 0


def test_the_question_is_what_will_be_sent(
    server: FakeServer, client: Driver, adapter_folder: Path
) -> None:
    client.push(adapter_folder, "chat", labels={"a": "b"})
    (_, question), (_, spec) = server.calls
    assert question.spec == spec
    assert {file.name: file.size for file in question.spec.files} == {
        path.name: path.stat().st_size for path in adapter_folder.glob("adapter_*")
    }
