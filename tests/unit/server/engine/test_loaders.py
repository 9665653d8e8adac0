"""Loader processes: they read the right numbers, and what happens when they end."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from veneer_registry.errors import AdapterCorrupt, DiskFailed, InternalError
from veneer_registry.format import weights_digest
from veneer_registry.weights import WEIGHTS_FILE
from veneer_server.adapters import loaders, pages
from veneer_server.adapters.loader_process import LoaderSetup
from veneer_server.adapters.loaders import Loaders
from veneer_server.step.adapter_table import AdapterTable
from veneer_server.wire.messages import LOST, AdapterSource

from tests.child_module import run_in_turn, run_instead
from tests.planted import planted
from tests.refused import refused
from tests.unit.registry.kit import PROJECTIONS, SHAPES, make_adapter, make_tensors

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def source(folder: Path) -> AdapterSource:
    return AdapterSource(weights_digest(folder), str(folder), 0, "chat@000000000000")


@pytest.fixture
def make() -> Iterator[Callable[[str], Loaders]]:
    """Loaders of a dtype; their processes are gone at the end."""
    made = []

    def start(dtype: str = "float32") -> Loaders:
        setup = LoaderSetup(dict(SHAPES), 2, dtype)  # type: ignore[arg-type]
        made.append(Loaders(setup, DTYPES[dtype], count=1, pinned=False))
        return made[-1]

    yield start
    for each in made:
        each.close()


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("stored", sorted(STORED))
def test_every_dtype_is_rounded_as_torch_does(
    make: Callable[[str], Loaders], tmp_path: Path, dtype: str, stored: str
) -> None:
    tensors = make_tensors(4, seed=3, dtype=stored)
    copy, stages = make(dtype).read(source(make_adapter(tmp_path / "a", tensors=tensors)))
    assert stages.keys() == {"read", "convert", "verify"}
    assert copy.run.dtype == DTYPES[dtype]
    table = AdapterTable(copy.layout, copy.run)
    seen = 0
    for slot in copy.layout.slots:
        stem = f"base_model.model.model.layers.{slot.module.layer}."
        (a_key,) = [
            k for k in tensors if k.startswith(stem) and f"{slot.module.projection}.lora_A" in k
        ]
        for key, found in (
            (a_key, table.run.as_strided((slot.fan_in, 4), (slot.a_stride, 1), slot.a).t()),
            (
                a_key.replace("lora_A", "lora_B"),
                table.run[slot.b : slot.b + 4 * slot.fan_out].view(4, slot.fan_out).t(),
            ),
        ):
            bits = torch.from_numpy(tensors[key].view(np.uint8).copy())
            wanted = bits.view(STORED[stored]).view(found.shape).to(DTYPES[dtype])
            assert torch.equal(found, wanted), key
            seen += 1
    assert seen == len(tensors)


@pytest.mark.parametrize("stored", sorted(STORED))
def test_pairs_of_inputs_lie_side_by_side(
    make: Callable[[str], Loaders], tmp_path: Path, stored: str
) -> None:
    """For kernels that multiply pairs; all else is as without."""
    wanted = source(make_adapter(tmp_path / "a", tensors=make_tensors(4, seed=3, dtype=stored)))
    plain, _ = make("bfloat16").read(wanted)
    setup = LoaderSetup(dict(SHAPES), 2, "bfloat16", paired=True)
    reader = Loaders(setup, torch.bfloat16, count=1, pinned=False)
    try:
        pairs, _ = reader.read(wanted)
    finally:
        reader.close()
    assert pairs.layout.length == plain.layout.length
    tables = AdapterTable(plain.layout, plain.run), AdapterTable(pairs.layout, pairs.run)
    seen = 0
    for one, other in zip(*(chain(*table.views) for table in tables), strict=True):
        assert one is not None
        assert other is not None
        fan_in, ranks = one.a_t.shape
        assert other.a_t.shape == (fan_in // 2, ranks, 2)
        assert torch.equal(other.a_t.transpose(1, 2).reshape(fan_in, ranks), one.a_t)
        assert one.a_t.abs().sum() > 0
        for mine, right in zip(other.expands, one.expands, strict=True):
            assert torch.equal(mine[0], right[0])
        seen += len(one.expands)
    assert seen == 2 * len(PROJECTIONS)


def test_damage_is_told_and_the_next_load_goes_on(
    make: Callable[[str], Loaders], tmp_path: Path
) -> None:
    good, bad = (make_adapter(tmp_path / name, seed=n) for n, name in enumerate("ab"))
    wanted = source(bad)
    path = bad / WEIGHTS_FILE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    reader = make("float32")
    with refused(AdapterCorrupt, weights_digest=wanted.weights_digest, cause="digest"):
        reader.read(wanted)
    pid = reader.pids[0]
    assert reader.read(source(good))[0].run.numel()
    assert reader.pids == (pid,), "it did not have to be started again"


def test_a_table_made_ahead_is_of_the_whole_run_and_taken_once(tmp_path: Path) -> None:
    wanted = source(make_adapter(tmp_path / "a"))
    setup = LoaderSetup(dict(SHAPES), 2, "float32")
    reader = Loaders(setup, torch.float32, count=1, pinned=False, tables=True)
    try:
        copy, _ = reader.read(wanted)
    finally:
        reader.close()
    plain = AdapterTable(copy.layout, copy.run)
    ahead = copy.take_table()
    again = copy.take_table()
    assert again is not ahead, "it is not kept beside a copy in HOST"
    for table in (ahead, again):
        assert table.ranks == plain.ranks
        for mine, right in zip(table.views, plain.views, strict=True):
            for one, other in zip(mine, right, strict=True):
                assert one is not None
                assert other is not None
                assert torch.equal(one.a_t, other.a_t)
                assert one.a_t.abs().sum() > 0


def test_no_room_to_map_a_run_is_no_memory_and_the_next_load_goes_on(
    make: Callable[[str], Loaders], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = source(make_adapter(tmp_path / "a"))
    reader = make("float32")

    # More than there are addresses.
    full = planted(pages, "length = within + size + _LARGE", "length = size + (1 << 50)")
    # The system's own words.
    with full, pytest.raises(MemoryError, match="Cannot allocate"):
        reader.read(wanted)
    assert reader.read(wanted)[0].run.numel()


def test_a_loader_that_was_killed_is_started_again(
    make: Callable[[str], Loaders], tmp_path: Path
) -> None:
    wanted = source(make_adapter(tmp_path / "a"))
    reader = make("float32")
    first = reader.read(wanted)[0]
    (pid,) = reader.pids
    os.kill(pid, signal.SIGKILL)
    again = reader.read(wanted)[0]
    assert reader.pids != (pid,)
    assert torch.equal(first.run, again.run), "memory that was handed over is the engine's"


def test_an_adapter_that_ends_every_loader_is_an_error_and_no_more(
    make: Callable[[str], Loaders], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = source(make_adapter(tmp_path / "a"))
    reader = make("float32")
    with monkeypatch.context() as patch:
        run_instead(patch, "this")  # prints a poem and leaves
        with refused(InternalError, loaders=2):
            reader.read(wanted)
    assert reader.read(wanted)[0].run.numel()


@pytest.mark.push
def test_loaders_end_with_the_engine(tmp_path: Path) -> None:
    """Even with one that is killed."""
    program = f"""
