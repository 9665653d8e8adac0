"""The commands that measure, and what is taken from their result files."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from tests.gpu.cards import Card
from tests.gpu.check.result import Serving, Training
from tests.gpu.check.steps import Model, Step, moved

PROMPT: Final = 48
TOKENS: Final = 64
RANK: Final = 16
WARM_UP: Final = 2
"""Seconds, in which nothing is measured."""


class Failed(Exception):  # not the product's: it ends a step of this check
    """A command ended with an error; the text is its last line."""


class Runner(Protocol):
    """Runs a command of this environment."""

    def __call__(self, command: Sequence[str], file: Path) -> None:
        """Run it; it writes ``file``.

        Raises:
            Failed: it did not.
        """


def run_process(command: Sequence[str], file: Path) -> None:
    """See `Runner`. What it says on the way is shown."""
    print("$ " + " ".join(command), flush=True)
    done = subprocess.run(
        [sys.executable, "-m", *command], stderr=subprocess.PIPE, text=True, check=False
    )
    if done.returncode or not file.exists():
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        print(*lines[-20:], sep="\n", flush=True)
        # A server that it started may have logged after it.
        errors = [line for line in lines if "error" in line.lower()]
        raise Failed(f"status {done.returncode}: {(errors or lines)[-1]}")


@dataclass(frozen=True, slots=True)
class Run:
    """A command, and the file that it writes."""

    name: str
    command: tuple[str, ...]
    file: Path


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured.

    Args:
        base: folder of the base.
        server_flags: for each server that is started.
        streams, adapters: numbers of them; 0 adapters, the base alone, is always measured.
        seconds: of each load.
    """

    base: Path
    out: Path
    model: Model
    server_flags: tuple[str, ...]
    streams: tuple[int, ...] = (1, 8, 32, 128)
    adapters: tuple[int, ...] = (1, 8, 32, 128)
    seconds: int = 5

    def _run(self, name: str, *command: str) -> Run:
        file = self.out / f"{name}.json"
        flags = (f"--server-flag={flag}" for flag in self._flags())
        common = ("--spawn", "--base-folder", str(self.base), *flags, "--json", str(file))
        return Run(name, ("veneer_loadtest", *command, *common), file)

    def _flags(self) -> Iterator[str]:
        yield from self.server_flags
        # All resident, with a tenth to spare.
        needed = 2 * max(self.adapters) * self.model.lora_weights(RANK) * 11 // 10
        yield f"--device-adapter-bytes={max(needed, 1 << 28)}"
        yield f"--host-cache-bytes={max(needed, 1 << 28)}"

    def answers(self, adapters: int) -> Run:
        """Answers of mixed batches beside PEFT's, then tokens/s of both."""
        return self._run(
            f"compare-{adapters}",
            "compare",
            "--peer",
            "peft",
            "--generate",
            str(adapters),
            *("--streams", ",".join(map(str, self.streams)), "--repeat", "1"),
            *("--tokens", str(TOKENS), "--prompt-tokens", str(PROMPT), "--rank", str(RANK)),
        )

    def load(self, streams: int) -> Run:
        """The base, then each number of adapters, by one server."""
        return self._run(
            f"load-{streams}",
            "run",
            "--streams",
            str(streams),
            "--duration",
            f"{WARM_UP + self.seconds}s",
            *("--generate", ",".join(map(str, (0, *self.adapters)))),
            *("--warmup", f"{WARM_UP}s", "--popularity", "roundrobin", "--tokens", str(TOKENS)),
            *("--prompt-tokens", str(PROMPT), "--rank", str(RANK)),
        )

    def swap(self) -> Run:
        """Swaps by tier, and streams while adapters are loaded."""
        return self._run("swap", "swap", "--samples", "10", "--rank", str(RANK))

    def training(self, method: str) -> Run:
        """20 steps of QLoRA, or of LoRA on the base in 16 bits, which needs more memory."""
        out = self.out / f"training-{method}"
        command = ("veneer_train", "lab", "qlora-vs-lora", "--base", str(self.base))
        more = ("--methods", method, "--set", "train.steps=20", "--out", str(out))
        return Run(out.name, (*command, *more), out / "results.csv")

    def served(self, streams: int, result: dict[str, Any], card: Card | None) -> list[Serving]:
        """From `load`'s file."""
        found: list[Serving] = []
        # The base counts as one adapter there.
        for adapters, level in zip((0, *self.adapters), result["levels"], strict=True):
            speed = level["tokens_per_s"]
            if level["requests"]["failed"]:
                raise Failed(f"{adapters} adapters: requests failed: {level['errors']}")
            if not level["inter_token_ms"]:
                raise Failed(f"{adapters} adapters: no request ended in {self.seconds} s")
            step = Step(streams, streams, PROMPT + TOKENS // 2, min(adapters, streams), RANK)
            share = None
            if card is not None:
                share = moved(self.model, step, "nf4") * speed / streams / card.bytes_per_s
            found.append(
                Serving(
                    adapters=adapters,
                    streams=streams,
                    tokens_per_s=speed,
                    first_token_p50_ms=level["first_token_ms"]["p50"],
                    inter_token_p50_ms=level["inter_token_ms"]["p50"],
                    inter_token_p99_ms=level["inter_token_ms"]["p99"],
                    ratio_to_base=speed / found[0].tokens_per_s if found else None,
                    bandwidth_share=share,
                )
            )
        return found


def trained(file: Path) -> Training:
    """From the lab's table of one method."""
    with file.open(encoding="utf-8", newline="") as lines:
        (row,) = csv.DictReader(lines)
    return Training(
        method=row["method"],
        base_loss=float(row["base loss"]),
        val_loss=float(row["val loss"]),
        tokens_per_s=float(row["tokens/s"]),
        peak_mb=float(row["peak, MB"]),
        planned_mb=float(row["planned, MB"]),
    )


def read(file: Path) -> dict[str, Any]:
    """A result file."""
    found: dict[str, Any] = json.loads(file.read_bytes())
    return found
