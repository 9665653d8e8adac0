"""Compiles every kernel for four kinds of card, without one: ``python -m tests.gpu.compile``.

Prints registers, spills and shared memory of each kernel, the warps that a multiprocessor then
holds, and for each launch the time that its bytes and operations take on paper. Registers,
spills and shared memory must not exceed ``budgets.json``, and kernels of decode steps must not
spill; else the exit status is 1. ``--write`` records new budgets. ``--only`` and ``--targets``
make it shorter.

Paper figures are no measurements: nothing here was run on a card.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from tests.gpu.cards import CARDS
from tests.gpu.launches import LAUNCHES, Launch, recorded

BUDGETS: Final = Path(__file__).with_name("budgets.json")
TARGETS: Final = (80, 89, 90, 100)
TYPES: Final = {
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}
WARPS: Final = {80: 64, 89: 48, 90: 64, 100: 64}
SHARED: Final = {80: 164, 89: 100, 90: 228, 100: 228}
"""Of a multiprocessor: warps, KiB."""


@dataclass(frozen=True, slots=True)
class Used:
    """Resources of a compiled kernel.

    Attributes:
        registers: of a thread.
        spilled: bytes that a thread stores and loads because registers do not suffice.
        shared: bytes of a program.
        warps: of a program; not part of the budget.
    """

    registers: int
    spilled: int
    shared: int
    warps: int

    def resident(self, target: int) -> int:
        """Warps that a multiprocessor holds at a time."""
        each = -(-self.registers * 32 // 256) * 256
        programs = 65536 // (each * self.warps)
        if self.shared:
            programs = min(programs, SHARED[target] * 1024 // (self.shared + 1024))
        return min(programs * self.warps, WARPS[target])


def source(
    kernel: JITFunction[Any], args: tuple[Any, ...], options: Mapping[str, Any]
) -> ASTSource:
    """What a launch with these arguments compiles: an integer 1 is a constant, and pointers and
    integers that 16 divides are known to be so divided."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...] | str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    given = {**dict(zip(kernel.arg_names, args, strict=False)), **options}
    for place, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(place,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if abs(value) < 1 << 31 else "i64"
            if value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def compiled(launch: Launch, target: int) -> dict[str, Used]:
    """Compile a launch's kernels for ``sm_<target>``."""
    found = {}
    for kernel, args, options in recorded(launch):
        names = set(kernel.arg_names)
        log = io.StringIO()
        with redirect_stdout(log):
            result: Any = triton.compile(
                source(kernel, args, options),
                target=GPUTarget("cuda", target, 32),
                options={name: value for name, value in options.items() if name not in names},
            )
        found[f"{launch.name} / {kernel.__name__}"] = used(result, log.getvalue())
    return found


def used(result: Any, log: str) -> Used:
    """Read from what ptxas says with -v."""
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", log)))
    (registers,) = re.findall(r"Used (\d+) registers", log)
    metadata = result.metadata
    return Used(int(registers), spilled, metadata.shared, metadata.num_warps)


def above(name: str, target: int, now: Used, decode: bool, budgets: Mapping[str, Any]) -> str:
    """What is wrong with a kernel's resources, or ""."""
    budget = budgets.get(name, {}).get(f"sm_{target}")
    if decode and now.spilled:
        return f"{name}, sm_{target}: a kernel of decode steps spills {now.spilled} bytes"
    if budget is None:
        return f"{name}, sm_{target}: no budget; record one with --write"
    over = [key for key, most in budget.items() if getattr(now, key) > most]
    return f"{name}, sm_{target}: more {', '.join(over)} than {budget}" if over else ""


def paper(launch: Launch) -> str:
    """The longer of moving bytes and computing, for each card."""
    times = (
        f"{name} {card.seconds(launch.moved, launch.operations) * 1e6:.0f} us"
        for name, card in CARDS.items()
    )
    return ", ".join(times)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="tests.gpu.compile", description=__doc__)
    parser.add_argument("--only", default="", help="launches whose name has this in it")
    parser.add_argument("--targets", default=",".join(map(str, TARGETS)))
    parser.add_argument("--write", action="store_true", help="record what is used as budgets")
    given = parser.parse_args()
    budgets = json.loads(BUDGETS.read_text("utf-8")) if BUDGETS.exists() else {}
    wrong = []
    with tempfile.TemporaryDirectory() as cache:
        knobs.cache.dir = cache
        knobs.compilation.always_compile = True  # for ptxas to say what it said
        knobs.nvidia.dump_ptxas_log = True
        for launch in LAUNCHES:
            if given.only not in launch.name:
                continue
            print(f"{launch.name}: on paper {paper(launch)}")
            for target in map(int, given.targets.split(",")):
                for name, now in compiled(launch, target).items():
                    if given.write:
                        kept = {k: v for k, v in asdict(now).items() if k != "warps"}
                        budgets.setdefault(name, {})[f"sm_{target}"] = kept
                    print(
                        f"    sm_{target:<3} {name.rpartition(' / ')[2]:16} "
                        f"{now.registers:3} registers, "
                        f"{now.spilled} bytes spilled, {now.shared} shared, "
                        f"{now.resident(target)} of {WARPS[target]} warps"
                    )
                    wrong.append(above(name, target, now, launch.decode, budgets))
    if given.write:
        BUDGETS.write_text(json.dumps(budgets, indent=1, sort_keys=True) + "\n", "utf-8")
    wrong = [each for each in wrong if each]
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
