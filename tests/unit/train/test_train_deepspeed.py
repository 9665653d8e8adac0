"""The sample ZeRO-2 config, as `accelerate launch` passes it on, read by DeepSpeed itself.

DeepSpeed is not in the suite's environment, where transformers would import it everywhere: it
is beside it (`make tools`), and one process has both.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands import launch
from accelerate.utils.launch import prepare_deepspeed_cmd_env

REPOSITORY = Path(__file__).resolve().parents[3]
DEEPSPEED = REPOSITORY / ".cache" / "tools" / "deepspeed"
LAUNCH = REPOSITORY / "examples" / "configs" / "accelerate-zero2.yaml"

READ = """
import json, sys, torch
from pathlib import Path
from deepspeed.runtime.config import DeepSpeedConfig
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig
from veneer_train.config import OptimConfig
from veneer_train.trainer import training_arguments

chosen = OptimConfig(batch=3, accum=5, clip=0.25)
arguments = training_arguments(chosen, Path(sys.argv[1]), torch.device("cpu"))
given = HfTrainerDeepSpeedConfig(arguments.deepspeed_plugin.hf_ds_config.config)
given.trainer_config_process(arguments)  # as Trainer does
read = DeepSpeedConfig(given.config)
misspelt = {**given.config, "zero_optimization": {"stage": 2, "overlap_com": True}}
try:
    DeepSpeedConfig(misspelt)
    refused = ""
except Exception as error:
    refused = str(error)
print(json.dumps({
    "stage": read.zero_optimization_stage,
    "batch": read.train_micro_batch_size_per_gpu,
    "accum": read.gradient_accumulation_steps,
    "of all": read.train_batch_size,
    "clip": read.gradient_clipping,
    "16 bits": read.float16_config.enabled or read.bfloat16_config.enabled,
    "optim": arguments.optim,
    "given": given.config,
    "refused": refused,
}))
"""


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process learns that `accelerate launch` starts with the sample config."""
    if not DEEPSPEED.is_dir():
        if os.environ.get("CI"):
            pytest.fail("DeepSpeed is missing: run `make tools`")
        pytest.skip("DeepSpeed is missing: run `make tools`")
    given: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "deepspeed_launcher", given.append)
        parser = launch.launch_command_parser()
        arguments = ["--config_file", str(LAUNCH), "-m", "veneer_train"]
        launch.launch_command(parser.parse_args(arguments))
    _, environment = prepare_deepspeed_cmd_env(*given)
    answer = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path_factory.mktemp("run"))],
        env={**environment, "PYTHONPATH": str(DEEPSPEED)},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert answer.returncode == 0, answer.stderr
    found: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return found


def test_deepspeed_reads_the_sample_config(read: dict[str, Any]) -> None:
    assert read["stage"] == 2
    assert (read["batch"], read["accum"], read["of all"]) == (3, 5, 15)
    assert read["clip"] == 0.25
    assert not read["16 bits"]  # adapters train in fp32
    assert "auto" not in json.dumps(read["given"])
    assert read["optim"] == "adamw_torch_fused"


def test_deepspeed_refuses_a_misspelt_key(read: dict[str, Any]) -> None:
    assert "overlap_com" in read["refused"]
