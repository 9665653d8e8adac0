"""Checks a request against the model, and fills in the model's defaults."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import Final

import msgspec
from veneer_registry.errors import ContextTooLong, InvalidField

from veneer_server.serving.records import Sampling
from veneer_server.text.defaults import RequestDefaults
from veneer_server.wire.messages import Constraint, EngineInfo, SamplingParams

_SEED_BITS: Final = 63


def most_prompt_tokens(info: EngineInfo) -> int:
    """Return the length of the longest prompt that leaves room for one new token."""
    return info.longest_sequence - 1


def room(
    info: EngineInfo, wanted: int | None, prompt_tokens: int, default: int | None = None
) -> int:
    """Return the most new tokens of a request: ``wanted``, or else the default, limited to the
    rest of the context.

    Raises:
        ContextTooLong: prompt and completion cannot fit.
    """
    limit = info.longest_sequence
    left = limit - prompt_tokens
    numbers = {
        "prompt_tokens": str(prompt_tokens),
        "context_length": str(info.context_length),
        "kv_cache_tokens": str(info.kv_cache_tokens),
    }
    if left < 1:
        raise ContextTooLong(
            f"the prompt has {prompt_tokens} tokens, but prompt and completion together "
            f"may have {limit}: shorten the prompt to at most {limit - 1} tokens",
            metadata={"field": "prompt", **numbers},
        )
    if wanted is not None and wanted > left:
        raise ContextTooLong(
            f"stopping.max_tokens is {wanted}, but after a prompt of {prompt_tokens} tokens "
            f"only {left} of {limit} are left: set at most {left}, or leave it unset",
            metadata={"field": "stopping.max_tokens", "largest": str(left), **numbers},
        )
    return min(left, default or left) if wanted is None else wanted


def kept_tokens(info: EngineInfo, truncate: int, wanted: int | None) -> int:
    """Return how many tokens of a prompt to keep, at least 1.

    Args:
        truncate: `GenerateCall.truncate_prompt`.
        wanted: most new tokens, if set.

    Raises:
        InvalidField: ``truncate`` is more than the context holds.
        ContextTooLong: ``truncate`` is -1, but ``wanted`` leaves no room for a prompt.
    """
    most = most_prompt_tokens(info)
    if truncate > most:
        raise InvalidField(
            f"truncate_prompt_tokens is {truncate}, but a prompt may have {most} tokens: give "
            "at most that",
            metadata={"field": "truncate_prompt_tokens", "largest": str(most)},
        )
    if truncate > 0:
        return truncate
    if wanted is not None and wanted > most:
        raise ContextTooLong(
            f"stopping.max_tokens is {wanted}, but prompt and completion together may have "
            f"{info.longest_sequence}, and truncate_prompt_tokens -1 keeps only what "
            f"stopping.max_tokens leaves: set stopping.max_tokens to at most {most}",
            metadata={
                "field": "stopping.max_tokens",
                "largest": str(most),
                "context_length": str(info.context_length),
                "kv_cache_tokens": str(info.kv_cache_tokens),
            },
        )
    return max(1, info.longest_sequence - max(1, wanted or 1))


def check_constraint_size(constraint: Constraint | None, most: int) -> None:
    """Raises InvalidField for a constraint of more than ``most`` bytes."""
    if constraint is None:
        return
    size = len(constraint.text.encode())
    if size > most:
        field = f"constraint.{constraint.kind}"
        raise InvalidField(
            f"{field} has {size} bytes: give at most {most}", metadata={"field": field}
        )


def check_ids(info: EngineInfo, field: str, ids: Iterable[int]) -> None:
    """Raises InvalidField if an id is outside the vocabulary."""
    worst = max(ids, default=0)
    if worst >= info.vocab_size:
        raise InvalidField(
            f"{field} holds {worst}, but the vocabulary ends at {info.vocab_size - 1}: use "
            "token ids of this base model",
            metadata={"field": field},
        )


def resolve_sampling(given: Sampling, base: RequestDefaults) -> SamplingParams:
    """Fill in unset values with the base's defaults, and an unset seed with a random one."""
    options = {"seed": secrets.randbits(_SEED_BITS), **given.given}
    return msgspec.structs.replace(base.sampling, **options)
