"""Row 21: a file of the data or cache folder is removed, emptied, halved or has a bit flipped.

The whole server really starts on a tiny Llama in NF4, each time in a separate process
(`tests.torture.at_rest_worker`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.tiny_llama import make_lora, make_tiny_llama
from tests.torture.at_rest import (
    ADAPTERS,
    Damage,
    Golden,
    Judge,
    Worker,
    damages,
    make_golden,
    tree,
)
from tests.torture.at_rest_worker import PLANTED
from tests.torture.row import Control, Outcome, Scale

ROW = 21
TITLE = "files at rest"
BAR = (
    "never served wrong, adapter data never deleted, the cache rebuilt, never a crash loop; "
    "a sentence says what happened and what to do, and doing it helps"
)
WORKERS = 2


def _adapters(work: Path) -> dict[str, Path]:
    return {
        name: make_lora(work / "adapters" / name, seed=seed) for name, seed in ADAPTERS.items()
    }


def run(scale: Scale) -> Outcome:
    """Apply damages of every kind to files, spread over workers."""
    base = str(make_tiny_llama(scale.work / "base"))
    workers = [Worker(base) for _ in range(scale.pick(1, WORKERS))]
    try:
        golden = make_golden(workers[0], scale.work / "golden", _adapters(scale.work))
        cases = damages(golden, scale.pick(16, 500), scale.random("damages"))
        judges = [
            Judge(worker, golden, scale.folder(f"worker-{number}"))
            for number, worker in enumerate(workers)
        ]

        def share(number: int) -> None:
            for index in range(number, len(cases), len(judges)):
                judges[number].run(index, cases[index])

        with ThreadPoolExecutor(len(judges)) as pool:
            list(pool.map(share, range(len(judges))))
    finally:
        for worker in workers:
            worker.close()
    return _outcome(judges, len(cases), full=scale.full)


def _outcome(judges: list[Judge], count: int, *, full: bool) -> Outcome:
    outcomes = sum((judge.outcomes for judge in judges), start=type(judges[0].outcomes)())
    figure = f"{count} damages: " + ", ".join(
        f"{n} {what}" for what, n in outcomes.most_common()
    )
    failures = tuple(line for judge in judges for line in judge.failures)
    notes = tuple(line for judge in judges for line in judge.told) if full else ()
    return Outcome(figure, BAR, failures, notes)


def controls(scale: Scale) -> Iterator[Control]:
    """Start broken servers on damage that they cannot handle."""
    rng = scale.random("controls")
    worker = Worker(str(make_tiny_llama(scale.work / "base")))
    try:
        golden = make_golden(worker, scale.work / "golden", _adapters(scale.work))
        for number, planted in enumerate(PLANTED):
            worker.planted = planted
            judge = Judge(worker, golden, scale.folder(f"planted-{number}"))
            judge.run(number, _unbearable(planted, golden, rng))
            yield Control(planted, next(iter(judge.failures), ""))
    finally:
        worker.close()


def _unbearable(planted: str, golden: Golden, rng: random.Random) -> Damage:
    """Return a damage that reveals a planted bug."""
    if "catalog" in planted:
        return Damage("stopped", "data/catalog.sqlite", "removed")
    top = "cache/quantized" if "cache" in planted else "data/store/weights"
    (path, *_) = (
        path
        for path in tree(golden.folders["stopped"])
        if path.suffix == ".safetensors" and str(path).startswith(top)
    )
    file = golden.folders["stopped"] / path
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    # In a weight, since any reader notices a damaged header or quantization state.
    begin, end = rng.choice(
        [
            tensor["data_offsets"]
            for name, tensor in sorted(header.items())
            if name.endswith(".weight")
        ]
    )
    at = (8 + size + rng.randrange(begin, end), rng.randrange(8))
    return Damage("stopped", str(path), "flipped", at)
