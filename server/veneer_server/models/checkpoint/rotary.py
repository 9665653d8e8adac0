"""Rotary frequencies of a base: the only part of it that its weight files do not contain."""

from __future__ import annotations

from pathlib import Path

import torch


def rotary(folder: Path) -> tuple[torch.Tensor, float]:
    """Return the frequencies, [head_dim / 2] float32, and the factor on cos and sin, for the
    folder's config. transformers computes them, in a model without layers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True)  # nosec B615 # a local folder
    config.num_hidden_layers, config.layer_types = 0, []
    config.vocab_size, config.pad_token_id = 1, None
    found = AutoModelForCausalLM.from_config(config).model.rotary_emb
    return found.inv_freq.float(), float(found.attention_scaling)
