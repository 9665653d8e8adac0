"""Row 13: one request in a batch with random others gives the same answer.

A needle (fixed prompt and adapter, greedy and sampled) is sent alone, then in batches that
differ in size, in its position, in how often memory runs out and it starts over, and in
adapters that are swapped meanwhile. In exact mode, tokens and log-probabilities must be bitwise
equal to those of the needle alone. In the default mode torch's rounding depends on the batch,
so the rate of differences is published. The native kernels promise bitwise equality in this
mode too.

It runs on a tiny Llama, in the real engine, in each form that this machine can run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from random import Random
from typing import Any, Final
from unittest.mock import patch

from veneer_server.engine.residency.residency import Residency
from veneer_server.engine.scheduling.waiting import WaitingSequences
from veneer_server.wire.messages import EngineConfig, SamplingParams

from tests.engine_harness import Answer, EngineHarness, engine, source
from tests.tiny_llama import VOCABULARY, make_lora, make_tiny_llama
from tests.torture.forms import Form, forms
from tests.torture.planted_isolation import not_exact
from tests.torture.row import Control, Outcome, Scale

ROW = 13
TITLE = "a needle in batches"
BAR = "bitwise equal in exact mode, native in the default mode too; its rate published"

MODULES: Final = ("self_attn.q_proj", "self_attn.v_proj")
ADAPTERS, ROOM = 8, 3
"""Number of adapters, and how many of them fit into memory."""
NEW = 24
SAMPLINGS: Final = (
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.9, top_p=0.9, seed=7),
)


def crowded(seen: Counter[str]) -> bool:
    """Return whether sequences were preempted, and adapters swapped."""
    return seen["preempted"] > 0 and seen["loads"] > ROOM


class Found:
    """Results of a form's batches."""

    def __init__(self) -> None:
        self.batches = self.tokens = self.other_tokens = self.other_logprobs = 0
        self.seen: Counter[str] = Counter()
        self.failures: list[str] = []


def run(scale: Scale) -> Outcome:
    """Run all forms, in exact and default mode."""
    figure, failures = [], []
    for form in forms():
        for exact in (True, False):
            found = _batches(scale, form, exact=exact, count=scale.pick(16, 200))
            bitwise = exact or form.native
            if bitwise:
                failures += found.failures
            if not crowded(found.seen):
                failures.append(f"{form.name}: nothing was preempted or swapped")
            figure.append(
                f"{form.name}{' exact' if exact else ''}: {found.other_tokens} of "
                f"{found.tokens:,} tokens and {found.other_logprobs} log-probabilities differ "
                f"in {found.batches} batches ({found.seen['preempted']} preemptions, "
                f"{found.seen['loads']} loads)"
            )
    return Outcome(figure="; ".join(figure), bar=BAR, failures=tuple(failures))


def controls(scale: Scale) -> Iterator[Control]:
    """Plant an exact mode that computes all sequences of a step together, with torch; and
    another seed each time."""
    torch = forms()[0]
    with not_exact():
        found = _batches(scale, torch, exact=True, count=scale.pick(16, 40), name="not exact")
    yield Control("exact mode computes a step's sequences together", _first(found))
    found = _batches(scale, torch, exact=True, count=4, name="other seed", seeds=True)
    yield Control("a seed that depends on the batch", _first(found))


def _first(found: Found) -> str:
    return found.failures[0] if found.failures else ""


@contextmanager
def _counted() -> Iterator[Counter[str]]:
    seen: Counter[str] = Counter()
    put_back, loaded = WaitingSequences.appendleft, Residency.loaded

    def preempted(self: WaitingSequences, sequence: Any) -> None:
        seen["preempted"] += 1
        put_back(self, sequence)

    def came(self: Residency, *given: Any) -> None:
        seen["loads"] += 1
        loaded(self, *given)

    with ExitStack() as stack:
        stack.enter_context(patch.object(WaitingSequences, "appendleft", preempted))
        stack.enter_context(patch.object(Residency, "loaded", came))
        yield seen


def _batches(
    scale: Scale, form: Form, *, exact: bool, count: int, name: str = "", seeds: bool = False
) -> Found:
    folder = scale.folder(f"{name or 'run'} {form.name} {exact}")
    random = scale.random(f"{form.name} {exact} {name}")
    base = make_tiny_llama(folder / "base", seed=scale.seed)
    adapters = [
        source(make_lora(folder / f"{n}", seed=n, rank=4, modules=MODULES))
        for n in range(ADAPTERS)
    ]
    room = ROOM * adapters[0].parameters * (2 if form.native else 4)
    config = EngineConfig(
        base_folder=str(base),
        cache_folder=str(form.cache(folder / "cache")),
        base_name="tiny",
        weights_fingerprint="",
        device="cpu",
        max_batch_tokens=64,
        max_running=16,
        kv_cache_bytes=8 << 20,
        host_adapter_bytes=room,
        device_adapter_bytes=room,
        **form.settings,
    )
    found = Found()
    with _counted() as seen, engine(config) as harness:
        # Batches are random, and how many sequences run at once depends on the machine:
        # continue until sequences were preempted and adapters swapped.
        for number in range(count if name else 4 * count):
            if number >= count and crowded(seen):
                break
            _batch(harness, random, adapters, found, number, exact=exact, seeds=seeds)
        found.seen = seen
    return found


def _batch(
    harness: EngineHarness,
    random: Random,
    adapters: list[Any],
    found: Found,
    number: int,
    *,
    exact: bool,
    seeds: bool,
) -> None:
    """Run the needle alone, then in one batch."""
    sampling = SAMPLINGS[number % len(SAMPLINGS)]
    needle = {
        "prompt": [3 + (n * 29) % (VOCABULARY - 3) for n in range(21)],
        "max_tokens": NEW,
        "ignore_eos": True,
        "logprobs": True,
        "adapter": adapters[0],
        "sampling": sampling,
        "use_prefix_cache": False,
    }
    harness.reconfigure(exact=exact)
    (alone,) = harness.run([needle])
    size = random.choice([1, 2, 5, 11, 23])
    others = [
        {
            "prompt": [random.randrange(3, VOCABULARY) for _ in range(random.randrange(1, 40))],
            "max_tokens": random.randrange(1, 32),
            "ignore_eos": True,
            "adapter": random.choice([None, *adapters]),
            "sampling": SamplingParams(temperature=1.0, seed=random.randrange(1 << 30)),
        }
        for _ in range(size)
    ]
    at = random.randrange(size + 1)
    if seeds:
        needle["sampling"] = SamplingParams(temperature=0.9, seed=100 + at)
    harness.reconfigure(
        exact=exact,
        kv_blocks=random.choice([6, 8, None]),
        max_running=random.choice([4, 16]),
    )
    among = harness.run([*others[:at], needle, *others[at:]])[at]
    _compare(found, number, alone, among, f"{size} others, position {at}")


def _compare(found: Found, number: int, alone: Answer, among: Answer, where: str) -> None:
    found.batches += 1
    found.tokens += len(alone.tokens)
    assert among.error is None, among.error
    pairs = list(zip(alone.tokens, among.tokens, strict=True))
    tokens = sum(a != b for a, b in pairs)
    logprobs = sum(a != b for a, b in zip(alone.logprobs, among.logprobs, strict=True))
    found.other_tokens += tokens
    found.other_logprobs += logprobs
    if tokens or logprobs:
        found.failures.append(
            f"batch {number} ({where}): {tokens} tokens and {logprobs} log-probabilities differ"
        )
