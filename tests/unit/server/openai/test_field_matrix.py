"""Every request field of OpenAI's, Anthropic's and vLLM's is served, refused by name, or listed
as without effect.

OpenAI's and Anthropic's are those of their SDKs. A failure means that an SDK learnt a field:
decide whether it changes the answer.
"""

from __future__ import annotations

from typing import Any

import pytest
from anthropic.types import message_count_tokens_params, message_create_params
from anthropic.types.beta import message_count_tokens_params as beta_count_params
from anthropic.types.beta import message_create_params as beta_params
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params as response_params
from veneer_registry.errors import InvalidField
from veneer_server.openai.extensions import Ignored
from veneer_server.openai.fields import (
    ELSEWHERE,
    IGNORED,
    REFUSED,
    ChatFields,
    CompletionFields,
    RequestFields,
    parse_fields,
)
from veneer_server.openai.messages import MessageFields
from veneer_server.openai.responses import ResponseFields

from tests.refused import refused

pytestmark = pytest.mark.push

SDKS = [
    (chat_params.CompletionCreateParamsStreaming, ChatFields),
    (completion_params.CompletionCreateParamsStreaming, CompletionFields),
    (response_params.ResponseCreateParamsStreaming, ResponseFields),
    (message_create_params.MessageCreateParamsStreaming, MessageFields),
    (beta_params.MessageCreateParamsStreaming, MessageFields),
    (message_count_tokens_params.MessageCountTokensParams, MessageFields),
    (beta_count_params.MessageCountTokensParams, MessageFields),
]

_SAMPLING = """
    frequency_penalty ignore_eos include_stop_str_in_output logit_bias min_p presence_penalty
    priority repetition_penalty request_id seed session_id skip_special_tokens
    spaces_between_special_tokens stop stop_token_ids stream structured_outputs temperature
    top_k top_p user watermarking
"""
_TRANSFER = """
    cache_salt ec_transfer_params kv_transfer_params mm_payload return_mm_kwargs vllm_xargs
"""
_PROMPTED = f"""
    {_SAMPLING} {_TRANSFER} add_special_tokens allowed_token_ids bad_words echo length_penalty
    logprob_token_ids logprobs max_tokens min_tokens model n prompt_logprobs
    repetition_detection response_format return_token_ids return_token_offsets
    return_tokens_as_token_ids return_weight_versions routed_experts_prompt_start
    stream_interval stream_options thinking_token_budget truncate_prompt_tokens
    truncation_side use_beam_search
"""
_CHAT = f"""
    {_PROMPTED} add_generation_prompt chat_template chat_template_kwargs
    continue_final_message documents include_reasoning max_completion_tokens media_io_kwargs
    messages mm_processor_kwargs parallel_tool_calls reasoning_effort return_prompt_text
    tool_choice tools top_logprobs
"""
_COMPLETION = f"{_PROMPTED} prompt prompt_embeds suffix"
_RESPONSE = f"""
    {_SAMPLING} {_TRANSFER} background chat_template_kwargs enable_response_messages include
    include_reasoning input instructions max_output_tokens max_tool_calls media_io_kwargs
    metadata mm_processor_kwargs model parallel_tool_calls previous_input_messages
    previous_response_id prompt prompt_cache_key prompt_cache_options prompt_cache_retention
    reasoning safety_identifier service_tier store text tool_choice tools top_logprobs
    truncation
"""
_MESSAGE = f"""
    {_TRANSFER} chat_template_kwargs max_tokens messages metadata model output_config
    stop_sequences stream system temperature thinking tool_choice tools top_k top_p
    watermarking
"""
VLLM = [  # of vLLM 0.33.0's request models, written down: its wheel has hundreds of megabytes
    (_CHAT, ChatFields),
    (_COMPLETION, CompletionFields),
    (_RESPONSE, ResponseFields),
    (_MESSAGE, MessageFields),
]


def known(kind: type[RequestFields]) -> set[str]:
    return {*kind.model_fields, *IGNORED, *REFUSED}


@pytest.mark.parametrize(("params", "kind"), SDKS)
def test_every_field_of_the_sdks_is_known(params: Any, kind: type[RequestFields]) -> None:
    fields = set(params.__annotations__)
    assert "model" in fields
    assert fields - known(kind) == set()


@pytest.mark.parametrize(("names", "kind"), VLLM)
def test_every_field_of_vllm_is_known(names: str, kind: type[RequestFields]) -> None:
    fields = set(names.split())
    # The chat's echo repeats the last message, and is refused as a completion's field.
    assert fields - known(kind) - {"echo"} == set()
    with refused(InvalidField, field="echo"):
        parse_fields(ChatFields, {"model": "m", "messages": [], "echo": True}, Ignored("warn"))


def test_a_field_of_another_endpoint_is_never_dropped() -> None:
    """It would change the answer there, so that dropping it changes the answer here."""
    kinds: dict[str, type[RequestFields]] = {
        "/v1/messages": MessageFields,
        "/v1/responses": ResponseFields,
    }
    own = {*ChatFields.model_fields, *CompletionFields.model_fields, *IGNORED, *REFUSED}
    for path, kind in kinds.items():
        assert {*kind.model_fields} - own == {
            name for name, other in ELSEWHERE.items() if other == path
        }
    asked = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
    for name, path in ELSEWHERE.items():
        with pytest.raises(InvalidField) as caught:
            parse_fields(ChatFields, {**asked, name: "something"}, Ignored("ignore"))
        assert caught.value.metadata["field"] == name
        assert path in caught.value.message


@pytest.mark.parametrize("name", sorted(REFUSED))
@pytest.mark.parametrize("kind", [ChatFields, CompletionFields, ResponseFields, MessageFields])
def test_what_would_change_the_answer_is_refused_whatever_the_flag_says(
    kind: type[RequestFields], name: str
) -> None:
    for unknown in ("refuse", "ignore", "warn"):
        ignored = Ignored(unknown)  # type: ignore[arg-type]
        with refused(InvalidField, field=name):
            parse_fields(kind, {"model": "m", name: ["something"]}, ignored)
        assert not ignored.counts


@pytest.mark.parametrize("kind", [ChatFields, CompletionFields, ResponseFields, MessageFields])
def test_a_name_is_served_or_refused_or_without_effect(kind: type[RequestFields]) -> None:
    """An endpoint may serve what has no effect elsewhere, as Responses repeat `metadata`."""
    assert not IGNORED & REFUSED.keys()
    assert not kind.model_fields.keys() & REFUSED.keys()
