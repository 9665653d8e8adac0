"""The program that row 2 starts: it runs the parsers of untrusted bytes under a fuzzer.

``python -m tests.torture.fuzzing --seconds 1200 --seed 7 WORK`` fuzzes guided by coverage if
`atheris` is installed (it is not a dependency: ``pip install --target DIR atheris``, then
``PYTHONPATH=DIR``), else (or with ``--engine seeded``) by seeded mutation. The exit status is
0 if only documented errors were raised; inputs that raised others are in WORK.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import random
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.torture.mutations import TOKENS, mutate_bytes

Target = Callable[[bytes], None]
MOST_BYTES = 8192


def has_atheris() -> bool:
    """Return whether coverage-guided fuzzing is possible here."""
    return importlib.util.find_spec("atheris") is not None


def parsers() -> Target:
    """Return a function that passes its bytes to the parser selected by the first byte.

    This imports the product, so that the caller can have it instrumented.
    """
    from veneer_registry.errors import AdapterInvalid
    from veneer_registry.lora_config import parse_config
    from veneer_registry.safetensors_header import read_header
    from veneer_registry.training_manifest import parse_training

    file = io.FileIO(os.memfd_create("fuzzed"), "r+")

    def header(data: bytes) -> None:
        file.seek(0)
        file.truncate()
        file.write(data)
        read_header(file, "fuzzed")

    picked: list[Callable[[bytes], Any]] = [header, parse_config, parse_training]

    def target(data: bytes) -> None:
        if not data:
            return
        try:
            picked[data[0] % len(picked)](data[1:])
        except AdapterInvalid as refusal:
            # The error must fit a gRPC trailer, and its reason is part of the contract.
            said = json.dumps([refusal.message, refusal.metadata])
            if not refusal.metadata["why"] or len(said) >= 4000:
                raise RuntimeError(f"a refusal without a usable reason: {said[:200]}") from None

    return target


def seeds() -> list[bytes]:
    """Return valid inputs for each parser, so that the fuzzer starts past the first checks."""
    header = {
        "__metadata__": {"format": "pt"},
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": {
            "dtype": "BF16",
            "shape": [2, 4],
            "data_offsets": [0, 16],
        },
        "b": {"dtype": "F32", "shape": [4], "data_offsets": [16, 32]},
    }
    text = json.dumps(header).encode()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 8,
        "lora_alpha": 16,
        "use_rslora": True,
        "rank_pattern": {"q_proj": 4},
        "alpha_pattern": {"^layers.0.mlp.up_proj$": 3.5},
        "bias": "none",
        "init_lora_weights": "gaussian",
        "target_modules": ["q_proj"],
    }
    training = {
        "base_fingerprint": {"weights": "a" * 64, "tokenizer": "b" * 64},
        "metrics": {"loss": 1.5, "steps": 3},
        "data": {"files": ["x", {"y": None}]},
    }
    return [
        b"\0" + len(text).to_bytes(8, "little") + text + bytes(32),
        b"\1" + json.dumps(config).encode(),
        b"\2" + json.dumps(training).encode(),
    ]


def deep_bug(data: bytes) -> None:
    """A planted bug behind three bytes, which can only be found step by step.

    It replaces the parsers, because their coverage would lead the fuzzer elsewhere for
    longer than a quick run.
    """
    # One comparison per line: each is a separate branch that coverage rewards.
    if len(data) > 3 and data[0] == 0x56:  # noqa: SIM102
        if data[1] == 0x65:  # noqa: SIM102
            if data[2] == 0xB7:
                raise RuntimeError("the planted bug")


def shallow_bug(target: Target) -> Target:
    """Return ``target`` with a planted bug that needs two bytes, for the run without
    coverage."""

    def planted(data: bytes) -> None:
        if b"[[" in data and data[0] % 3:
            raise RuntimeError("the planted bug")
        target(data)

    return planted


def by_coverage(seconds: int, seed: int, work: Path, *, planted: bool) -> None:
    """Fuzz by coverage. Never returns: the fuzzer ends the process, with status 77 after an
    error that is not documented."""
    import atheris

    with atheris.instrument_imports(include=["veneer_registry", "json"]):
        target = parsers()
    corpus = work / "corpus"
    corpus.mkdir(exist_ok=True)
    flags = [f"-max_total_time={seconds}", f"-seed={seed}", "-timeout=2", "-rss_limit_mb=1024"]
    flags += ["-print_final_stats=1", f"-artifact_prefix={work}/", str(corpus)]
    if planted:
        # Without seeds, so that only coverage can lead to the bug.
        target = atheris.instrument_func(deep_bug)
    else:
        for number, data in enumerate(seeds()):
            (corpus / f"seed-{number}").write_bytes(data)
        tokens = (token for token in TOKENS if len(token) < 64)
        lines = ("".join(f"\\x{byte:02x}" for byte in token) for token in tokens)
        (work / "tokens").write_text("".join(f'"{line}"\n' for line in lines))
        flags += [f"-max_len={MOST_BYTES}", f"-dict={work / 'tokens'}"]
    atheris.Setup([sys.argv[0], *flags], target)
    atheris.Fuzz()


def by_mutation(seconds: int, seed: int, work: Path, *, planted: bool) -> int:
    """Fuzz by random damage to the same seeds; return the exit status."""
    target = parsers()
    if planted:
        target = shallow_bug(target)
    rng = random.Random(seed)
    good = seeds()
    began, done = time.monotonic(), 0
    while time.monotonic() - began < seconds:
        for _ in range(200):
            data = mutate_bytes(rng.choice(good), rng)[:MOST_BYTES]
            try:
                target(data)
            except Exception:
                (work / "crash-seeded").write_bytes(data)
                traceback.print_exc()
                return 77
        done += 200
    print(f"stat::number_of_executed_units: {done}", file=sys.stderr)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--engine", choices=("coverage", "seeded"), default="coverage")
    parser.add_argument("--planted", action="store_true", help="with a bug to find")
    parser.add_argument("work", type=Path, help="folder for corpus and findings")
    given = parser.parse_args()
    run = by_coverage if given.engine == "coverage" and has_atheris() else by_mutation
    return run(given.seconds, given.seed, given.work, planted=given.planted) or 0


if __name__ == "__main__":
    sys.exit(main())
