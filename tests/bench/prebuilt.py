"""Compare kernels compiled for this CPU with a wheel's: ``python -m tests.bench.prebuilt``.

It times decoding steps on one thread with an adapter per row, with all libraries in one process
and in a new random order for each round. The shortest time of each counts, so other processes
may share the cores. With the same compiler, the two AVX2 libraries have the same bytes, so
their ratio shows the noise, most of which comes from where the weights are in memory.
"""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path

from veneer_server.backends.native import chosen
from veneer_server.backends.native.chosen import UsableLibrary
from veneer_server.backends.native.compiler import build, cpu_flags
from veneer_server.backends.native.forms import FORMS, compile_forms
from veneer_server.engine.execution import backend_choice as backends
from veneer_server.engine.execution.backend_choice import Chosen
from veneer_server.models.config import read_decoder_config
from veneer_server.models.source import import_bundled

from tests.bench.steps import CACHE, ROWS, load, make_adapters, make_step

ROUNDS, CONTEXT, BLOCKS = 100, 64, 400


def loaded(file: Path) -> Chosen:
    """Load the base with this library, as the server does."""
    backends.find_library = lambda cache, instructions="auto": UsableLibrary(file)
    return load("native", 1, num_blocks=BLOCKS)


def main() -> None:
    """Measure and print."""
    print("seed 1")
    chance = random.Random(1)
    with tempfile.TemporaryDirectory() as folder:
        made = compile_forms(["c++"], Path(chosen.__file__).with_name("cpp"), Path(folder))
        backends_ = {}
        here = [form for form in FORMS if form.needs <= cpu_flags()]
        for form in here:
            [file] = (each for each in made if each.name.startswith(f"{form.name}-"))
            own = build(CACHE, form.name)
            backends_[form.name, "compiled"] = loaded(own)
            backends_[form.name, "prebuilt"] = loaded(file)
    any_ = next(iter(backends_.values()))
    tables = make_adapters(
        read_decoder_config(import_bundled(CACHE).path), any_.lora_dtype, paired=any_.paired
    )
    for rows in ROWS:
        step = make_step(rows, CONTEXT - 4, 1, tables[:rows], most=CONTEXT)
        best = dict.fromkeys(backends_, float("inf"))
        for _ in range(ROUNDS):
            for key in chance.sample(list(best), len(best)):
                began = time.perf_counter()
                backends_[key].backend.execute(step)
                best[key] = min(best[key], time.perf_counter() - began)
        for form in here:
            compiled, prebuilt = best[form.name, "compiled"], best[form.name, "prebuilt"]
            print(
                f"{rows:3} rows, {form.name:12} compiled {compiled * 1e3:7.2f} ms, "
                f"prebuilt {prebuilt * 1e3:7.2f} ms, ratio {prebuilt / compiled:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
