"""Row 11: non-finite or too large numbers affect only their own request."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from veneer_registry import weights
from veneer_registry.adapter import BaseSpec
from veneer_registry.errors import AdapterInvalid
from veneer_registry.registry import Registry
from veneer_registry.values import MAX_MAGNITUDE, ServingDtype, to_bfloat16
from veneer_server.backends.native.decoder import NativeDecoder
from veneer_server.backends.torch.attention import KvCache
from veneer_server.backends.torch.lora import LoraBatch
from veneer_server.sizing.memory_plan import BLOCK_TOKENS
from veneer_server.wire.messages import AdapterSource

from tests.adapter_files import parse_header
from tests.engine_harness import EngineHarness, source
from tests.tiny_llama import make_lora
from tests.torture.forms import TORCH, Form, forms
from tests.torture.row import Control, Outcome, Scale
from tests.torture.tiny_engine import ask, tiny_engine
from tests.unit.registry.kit import BASE, Tensors, make_adapter, make_tensors, push

ROW = 11
TITLE = "NaN, infinity, huge numbers"
BAR = "refused at upload with the tensor and why; let in, batch mates are bitwise unchanged"

BAD: dict[str, float] = {
    "NaN": float("nan"),
    "infinity": float("inf"),
    "-infinity": float("-inf"),
    "1e30": 1e30,
    "70000 (past fp16)": 7e4,
    "just past the bound": MAX_MAGNITUDE * 1.01,
}
SERVING: tuple[ServingDtype, ...] = ("bfloat16", "float16", "float32")


def encode(value: float, dtype: str) -> np.ndarray[Any, Any]:
    """Return ``value`` as one element of a file's dtype (BF16: its bits)."""
    with np.errstate(over="ignore"):
        single = np.array([value], dtype=np.float32)
        if dtype == "BF16":
            return to_bfloat16(single)
        return single.astype({"F32": np.float32, "F16": np.float16}[dtype])


