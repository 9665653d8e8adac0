"""Compare each kernel's time with the machine's limit: ``python -m tests.bench.kernels``.

Limits are measured in the same run, for one thread and for two: memory bytes read per second,
and bf16 multiplications per second. A kernel's limit is the longer of the times for its bytes
and for its multiplications at those rates; its share is that limit divided by the time it took.
First come single GEMMs on one thread, with weights from memory; then the parts of whole steps
on all threads, which the kernels time themselves if compiled with ``VENEER_TIMES`` (LoRA is the
difference between a mixed step and a plain step, measured alternately). A step's limit is the
sum of its parts' limits, since they run one after another.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import shutil
import statistics
import time
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any

import torch
from veneer_server.backends.native.compiler import build
from veneer_server.backends.native.library import BFLOAT16, EIGHT_BIT, Library, Linear
from veneer_server.backends.native.linear import NativeLinear, pack_dense
from veneer_server.models.config import DecoderConfig
from veneer_server.step.adapter_table import AdapterTable

from tests.bench.limits import Limits, Work, huge_pages, load_limits, measure_limits
from tests.bench.steps import CACHE, ROWS, blocks_for, load, make_adapters, make_step
from tests.bench.work import EXPANDS, SHRINKS, adapter_work, base_work, kernel_work

COLD = 128 << 20
"""Bytes of weights that are read in turn: more than fit in the caches."""
CONTEXTS = (104, 1000)
ROUNDS, STEPS = 7, 10
Parts = dict[str, float]
"""Seconds per step, by part; ``whole`` is the whole step."""


def print_line(name: str, work: Work, limits: Limits, seconds: float) -> None:
    limit = limits.seconds(work)
    print(
        f"{name:26} {work.bytes / 1e6:9.2f} {work.flops / 1e9:9.3f} {limit * 1e3:9.3f} "
        f"{seconds * 1e3:9.3f} {limit / seconds if limit else 0:7.2f} "
        f"{work.bytes / seconds / 1e9:7.1f} {work.flops / seconds / 1e9:8.0f}",
        flush=True,
    )


def print_head(title: str) -> None:
    heads = f"{'MB':>9} {'GFLOP':>9} {'limit ms':>9} {'took ms':>9} {'share':>7} {'GB/s':>7}"
    print(f"\n{title}\n{'':26} {heads} {'GFLOP/s':>8}")


# ------------------------------------------------------- single products, one thread


def print_products(
    functions: Any, limits: Limits, weights: Iterable[tuple[str, NativeLinear]]
) -> None:
    """Print the GEMM of each weight [outputs, inputs], for few rows and for many."""
    multiply = ctypes.CDLL(str(build(CACHE))).veneer_multiply
    print_head("single products, one thread, weights from memory")
    for kind, linear in weights:
        outputs, inputs = linear.shape
        copies, _memory = copies_of(linear)
        places = (ctypes.c_void_p * len(copies))(*map(ctypes.addressof, copies))
        for rows in (*ROWS, 128):
            x = torch.randn(rows, inputs).bfloat16()
            y = torch.empty(rows, outputs)
            took = functions.limit_time(
                multiply,
                places,
                # About a tenth of a second at 100 GFLOP/s is enough.
                max(1, min(len(copies), int(1e10 / (2 * rows * outputs * inputs)))),
                ctypes.c_void_p(x.data_ptr()),
                ctypes.c_int64(rows),
                ctypes.c_void_p(y.data_ptr()),
                5,
            )
            work = kernel_work(kind, outputs, inputs, rows)
            print_line(f"{kind} {outputs}x{inputs}, {rows} rows", work, limits, took)


def copies_of(linear: NativeLinear) -> tuple[list[Linear], torch.Tensor]:
    """Make as many copies of a weight as fit in `COLD`. Return them with their memory, which
    must stay alive."""
    size = -(-linear.nbytes // 64) * 64
    count = max(2, COLD // size)
    memory = huge_pages(count * size)
    copies = []
    for number in range(count):
        copy = Linear.from_buffer_copy(linear.struct)
        place = memory.data_ptr() + number * size
        ctypes.memmove(place, linear.struct.weights, linear.nbytes)
        copy.weights = place
        copies.append(copy)
    return copies, memory


# ------------------------------------------------------------- parts of whole steps


def part_names() -> list[str]:
    """Return the parts in the order of decoder.h; its ``kQkvTime`` is ``qkv`` here."""
    source = (
        resources.files("veneer_server.backends.native") / "cpp" / "decoder" / "decoder.h"
    ).read_text("utf-8")
    found = re.search(r"enum Time \{([^}]*)\}", source)
    assert found, "decoder.h has no enum Time"
    names = [name.strip() for name in found[1].split(",")]
    return [re.sub(r"^k|Time$", "", name).lower() for name in names if name != "kTimes"]


class Steps:
    """Steps of the native backend, timed by part."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._names = part_names()
        self._times = ctypes.CDLL(str(build(CACHE))).veneer_times
        self._times.argtypes = [ctypes.c_void_p, ctypes.c_void_p]

    def run(self, rows: int, context: int, tables: Sequence[AdapterTable]) -> Parts:
        """Run a round; return the seconds per step."""
        step = make_step(rows, context - 1, 1, tables, most=context)
        self._backend.execute(step)
        before, began = self._read(), time.perf_counter()
        for _ in range(STEPS):
            self._backend.execute(step)
        took = {"whole": (time.perf_counter() - began) / STEPS}
        for name, start, end in zip(self._names, before, self._read(), strict=True):
            took[name] = (end - start) / STEPS
        return took

    def _read(self) -> list[float]:
        seconds = (ctypes.c_double * len(self._names))()
        self._times(self._backend.handle, seconds)
        return list(seconds)


