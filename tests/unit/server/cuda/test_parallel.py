"""Tensor parallelism: parts of a base and of adapters, by two processes over gloo."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from veneer_registry.child_python import child_python
from veneer_server.backends.cuda.nf4 import packing, quantizing, reference, shards
from veneer_server.backends.parallel.adapters import cut_layout, cut_run
from veneer_server.backends.parallel.sharding import Shard
from veneer_server.backends.parallel.weights import output_ranges, shard_weights
from veneer_server.models.config import UnsupportedModel
from veneer_server.step.layout import Group

from tests.places import REPOSITORY
from tests.refused import refused
from tests.tiny_llama import make_tiny_llama
from tests.unit.server.cuda import parallel_kit as kit


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Logits of each process, in each dtype."""
    folder = tmp_path_factory.mktemp("parallel")
    spawn = multiprocessing.get_context("spawn")
    processes = [
        spawn.Process(target=kit.process, args=(index, 2, str(folder))) for index in range(2)
    ]
    for each in processes:
        each.start()
    for each in processes:
        each.join(120)
        assert each.exitcode == 0
    return folder


def _logits(folder: Path, name: str) -> list[torch.Tensor]:
    return [
        torch.from_numpy(np.fromfile(folder / f"{name}.{index}", np.float32))
        for index in range(2)
    ]


def test_two_processes_give_the_logits_of_one(by_two: Path) -> None:
    """float32. Each sum over inputs of o and down is added in two parts: a few units in the
    last place per layer, here at most 2 ** -17 of the largest logit."""
    one = kit.serve(torch.float32).flatten()
    for part in _logits(by_two, "float32"):
        assert (part - one).abs().max() <= 2**-17 * one.abs().max()


def test_two_processes_in_bfloat16_are_as_near_as_rounding_allows(by_two: Path) -> None:
    """Partial sums are rounded to bfloat16 (2 ** -9) before they are added: twice as many
    roundings as by one process, whose own distance to float32 is the measure."""
    exact = kit.serve(torch.float32).flatten()
    one = kit.serve(torch.bfloat16).flatten()
    rounding = (one - exact).square().mean().sqrt()
    for part in _logits(by_two, "bfloat16"):
        assert (part - one).square().mean().sqrt() <= 2 * rounding


def test_all_processes_have_the_same_bits(by_two: Path) -> None:
    for name in ("float32", "bfloat16"):
        one, other = _logits(by_two, name)
        assert torch.equal(one, other)


def test_the_adapters_matter() -> None:
    with_, without = (kit.serve(torch.float32, adapters=on) for on in (True, False))
    changed = (with_ - without).abs().amax(dim=1) > 0.1
    assert changed.tolist() == [False] * 19 + [True] * 10 + [False, True, True]


def test_parts_are_divided_by_head_and_by_block() -> None:
    whole = kit.base()
    parts = [shard_weights(whole, Shard(index, 2)) for index in range(2)]
    for part in parts:
        assert (part.config.num_heads, part.config.num_kv_heads) == (2, 1)
        assert part.config.shapes["down_proj"] == (64, 128)
        assert part.config.shapes["o_proj"] == (64, 32)
    # q, k and v of the second process: heads 2 and 3, and 1.
    ranges = output_ranges(Group.QKV, kit.CONFIG, Shard(1, 2))
    assert ranges == [slice(32, 64), slice(80, 96), slice(112, 128)]


def test_one_process_has_any_base_whole() -> None:
    odd = replace(kit.CONFIG, intermediate_size=100)
    assert Shard(0, 1).config(odd) is odd
    with refused(UnsupportedModel, what="inner size"):
        Shard(0, 2).config(odd)


def test_parts_of_an_adapter_have_one_size() -> None:
    """q, k, v, gate and up have B divided, o and down A. A rank of q, 64 x 64, has 64 numbers
    of A, and 32 of B."""
    layout, run = kit.adapter(1)
    cuts = [cut_run(layout, run, kit.CONFIG, Shard(index, 2)) for index in range(2)]
    of = {"q_proj": 96, "k_proj": 80, "v_proj": 80, "o_proj": 96}
    of |= {"gate_proj": 192, "up_proj": 192, "down_proj": 192}
    by_hand = sum(s.module.rank * of[s.module.projection] for s in layout.slots)
    for cut, part in cuts:
        assert cut.length == len(part) == by_hand
        assert cut == cut_layout(layout, kit.CONFIG, Shard(0, 2))


def test_a_follower_without_a_card_is_an_engine_that_says_so(tmp_path: Path) -> None:
    """The real program. `Device.join` is not reached."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    done = subprocess.run(
        child_python("-m", "tests.unit.server.cuda.lead", str(make_tiny_llama(tmp_path / "b"))),
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "card 1: torch finds 0 CUDA devices" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("count", "what"), [(3, "attention heads"), (4, "key and value heads")]
)
def test_a_base_that_cannot_be_divided_is_refused(count: int, what: str) -> None:
    with refused(UnsupportedModel, what=what, processes=str(count)):
        Shard(0, count).config(kit.CONFIG)


@pytest.mark.parametrize("nested", [True, False])
def test_parts_of_nf4_have_the_whole_s_numbers(nested: bool) -> None:
    """An odd number of blocks for each output, so that groups of scales lie across outputs."""
    weight = torch.randn(45, 64 * 13, generator=torch.Generator().manual_seed(1))
    packed = quantizing.quantize(weight, nested=nested)
    whole = reference.expand(packed)
    rows = [slice(3, 9), slice(30, 45)]
    few = shards.of_outputs(packed, rows)
    assert torch.equal(reference.expand(few), torch.cat([whole[r] for r in rows]))
    part = shards.of_inputs(packed, slice(64 * 5, 64 * 11))
    assert torch.equal(reference.expand(part), whole[:, 64 * 5 : 64 * 11])
    both = shards.of_inputs(few, slice(64 * 5, 64 * 11))
    assert torch.equal(
        reference.expand(both), torch.cat([whole[r, 64 * 5 : 64 * 11] for r in rows])
    )
    assert both.nbytes < packed.nbytes
    with pytest.raises(ValueError):  # noqa: PT011 (its words are for people)
        shards.of_inputs(packed, slice(0, 32))
    assert isinstance(both, packing.PackedNf4)