import os, signal, sys
from tests.unit.server.engine.test_loaders import Loaders, LoaderSetup, SHAPES, source, torch
from pathlib import Path
loaders = Loaders(LoaderSetup(dict(SHAPES), 2, "float32"), torch.float32, count=2, pinned=False)
loaders.start()
loaders.read(source(Path({str(make_adapter(tmp_path / "a"))!r})))
print(*loaders.pids, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    pids = ended.stdout.split()
    assert len(pids) == 2
    for pid in map(int, pids):
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        select.select([fd], [], [])  # until it has ended; pytest's timeout bounds it
        os.close(fd)


@pytest.mark.push
def test_loads_of_other_sizes_follow_one_another(
    make: Callable[[str], Loaders], tmp_path: Path
) -> None:
    """The memory that is ready for the next one may be too small, or too large."""
    folders = [
        make_adapter(tmp_path / str(rank), {"r": rank}, make_tensors(rank, seed=rank))
        for rank in (2, 8, 4, 4)
    ]
    one = make("float32")
    for folder in folders:
        copy = one.read(source(folder))[0]
        alone = make("float32").read(source(folder))[0]
        assert torch.equal(copy.run, alone.run)
        assert copy.run.abs().sum() > 0


def adapter_memory() -> tuple[int, int]:
    """How many mappings of adapters there are, and the kB of adapters in memory."""
    maps = Path("/proc/self/maps").read_text("utf-8").count("veneer-adapter")
    status = Path("/proc/self/status").read_text("utf-8")
    (shared,) = [line for line in status.splitlines() if line.startswith("RssShmem")]
    return maps, int(shared.split()[1])


def test_many_adapters_take_few_mappings(tmp_path: Path) -> None:
    """Linux allows a process 65,530, and adapters of a small base are small."""
    folders = [make_adapter(tmp_path / str(n), seed=n) for n in range(3)]
    # Room for four.
    setup = LoaderSetup(dict(SHAPES), 2, "float32", 8 << 20)
    reader = Loaders(setup, torch.float32, count=2, pinned=False)
    maps, before = adapter_memory()
    try:
        copies = [reader.read(source(folders[n % 3]))[0] for n in range(40)]
        for number, copy in enumerate(copies):
            assert torch.equal(copy.run, copies[number % 3].run)
        assert not torch.equal(copies[0].run, copies[1].run)
        assert adapter_memory()[0] - maps <= 10, "a mapping for four adapters"
        kept, full = copies.pop(17), adapter_memory()[1]
        again = kept.run.clone()
        copies.clear()
        assert adapter_memory()[1] - before < (full - before) / 4
        assert torch.equal(kept.run, again)
    finally:
        reader.close()
    del kept, copy
    assert adapter_memory() == (maps, before)


def test_an_adapter_larger_than_a_segment_has_one_of_its_own(tmp_path: Path) -> None:
    wanted = source(make_adapter(tmp_path / "a"))
    small = Loaders(
        LoaderSetup(dict(SHAPES), 2, "float32", 4096), torch.float32, count=1, pinned=False
    )
    large = Loaders(
        LoaderSetup(dict(SHAPES), 2, "float32"), torch.float32, count=1, pinned=False
    )
    try:
        found = [each.read(wanted)[0].run for each in (small, large, small)]
    finally:
        small.close()
        large.close()
    assert found[0].nbytes > 4096
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.fixture
def hurried() -> Iterator[Loaders]:
    """Loaders with little patience."""
    setup = LoaderSetup(dict(SHAPES), 2, "float32")
    reader = Loaders(setup, torch.float32, count=1, pinned=False, limit_s=2.0)
    yield reader
    reader.close()


@pytest.mark.push
def test_a_loader_that_is_stopped_is_killed_and_the_load_done_by_another(
    hurried: Loaders, tmp_path: Path
) -> None:
    """It left the requests that waited for it waiting for ever."""
    wanted = source(make_adapter(tmp_path / "a"))
    first = hurried.read(wanted)[0]
    (pid,) = hurried.pids
    os.kill(pid, signal.SIGSTOP)
    again, stages = hurried.read(wanted)
    assert torch.equal(first.run, again.run)
    assert stages[LOST] >= 2.0
    assert hurried.pids != (pid,)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert LOST not in hurried.read(wanted)[1]


def test_a_load_that_takes_too_long_each_time_may_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = source(make_adapter(tmp_path / "a"))
    module = tmp_path / "sleeps_for_ever.py"
    module.write_text("import signal\nsignal.pause()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    setup = LoaderSetup(dict(SHAPES), 2, "float32")
    reader = Loaders(setup, torch.float32, count=1, pinned=False, limit_s=0.2)
    with monkeypatch.context() as patch:
        run_instead(patch, "sleeps_for_ever")
        with pytest.raises(DiskFailed) as caught:
            reader.read(wanted)
    assert caught.value.retry_after_s
    assert caught.value.metadata["loaders"] == "2"
    assert reader.pids == ()
    reader.close()


@pytest.mark.push
@pytest.mark.parametrize("first", ["sleeps", "ends"])
def test_each_try_is_told_as_it_ended(
    hurried: Loaders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    """One takes too long and one ends by itself: an operator looks for different causes."""
    run_in_turn(tmp_path, monkeypatch, first)
    wanted = InternalError if first == "sleeps" else DiskFailed
    with refused(wanted, loaders=2) as caught:
        hurried.read(source(make_adapter(tmp_path / "a")))
    ends = ["killed after 2 s", "status 3"]
    assert ", then ".join(ends if first == "sleeps" else ends[::-1]) in caught.value.message
    assert hurried.pids == ()


def test_a_large_adapter_has_more_time(
    make: Callable[[str], Loaders], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = make("float32")
    given = []

    def noted(self: object, wanted: object, prepare: object, limit_s: float) -> None:
        given.append(limit_s)
        raise InternalError("enough is known")

    monkeypatch.setattr(loaders.Loader, "load", noted)
    for parameters in (0, 500_000_000):
        with pytest.raises(InternalError):
            reader.read(AdapterSource("d" * 64, str(tmp_path), parameters, "big"))
    assert given[0] == loaders.LIMIT_S
    assert given[1] - given[0] == pytest.approx(500_000_000 * 4 / loaders.BYTES_A_SECOND)


@pytest.mark.push
def test_a_stopped_loader_does_not_hold_up_the_end(tmp_path: Path) -> None:
    setup = LoaderSetup(dict(SHAPES), 2, "float32")
    reader = Loaders(setup, torch.float32, count=1, pinned=False)
    reader.read(source(make_adapter(tmp_path / "a")))
    (pid,) = reader.pids
    os.kill(pid, signal.SIGSTOP)
    reader.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
