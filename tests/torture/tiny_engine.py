"""Run the real engine on a tiny Llama, for rows that torture adapter loading."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from veneer_server.wire.messages import EngineConfig

from tests.engine_harness import EngineHarness, engine
from tests.tiny_llama import make_tiny_llama
from tests.torture.forms import TORCH, Form


@contextmanager
def tiny_engine(work: Path, form: Form = TORCH) -> Iterator[EngineHarness]:
    """Run an engine with space for a few sequences; check on exit that nothing leaked."""
    base = make_tiny_llama(work / "base")
    settings = EngineConfig(
        base_folder=str(base),
        cache_folder=str(form.cache(work / "cache")),
        base_name="tiny",
        weights_fingerprint="",
        device="cpu",
        max_batch_tokens=64,
        max_running=8,
        kv_cache_bytes=8 << 20,
        **form.settings,
    )
    with engine(settings) as harness:
        yield harness


def ask(seed: int, **more: Any) -> dict[str, Any]:
    """Build a request whose prompt is determined by ``seed``."""
    prompt = [3 + (seed * 37 + n * 11) % 500 for n in range(6)]
    return {"prompt": prompt, "max_tokens": 4, "logprobs": True, "ignore_eos": True, **more}
