"""Write a trained adapter as the folder that the server takes.

PEFT's own ``save_pretrained`` would write the base's path on this machine, targets in
the order of a Python set, and fp32 tensors; so the folder is written here.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from enum import Enum
from pathlib import Path
from typing import Any, Final

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from veneer_registry.format import read_adapter

from veneer_train.config import TrainConfig

__all__ = ["FILE_DTYPE", "round_to_file_dtype", "write_folder"]

FILE_DTYPE: Final = torch.bfloat16
_MODE: Final = 0o644


def round_to_file_dtype(model: Any) -> None:
    """Round the adapter's weights, in place, to what `write_folder` can store."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(parameter.to(FILE_DTYPE))


def _plain(value: object) -> object:
    """JSON for what PEFT keeps in a config. Sets are sorted: same run, same bytes."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, Enum):
        return value.value
    raise TypeError(f"adapter config holds {value!r}, which is not JSON")


def _adapter_config(model: Any, base_name: str) -> dict[str, Any]:
    facts = model.peft_config["default"].to_dict()
    facts["base_model_name_or_path"] = base_name
    facts["inference_mode"] = True
    facts["target_modules"] = sorted(facts["target_modules"])
    return {key: facts[key] for key in sorted(facts)}


def _card(config: TrainConfig, manifest: dict[str, Any]) -> str:
    """A short model card with the front matter that model hubs read."""
    front = [f"base_model: {config.model.name}", "library_name: peft", "tags: [lora, veneer]"]
    if config.output.license:
        front.append(f"license: {config.output.license}")
    lora, data = config.lora, manifest["data"]["train"]
    metrics = "\n".join(f"| {name} | {value} |" for name, value in manifest["metrics"].items())
    return "\n".join(
        [
            "---",
            *front,
            "---",
            f"# {Path(config.output.dir).name}: a LoRA adapter for {config.model.name}",
            "",
            config.output.description or "Trained with `veneer-train`.",
            "",
            f"Rank {lora.r}, alpha {lora.alpha:g}, targets {', '.join(lora.target_modules)}; "
            f"trained for {manifest['steps']} steps on {data['samples']} samples over a "
            f"{config.quant.type.upper()} base. `training_manifest.json` has the rest.",
            "",
            "| metric | value |",
            "| --- | --- |",
            metrics,
            "",
        ]
    )


def write_folder(
    out: Path, model: Any, config: TrainConfig, manifest: dict[str, Any], template: str | None
) -> None:
    """Write the adapter folder ``out``: whole, checked as the server will, or not at all.

    Args:
        out: replaced if it exists.
        model: the PEFT model that was trained.
        config: for names in the card and in the adapter's config.
        manifest: see `veneer_train.manifest.build_manifest`.
        template: the chat template to ship, or None for the base's own.

    Raises:
        AdapterInvalid: the server would refuse these weights (NaN, for example).
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        tensors = {
            name: tensor.detach().to(device="cpu", dtype=FILE_DTYPE).contiguous()
            for name, tensor in get_peft_model_state_dict(model).items()
        }
        save_file(tensors, staging / "adapter_model.safetensors", metadata={"format": "pt"})
        texts = {
            "adapter_config.json": _json(_adapter_config(model, config.model.name)),
            "training_manifest.json": _json(manifest),
            "README.md": _card(config, manifest),
        }
        if template is not None:
            texts["chat_template.jinja"] = template
        for name, text in texts.items():
            (staging / name).write_text(text, "utf-8")
        for path in staging.iterdir():
            path.chmod(_MODE)
        staging.chmod(0o755)
        read_adapter(staging, base=None)
        if out.exists():
            shutil.rmtree(out)
        os.replace(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _json(value: object) -> str:
    return json.dumps(value, indent=2, default=_plain, ensure_ascii=False) + "\n"
