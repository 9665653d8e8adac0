"""Two processes over gloo, each with half of a base and of its adapters on a simulated card.

The same steps by one process are the reference. What differs is that sums over the inputs of o
and down are rounded to bfloat16 in two parts; `RATIO` says how far that may lead. `serve` is
the same for an engine: its followers run this module in place of
``veneer_server.backends.cuda.follower``.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import threading
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, Final, cast
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from veneer_server.backends.cuda import chosen, follower, forward, weights
from veneer_server.backends.cuda.buckets import Sizes
from veneer_server.backends.cuda.decoder import CudaDecoder
from veneer_server.backends.cuda.fp8 import reference as fp8
from veneer_server.backends.cuda.linears import linear_of
from veneer_server.backends.cuda.memory import adapters
from veneer_server.backends.cuda.nf4 import reference as nf4
from veneer_server.backends.parallel import leading
from veneer_server.backends.parallel.peers import GroupPeers, Member
from veneer_server.backends.parallel.sharding import Shard
from veneer_server.backends.parallel.weights import shard_weights
from veneer_server.backends.torch.attention import KvCache
from veneer_server.backends.torch.decoder import Decoder
from veneer_server.models.config import Quantization
from veneer_server.models.linear import Dense
from veneer_server.models.loader import DecoderWeights
from veneer_server.step.adapter_table import AdapterTable

from tests.gpu.engine import scenario
from tests.gpu.engine.plain import PLAIN
from tests.gpu.engine.simulated import SimulatedDevice
from tests.places import REPOSITORY
from tests.planted import planted
from tests.unit.server.cuda import parallel_kit as kit

CONFIG: Final = replace(kit.CONFIG, head_dim=32)
"""Heads of half a block of weights: a process has whole blocks."""
FORMATS: Final[tuple[Quantization, ...]] = ("nf4", "fp8", "none")
RATIO: Final = 2.0
"""Root mean square distance of two processes' logits to one's, over that of one's to torch's in
float32: a process more is a rounding more of each partial sum, see test_parallel."""
COUNT: Final = 2


def check(
    quantization: Quantization, *, exact: bool, kernels: bool = False, bug: str = ""
) -> str:
    """In words how far two processes are from one.

    Raises:
        AssertionError: further than `RATIO`, or their logits differ from each other.
    """
    instead = None if kernels else PLAIN
    one = _serve(quantization, instead, None, exact=exact)
    exactly = _reference(quantization)
    with tempfile.TemporaryDirectory() as folder:
        spawn = multiprocessing.get_context("spawn")
        given = (folder, quantization, exact, kernels, bug)
        processes = [spawn.Process(target=_process, args=(i, *given)) for i in range(COUNT)]
        for each in processes:
            each.start()
        for each in processes:
            each.join(1800)
            each.kill()
            assert each.exitcode == 0, f"a process ended with {each.exitcode}"
        parts = [np.fromfile(Path(folder) / f"{i}", np.float32) for i in range(COUNT)]
    assert np.array_equal(*parts), "the processes have different logits"
    apart = (torch.from_numpy(parts[0]).view_as(one) - one).square().mean().sqrt()
    rounding = (one - exactly).square().mean().sqrt()
    told = f"{apart:.4f} from one process, which is {rounding:.4f} from torch in float32"
    assert apart <= RATIO * rounding, told
    return told


def _weights(quantization: Quantization) -> DecoderWeights:
    """The base, its linears as the backend has them, not on a card yet."""
    made = kit.base(torch.bfloat16, CONFIG)
    sizes = {"qkv": ("q_proj", "k_proj", "v_proj"), "gate_up": ("gate_proj", "up_proj")}

    def linear(found: Any, name: str) -> Any:
        assert isinstance(found, Dense)
        outs = [CONFIG.shapes[cast(Any, member)][0] for member in sizes.get(name, ())]
        each = found.weight.split(outs) if outs else [found.weight]
        return linear_of(each, found.bias, quantization)

    names = ("qkv", "output", "gate_up", "down")
    layers = tuple(
        replace(layer, **{name: linear(getattr(layer, name), name) for name in names})
        for layer in made.layers
    )
    return replace(made, layers=layers)


def _reference(quantization: Quantization) -> torch.Tensor:
    """Torch in float32, with the numbers that the weights stand for."""
    made = _weights(quantization)

    def linear(found: Any) -> Dense:
        if quantization == "none":
            return Dense(found.weight.float(), found.bias.float())
        expand = nf4.expand if quantization == "nf4" else fp8.expand
        return Dense(expand(found.weight).bfloat16().float(), found.bias.float())

    layers = tuple(
        replace(
            layer,
            qkv=linear(layer.qkv),
            output=linear(layer.output),
            gate_up=linear(layer.gate_up),
            down=linear(layer.down),
        )
        for layer in made.layers
    )
    embedding = made.embedding.float()
    whole = replace(
        made,
        layers=layers,
        dtype=torch.float32,
        dense_embedding=embedding,
        dense_head=embedding,
    )
    cache = KvCache(
        num_layers=CONFIG.num_layers,
        num_blocks=12,
        block_size=16,
        kv_heads=CONFIG.num_kv_heads,
        head_dim=CONFIG.head_dim,
        dtype=torch.float32,
        device=whole.device,
    )
    decoder = Decoder(whole, cache, torch.float32)
    layouts = [kit.adapter(seed, CONFIG) for seed in (1, 2)]
    tables = [AdapterTable(layout, run.bfloat16().float()) for layout, run in layouts]
    return torch.cat([decoder.execute(each).clone() for each in kit.steps(*tables)])


def _serve(
    quantization: Quantization, instead: Any, member: Member | None, *, exact: bool
) -> torch.Tensor:
    """All rows' logits: prompts, then twice a step that decodes, the second by its graph."""
    device = SimulatedDevice(Random(7), instead)
    made = _weights(quantization)
    if member is not None:
        cut = weights._cut  # private: the cut that `load` makes
        made = shard_weights(made, member.shard, cut)
    decoder = CudaDecoder(
        device,
        weights.keep(device, made),
        Sizes(rows=64, sequences=4, context=256),
        blocks=12,
        block_size=16,
        adapter_bytes=1 << 18,
        exact=exact,
        slots=4,
        most_rank=16,
        chunk_bytes=1 << 14,
        member=member,
    )
    runs = [kit.adapter(seed, CONFIG) for seed in (1, 2)]
    tables = [decoder.adapters.place(layout, run.bfloat16()) for layout, run in runs]
    found = []
    prompts, decodes = kit.steps(*tables)
    for step in (prompts, decodes, decodes):
        logits = decoder.execute(step)
        assert all(decoder.finite(logits))
        found.append(logits.as_subclass(torch.Tensor).clone())
    assert torch.equal(found[1], found[2]), "a graph gives other logits"
    return torch.cat(found[:2])


