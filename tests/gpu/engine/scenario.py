"""The real engine on a simulated card: mixed batches with swaps, beside torch's numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from veneer_server.models.config import Quantization
from veneer_server.wire.messages import AdapterSource, EngineConfig, SamplingParams

from tests.engine_harness import Answer, EngineHarness, engine, source
from tests.gpu.engine.formats import rounded
from tests.gpu.engine.simulated import SimulatedDevice
from tests.tiny_llama import make_lora, make_tiny_llama

RATIO: Final = 1.25
"""Our distance from torch's float32 over that of torch's bfloat16: both are samples of the same
rounding (the state is float32, what lies between is bfloat16), over hundreds of numbers.

The adapters are in bfloat16. Of float32 ones a card would serve rounded numbers, and torch on a
CPU, which keeps adapters in float32, the numbers themselves."""
RANKS: Final = (1, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class Found:
    """What a run found."""

    figure: str
    failures: tuple[str, ...]


def run(
    folder: Path,
    *,
    requests: int,
    exact: bool,
    quantization: Quantization = "nf4",
    ratio: float = RATIO,
    **settings: Any,
) -> Found:
    """Requests with adapters that do not all fit, in one batch; their prompts' scores beside
    torch's; in exact mode each request once more alone, which must give the same bits.

    Args:
        settings: of `EngineConfig`.
    """
    base = make_tiny_llama(folder / "base")
    adapters = [
        source(make_lora(folder / f"adapter-{at}", seed=at, rank=rank, bfloat16=True))
        for at, rank in enumerate(RANKS * 2)
    ]
    asked = [_request(at, adapters) for at in range(requests)]
    serving: dict[str, Any] = {"backend": "cuda", "exact": exact, "quantization": quantization}
    with engine(config(base, folder, **serving, **settings)) as harness:
        answers = harness.run(asked)
        steps, device = harness.loop.steps, SimulatedDevice.current
        again = _alone(harness, asked) if exact else answers
    if quantization == "fp8":
        base, quantization = rounded(base, folder / "rounded"), "none"
    apart = {
        dtype: _scores(base, folder, asked, dtype=dtype, quantization=quantization)
        for dtype in ("float32", "bfloat16")
    }
    mine = np.concatenate([a.prompt_logprobs for a in answers])
    ours, theirs = (
        float(np.abs(found - apart["float32"]).mean()) for found in (mine, apart["bfloat16"])
    )
    failures = [
        f"request {at} ended with {answer.error}"
        for at, answer in enumerate(answers)
        if answer.error is not None
    ]
    failures += [
        f"request {at} alone differs"
        for at, (answer, other) in enumerate(zip(answers, again, strict=True))
        if (answer.tokens, answer.logprobs) != (other.tokens, other.logprobs)
    ]
    if not ours <= ratio * theirs:
        failures.append(f"{ours:.4f} from torch in float32, torch in bfloat16 {theirs:.4f}")
    waits = sum(n for what, n in device.syncs.items() if "copy" not in what)
    stalls = device.stalls
    figure = (
        f"{requests} requests, {steps} steps, {device.captures} graphs, {ours:.4f} from torch "
        f"in float32 (torch in bfloat16: {theirs:.4f}), {waits} waits of all steps, "
        f"{stalls} without work behind"
    )
    return Found(figure, tuple(failures))


def _request(at: int, adapters: list[AdapterSource]) -> dict[str, Any]:
    choices = (
        SamplingParams(temperature=0),
        SamplingParams(temperature=0.8, seed=at, top_p=0.9),
        SamplingParams(temperature=1.0, seed=at, top_k=20, min_p=0.02),
        SamplingParams(temperature=0, repetition_penalty=1.2, presence_penalty=0.5),
    )
    return {
        "prompt": [3 + (at * 37 + n * 11) % 500 for n in range(1 + 7 * at % 40)],
        "adapter": adapters[at % len(adapters)] if at % 3 else None,
        "sampling": choices[at % len(choices)],
        "max_tokens": 4 + at % 5,
        "ignore_eos": True,
        "logprobs": True,
        "prompt_logprobs": True,
    }


def _alone(harness: EngineHarness, asked: list[dict[str, Any]]) -> list[Answer]:
    return [harness.run([request])[0] for request in asked]


def _scores(base: Path, folder: Path, asked: list[dict[str, Any]], **how: Any) -> Any:
    with engine(config(base, folder, backend="torch", **how)) as harness:
        answers = harness.run([{**request, "max_tokens": 1} for request in asked])
    return np.concatenate([answer.prompt_logprobs for answer in answers])


def config(base: Path, folder: Path, **more: Any) -> EngineConfig:
    """Of an engine whose adapters do not all fit."""
    return EngineConfig(
        base_folder=str(base),
        cache_folder=str(folder / "cache"),
        base_name="tiny",
        weights_fingerprint="",
        device="cpu",
        threads=1,
        max_running=8,
        max_batch_tokens=64,
        kv_cache_bytes=1 << 20,
        device_adapter_bytes=320 << 10,
        host_adapter_bytes=4 << 20,
        **more,
    )