def poisoned(dtype: str, value: float, place: int, rank: int) -> tuple[Tensors, str]:
    """Make valid tensors with one bad element; ``place`` selects its tensor and position."""
    tensors = make_tensors(rank, dtype=dtype, projections=("q_proj", "down_proj"))
    name = sorted(tensors)[place % len(tensors)]
    flat = tensors[name].reshape(-1)
    flat[(0, flat.size // 2, flat.size - 1)[place % 3]] = encode(value, dtype)[0]
    return tensors, name


def refuses(registry: Registry, folder: Path, tensors: Tensors, bad: str, rank: int) -> str:
    """Push; return what is wrong with the answer, or "" if it is the expected refusal."""
    try:
        push(registry, "bad", make_adapter(folder, {"r": rank}, tensors), allow_replace=True)
    except AdapterInvalid as error:
        named = error.metadata.get("tensor") == bad
        return "" if named and error.metadata.get("why") else f"does not say where: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def torture_uploads(work: Path, most: int, scale: Scale) -> Outcome:
    """Push every combination of dtype, bad number, serving dtype and position, at most
    ``most``."""
    cases = list(itertools.product(("F32", "F16", "BF16"), BAD, SERVING, range(6)))
    chosen = scale.random("uploads").sample(cases, min(most, len(cases)))
    failures = []
    for serving in SERVING:
        base = BaseSpec(
            BASE.name, BASE.num_layers, BASE.shapes, BASE.fingerprint, serving_dtype=serving
        )
        with Registry.open(work / serving, base) as registry:
            for dtype, what, _, place in (case for case in chosen if case[2] == serving):
                # Rank 4, or a rank with tensors larger than the reader's buffer of 1 MiB.
                rank = 4096 if place == 5 else 4
                tensors, name = poisoned(dtype, BAD[what], place, rank)
                wrong = refuses(registry, work / "adapter", tensors, name, rank)
                if wrong:
                    failures.append(f"{what} in {dtype}, served in {serving}: {wrong}")
            good = make_tensors()
            good[min(good)].reshape(-1)[0] = encode(MAX_MAGNITUDE * 0.99, "BF16")[0]
            push(registry, "good", make_adapter(work / "good", tensors=good))
    return Outcome(f"{len(chosen)} uploads, {len(failures)} not refused", BAR, tuple(failures))


# ------------------------------------------------------- with the check bypassed


@contextlib.contextmanager
def without_check() -> Iterator[None]:
    """A planted bug: numbers are not checked when an adapter is read."""
    real = weights.find_problem
    weights.find_problem = lambda *_: None
    try:
        yield
    finally:
        weights.find_problem = real


def poison(folder: Path, number: float, side: str) -> Path:
    """Replace one element of every A or B of a float32 adapter in place."""
    path = folder / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    for name, tensor in parse_header(path).tensors.items():
        if f"lora_{side}" in name:
            data[tensor.begin : tensor.begin + 4] = np.array([number], "<f4").tobytes()
    path.write_bytes(data)
    return folder


Answer = tuple[tuple[int, ...], tuple[float, ...]]


def mates_of(
    harness: EngineHarness, third: AdapterSource, good: AdapterSource
) -> tuple[list[Answer], str | None]:
    """Run a batch; return tokens and log-probabilities of the base and of a good adapter beside
    ``third``, and the error of ``third``.

    All prompts run in one step and request one token, so that shapes are the same whatever
    happens to ``third``.
    """
    batch = [
        ask(1, max_tokens=1),
        # Longer, so that it leaves data where the next sequence in its block has no tokens.
        ask(2, max_tokens=1, adapter=third, prompt=list(range(3, 3 + BLOCK_TOKENS - 2))),
        ask(3, max_tokens=1, adapter=good),
        ask(4, max_tokens=1),
    ]
    for request in batch:
        # Load adapters first, or the batch would start without the waiting requests.
        if "adapter" in request:
            harness.run([request])
    steps = harness.loop.steps
    answers = harness.run(batch)
    if harness.loop.steps != steps + 1:
        raise RuntimeError("the batch took more than one step")
    mates = [(tuple(a.tokens), tuple(a.logprobs)) for a in (answers[0], *answers[2:])]
    return mates, answers[1].error


def torture_batches(work: Path, scale: Scale, form: Form = TORCH) -> Outcome:
    """Run each bad number in A or in B beside others, and compare with a harmless adapter.

    There are few KV blocks, so that a later batch reuses the blocks of the broken one.
    """
    numbers = {**BAD, "3e38": 3e38}
    cases = list(itertools.product((False, True), numbers, "AB"))
    if not scale.full:
        cases = [case for case in cases if case[2] == "A" or case[1] in ("NaN", "infinity")]
    failures, aborted = [], 0
    good = source(make_lora(work / "good", seed=1))
    harmless = source(make_lora(work / "harmless", seed=2))
    with without_check(), tiny_engine(work, form) as harness:
        for number, (exact, what, side) in enumerate(cases):
            folder = make_lora(work / str(number), seed=2)
            bad = source(poison(folder, numbers[what], side))
            harness.reconfigure(exact=exact, kv_blocks=8)
            expected, _ = mates_of(harness, harmless, good)
            found, error = mates_of(harness, bad, good)
            aborted += error is not None
            place = f"{what} in {side}{', exact mode' if exact else ''}"
            if found != expected:
                failures.append(f"{place}: a batch mate changed")
            if what in ("NaN", "infinity") and error != "NON_FINITE_OUTPUT":
                failures.append(f"{place}: its own request was answered with {error}")
            if mates_of(harness, harmless, good)[0] != expected:
                failures.append(f"{place}: a later batch changed")
            later = harness.run([ask(seed, max_tokens=3) for seed in range(5, 9)])
            if errors := {answer.error for answer in later} - {None}:
                failures.append(f"{place}: a later sequence ended with {errors}")
    figure = f"{form.name}: {len(cases)} batches beside one ({aborted} aborted), "
    told = tuple(f"{form.name}: {line}" for line in failures)
    return Outcome(f"{figure}{len(failures)} harmed", BAR, told)


@contextlib.contextmanager
def masked_sum() -> Iterator[None]:
    """A planted bug: every row goes through every adapter, multiplied by 1 or 0."""
    real = LoraBatch.__init__, LoraBatch.add

    def remember(self: LoraBatch, segments: Any, rows: int, buffers: Any) -> None:
        real[0](self, segments, rows, buffers)
        _segments[id(self)] = segments, buffers

    def add(self: LoraBatch, layer: int, group: Any, x: Any, y: Any) -> Any:
        segments, buffers = _segments[id(self)]
        total = y.clone()
        columns = torch.split(total, list(buffers.fan_out[group]), dim=1)
        for segment in segments:
            views = segment.table.views[group.value][layer]
            mask = torch.zeros(x.shape[0], 1)
            mask[segment.begin : segment.end] = 1
            shrunk = torch.split(x @ views.a_t, list(views.ranks), dim=1)
            for member, part, (b_t, scaling) in zip(
                views.members, shrunk, views.expands, strict=True
            ):
                columns[member].add_(mask * (part @ b_t) * scaling)
        return total

    _segments: dict[int, Any] = {}
    LoraBatch.__init__, LoraBatch.add = remember, add  # type: ignore[method-assign]
    try:
        yield
    finally:
        LoraBatch.__init__, LoraBatch.add = real  # type: ignore[method-assign]


@contextlib.contextmanager
def nothing_cleared() -> Iterator[None]:
    """A planted bug: neither backend clears a KV block with non-finite numbers."""
    real = NativeDecoder.clear, KvCache.clear
    NativeDecoder.clear = KvCache.clear = lambda self, blocks: None  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        NativeDecoder.clear, KvCache.clear = real  # type: ignore[method-assign]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the log of failed sequences, which is expected here."""
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def run(scale: Scale) -> Outcome:
    """Run all combinations, or 60 uploads and some batches, on each backend."""
    uploads = torture_uploads(scale.folder("uploads"), scale.pick(60, 1000), scale)
    with quiet():
        batches = [torture_batches(scale.folder(f.name), scale, f) for f in forms()]
    return Outcome(
        "; ".join(outcome.figure for outcome in (uploads, *batches)),
        BAR,
        tuple(line for outcome in (uploads, *batches) for line in outcome.failures),
    )


def controls(scale: Scale) -> Iterator[Control]:
    """Plant bugs: without the check, uploads are accepted; a mask instead of segments spreads
    NaN; and blocks that are not cleared pass NaN on to the next sequence."""
    with without_check():
        found = torture_uploads(scale.folder("uploads"), 6, scale)
    yield Control.of("numbers are not checked", found)
    quick = Scale(False, scale.seed, scale.work)
    with quiet(), masked_sum():
        found = torture_batches(scale.folder("batches"), quick)
    yield Control.of("rows are masked, not routed", found)
    for form in forms():
        with quiet(), nothing_cleared():
            found = torture_batches(scale.folder(f"uncleared {form.name}"), quick, form)
        yield Control.of(f"KV blocks are not cleared, {form.name}", found)
