"""The program that row 1 starts: it pushes damaged adapters through a real registry.

``python -m tests.torture.mutants WORK --count 10000 --seed 7`` prints one JSON object. It is a
separate process, so that a crash is detected and its memory shows the cost of these adapters.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from veneer_registry.errors import AdapterInvalid, VeneerError
from veneer_registry.registry import Registry
from veneer_registry.safetensors_header import ADAPTER_LIMITS

from tests.torture.crafted import CONFIG, TRAINING, WEIGHTS, Files, bombs, crafted, split
from tests.torture.mutations import mutate_bytes, mutate_json
from tests.unit.registry.kit import BASE, SHAPES, announce, raw_file, send

LIMIT = 32 << 20
"""The registry's `max_adapter_bytes`."""
ALLOWED = ("INVALID_ARGUMENT", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED")
"""Allowed codes: for an error in the adapter, a wrong base, or a wrong size."""


def mutant(seeds: list[Files], rng: random.Random) -> Files:
    """Return one of ``seeds`` with one file damaged."""
    files = dict(rng.choice(seeds))
    name = rng.choice([WEIGHTS, WEIGHTS, CONFIG, *files])
    if name not in files:
        return files
    match rng.randrange(5):
        case 0:
            files[name] = mutate_bytes(files[name], rng)
        case 1:
            files[name] = rng.choice(seeds).get(name, b"")
        case 2 if name == WEIGHTS:
            data = bytearray(files[name])
            at = rng.randrange(len(data) // 2) * 2
            bad = (b"\xc0\x7f", b"\x80\x7f", b"\x80\xff", b"\x00\x7c", b"\x01\xfc", b"\x1d\x49")
            data[at : at + 2] = rng.choice(bad)
            files[name] = bytes(data)
        case _ if name in (CONFIG, TRAINING, WEIGHTS):
            with contextlib.suppress(ValueError, UnicodeDecodeError, IndexError):
                files[name] = _structural(name, files[name], rng)
    return files


def _structural(name: str, data: bytes, rng: random.Random) -> bytes:
    if name != WEIGHTS:
        return json.dumps(mutate_json(json.loads(data), rng)).encode()
    header, tensors = split(data)
    return raw_file(mutate_json(header, rng), tensors)


def objection(files: Files) -> str:
    """Return why these files should not have been accepted, or ""; uses none of the registry's
    code."""
    config = json.loads(files[CONFIG], object_pairs_hook=_no_duplicates)
    header = files[WEIGHTS][8 : 8 + int.from_bytes(files[WEIGHTS][:8], "little")]
    json.loads(header, object_pairs_hook=_no_duplicates)
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        return "its config is not plain LoRA"
    sides: dict[str, dict[str, Any]] = {}
    for name, tensor in safetensors.deserialize(files[WEIGHTS]):
        stem, _, side = name.removesuffix(".weight").rpartition(".lora_")
        sides.setdefault(stem, {})[side] = tensor
        if not _finite(tensor):
            return f"{name} is not finite and small"
    for stem, pair in sides.items():
        fan_out, fan_in = SHAPES.get(stem.rpartition(".")[2], (0, 0))  # type: ignore[call-overload]
        if set(pair) != {"A", "B"}:
            return f"{stem} is half of a pair"
        (rank, a_in), (b_out, b_rank) = pair["A"]["shape"], pair["B"]["shape"]
        if (a_in, b_out, rank) != (fan_in, fan_out, b_rank):
            return f"{stem} has shapes that do not fit"
    return "" if sides else "it holds no tensors"


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def _finite(tensor: dict[str, Any]) -> bool:
    raw = bytes(tensor["data"])
    if tensor["dtype"] == "BF16":
        values = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    else:
        values = np.frombuffer(raw, {"F32": "<f4", "F16": "<f2"}[tensor["dtype"]])
    with np.errstate(invalid="ignore"):
        return bool((np.abs(values.astype(np.float64)) <= 1e4).all())


class Judge:
    """Pushes adapters and collects wrong answers."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.failures: list[str] = []
        self.answers: Counter[str] = Counter()
        self.worst = 0.0

    def push(self, files: Files, what: str, *, publish: bool) -> None:
        """Push an adapter; anything but acceptance or a documented error is a failure."""
        # CPU time, so that the machine's load does not matter.
        began = time.process_time()
        try:
            upload = self.registry.begin_upload(announce("mutant", files, allow_replace=True))
            send(upload, files, 1 << 20)
            (self.registry.publish if publish else self.registry.validate)(upload)
            answer = "accepted"
        except VeneerError as error:
            answer = error.code
            self._check_refusal(error, what)
        except Exception as error:
            answer = type(error).__name__
            self.failures.append(f"{what}: {answer} escaped: {str(error)[:150]}")
        took = time.process_time() - began
        self.worst = max(self.worst, took)
        if took > 2:
            self.failures.append(f"{what}: took {took:.1f} s of CPU ({answer})")
        self.answers[answer] += 1
        if answer == "accepted":
            self._check_accepted(files, what)

    def _check_refusal(self, error: VeneerError, what: str) -> None:
        if error.code not in ALLOWED:
            self.failures.append(f"{what}: {error.code}: {error}")
        elif isinstance(error, AdapterInvalid) and not error.metadata.get("why"):
            self.failures.append(f"{what}: refused without a reason: {error}")
        elif len(json.dumps([error.message, error.metadata])) > 4000:
            self.failures.append(f"{what}: the reason does not fit a gRPC trailer")

    def _check_accepted(self, files: Files, what: str) -> None:
        try:
            why = objection(files)
        except Exception as error:
            why = f"another reader cannot read it ({type(error).__name__}: {error})"
        if why:
            self.failures.append(f"{what}: accepted, but {why[:200]}")


def torture(work: Path, count: int, seed: int, *, with_bombs: bool) -> dict[str, Any]:
    """Push ``count`` mutants and the bombs; return the results for JSON."""
    rng = random.Random(seed)
    seeds = crafted()
    large = bombs(seeds[0], ADAPTER_LIMITS.header_bytes) if with_bombs else {}
    growth: dict[str, int] = {}
    with Registry.open(work / "data", BASE, max_adapter_bytes=LIMIT) as registry:
        judge = Judge(registry)
        before = resident("VmHWM:")
        for number, files in enumerate(seeds):
            judge.push(files, f"crafted {number}", publish=number % 20 == 0)
        for number in range(count):
            judge.push(mutant(seeds, rng), f"mutant {number}", publish=number % 20 == 0)
        growth["mutants"] = resident("VmHWM:") - before
        for name, files in large.items():
            # Resets the kernel's peak memory counter.
            Path("/proc/self/clear_refs").write_text("5")
            before = resident("VmRSS:")
            judge.push(files, name, publish=False)
            growth[name] = resident("VmHWM:") - before
    return {
        "crafted": len(seeds),
        "done": count,
        "failures": judge.failures,
        "answers": judge.answers,
        "worst_s": judge.worst,
        "growth": growth,
    }


def resident(key: str) -> int:
    """Return the bytes in memory now (``VmRSS:``), or the maximum so far (``VmHWM:``)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


# ------------------------------------------------------------------ planted bugs


@contextlib.contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    real = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, real)


def no_number_check() -> Any:
    """A planted bug: NaN and infinity are accepted."""
    from veneer_registry import weights

    return replaced(weights, "find_problem", lambda *_: None)


def own_json(bug: Any) -> Any:
    """Plant a bug: the strict reader's ``json.loads`` calls ``bug`` on its text first."""
    real = json.loads

    def loads(text: str, **options: Any) -> Any:
        # Only the strict reader passes this hook.
        if "parse_constant" in options:
            bug(text)
        return real(text, **options)

    return replaced(json, "loads", loads)


def _key_error(text: str) -> None:
    if "[[" in text:
        raise KeyError("planted")


def _abort(text: str) -> None:
    if "[[" in text:
        os.abort()


def _hog(text: str) -> None:
    if "[[" in text:
        _ = bytearray(150 << 20)


PLANTED = {
    "NaN and infinity are not refused": no_number_check,
    "a KeyError escapes from the JSON reader": lambda: own_json(_key_error),
    "the process crashes on nested lists": lambda: own_json(_abort),
    "nested lists take 150 MiB to read": lambda: own_json(_hog),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--planted", choices=sorted(PLANTED), help="leaves out size bombs")
    given = parser.parse_args()
    with PLANTED[given.planted]() if given.planted else contextlib.nullcontext():
        found = torture(given.work, given.count, given.seed, with_bombs=not given.planted)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