def _process(
    index: int, folder: str, quantization: Quantization, exact: bool, kernels: bool, bug: str
) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), COUNT)
    dist.init_process_group("gloo", store=store, rank=index, world_size=COUNT)
    try:
        member = Member(Shard(index, COUNT), CONFIG, GroupPeers())
        instead = None if kernels else PLAIN
        with PLANTED[bug]() if bug else nullcontext():
            logits = _serve(quantization, instead, member, exact=exact)
        logits.numpy().tofile(Path(folder) / f"{index}")
    finally:
        dist.destroy_process_group()


PLANTED: Final[dict[str, Any]] = {
    "parts of sums are not added": partial(
        planted, forward, "if self._peers is None:", "if True:"
    ),
    "a bias is added by each process": partial(
        planted, weights, "if divided_inputs(first) and shard.index:", "if False:"
    ),
    "an adapter is not cut": partial(
        planted,
        adapters,
        "layout, run = cut_run(layout, run, member.whole, member.shard)",
        "layout, run = cut_run(layout, run, member.whole, type(member.shard)(0, 2))",
    ),
}


def serve(*, requests: int, exact: bool, bug: str = "") -> scenario.Found:
    """The engine of `scenario` on two simulated cards. Not in 4 bits: half of the tiny base's
    heads is not a whole block of weights."""
    path = f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(patch.dict(os.environ, {"PYTHONPATH": path}))
        stack.enter_context(patch.object(chosen, "open_device", _opened))
        stack.enter_context(patch.object(follower, "MODULE", "tests.gpu.engine.parallel"))
        stack.callback(lambda: dist.is_initialized() and dist.destroy_process_group())
        if bug:
            stack.enter_context(PLANTED_LEADING[bug]())
        return scenario.run(
            folder,
            requests=requests,
            exact=exact,
            quantization="none",
            ratio=RATIO,
            tensor_parallel=COUNT,
        )


class _Diligent(SimulatedDevice):
    """FAKE `Device` that executes what is enqueued as soon as it can: nothing in a follower
    waits for the tokens of a step."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._more = threading.Semaphore(0)
        threading.Thread(target=self._work, daemon=True).start()

    def enqueue(self, operation: Any) -> None:
        super().enqueue(operation)
        self._more.release()

    def _work(self) -> None:
        while self._more.acquire():
            self.drained("")


def _opened(device: Any) -> SimulatedDevice:
    kind = SimulatedDevice if device.type == "cpu" else _Diligent
    return kind(Random(7), PLAIN)


PLANTED_LEADING: Final[dict[str, Any]] = {
    "followers have another adapter": partial(
        planted,
        leading,
        "segments = [(s.begin, s.end, number(s.table)) for s in step.segments]",
        "segments = [(s.begin, s.end, min(self.adapters._numbers.values())) "
        "for s in step.segments]",
    ),
}
"""What `serve` must notice."""


if __name__ == "__main__":
    with patch.object(chosen, "open_device", _opened):
        follower.main()
