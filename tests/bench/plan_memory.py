"""Compare the memory that `veneer-train plan` predicts with the peak of a training process:
``python -m tests.bench.plan_memory``.

It trains NF4 + LoRA on the bundled base, in one process per setting. Every sample is as long as
``data.max_len`` allows, since the plan is for the longest batch. Fails if a prediction is off
by more than 15 %.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from veneer_server.models.source import import_bundled
from veneer_train.config import parse_config
from veneer_train.labs.one_run import run
from veneer_train.labs.quant import library_text
from veneer_train.plan import plan, read_shape

from tests.places import cache_dir

CACHE = cache_dir()


class _Setting(NamedTuple):
    batch: int
    length: int
    rank: int
    targets: str | list[str] = "all-linear"


_SETTINGS = (
    _Setting(1, 128, 16),
    _Setting(4, 128, 16),
    _Setting(4, 320, 8),
    _Setting(2, 512, 64),
    _Setting(4, 256, 16, ["q_proj", "v_proj"]),
)


def _data(folder: Path, length: int) -> Path:
    text = library_text(400_000)
    size = 8 * length  # characters: more than ``length`` tokens
    rows = [
        {"prompt": "def", "completion": text[start : start + size]}
        for start in range(0, 12 * size, size)
    ]
    file = folder / f"{length}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


def _config(base: Path, scratch: Path, setting: _Setting, steps: int) -> dict[str, Any]:
    data = str(_data(scratch, setting.length))
    return {
        "model": {"path": str(base), "name": "smollm2-135m"},
        "lora": {"r": setting.rank, "alpha": 16, "targets": setting.targets},
        "data": {
            "train": data,
            "val": data,
            "max_len": setting.length,
            "on_truncated": "truncate",
        },
        "train": {"batch": setting.batch, "accum": 1, "steps": steps},
        "eval": {"every": 0},
        "output": {"dir": str(scratch / "adapter"), "save_every": 0},
    }


def main() -> None:
    """Measure and print; fail if a plan is off."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--method", choices=("qlora", "lora", "full"), default="qlora")
    given = parser.parse_args()
    off = 0.0
    with tempfile.TemporaryDirectory(prefix="veneer-bench-") as folder:
        base = import_bundled(CACHE).path
        print("batch  length  rank  targets      planned MB  peak MB  ratio")
        for number, setting in enumerate(_SETTINGS):
            scratch = Path(folder) / str(number)
            scratch.mkdir()
            raw = _config(base, scratch, setting, given.steps)
            told = plan(read_shape(base), parse_config(raw), method=given.method)
            peak = run(raw, given.method, scratch / "run", threads=given.threads).peak_bytes
            ratio = told.total / peak
            off = max(off, abs(ratio - 1))
            targets = (
                setting.targets
                if isinstance(setting.targets, str)
                else "+".join(setting.targets)
            )
            print(
                f"{setting.batch:5} {setting.length:7} {setting.rank:5}  {targets[:12]:12}"
                f"{told.total / 1e6:10.0f} {peak / 1e6:8.0f} {ratio:6.2f}  "
                + " ".join(f"{name} {size / 1e6:.0f}" for name, size in told.parts.items()),
                flush=True,
            )
    if off > 0.15:
        raise SystemExit(f"a plan is off by {off:.0%}")


if __name__ == "__main__":
    main()