def median(rounds: Sequence[Parts]) -> Parts:
    return {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}


def print_steps(
    steps: Steps, config: DecoderConfig, limits: Limits, rows: int, tables: list[AdapterTable]
) -> None:
    """Print a plain and a mixed step of this many rows, and LoRA as their difference."""
    context, mixed = CONTEXTS[0], tables[:rows]
    rounds = [
        (steps.run(rows, context, ()), steps.run(rows, context, mixed)) for _ in range(ROUNDS)
    ]
    plain, both = median([a for a, _ in rounds]), median([b for _, b in rounds])
    added = median([{name: b[name] - a[name] for name in a} for a, b in rounds])
    base, lora = base_work(config, rows, context), adapter_work(config, rows, len(mixed))
    print_head(f"a step of {rows} rows, context {context}, {limits.threads} threads")
    for name in (name for name in plain if name != "whole"):
        print_line(name, base.get(name, Work()), limits, plain[name])
    for name, parts in (("LoRA shrink (A)", SHRINKS), ("LoRA expand (B)", EXPANDS)):
        took = sum(added.get(part, 0.0) for part in parts)
        print_line(name, _sum(lora[part] for part in parts), limits, took)
    _print_whole("whole step, base", list(base.values()), limits, plain["whole"])
    works = [*base.values(), *(_sum(lora[part] for part in p) for p in (SHRINKS, EXPANDS))]
    _print_whole(f"whole step, {len(mixed)} adapters", works, limits, both["whole"])


def _sum(works: Iterable[Work]) -> Work:
    total = Work()
    for work in works:
        total = total.plus(work)
    return total


def _print_whole(name: str, works: list[Work], limits: Limits, took: float) -> None:
    """Print a step's time and the sum of its parts' limits, at the rate of torch's matmul and
    of multiplications in registers."""
    total = _sum(works)
    limit, strict = (
        sum(each.seconds(work) for work in works)
        for each in (limits, limits._replace(matmul=limits.registers))
    )
    print(
        f"{name:26} {total.bytes / 1e6:9.2f} {total.flops / 1e9:9.3f} {limit * 1e3:9.3f} "
        f"{took * 1e3:9.3f} {limit / took:7.2f}   ({strict / took:.2f} by registers)"
    )


def print_attention(steps: Steps, config: DecoderConfig, limits: Limits) -> None:
    print_head(f"attention of a step, {config.num_layers} layers, {limits.threads} threads")
    for context in CONTEXTS:
        for rows in ROWS:
            took = median([steps.run(rows, context, ()) for _ in range(3)])["attend"]
            work = base_work(config, rows, context)["attend"]
            print_line(f"{rows} rows, context {context}", work, limits, took)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    threads = parser.parse_args().threads
    functions = load_limits()
    one, several = measure_limits(functions, 1), measure_limits(functions, threads)
    print(one, several, sep="\n")
    os.environ["CXX"] = (
        f"{os.environ.get('CXX') or shutil.which('c++') or 'g++'} -DVENEER_TIMES"
    )
    num_blocks = max(ROWS) * blocks_for(max(CONTEXTS)) + 1
    chosen = load("native", threads, num_blocks=num_blocks)
    torch.set_num_threads(1)
    layer, library = chosen.weights.layers[0], Library(build(CACHE))
    weights: list[tuple[str, Any]] = [
        ("nf4", linear) for linear in (layer.qkv, layer.output, layer.gate_up, layer.down)
    ]
    for kind, name in ((EIGHT_BIT, "8-bit"), (BFLOAT16, "bf16")):
        weights.append((name, pack_dense(library, kind, chosen.weights.head)))
    print_products(functions, one, weights)
    steps, config = Steps(chosen.backend), chosen.weights.config
    tables = make_adapters(config, chosen.lora_dtype, paired=chosen.paired)
    for rows in ROWS:
        print_steps(steps, config, several, rows, tables)
    print_attention(steps, config, several)


if __name__ == "__main__":
    main()
