"""Adapters made by PEFT itself, and PEFT as the reference for their outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:  # two seconds of every worker, which few need
    from peft import LoraConfig

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ATTENTION, MLP = ALL_LINEAR[:4], ALL_LINEAR[4:]


def variants() -> dict[str, LoraConfig]:
    """Return one config for each kind of adapter that the server must mix in a batch."""
    from peft import LoraConfig

    def lora(**options: Any) -> LoraConfig:
        # False gives random A and B: an adapter whose B is zero tests nothing.
        options = {"target_modules": ALL_LINEAR, "lora_alpha": 16} | options
        return LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options)

    return {
        "rank-1": lora(r=1, lora_alpha=2),
        "rank-4": lora(r=4, lora_alpha=8),
        "rank-16": lora(r=16),
        "rank-64": lora(r=64, lora_alpha=32),
        "rslora": lora(r=8, lora_alpha=4, use_rslora=True),
        "patterns": lora(
            r=8,
            rank_pattern={"q_proj": 4, "layers.1.mlp.down_proj": 12},
            alpha_pattern={"q_proj": 2, "layers.2.self_attn.o_proj": 32},
        ),
        "attention": lora(r=8, target_modules=ATTENTION),
        "mlp": lora(r=8, target_modules=MLP),
        "all-linear": lora(r=8, target_modules="all-linear"),
        "some-layers": lora(r=8, layers_to_transform=[0, 2]),
        "regex": lora(r=8, target_modules=r".*\.self_attn\.(q|v)_proj"),
    }


def make_adapters(
    model: Any,
    folder: Path,
    *,
    scale: float = 0.02,
    seed: int = 0,
    only: Sequence[str] = (),
) -> dict[str, Path]:
    """Save every variant over ``model``, or ``only`` some, with random B; returns name ->
    folder."""
    from peft import get_peft_model

    made: dict[str, Path] = {}
    for index, (name, config) in enumerate(variants().items()):
        if only and name not in only:
            continue
        torch.manual_seed(seed + index)
        wrapped = get_peft_model(model, config)
        for key, parameter in wrapped.named_parameters():
            if "lora_B" in key:
                parameter.data.normal_(std=scale)
        wrapped.save_pretrained(folder / name)
        model = wrapped.unload()
        made[name] = folder / name
    return made


@torch.no_grad()
def reference_logprobs(
    model: Any, adapters: Mapping[str, Path], prompts: Sequence[list[int]]
) -> dict[str | None, list[list[float]]]:
    """Compute teacher-forced log-probabilities of each prompt's tokens after the first, by
    PEFT with one adapter loaded at a time; key None is the base."""
    from peft import PeftModel

    def score(scorer: Any) -> list[list[float]]:
        scores = []
        for prompt in prompts:
            tokens = torch.tensor([prompt])
            logits = scorer(tokens).logits[0, :-1].float()
            rows = torch.log_softmax(logits, dim=-1)
            scores.append(rows.gather(1, tokens[0, 1:, None]).squeeze(1).tolist())
        return scores

    results: dict[str | None, list[list[float]]] = {None: score(model.eval())}
    for name, folder in adapters.items():
        wrapped = PeftModel.from_pretrained(model, folder).eval()
        results[name] = score(wrapped)
        model = wrapped.unload()
    return results
