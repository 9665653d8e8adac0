"""What speculation gains and costs: ``python -m tests.bench.speculation``.

Runs the real engine in this process, on the bundled base. Each prompt is sent twice, with
speculation and without it, in turns; the two answers must be equal to the bit. With speculation
the store has only answers to other prompts, and the prefix cache is empty each time.

Workloads: ``edit`` (code that is to be repeated with small changes: half of the input or more
is copied), ``expected`` (the same, with the input as the caller's `prediction`), ``chat``
(questions, sampled), and ``32 streams`` (chats, 32 at once). For each: tokens a second without
and with speculation, the median of the ratios over prompts, accepted of drafted tokens, tokens
a step, and the share of the gain that acceptance and the cost of rows, as measured before
serving, allow.
"""

from __future__ import annotations

import argparse
import ast
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from veneer_registry.fingerprint import fingerprint_base
from veneer_server.engine.scheduling.speculation import Speculation, StepTimes
from veneer_server.models.source import import_bundled
from veneer_server.text.tokenizer import TextTokenizer
from veneer_server.wire.messages import (
    EngineConfig,
    SamplingParams,
    SequenceOutput,
    SequenceRequest,
    StepDone,
    Submit,
)

from tests.engine_harness import EngineHarness, engine, source
from tests.places import REPOSITORY, cache_dir

ADAPTERS: Final = REPOSITORY / "examples" / "adapters"
QUESTIONS: Final = (
    "What is a binary tree?",
    "Write a short story about a lighthouse keeper.",
    "How do I cook rice?",
    "Explain photosynthesis to a child.",
    "Give me three ideas for a birthday party.",
    "What are the causes of the French Revolution?",
    "Write a polite email that declines an invitation.",
    "Why is the sky blue?",
    "List five animals that live in the desert.",
    "What is the difference between a list and a tuple in Python?",
    "Describe a rainy day in a big city.",
    "How does a bicycle stay upright?",
    "Write a poem about autumn.",
    "What should I pack for a week in the mountains?",
    "Explain what a database index is.",
    "Tell me a joke about computers.",
)


@dataclass
class Run:
    """One request's or batch's answers and steps.

    Attributes:
        seconds: from the first token to the last.
        cpu: processor seconds of this process meanwhile; other load disturbs them less.
        steps: those that computed no prompt.
    """

    tokens: list[list[int]]
    seconds: float
    cpu: float
    steps: list[StepDone]

    @property
    def rate(self) -> float:
        """Tokens a second after the first."""
        return max(1, sum(map(len, self.tokens)) - len(self.tokens)) / self.seconds


@dataclass
class Pair:
    """The same requests without and with speculation."""

    plain: Run
    drafted: Run

    @property
    def gain(self) -> float:
        return self.drafted.rate / self.plain.rate

    @property
    def cpu_gain(self) -> float:
        return self.plain.cpu / self.drafted.cpu

    def allowed(self, times: StepTimes) -> float:
        """The gain if steps cost what was measured for their rows before serving."""
        steps = self.drafted.steps
        if not steps:
            return 1.0
        cost = sum(times.seconds(step.decode_rows + step.drafted) for step in steps)
        alone = sum(
            times.seconds(step.decode_rows)
            * (step.decode_rows + step.accepted)
            / step.decode_rows
            for step in steps
        )
        return alone / cost


@dataclass
class Bench:
    """Runs workloads on one engine."""

    harness: EngineHarness
    speculation: Speculation
    tokenizer: TextTokenizer
    found: dict[str, list[Pair]] = field(default_factory=dict)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def chat(self, text: str) -> list[int]:
        return self.ids(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")

    def pair(self, name: str, requests: list[dict[str, Any]], *, first: bool) -> None:
        """Send the same requests in both ways.

        Args:
            first: whether speculation goes first.
        """
        runs = {on: self.run(requests, on=on) for on in (first, not first)}
        if runs[True].tokens != runs[False].tokens:
            raise SystemExit(f"{name}: speculation changed an answer")
        self.found.setdefault(name, []).append(Pair(runs[False], runs[True]))

    def run(self, requests: list[dict[str, Any]], *, on: bool) -> Run:
        self.harness.reconfigure()
        self.harness.scheduler.speculation = self.speculation if on else None
        numbers = {10**9 + at: list[int]() for at in range(len(requests))}
        for number, request in zip(numbers, requests, strict=True):
            self.harness.inbox.put(Submit(number, SequenceRequest(**request)))
        began, worked, steps, open_ends = 0.0, 0.0, list[StepDone](), set(numbers)
        while open_ends:
            message = self.harness.out.get(timeout=120)
            if isinstance(message, SequenceOutput):
                if not began:
                    began, worked = time.perf_counter(), time.process_time()
                numbers[message.sequence] += message.tokens
                if message.finish is not None:
                    open_ends.discard(message.sequence)
            elif isinstance(message, StepDone) and not message.prefill_tokens:
                steps.append(message)
        seconds, cpu = time.perf_counter() - began, time.process_time() - worked
        self.harness.settle()
        return Run(list(numbers.values()), seconds, cpu, steps)


def functions(least: int, most: int) -> Iterator[str]:
    """This repository's functions whose source is within these lengths, in characters."""
    for path in sorted((REPOSITORY / "adapters_registry").rglob("*.py")):
        text = path.read_text()
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef):
                found = ast.get_source_segment(text, node) or ""
                if least <= len(found) <= most:
                    yield found


