"""Checks request fields against their ranges; every error names the field and the fix.

Fields have the names of the gRPC contract; the HTTP gateway translates them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, NoReturn

from veneer_registry.errors import InvalidField

from veneer_server.queues.fairness import MAX_PRIORITY
from veneer_server.text.turns import longer_as_json
from veneer_server.wire.messages import Constraint

MAX_MESSAGES: Final = 4096
"""Most messages of a chat. Rendering each takes the front process some microseconds."""
MAX_ROLE: Final = 64
MAX_SESSION_KEY: Final = 256
MAX_CACHE_SALT: Final = 1024
MAX_STOPS: Final = 16
MAX_STOP_LENGTH: Final = 256
MAX_STOP_TOKENS: Final = 64
MAX_BIAS: Final = 100.0
MAX_BIASES: Final = 1024
MAX_TOP_LOGPROBS: Final = 20
MAX_SAMPLES: Final = 16
MAX_CHOICES: Final = 1000
MAX_SCHEMA: Final = 256 << 10
"""Most characters, as JSON, of a schema that is sent as an object. `--constraint-bytes` limits
all constraints."""


def invalid(field: str, problem: str) -> InvalidField:
    """The error for an invalid field."""
    return InvalidField(f"{field} {problem}", metadata={"field": field})


def refuse(field: str, problem: str) -> NoReturn:
    """Raises InvalidField for a field."""
    raise invalid(field, problem)


def check_json_size(field: str, value: object, most: int) -> None:
    """Raises InvalidField for a value that takes more than ``most`` characters as JSON, without
    writing that JSON."""
    if longer_as_json(value, most):
        refuse(field, f"has more than {most} characters as JSON: send less")


def check_number(field: str, value: float | None, least: float, most: float, fix: str) -> None:
    """Raises InvalidField for a value outside its range, NaN included; None means unset."""
    if value is not None and not least <= value <= most:
        refuse(field, f"is {value}: {fix}")


def check_priority(priority: int) -> None:
    """Raises InvalidField for a priority outside its range."""
    if not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
        refuse("priority", f"is {priority}: give {-MAX_PRIORITY} to {MAX_PRIORITY}, or none")


def check_logit_bias(given: Mapping[int, float]) -> None:
    """Raises InvalidField for too many entries, or one outside its range."""
    if len(given) > MAX_BIASES:
        refuse("sampling.logit_bias", f"has {len(given)} entries: give at most {MAX_BIASES}")
    for token, bias in given.items():
        if not -MAX_BIAS <= bias <= MAX_BIAS:
            refuse(
                "sampling.logit_bias",
                f"for token {token} is {bias}: give {-MAX_BIAS:g} to {MAX_BIAS:g}",
            )


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raises InvalidField for no messages, too many, or one without a valid role."""
    if not messages:
        refuse("messages", "is empty: send at least one message")
    if len(messages) > MAX_MESSAGES:
        refuse("messages", f"has {len(messages)} entries: send at most {MAX_MESSAGES}")
    for at, message in enumerate(messages):
        if not 1 <= len(message["role"]) <= MAX_ROLE:
            refuse(f"messages[{at}].role", "must be 1 to 64 characters, such as 'user'")


def check_cache_salt(salt: str) -> None:
    """Raises InvalidField for a salt that is too long."""
    if len(salt) > MAX_CACHE_SALT:
        refuse("cache_salt", f"has {len(salt)} characters: give at most {MAX_CACHE_SALT}")


def check_stops(stops: Sequence[str], ids: Sequence[int]) -> None:
    """Raises InvalidField for too many stops, or one that is too long or empty."""
    if len(stops) > MAX_STOPS:
        refuse("stopping.stop", f"has {len(stops)} strings: give at most {MAX_STOPS}")
    for at, stop in enumerate(stops):
        if not 1 <= len(stop) <= MAX_STOP_LENGTH:
            refuse(
                f"stopping.stop[{at}]",
                f"has {len(stop)} characters: give 1 to {MAX_STOP_LENGTH}",
            )
    if len(ids) > MAX_STOP_TOKENS:
        refuse("stopping.stop_token_ids", f"has {len(ids)} ids: give at most {MAX_STOP_TOKENS}")


def check_output(n: int, logprobs: bool, top_logprobs: int) -> None:
    """Raises InvalidField for too many samples or top tokens, or top tokens without
    ``logprobs``."""
    if top_logprobs > MAX_TOP_LOGPROBS:
        refuse("output.top_logprobs", f"is {top_logprobs}: give at most {MAX_TOP_LOGPROBS}")
    if top_logprobs and not logprobs:
        refuse("output.top_logprobs", "needs output.logprobs: set that as well")
    if not 1 <= n <= MAX_SAMPLES:
        refuse("output.n", f"is {n}: give 1 to {MAX_SAMPLES}, or leave it unset")


def check_min_tokens(least: int, most: int | None) -> None:
    """Raises InvalidField if ``least`` tokens are more than ``most``, if that is set."""
    if most is not None and least > most:
        refuse("stopping.min_tokens", f"is {least}: give at most stopping.max_tokens, {most}")


def check_prompt_logprobs(tops: int | None) -> None:
    """Raises InvalidField for too many top tokens."""
    if tops is not None and tops > MAX_TOP_LOGPROBS:
        refuse("output.prompt_logprobs", f"is {tops}: give at most {MAX_TOP_LOGPROBS}")


def check_truncation(tokens: int | None) -> None:
    """Raises InvalidField for a number of tokens that no prompt can have."""
    if tokens is not None and (tokens < -1 or tokens == 0):
        refuse("truncate_prompt_tokens", f"is {tokens}: give 1 or more, or -1")


def choice(texts: Sequence[str], field: str = "constraint.choice") -> Constraint:
    """Make a constraint to one of these texts.

    Args:
        field: name of the field with the texts, for errors.

    Raises:
        InvalidField: there are no texts, too many, or an empty one.
    """
    if len(texts) > MAX_CHOICES:
        refuse(field, f"has {len(texts)} texts: give at most {MAX_CHOICES}")
    if not texts or not all(texts):
        refuse(field, "has no texts, or an empty one: give at least one, none of them empty")
    return Constraint("choice", json.dumps(list(texts)))


def check_constraint(constraint: Constraint, field: str) -> None:
    """Raises InvalidField for an empty constraint. The engine checks whether it compiles.

    Args:
        field: the caller's name for it, for errors; empty for the gRPC contract's name.
    """
    if not constraint.text:
        refuse(
            field or f"constraint.{constraint.kind}", "is empty: give one, or leave it unset"
        )
