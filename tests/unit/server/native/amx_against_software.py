"""Compares the kernels for AMX with those over the software model, bit by bit:
``python -m tests.unit.server.native.amx_against_software AMX_LIBRARY SOFTWARE_LIBRARY``.

A process of its own: where the CPU has no AMX, its instructions are emulated in it
(``amx_emulator.cpp``, preloaded).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from veneer_server.backends.native.library import EIGHT_BIT, FOUR_BIT, Library

from tests.unit.server.native.model_kit import Served, adapter_of, make_base, table_of
from tests.unit.server.native.test_native import KINDS

SEED = 23
ROWS = (1, 2, 3, 4, 17, 150)
SHAPES = ({"dim": 32}, {"dim": 64}, {"heads": 2, "kv_heads": 1, "dim": 96})


def main(amx: Path, software: Path) -> None:
    """See the module. Exits with a message where a number differs."""
    both = Library(amx), Library(software)
    assert [each.instructions for each in both] == ["amx-bf16", "software-matrix"]
    compared = 0

    def compare(what: str, first: torch.Tensor, second: torch.Tensor) -> None:
        nonlocal compared
        if not torch.equal(first.view(torch.int32), second.view(torch.int32)):
            raise SystemExit(f"{what}: {int((first != second).sum())} numbers differ")
        compared += first.numel()

    for kind, (make, _) in KINDS.items():
        for rows in ROWS:
            x = torch.randn(rows, 192, generator=torch.Generator().manual_seed(rows))
            for int8 in range(1 if kind == "bfloat16" else 2):
                results = []
                for library in both:
                    torch.manual_seed(SEED)
                    linear, *_ = make(library, 80, 192)
                    linear.struct.int8_inputs = int8
                    results.append(linear(x.bfloat16()))
                compare(f"{kind}, {rows} rows, int8 {int8}", *results)
    for shape in SHAPES:
        generator = torch.Generator().manual_seed(SEED)
        base = make_base(generator, **shape)
        adapter = adapter_of(generator, base, dict.fromkeys(base.layers[0], 17))
        tokens = torch.randint(0, 128, (41,), generator=generator).tolist()
        parts = [
            (tokens, 0, range(1, 5), table_of(base, adapter)),
            (tokens[:5], 0, [7], None),
            (tokens[:1], 0, [8], table_of(base, adapter, torch.float32)),
            (tokens[:1], 0, [9], table_of(base, adapter)),
            (tokens[:2], 0, [10], table_of(base, adapter)),
        ]
        options: list[dict[str, Any]] = [
            {},
            {"kind": EIGHT_BIT, "head": EIGHT_BIT, "int8_activations": True},
            {"kind": FOUR_BIT, "head": EIGHT_BIT, "int8_activations": True},
        ]
        for chosen in options:
            steps = [
                torch.cat(Served.over(library, base, threads=2, **chosen).step(parts))
                for library in both
            ]
            compare(f"a step, {shape}, {chosen}", *steps)
    print(f"{compared} numbers are the same")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
