"""No running row is left out of steps while adapters are loaded, moved and evicted."""

from __future__ import annotations

from itertools import count, pairwise
from pathlib import Path

import pytest
from veneer_server.wire.messages import (
    Activate,
    AdapterLoaded,
    EngineConfig,
    Evict,
    OperationDone,
    SequenceFailed,
    SequenceOutput,
    SequenceRequest,
    StepDone,
    Submit,
)

from tests.engine_harness import GREEDY, engine, source

pytestmark = [pytest.mark.push, pytest.mark.real_base]

STREAMS, NEW_TOKENS = 16, 80


def test_sixteen_streams_take_part_in_every_step_during_swaps(
    base_folder: Path, cache_dir: Path, real_adapters: dict[str, Path]
) -> None:
    """The device budget holds all but a few adapters, so every activation evicts."""
    adapters = [source(path, name) for name, path in real_adapters.items()]
    in_use, others = adapters[:4], adapters[4:]
    used = sum(a.parameters for a in in_use) * 4
    room = max(a.parameters for a in others) * 4
    config = EngineConfig(
        base_folder=str(base_folder),
        cache_folder=str(cache_dir),
        base_name="smollm2-135m",
        weights_fingerprint="",
        device="cpu",
        kv_cache_bytes=128 << 20,
        device_adapter_bytes=used + room,
        host_adapter_bytes=used + room,
    )
    operations = count(1)
    steps_of: dict[int, list[int]] = {n: [] for n in range(STREAMS)}
    loads = evictions = step = 0
    with engine(config) as harness:
        for number in range(STREAMS):
            harness.tell(
                Submit(
                    number,
                    SequenceRequest(
                        prompt=[100 + number] * 20,
                        max_tokens=NEW_TOKENS,
                        sampling=GREEDY,
                        adapter=in_use[number % 4],
                        ignore_eos=True,
                    ),
                )
            )
        open_ends = set(range(STREAMS))
        started, waiting_for, turn = False, None, 0
        while open_ends:
            message = harness.out.get(timeout=120)
            match message:
                case SequenceOutput():
                    steps_of[message.sequence].append(step)
                    if message.finish is not None:
                        open_ends.discard(message.sequence)
                case StepDone():
                    step = message.step
                case SequenceFailed():
                    raise AssertionError(message.error)
                case AdapterLoaded():
                    loads += 1
                case OperationDone():
                    assert message.error is None, message.error
                    if message.operation == waiting_for:
                        waiting_for = None
            started = started or all(steps_of.values())
            if started and waiting_for is None and open_ends:
                # One after the other: load, move to the device, free again.
                adapter = others[turn // 2 % len(others)]
                waiting_for = next(operations)
                if turn % 2 == 0:
                    harness.tell(Activate(waiting_for, adapter))
                else:
                    harness.tell(Evict(waiting_for, adapter.weights_digest))
                    evictions += 1
                turn += 1
    assert loads >= 6, "the swaps did not overlap with the streams"
    assert evictions >= 2
    for number, steps in steps_of.items():
        assert len(steps) == NEW_TOKENS
        gaps = [after - before for before, after in pairwise(steps)]
        # The bar is 2 steps; the design's is none.
        assert max(gaps) <= 2, (number, steps)
