"""One training run in a separate process, to measure its peak memory:
``python -m veneer_train.labs.one_run SPEC.json RESULT.json``."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from veneer_registry.child_python import child_python
from veneer_registry.errors import Aborted

from veneer_train.config import parse_config
from veneer_train.plan import Method


@dataclass(frozen=True, slots=True)
class LabResult:
    """Result of a run.

    Attributes:
        val_loss, val_accuracy: after training.
        base_loss: loss of the base, before training.
        peak_bytes: peak memory of the process (on a GPU, of the GPU's memory).
        tokens_per_s: speed of training, without evaluations.
        trained: number of trained parameters.
        longest: tokens of the longest sample.
    """

    method: str
    base_loss: float
    val_loss: float
    val_accuracy: float
    peak_bytes: int
    tokens_per_s: float
    trained: int
    steps: int
    longest: int


def run(config: Mapping[str, Any], method: Method, scratch: Path, *, threads: int) -> LabResult:
    """Run in a child process and wait for it.

    Args:
        config: input of `parse_config`; ``method`` sets its ``quant.type``.
        scratch: a folder for the run's files.

    Raises:
        Aborted: the process failed; the message says how it ended.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    spec, result = scratch / "spec.json", scratch / "result.json"
    spec.write_text(json.dumps({"config": config, "method": method, "threads": threads}))
    done = subprocess.run(
        child_python("-m", "veneer_train.labs.one_run", str(spec), str(result)),
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise Aborted(f"the {method} run ended with status {done.returncode}: {last}")
    return msgspec.json.decode(result.read_bytes(), type=LabResult)


def _main(spec_file: Path, result_file: Path) -> None:
    from veneer_train.commands.common import quiet_libraries

    quiet_libraries()
    import torch

    spec = json.loads(spec_file.read_bytes())
    torch.set_num_threads(spec["threads"])
    method: Method = spec["method"]
    found = train(spec["config"], method)
    result_file.write_bytes(msgspec.json.encode(found))


def train(raw: dict[str, Any], method: Method) -> LabResult:
    """Do the run in this process; see `run`."""
    raw.setdefault("quant", {})["type"] = "nf4" if method == "qlora" else "none"
    config = parse_config(raw)
    import torch
    from transformers import set_seed

    from veneer_train.data import load_split
    from veneer_train.evaluate import evaluate
    from veneer_train.metrics_log import MetricsLog
    from veneer_train.model import (
        add_adapter,
        load_base,
        load_tokenizer,
        read_template,
        training_device,
    )
    from veneer_train.trainer import fit

    folder = Path(config.model.path)
    tokenizer = load_tokenizer(folder)
    template = read_template(config.data.template, tokenizer)
    split = load_split(config.data, tokenizer, template, config.train.seed)
    device = training_device()
    set_seed(config.train.seed)
    model = load_base(folder, config.quant, device)
    if method == "full":
        model.requires_grad_(True)
    else:
        model = add_adapter(model, config.lora)
    assert split.val is not None, "labs measure on held-out samples"
    before = evaluate(model, split.val.samples, config.train.batch)
    with MetricsLog(config.output.logs_dir / "metrics.jsonl", lambda row: None) as log:
        began = time.monotonic()
        fitted = fit(model, split, config, log, device)
        seconds = time.monotonic() - began
    after = evaluate(model, split.val.samples, config.train.batch)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    return LabResult(
        method=method,
        base_loss=before.loss,
        val_loss=after.loss,
        val_accuracy=after.accuracy,
        peak_bytes=peak,
        tokens_per_s=fitted.tokens / seconds,
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        steps=fitted.steps,
        longest=max(len(s.input_ids) for s in (*split.train.samples, *split.val.samples)),
    )


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))
