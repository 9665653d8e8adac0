"""Every error of the tree in OpenAI's shape."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from veneer_registry import errors
from veneer_registry.errors import VeneerError
from veneer_server.openai.errors import HttpError, http_failure


def tree(kind: type[VeneerError]) -> Iterator[type[VeneerError]]:
    yield kind
    for sub in kind.__subclasses__():
        if sub.__module__ == errors.__name__:
            yield from tree(sub)


EXPECTED = {
    "INVALID_ARGUMENT": (400, "invalid_request_error"),
    "NOT_FOUND": (404, "invalid_request_error"),
    "ALREADY_EXISTS": (409, "invalid_request_error"),
    "FAILED_PRECONDITION": (409, "invalid_request_error"),
    "ABORTED": (409, "invalid_request_error"),
    "RESOURCE_EXHAUSTED": (429, "rate_limit_error"),
    "CANCELLED": (499, "invalid_request_error"),
    "INTERNAL": (500, "server_error"),
    "DATA_LOSS": (500, "server_error"),
    "UNKNOWN": (500, "server_error"),
    "UNAUTHENTICATED": (401, "invalid_request_error"),
    "PERMISSION_DENIED": (403, "invalid_request_error"),
    "UNIMPLEMENTED": (501, "server_error"),
    "UNAVAILABLE": (503, "server_error"),
    "DEADLINE_EXCEEDED": (504, "server_error"),
}


LIMITS = {errors.QuotaExceeded: "insufficient_quota", errors.RateLimitExceeded: "requests"}
"""Types that OpenAI has for limits."""


@pytest.mark.parametrize("kind", list(tree(VeneerError)))
def test_status_and_type_follow_the_code(kind: type[VeneerError]) -> None:
    failure = http_failure(kind("why: fix"))
    error = failure.body["error"]
    status, type_ = EXPECTED[kind.code]
    assert (failure.status, error["type"]) == (status, LIMITS.get(kind, type_))
    assert error["message"] == "why: fix"
    assert set(error) == {"message", "type", "param", "code"}


def test_codes_that_clients_know() -> None:
    missing = http_failure(errors.AdapterNotFound("no 'sqll'; did you mean 'sql'?"))
    assert missing.body["error"]["code"] == "model_not_found"
    assert missing.body["error"]["param"] == "model"
    long = http_failure(errors.ContextTooLong("x", metadata={"field": "stopping.max_tokens"}))
    assert long.body["error"]["code"] == "context_length_exceeded"
    assert long.body["error"]["param"] == "max_tokens"
    assert http_failure(errors.QueueFull("x")).body["error"]["code"] == "queue_full"


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ("sampling.top_p", "top_p"),
        ("stopping.stop[3]", "stop[3]"),
        ("output.n", "n"),
        ("adapter", "model"),
        ("token_ids", "prompt"),
        ("constraint.json_schema", "response_format"),
        ("messages[0].role", "messages[0].role"),
    ],
)
def test_fields_have_their_json_names(field: str, param: str) -> None:
    error = errors.InvalidField(f"{field} is wrong", metadata={"field": field})
    told = http_failure(error).body["error"]
    assert told["param"] == param
    assert "sampling." not in told["message"]


@pytest.mark.parametrize(
    ("path", "field", "param"),
    [
        ("/v1/completions", "output.top_logprobs", "logprobs"),
        ("/inference/v1/generate", "output.top_logprobs", "logprobs"),
        ("/v1/responses", "output.logprobs", "include"),
        ("/v1/responses", "stopping.max_tokens", "max_output_tokens"),
        ("/v1/responses", "prompt", "prompt"),
        ("/v1/chat/completions", "stopping.max_tokens", "max_tokens"),
    ],
)
def test_fields_have_the_names_of_the_api(path: str, field: str, param: str) -> None:
    error = errors.InvalidField(f"{field} is wrong", metadata={"field": field})
    told = http_failure(error, path).body["error"]
    assert told["param"] == param
    assert told["message"] == f"{param} is wrong"


def test_ollama_s_options_are_named_as_such() -> None:
    error = errors.InvalidField("send a smaller stopping.max_tokens", metadata={"field": "x"})
    told = http_failure(error, "/api/chat").body["error"]
    assert told == "send a smaller options.num_predict"


def test_retries_are_advised_by_what_the_error_knows() -> None:
    full = http_failure(errors.QueueFull("x", retry_after_s=1.4)).headers
    assert full == {"retry-after": "2", "retry-after-ms": "1400", "x-should-retry": "true"}
    assert http_failure(errors.Draining("x")).headers["retry-after"] == "1"
    bug = http_failure(errors.InternalError("x")).headers
    assert bug == {"x-should-retry": "false"}


@pytest.mark.parametrize(
    "error",
    [
        errors.TemplateFailed("日" * 10**6),
        errors.InvalidField("x" * 10**6, metadata={"field": "y-" * 10**6}),
        HttpError(400, "invalid_json", "x" * 10**6),
    ],
)
def test_an_error_is_bounded_whatever_it_quotes(error: VeneerError | HttpError) -> None:
    body = json.dumps(http_failure(error).body, ensure_ascii=False).encode()
    assert 500 < len(body) < 2000


def test_what_is_wrong_as_http() -> None:
    failure = http_failure(HttpError(413, "request_too_large", "send less"))
    assert failure.status == 413
    assert failure.body["error"]["type"] == "invalid_request_error"
    assert failure.headers["connection"] == "close"
