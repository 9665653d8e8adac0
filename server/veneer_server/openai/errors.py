"""The one place where an exception becomes an HTTP answer in OpenAI's shape.

``{"error": {"message", "type", "param", "code"}}``. The SDKs decide by status whether to
retry, unless ``x-should-retry`` overrides it, so each answer sets that header from the error.
"""

from __future__ import annotations

import math
import re
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

from veneer_server.errors import MAX_MESSAGE, MAX_VALUE, clip, one_line
from veneer_server.openai.words import in_openai_words

__all__ = ["PACED", "HttpError", "HttpFailure", "http_failure"]

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
"""gRPC code -> HTTP status, as Google's APIs map them; all else is 500."""

PACED: Final = frozenset({400, 401, 403, 404, 405, 413, 415})
"""Statuses of invalid requests; see `pace`."""

_CODES: Final[Mapping[type[VeneerError], str]] = {
    AdapterNotFound: "model_not_found",
    ContextTooLong: "context_length_exceeded",
    QuotaExceeded: "insufficient_quota",
    Unauthenticated: "invalid_api_key",
}
"""Codes that OpenAI's clients know; the others are our reasons in lower case."""

_UNAVAILABLE_RETRY_S: Final = 1.0

_OUR_FIELDS: Final = re.compile(r"\b(?:sampling|stopping|output|template)\.(?=[a-z])")
"""Prefixes of protobuf fields whose JSON name is the part after the prefix."""

_OTHER_NAMES: Final = {
    "adapter": "model",
    "name": "model",
    "token_ids": "prompt",
    "constraint": "response_format",
    "kwargs": "chat_template_kwargs",
}


_CONSTRAINTS: Final = (
    *("constraint.json_schema", "constraint.regex"),
    *("constraint.choice", "constraint.grammar"),
)


class HttpError(Exception):
    """A request that is rejected at the HTTP level, before its fields are checked."""

    def __init__(
        self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        """Args:
        code: for programs, in OpenAI's style.
        message: for people; says how to fix the request.
        headers: of the answer.
        """
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.headers = dict(headers or {})


@dataclass(frozen=True, slots=True)
class HttpFailure:
    """An error answer."""

    status: int
    body: Mapping[str, Any]
    headers: Mapping[str, str]


def http_failure(error: VeneerError | HttpError) -> HttpFailure:
    """Status, body and headers of an error."""
    told = error.message if isinstance(error, HttpError) else in_openai_words(error.message)
    message = clip(one_line(told), MAX_MESSAGE)
    if isinstance(error, HttpError):
        headers = {"x-should-retry": "false", **error.headers}
        if error.status in (408, 413):  # the rest of the body is not read
            headers["connection"] = "close"
        return HttpFailure(
            error.status, _body(message, error.status, None, error.code), headers
        )
    status = _STATUS.get(error.code, 500)
    param = _param(error)
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
    if isinstance(error, QuotaExceeded):
        body["error"]["type"] = code
    elif isinstance(error, RateLimitExceeded):
        tokens = error.metadata.get("limit", "").startswith("tokens")
        body["error"]["type"] = "tokens" if tokens else "requests"
    return HttpFailure(status, body, headers)


def _param(error: VeneerError) -> str | None:
    if isinstance(error, AdapterNotFound):
        return "model"
    field = error.metadata.get("field")
    if field is None:
        return None
    field = _OUR_FIELDS.sub("", clip(field, MAX_VALUE))
    if field in _CONSTRAINTS:
        return in_openai_words.words[field].partition(".")[0]
    head = re.match(r"\w*", field)
    name = head[0] if head is not None else field
    return _OTHER_NAMES.get(name, field)


def _body(message: str, status: int, param: str | None, code: str) -> dict[str, Any]:
    kind = (
        "server_error"
        if status >= 500
        else "rate_limit_error"
        if status == 429
        else "invalid_request_error"
    )
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
