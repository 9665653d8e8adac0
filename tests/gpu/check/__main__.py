"""Check and measure on the card at hand: ``make gpu-check``, or ``python -m tests.gpu.check``.

First every kernel beside its reference, then answers of mixed batches beside PEFT's. Only then
speed: tokens/s at 1 to 128 streams with 1 to 128 adapters, beside our own base without adapters
and PEFT; swaps by tier; the longest gaps between tokens; the share of the card's memory
bandwidth; 20 steps of training. Writes one JSON file (docs/gpu-check.schema.json). Without a
card it says so and ends with status 2; with 1 if something is wrong.

``--rehearse`` runs the same without a card: the kernels interpreted, and the same commands with
the CPU's backend, in few sizes. Its figures say nothing about a card.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec
from veneer_loadtest.setup import find_base_folder

from tests.gpu.check.check import check
from tests.gpu.check.result import GpuCheck
from tests.gpu.check.runs import Plan, Runner, run_process
from tests.gpu.check.steps import Model

SEEDS: Final = 20
NO_CARD: Final = 2


def kernels(module: str = "veneer_server.backends.cuda.self_test") -> Mapping[str, Any]:
    """The answer of the kernels' self-test, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", module, str(SEEDS)],
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return {"why": f"the self-test ended with {done.returncode}: {last}"}
    return found


def model_of(base: Path) -> Model:
    """Sizes from a base's config.json."""
    facts = json.loads((base / "config.json").read_bytes())
    heads = facts["num_attention_heads"]
    return Model(
        layers=facts["num_hidden_layers"],
        hidden=facts["hidden_size"],
        inner=facts["intermediate_size"],
        heads=heads,
        kv_heads=facts.get("num_key_value_heads") or heads,
        head=facts.get("head_dim") or facts["hidden_size"] // heads,
        vocab=facts["vocab_size"],
    )


def told(result: GpuCheck) -> str:
    """The result in a few lines."""
    lines = [f"{result.card}, {result.base}: {result.seconds:.0f} s"]
    for each in result.serving:
        ratios = [
            f"{ratio:.2f} of {what}"
            for ratio, what in (
                (each.ratio_to_base, "the base's"),
                (each.ratio_to_peft, "PEFT's"),
                (each.bandwidth_share, "the bandwidth"),
            )
            if ratio is not None
        ]
        speed = f"{each.tokens_per_s:.0f} tokens/s, ITL p99 {each.inter_token_p99_ms:.1f} ms"
        lines.append(
            f"{each.streams} streams, {each.adapters} adapters: {speed}; "
            f"{', '.join(ratios) or 'no ratios'}"
        )
    lines += [f"{name}: {value:.1f}" for name, value in result.swap.items()]
    lines += [
        f"{each.method}: loss {each.base_loss:.3f} to {each.val_loss:.3f}, "
        f"{each.peak_mb:.0f} MB, {each.planned_mb:.0f} planned"
        for each in result.training
    ]
    lines += [f"FAILED {name}: {why}" for name, why in result.failed.items()]
    return "\n".join(lines)


def main(
    arguments: Sequence[str] | None = None,
    *,
    kernels: Callable[..., Mapping[str, Any]] = kernels,
    runner: Runner = run_process,
) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="tests.gpu.check", description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("gpu-check.json"), help="the result")
    parser.add_argument("--base", type=Path, help="a Hugging Face folder; else the bundled one")
    parser.add_argument("--streams", default="1,8,32,128")
    parser.add_argument("--adapters", default="1,8,32,128")
    parser.add_argument("--seconds", type=int, default=5, help="of each load")
    parser.add_argument("--server-flag", action="append", default=[])
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, see above")
    given = parser.parse_args(arguments)
    device = ("--device=cuda", "--backend=cuda")
    if given.rehearse:
        kernels = partial(kernels, "tests.gpu.check.rehearsal")
        device = ("--device=cpu",)
        given.streams, given.adapters, given.seconds = "1,2", "1,2", 3
    found = kernels()
    if "name" not in found:
        print(f"nothing was checked or measured: {found['why']}")
        return NO_CARD
    base = given.base or find_base_folder(None)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch:
        plan = Plan(
            base=base,
            out=Path(scratch),
            model=model_of(base),
            server_flags=(*device, *given.server_flag),
            streams=tuple(map(int, given.streams.split(","))),
            adapters=tuple(map(int, given.adapters.split(","))),
            seconds=given.seconds,
        )
        result = check(plan, found, runner, seeds=SEEDS)
    given.json.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    print(told(result))
    return 1 if result.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
