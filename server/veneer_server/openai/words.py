"""Translates the gRPC names of fields and methods into those of the HTTP gateway."""

from __future__ import annotations

from typing import Final

from veneer_registry.interface_words import Translation

from veneer_server.wire.messages import SamplingParams

__all__ = ["in_openai_words"]

_SAME: Final = {
    "sampling": SamplingParams.__struct_fields__,
    "stopping": ("max_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos"),
    "output": ("n", "logprobs", "top_logprobs", "echo", "prompt_logprobs"),
    "template": ("reasoning_effort", "add_generation_prompt", "continue_final_message"),
}

in_openai_words: Final = Translation(
    {f"{part}.{name}": name for part, names in _SAME.items() for name in names}
    | {
        "constraint.json_schema": "response_format",
        "constraint.regex": "structured_outputs.regex",
        "constraint.choice": "structured_outputs.choice",
        "constraint.grammar": "structured_outputs.grammar",
        "template.kwargs": "chat_template_kwargs",
        "token_ids": "prompt",
        "session_key": "user",
        "prompt": "prompt of /v1/completions",
        "adapter": "model",
        "ListAdapters": "GET /v1/models",
        "GetAdapter": "GET /v1/models/NAME",
        # Not available over HTTP.
        "SetAlias": "`veneer adapter alias`",
        "UpdateBudgets": "`veneer budgets`",
        "EvictAdapter": "`veneer adapter evict`",
        "unpin": "`veneer adapter evict --unpin`",
    }
)
"""Rewrites a server message for a caller of the gateway."""