def edits(bench: Bench, count: int, *, expected: bool) -> Iterator[dict[str, Any]]:
    """Requests to repeat a function with a name changed, as a completion."""
    adapter = source(ADAPTERS / "code")
    for at, code in zip(range(count), functions(400, 1200), strict=False):
        prompt = bench.ids(f"# The code:\n{code}\n\n# The same code, without comments:\n")
        own = bench.ids(code)
        yield {
            "prompt": prompt,
            "max_tokens": min(len(own), 200),
            "sampling": SamplingParams(temperature=0.0, seed=at),
            "adapter": adapter if at % 2 else None,
            "ignore_eos": True,
            "prediction": own if expected else [],
        }


def chats(bench: Bench, count: int, new: int) -> list[dict[str, Any]]:
    adapters = [None, *map(source, sorted(ADAPTERS.iterdir()))]
    return [
        {
            "prompt": bench.chat(QUESTIONS[at % len(QUESTIONS)] + " " * (at // len(QUESTIONS))),
            "max_tokens": new,
            "sampling": SamplingParams(temperature=0.7, top_p=0.9, seed=at),
            "adapter": adapters[at % len(adapters)],
        }
        for at in range(count)
    ]


def report(bench: Bench, times: StepTimes) -> dict[str, dict[str, float]]:
    rows: dict[str, dict[str, float]] = {}
    for name, pairs in bench.found.items():
        steps = [step for pair in pairs for step in pair.drafted.steps]
        drafted, accepted = (
            sum(getattr(step, which) for step in steps) for which in ("drafted", "accepted")
        )
        gains = sorted(pair.gain for pair in pairs)
        whole = sum(p.plain.seconds for p in pairs) / sum(p.drafted.seconds for p in pairs)
        rows[name] = {
            "plain tokens/s": statistics.median(pair.plain.rate for pair in pairs),
            "drafted tokens/s": statistics.median(pair.drafted.rate for pair in pairs),
            "gain, median": statistics.median(gains),
            "gain, lowest": gains[0],
            "gain, highest": gains[-1],
            "gain, all": whole,
            "gain in processor time, median": statistics.median(p.cpu_gain for p in pairs),
            "accepted of drafted": accepted / max(1, drafted),
            "drafted a step": drafted / max(1, len(steps)),
            "tokens a row": 1 + accepted / max(1, sum(s.decode_rows for s in steps)),
            "gain of allowed": statistics.median(
                pair.gain / pair.allowed(times) for pair in pairs
            ),
        }
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=12, help="prompts of each workload")
    parser.add_argument("--new", type=int, default=96, help="tokens of a chat's answer")
    parser.add_argument("--batches", type=int, default=4, help="batches of 32 streams")
    parser.add_argument("--only", default="", help="workloads, separated by commas")
    parser.add_argument("--json", type=Path, help="file for the figures")
    given = parser.parse_args(arguments)
    only = {name for name in given.only.split(",") if name}
    base, cache = import_bundled(cache_dir()).path, cache_dir()
    config = EngineConfig(
        base_folder=str(base),
        cache_folder=str(cache),
        base_name=base.name,
        weights_fingerprint=fingerprint_base(base, cache_dir=cache).weights,
        device="cpu",
        backend="native",
        speculation="on",
        kv_cache_bytes=512 << 20,
    )
    with engine(config) as harness:
        speculation = harness.scheduler.speculation
        cost = harness.scheduler.limits.cost
        assert speculation is not None
        assert cost is not None
        print(harness.info.backend, [(n, round(1e3 * s, 2)) for n, s in cost.sampled_s])
        bench = Bench(harness, speculation, TextTokenizer.from_folder(base))
        warm = chats(bench, 1, 16)
        bench.run(warm, on=False)
        for name, expected in (("edit", False), ("expected", True)):
            if not only or name in only:
                for at, request in enumerate(edits(bench, given.prompts, expected=expected)):
                    bench.pair(name, [request], first=at % 2 == 1)
        if not only or "chat" in only:
            for at, request in enumerate(chats(bench, given.prompts, given.new)):
                bench.pair("chat", [request], first=at % 2 == 1)
        if not only or "32 streams" in only:
            every = chats(bench, 32 * given.batches, given.new)
            for at in range(given.batches):
                bench.pair("32 streams", every[32 * at :][:32], first=at % 2 == 1)
        rows = report(bench, StepTimes(cost.sampled_s))
    for name, figures in rows.items():
        print(name, *(f"{key} {value:.2f}" for key, value in figures.items()), sep="\n  ")
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
