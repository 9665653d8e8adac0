"""The CLI's names for the contract's calls and fields."""

from __future__ import annotations

from typing import Final

from veneer_proto.v1 import adapters_pb2, inference_pb2
from veneer_registry.interface_words import Translation

__all__ = ["in_cli_words"]

_COMMANDS: Final = {
    "Generate": "generate",
    "GenerateStream": "generate",
    "ListAdapters": "adapter ls",
    "GetAdapter": "adapter show",
    "UploadAdapter": "adapter push",
    "GetUpload": "adapter push",
    "RegisterAdapter": "adapter push",
    "UpdateAdapter": "adapter label",
    "DownloadAdapter": "adapter pull",
    "DeleteAdapter": "adapter rm",
    "ActivateAdapter": "adapter activate",
    "EvictAdapter": "adapter evict",
    "WatchAdapters": "adapter watch",
    "SetAlias": "adapter alias",
    "ListAliases": "adapter aliases",
    "GetHistory": "adapter history",
    "GetServerInfo": "info",
    "PlanCapacity": "plan",
    "GetUsage": "usage",
    "SelfTest": "self-test",
    "UpdateBudgets": "budgets",
}

_OPTIONS: Final = {
    **{
        f"sampling.{field.name}": f"--{field.name.replace('_', '-')}"
        for field in inference_pb2.SamplingOptions.DESCRIPTOR.fields
    },
    "stopping.max_tokens": "--max-tokens",
    "stopping.min_tokens": "--min-tokens",
    "stopping.stop": "--stop",
    "stopping.stop_token_ids": "--stop-token-id",
    "output.n": "--n",
    "output.logprobs": "--logprobs",
    "output.top_logprobs": "--top-logprobs",
    "constraint.json_schema": "--json-schema",
    "constraint.regex": "--regex",
    "constraint.choice": "--choice",
    "constraint.grammar": "--grammar",
    "template.reasoning_effort": "--reasoning-effort",
    "use_prefix_cache": "--prefix-cache",
    "session_key": "--session",
    "priority": "--priority",
    "prompt": "--raw",
    "spec.labels": "--label",
    "spec.activate": "--activate",
    "spec.validate_only": "--dry-run",
    "allow_replace": "--replace",
    "same_base": "--same-base",
    "unpin": "--unpin",
    "mode": "--mode",
    "tier": "--tier",
    "context_length": "--context",
    "shape.rank": "--rank",
    "shape.modules": "--module",
}

_VALUES: Final = {
    value.name: value.name.removeprefix(prefix).lower().replace("_", "-")
    for enum, prefix in (
        (inference_pb2.Tier.DESCRIPTOR, "TIER_"),
        (adapters_pb2.EvictMode.DESCRIPTOR, "EVICT_MODE_"),
    )
    for value in enum.values
}
"""Values of the contract's enumerations, as flags take them."""

in_cli_words: Final = Translation(
    {name: f"`veneer {command}`" for name, command in _COMMANDS.items()} | _OPTIONS | _VALUES
)
"""Translates a message of the server for a user of ``veneer``."""
