"""Writes a trained adapter as the folder that the server accepts.

PEFT's own ``save_pretrained`` would write the base's path on this machine, targets in
the order of a Python set, and fp32 tensors; so we write the folder ourselves.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from veneer_registry.format import read_adapter

from veneer_train.plain_json import plain_json, plain_text

FILE_DTYPE: Final = torch.bfloat16
_MODE: Final = 0o644


def round_to_file_dtype(model: Any) -> None:
    """Round the adapter's weights in place to the dtype that `write_folder` stores."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(parameter.to(FILE_DTYPE))


@dataclass(frozen=True, slots=True)
class AdapterSnapshot:
    """A copy of an adapter, so that training can continue meanwhile.

    Attributes:
        tensors: copies on the CPU in `FILE_DTYPE`, by PEFT's names.
        config: content of ``adapter_config.json``.
    """

    tensors: Mapping[str, torch.Tensor]
    config: Mapping[str, Any]

    @property
    def dora(self) -> bool:
        return bool(self.config.get("use_dora"))


def take(model: Any, base_name: str) -> AdapterSnapshot:
    """Copy a PEFT model's adapter.

    Args:
        base_name: the base's logical name, since the adapter must not contain a path of this
            machine.
    """
    (name,) = model.active_adapters
    facts = model.peft_config[name].to_dict()
    facts["base_model_name_or_path"] = base_name
    facts["inference_mode"] = True
    if not isinstance(facts["target_modules"], str):  # keep a pattern as it is
        facts["target_modules"] = sorted(facts["target_modules"])
    tensors = {
        key: tensor.detach().to(device="cpu", dtype=FILE_DTYPE, copy=True).contiguous()
        for key, tensor in get_peft_model_state_dict(model, adapter_name=name).items()
    }
    return AdapterSnapshot(tensors, {key: facts[key] for key in sorted(facts)})


def model_card(
    title: str, manifest: Mapping[str, Any], *, about: str = "", license_name: str = ""
) -> str:
    """A short card with the front matter that model hubs read."""
    name = manifest["base_name"]
    front = [f"base_model: {name}", "library_name: peft", "tags: [lora, veneer]"]
    if license_name:
        front.append(f"license: {license_name}")
    said = [about or "Trained with `veneer-train`.", ""]
    if "lora" in manifest.get("config", {}):
        config, data = manifest["config"], manifest["data"]["train"]
        lora = config["lora"]
        targets = lora["targets"]
        said += [
            f"Rank {lora['r']}, alpha {lora['alpha']:g}, targets "
            f"{targets if isinstance(targets, str) else ', '.join(sorted(targets))}; "
            f"trained for {manifest['steps']} steps on {data['samples']} samples over a "
            f"{config['quant']['type'].upper()} base. `training_manifest.json` has the rest.",
            "",
        ]
    metrics = [f"| {key} | {value} |" for key, value in manifest["metrics"].items()]
    return "\n".join(
        [
            *("---", *front, "---", f"# {title}: a LoRA adapter for {name}", ""),
            *said,
            *(["| metric | value |", "| --- | --- |", *metrics, ""] if metrics else []),
        ]
    )


def write_folder(
    out: Path,
    adapter: AdapterSnapshot,
    manifest: Mapping[str, Any],
    *,
    card: str,
    template: str | None = None,
) -> None:
    """Write the adapter folder ``out``, checked as a server does; complete or not at all.

    Args:
        out: replaced if it exists.
        manifest: see `veneer_train.manifest.build_manifest`.
        card: see `model_card`.
        template: the chat template to ship, or None for the base's.

    Raises:
        AdapterInvalid: the server would refuse these weights (NaN, for example).
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        file = staging / "adapter_model.safetensors"
        save_file(dict(adapter.tensors), file, metadata={"format": "pt"})
        texts = {
            "adapter_config.json": plain_json(adapter.config),
            "training_manifest.json": plain_json(manifest),
            "README.md": plain_text(card),
        }
        if template is not None:
            texts["chat_template.jinja"] = template
        for name, text in texts.items():
            (staging / name).write_text(text, "utf-8")
        for path in staging.iterdir():
            path.chmod(_MODE)
        staging.chmod(0o755)
        if not adapter.dora:  # servers accept DoRA only merged, so their check does not apply
            read_adapter(staging, base=None)
        if out.exists():
            shutil.rmtree(out)
        os.replace(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
