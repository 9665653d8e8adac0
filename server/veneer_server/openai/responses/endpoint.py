"""``POST /v1/responses``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from veneer_server.logs import REQUEST_ID
from veneer_server.openai.fields import parse_fields
from veneer_server.openai.generate import GenerateEndpoint, Job
from veneer_server.openai.responses.answer import ResponseAnswer
from veneer_server.openai.responses.fields import ResponseFields
from veneer_server.openai.responses.requests import (
    chat_fields,
    response_call,
    shown_tools,
)
from veneer_server.serving.checks import invalid

__all__ = ["ResponsesEndpoint"]

_MOST_METADATA: Final = 16
_LONGEST_KEY: Final = 64
_LONGEST_VALUE: Final = 512


class ResponsesEndpoint(GenerateEndpoint):
    """Responses without state: nothing is stored, so ``store`` has no effect."""

    method = "POST /v1/responses"

    def _parse(self, body: object) -> Job:
        core, fields = self._core, parse_fields(ResponseFields, body)
        assert isinstance(body, dict), "parsed"
        chat = chat_fields(fields)
        call = response_call(fields, chat, core.base.name)
        answer = ResponseAnswer(
            fields,
            chat,
            call,
            core.generator.prompts.tokenizer,
            tools=shown_tools(fields),
            request_id=REQUEST_ID.get(),
            metadata=_metadata(body.get("metadata")),
        )
        return Job([call], answer, fields.stream)


def _metadata(given: object) -> Mapping[str, str]:
    """The caller's notes, within OpenAI's bounds, since each event may repeat them."""
    if given is None:
        return {}
    if not isinstance(given, dict) or len(given) > _MOST_METADATA:
        raise invalid("metadata", f"must be an object of at most {_MOST_METADATA} members")
    for key, value in given.items():
        if len(key) > _LONGEST_KEY:
            raise invalid(
                "metadata",
                f"has a key of {len(key)} characters: give at most {_LONGEST_KEY}",
            )
        if not isinstance(value, str) or len(value) > _LONGEST_VALUE:
            raise invalid(
                f"metadata.{key}", f"is not a string of at most {_LONGEST_VALUE} characters"
            )
    return given
