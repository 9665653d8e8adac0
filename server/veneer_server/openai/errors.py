"""The one place where an exception becomes an HTTP answer, in the terms of the API called.

The body is OpenAI's, ``{"error": {"message", "type", "param", "code"}}``. The SDKs decide by
status whether to retry, unless ``x-should-retry`` overrides it, so each answer sets that header
from the error. Below ``/api/`` the body is Ollama's, ``{"error": message}``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from veneer_registry.errors import (
    AdapterNotFound,
    ContextTooLong,
    QuotaExceeded,
    RateLimitExceeded,
    Unauthenticated,
    Unavailable,
    VeneerError,
)
from veneer_registry.interface_words import Translation

from veneer_server.errors import MAX_MESSAGE, MAX_VALUE, clip, one_line
from veneer_server.wire.messages import SamplingParams

OLLAMA: Final = "/api/"
"""Prefix of the paths of Ollama's API."""

_STATUS: Final = {
    "INVALID_ARGUMENT": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "FAILED_PRECONDITION": 409,
    "ABORTED": 409,
    "RESOURCE_EXHAUSTED": 429,
    "CANCELLED": 499,
    "UNIMPLEMENTED": 501,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
"""gRPC code -> HTTP status, as Google's APIs map them; all others are 500."""

PACED: Final = frozenset({400, 401, 403, 404, 405, 413, 415})
"""Statuses of invalid requests, whose refusal is delayed; see `RefusalPace`."""

_CODES: Final[Mapping[type[VeneerError], str]] = {
    AdapterNotFound: "model_not_found",
    ContextTooLong: "context_length_exceeded",
    QuotaExceeded: "insufficient_quota",
    Unauthenticated: "invalid_api_key",
}
"""Codes that OpenAI's clients know; the others are our reasons in lower case."""

_UNAVAILABLE_RETRY_S: Final = 1.0

# -------------------- words
# Server messages use the gRPC contract's names of fields and methods. These are each HTTP API's
# names for them. The call names the field of a constraint: `GenerateCall.constraint_field`.

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
        "same_base": "`veneer adapter push --same-base`",
    }
)
"""Rewrites a server message for a caller of the gateway."""

_COMPLETION: Final = in_openai_words.words | {"output.top_logprobs": "logprobs"}

_WORDS: Final[Mapping[str, Translation]] = {
    OLLAMA: Translation(
        in_openai_words.words
        | {f"sampling.{name}": f"options.{name}" for name in SamplingParams.__struct_fields__}
        | {
            "sampling.repetition_penalty": "options.repeat_penalty",
            "stopping.max_tokens": "options.num_predict",
            "stopping.stop": "options.stop",
            "constraint.json_schema": "format",
            "tool_choice": "tool_choice of /v1/chat/completions",
            "ListAdapters": "GET /api/tags",
            "GetAdapter": "POST /api/show",
        }
    ),
    "/v1/completions": Translation(_COMPLETION),
    "/inference/v1/generate": Translation(_COMPLETION | {"token_ids": "token_ids"}),
    "/v1/responses": Translation(
        in_openai_words.words
        | {"stopping.max_tokens": "max_output_tokens", "output.logprobs": "include"}
    ),
}
"""By prefix of the path; other paths use `in_openai_words`."""

_OTHER_NAMES: Final = {"adapter": "model", "name": "model", "constraint": "response_format"}

_PROMPTS: Final = {
    "/v1/chat/completions": "messages",
    "/v1/messages": "messages",
    "/v1/messages/count_tokens": "messages",
    "/v1/responses": "input",
    "/v1/responses/input_tokens": "input",
    "/inference/v1/generate": "token_ids",
}
"""The prompt's field by path, where it is not ``prompt``."""


def words_of(path: str) -> Translation:
    """Return the translation of server messages for callers of a path."""
    return next(
        (words for begin, words in _WORDS.items() if path.startswith(begin)), in_openai_words
    )


def _param(error: VeneerError, path: str) -> str | None:
    """The field that an error is about, under the caller's name for it."""
    if isinstance(error, AdapterNotFound):
        return "model"
    if (field := error.metadata.get("field")) is None:
        return None
    if field in ("prompt", "messages") and isinstance(error, ContextTooLong):
        return _PROMPTS.get(path, field)
    field = clip(field, MAX_VALUE)
    name = field.partition("[")[0]
    names = words_of(path).words if "." in name or name == "token_ids" else _OTHER_NAMES
    return names.get(name, name) + field.removeprefix(name)


# -------------------- failures


class HttpError(Exception):
    """A request that is rejected at the HTTP level, before its fields are checked."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        headers: Mapping[str, str] | None = None,
        *,
        param: str | None = None,
    ) -> None:
        """Args:
        code: for programs, in OpenAI's style.
        message: for people; says how to fix the request.
        headers: of the answer.
        param: the field that the error is about.
        """
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.headers = dict(headers or {})
        self.param = param


@dataclass(frozen=True, slots=True)
class HttpFailure:
    """An error answer."""

    status: int
    body: Mapping[str, Any]
    headers: Mapping[str, str]


def http_failure(error: VeneerError | HttpError, path: str = "") -> HttpFailure:
    """Status, body and headers of an error. Args: path: the request's; decides the form."""
    if path.startswith(OLLAMA):
        failure = http_failure(error)
        told = error.message if isinstance(error, HttpError) else words_of(path)(error.message)
        sentence = {"error": clip(one_line(told), MAX_MESSAGE)}
        return HttpFailure(failure.status, sentence, failure.headers)
    told = error.message if isinstance(error, HttpError) else words_of(path)(error.message)
    message = clip(one_line(told), MAX_MESSAGE)
    if isinstance(error, HttpError):
        headers = {"x-should-retry": "false", **error.headers}
        if error.status in (408, 413):  # the rest of the body is not read
            headers["connection"] = "close"
        return HttpFailure(
            error.status, _body(message, error.status, error.param, error.code), headers
        )
    status = _STATUS.get(error.code, 500)
    param = _param(error, path)
    retry_s = error.retry_after_s
    if retry_s is None and isinstance(error, Unavailable):
        retry_s = _UNAVAILABLE_RETRY_S
    headers = {"x-should-retry": "false" if retry_s is None else "true"}
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    if retry_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(retry_s)))
        headers["retry-after-ms"] = str(max(1, int(retry_s * 1000)))
    code = next(
        (name for kind, name in _CODES.items() if isinstance(error, kind)),
        error.reason.lower(),
    )
    body = _body(message, status, param, code)
    if (known := error.metadata.get("error_code")) is not None:  # for Anthropic's SDKs
        body["error"]["details"] = {"error_code": known}
    if isinstance(error, QuotaExceeded):
        body["error"]["type"] = code
    elif isinstance(error, RateLimitExceeded):
        tokens = error.metadata.get("limit", "").startswith("tokens")
        body["error"]["type"] = "tokens" if tokens else "requests"
    return HttpFailure(status, body, headers)


def _body(message: str, status: int, param: str | None, code: str) -> dict[str, Any]:
    kind = (
        "server_error"
        if status >= 500
        else "rate_limit_error"
        if status == 429
        else "invalid_request_error"
    )
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
