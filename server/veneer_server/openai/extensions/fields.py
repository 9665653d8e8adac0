"""vLLM's extensions of both endpoints' fields, and of a chat's."""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import Field

from veneer_server.openai.extensions.base import Fields
from veneer_server.serving.checks import MAX_TOP_LOGPROBS
from veneer_server.text.templates.options import Effort

__all__ = ["ChatExtensions", "SharedExtensions"]

_INT32: Final = (1 << 31) - 1
_UINT32: Final = (1 << 32) - 1


class SharedExtensions(Fields):
    """Fields of both endpoints.

    Attributes:
        prompt_logprobs: number of top tokens beside each of the prompt's log-probabilities.
        return_token_ids: answer with the ids of the prompt's and the answer's tokens.
        return_tokens_as_token_ids: call tokens ``token_id:17`` in log-probabilities.
        truncate_prompt_tokens: see `GenerateCall.truncate_prompt`.
    """

    min_tokens: Annotated[int, Field(ge=0, le=_UINT32)] = 0
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=_INT32)] | None = None
    guided_grammar: str | None = None


class ChatExtensions(Fields):
    """Fields of chats.

    Attributes:
        include_reasoning: whether the answer shows what the model thought.
        add_generation_prompt: unset means yes, unless ``continue_final_message``.
    """

    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    reasoning_effort: Effort | None = None
    include_reasoning: bool = True
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
