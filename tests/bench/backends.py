"""Time decoding steps of each backend, without a server: ``python -m tests.bench.backends``.

It runs the bundled base in NF4, 1, 8 and 32 rows, contexts of 40 to 104 tokens; plain, and with
a mix of 8 different adapters of rank 16 on all projections. Backends alternate by round, so
that a slow minute of the machine affects both. Prints medians over all rounds, and their
ratios.

With ``--llama-batched-bench`` and ``--llama-model``, llama.cpp decodes its base for as long in
each round, without adapters, since its server cannot mix adapters.

With ``--base``, that base is used instead, by the native backend alone; `tests.bench.big_base`
writes large bases. llama.cpp's model must be of the same shape.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from veneer_server.engine.execution.backend_choice import Chosen
from veneer_server.step.adapter_table import AdapterTable

from tests.bench.steps import PROMPT, ROWS, blocks_for, load, make_adapters, run_round

NEW = 60


class Kind(NamedTuple):
    """What a round measures: a backend, with or without mixed adapters."""

    backend: str
    mixed: bool

    def __str__(self) -> str:
        return f"{self.backend} {'mixed' if self.mixed else 'base'}"


KINDS = tuple(Kind(name, mixed) for name in ("torch", "native") for mixed in (False, True))


class Peers:
    """Both backends, loaded.

    Args:
        threads: number of threads per backend.
        most: maximum tokens of a sequence.
        base: folder of a base, for the native backend alone; None: the bundled base, for both.
        int8: whether the native backend uses 8-bit activations.
        instructions: the native backend's instruction set.
    """

    def __init__(
        self,
        threads: int,
        most: int,
        base: Path | None = None,
        *,
        int8: bool = False,
        instructions: str = "auto",
    ) -> None:
        self._threads = threads
        names = ("torch", "native") if base is None else ("native",)
        self.kinds = [kind for kind in KINDS if kind.backend in names]
        self._chosen: dict[str, Chosen] = {}
        self._tables: dict[str, list[AdapterTable]] = {}
        for name in names:
            blocks = max(ROWS) * blocks_for(most) + 1
            chosen = load(
                name,
                threads,
                num_blocks=blocks,
                base=base,
                instructions=instructions,
                int8_activations=int8,
            )
            self._chosen[name] = chosen
            self._tables[name] = make_adapters(
                chosen.weights.config, chosen.lora_dtype, paired=chosen.paired
            )

    @property
    def native_name(self) -> str:
        """The native backend's name with its instruction set: ``native (avx512-bf16)``."""
        return self._chosen["native"].name

    def rounds(self, rows: int, count: int, new: int) -> Iterator[dict[Kind, float]]:
        """Yield each round's median seconds per step of each kind, in alternating order."""
        for number in range(count):
            times = {}
            for kind in self.kinds if number % 2 == 0 else self.kinds[::-1]:
                # The native backend's remaining torch code runs on one thread, as in serving.
                torch.set_num_threads(1 if kind.backend == "native" else self._threads)
                tables = self._tables[kind.backend][:rows] if kind.mixed else []
                times[kind] = run_round(self._chosen[kind.backend].backend, rows, new, tables)
            yield times


def ratios(times: dict[Kind, float]) -> dict[str, float]:
    """Compute ratios of speeds from seconds per step."""
    base, mixed = times[Kind("native", False)], times[Kind("native", True)]
    theirs = {
        f"native / torch, {'mixed' if kind.mixed else 'base'}": (
            time / times[Kind("native", kind.mixed)]
        )
        for kind, time in times.items()
        if kind.backend == "torch"
    }
    return {**theirs, "native mixed / base": base / mixed}


def llama_decode(given: argparse.Namespace, rows: int) -> float:
    """Measure llama.cpp's decoding speed in tokens per second."""
    sizes = ["-c", str(rows * (PROMPT + 2 * NEW)), "-npp", str(PROMPT), "-ntg", str(NEW)]
    threads = ["-t", str(given.threads), "-tb", str(given.threads)]
    command = [given.llama_batched_bench, "-m", given.llama_model, *sizes, *threads]
    printed = subprocess.run(
        [*command, "-npl", str(rows), "--output-format", "jsonl"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        # llama.cpp is fastest if its threads spin at barriers.
        env={name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"},
        text=True,
        check=True,
    ).stdout
    (line,) = (line for line in printed.splitlines() if line.startswith("{"))
    return float(json.loads(line)["speed_tg"])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama-batched-bench", metavar="PROGRAM")
    parser.add_argument("--llama-model", metavar="GGUF")
    parser.add_argument("--base", type=Path, metavar="FOLDER")
    parser.add_argument("--int8-activations", action="store_true", help="of native")
    parser.add_argument("--native-instructions", default="auto", metavar="NAME")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    peers = Peers(
        given.threads,
        PROMPT + 2 * NEW,
        given.base,
        int8=given.int8_activations,
        instructions=given.native_instructions,
    )
    found: dict[str, dict[str, Any]] = {}
    for rows in ROWS:
        rounds, llama = [], []
        for each in peers.rounds(rows, given.rounds, NEW):
            rounds.append(each)
            if given.llama_batched_bench:
                llama.append(llama_decode(given, rows))
        times = {kind: statistics.median(each[kind] for each in rounds) for kind in peers.kinds}
        found[str(rows)] = {
            **{f"{kind}, tokens/s": round(rows / time, 1) for kind, time in times.items()},
            **{name: round(value, 3) for name, value in ratios(times).items()},
        }
        if llama:
            theirs = statistics.median(llama)
            found[str(rows)] |= {
                "llama.cpp base, tokens/s": round(theirs, 1),
                "llama.cpp base, least and most": (min(llama), max(llama)),
                "native mixed / llama.cpp base": round(
                    rows / times[Kind("native", True)] / theirs, 2
                ),
            }
        if not given.json:
            print(
                f"{rows} rows", *(f"  {k}: {v}" for k, v in found[str(rows)].items()), sep="\n"
            )
    if given.json:
        print(
            json.dumps(
                {"threads": given.threads, "rounds": given.rounds, "rows": found}, indent=2
            )
        )


if __name__ == "__main__":
    main()
