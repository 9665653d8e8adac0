"""Time a prefill of 512 tokens by each instruction set: ``python -m tests.bench.prefill``.

It runs one step of the bundled base in NF4 with a prompt of 512 tokens, without an adapter and
with one of rank 16, alternating between this CPU's instruction sets. Prints the fastest rounds,
and ratios to the last instruction set.
"""

from __future__ import annotations

import argparse
import time

import torch
from veneer_server.backends.native.compiler import cpu_flags
from veneer_server.backends.native.forms import forms_of

from tests.bench.steps import blocks_for, load, make_adapters, make_step

TOKENS = 512


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="tests.bench.prefill", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    blocks, forms = blocks_for(TOKENS) + 1, []
    best: dict[tuple[str, bool], float] = {}
    for form in forms_of("x86_64"):
        if not form.needs <= cpu_flags():
            continue
        forms.append(load("native", given.threads, num_blocks=blocks, instructions=form.name))
    torch.set_num_threads(1)
    adapter = make_adapters(forms[0].weights.config, forms[0].lora_dtype, paired=True)[:1]
    for mixed in (False, True):
        step = make_step(1, 0, TOKENS, adapter if mixed else [], most=TOKENS)
        for number in range(given.rounds):
            for chosen in forms if number % 2 == 0 else forms[::-1]:
                began = time.perf_counter()
                chosen.backend.execute(step)
                took = time.perf_counter() - began
                best[chosen.name, mixed] = min(took, best.get((chosen.name, mixed), took))
    for (name, mixed), took in best.items():
        what = "with an adapter" if mixed else "base"
        ratio = best[forms[-1].name, mixed] / took
        print(f"{name:24} {what:16} {took * 1e3:7.1f} ms {ratio:6.2f} x {forms[-1].name}")


if __name__ == "__main__":
    main()
