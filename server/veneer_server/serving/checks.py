"""Ranges of what a request may ask for; every refusal names the field and the fix."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Final, NoReturn

from veneer_proto.v1 import inference_pb2
from veneer_registry.errors import InvalidField

from veneer_server.serving.records import Sampling
from veneer_server.wire.messages import Constraint

__all__ = [
    "checked_constraint",
    "checked_n",
    "checked_sampling",
    "checked_stop_token_ids",
    "checked_stops",
    "checked_top_logprobs",
    "refuse",
]

MAX_MESSAGES: Final = 4096
"""Of a chat. A template renders each, which takes some microseconds of the front's."""
MAX_STOPS: Final = 16
MAX_STOP_LENGTH: Final = 256
MAX_STOP_TOKENS: Final = 64
MAX_TEMPERATURE: Final = 100.0
MIN_REPETITION_PENALTY: Final = 0.01
"""Logits are divided by it: by much less they would overflow."""
MAX_REPETITION_PENALTY: Final = 100.0
MAX_PENALTY: Final = 2.0
MAX_BIAS: Final = 100.0
MAX_BIASES: Final = 1024
MAX_TOP_LOGPROBS: Final = 20
MAX_SAMPLES: Final = 16
MAX_CHOICES: Final = 1000


def refuse(field: str, problem: str) -> NoReturn:
    """Raises InvalidField."""
    raise InvalidField(f"{field} {problem}", metadata={"field": field})


# ----------------------------------------------------------------------- sampling


def checked_sampling(options: inference_pb2.SamplingOptions) -> Sampling:
    """Raises InvalidField for a value outside its range, NaN included."""

    def value(name: str) -> float | None:
        return getattr(options, name) if options.HasField(name) else None

    temperature = value("temperature")
    if temperature is not None and not 0 <= temperature <= MAX_TEMPERATURE:
        refuse(
            "sampling.temperature",
            f"is {temperature}: give 0 (greedy) to {MAX_TEMPERATURE:g}, or leave it unset",
        )
    top_p = value("top_p")
    if top_p is not None and not 0 < top_p <= 1:
        refuse("sampling.top_p", f"is {top_p}: give more than 0 and at most 1")
    min_p = value("min_p")
    if min_p is not None and not 0 <= min_p <= 1:
        refuse("sampling.min_p", f"is {min_p}: give 0 (off) to 1")
    repetition = value("repetition_penalty")
    least, most = MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY
    if repetition is not None and not least <= repetition <= most:
        refuse(
            "sampling.repetition_penalty",
            f"is {repetition}: give {least:g} to {most:g}; 1 is off",
        )
    for name in ("presence_penalty", "frequency_penalty"):
        penalty = value(name)
        if penalty is not None and not -MAX_PENALTY <= penalty <= MAX_PENALTY:
            refuse(
                f"sampling.{name}",
                f"is {penalty}: give {-MAX_PENALTY:g} to {MAX_PENALTY:g}; 0 is off",
            )
    return Sampling(
        temperature=temperature,
        top_k=options.top_k if options.HasField("top_k") else None,
        top_p=top_p,
        seed=options.seed if options.HasField("seed") else None,
        min_p=min_p,
        repetition_penalty=repetition,
        presence_penalty=value("presence_penalty"),
        frequency_penalty=value("frequency_penalty"),
        logit_bias=_logit_bias(options.logit_bias),
    )


def _logit_bias(given: Mapping[int, float]) -> Mapping[int, float]:
    if len(given) > MAX_BIASES:
        refuse("sampling.logit_bias", f"has {len(given)} entries: give at most {MAX_BIASES}")
    for token, bias in given.items():
        if not -MAX_BIAS <= bias <= MAX_BIAS:
            refuse(
                "sampling.logit_bias",
                f"of token {token} is {bias}: give {-MAX_BIAS:g} to {MAX_BIAS:g}",
            )
    return dict(given)


# ----------------------------------------------------------------------- stopping


def checked_stops(stops: Sequence[str]) -> tuple[str, ...]:
    """Raises InvalidField for too many, too long or empty ones."""
    if len(stops) > MAX_STOPS:
        refuse("stopping.stop", f"has {len(stops)} strings: give at most {MAX_STOPS}")
    for at, stop in enumerate(stops):
        if not 1 <= len(stop) <= MAX_STOP_LENGTH:
            refuse(
                f"stopping.stop[{at}]",
                f"has {len(stop)} characters: give 1 to {MAX_STOP_LENGTH}",
            )
    return tuple(stops)


def checked_stop_token_ids(ids: Sequence[int]) -> tuple[int, ...]:
    """Raises InvalidField for too many."""
    if len(ids) > MAX_STOP_TOKENS:
        refuse("stopping.stop_token_ids", f"has {len(ids)}: give at most {MAX_STOP_TOKENS}")
    return tuple(ids)


# ------------------------------------------------------------------------- output


def checked_top_logprobs(output: inference_pb2.OutputOptions) -> int:
    """Raises InvalidField for too many, or any without ``logprobs``."""
    count = output.top_logprobs
    if count > MAX_TOP_LOGPROBS:
        refuse("output.top_logprobs", f"is {count}: give at most {MAX_TOP_LOGPROBS}")
    if count and not output.logprobs:
        refuse("output.top_logprobs", "needs output.logprobs: set that as well")
    return count


def checked_n(output: inference_pb2.OutputOptions) -> int:
    """Raises InvalidField outside 1 to 16."""
    count = output.n if output.HasField("n") else 1
    if not 1 <= count <= MAX_SAMPLES:
        refuse("output.n", f"is {count}: give 1 to {MAX_SAMPLES}, or leave it unset")
    return count


def checked_constraint(request: inference_pb2.GenerateRequest) -> Constraint | None:
    """Whether it compiles is found out by the engine.

    Raises:
        InvalidField: it is empty, or a choice of too many.
    """
    if not request.HasField("constraint"):
        return None
    kind = request.constraint.WhichOneof("kind")
    if kind is None:
        refuse("constraint", "is empty: give json_schema, regex or choice, or leave it unset")
    field = f"constraint.{kind}"
    if kind == "choice":
        given = request.constraint.choice.texts
        if len(given) > MAX_CHOICES:
            refuse(field, f"has {len(given)} texts: give at most {MAX_CHOICES}")
        texts = list(given)
        if not texts or not all(texts):
            refuse(field, "has no texts, or an empty one: give at least one, of 1 character")
        constraint = Constraint("choice", json.dumps(texts))
    elif kind == "json_schema":
        constraint = Constraint("json_schema", request.constraint.json_schema)
    else:
        constraint = Constraint("regex", request.constraint.regex)
    if not constraint.text:
        refuse(field, "is empty: give one, or leave it unset")
    return constraint
