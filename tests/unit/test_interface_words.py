"""The tables of terms: what they translate, what they leave, and that no term is missing."""

from __future__ import annotations

from typing import Any

import pytest
from typer.main import get_command
from veneer_client.cli.main import cli
from veneer_client.cli.values import MODES
from veneer_client.cli.words import in_cli_words
from veneer_proto.v1 import adapters_pb2, inference_pb2, server_pb2
from veneer_registry.adapter import Tier
from veneer_registry.interface_words import Translation
from veneer_server.openai.errors import in_openai_words
from veneer_server.openai.fields import ChatFields, CompletionFields


@pytest.mark.parametrize("words", [in_cli_words, in_openai_words])
def test_what_a_caller_sent_is_not_translated(words: Translation) -> None:
    quoted = "no adapter is called 'ListAdapters' or \"sampling.top_p\"; see x.sampling.top_p.y"
    assert words(quoted) == quoted
    assert words("the server's ListAdapters of it's own") == (
        f"the server's {words.words['ListAdapters']} of it's own"
    )
    assert words("push it to the prompt, unpin") == "push it to the prompt, unpin"
    assert words("sampling.top_p_max, stopping.stop[3]") == (
        f"sampling.top_p_max, {words.words['stopping.stop']}[3]"
    )


def test_every_word_of_the_cli_is_one() -> None:
    program: Any = get_command(cli)
    options = set()
    left, commands = [("veneer", program)], set()
    while left:
        path, command = left.pop()
        commands.add(path)
        options |= {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
        left += [(f"{path} {name}", c) for name, c in getattr(command, "commands", {}).items()]
    values = {"unspecified", *(t.value for t in Tier), *MODES}
    for word in in_cli_words.words.values():
        assert word.strip("`") in commands | options | values


def _contract() -> set[str]:
    """Options of a generation, as messages name them."""
    parts = {
        "sampling": inference_pb2.SamplingOptions,
        "stopping": inference_pb2.StoppingOptions,
        "output": inference_pb2.OutputOptions,
        "constraint": inference_pb2.Constraint,
        "template": inference_pb2.TemplateOptions,
    }
    return {
        f"{part}.{field.name}"
        for part, kind in parts.items()
        for field in kind.DESCRIPTOR.fields
    }


def test_every_option_of_a_generation_has_its_name_at_each_door() -> None:
    unserved = {
        "stopping.ignore_eos",
        "output.echo",
        "output.prompt_logprobs",
        "template.kwargs",
        "template.add_generation_prompt",
        "template.continue_final_message",
    }
    assert _contract() - in_cli_words.words.keys() == unserved
    assert _contract() <= in_openai_words.words.keys()
    served = ChatFields.model_fields.keys() | CompletionFields.model_fields.keys()
    for field in _contract():
        assert in_openai_words.words[field].partition(".")[0] in served, field


def test_every_call_has_its_command() -> None:
    calls = {
        method.name
        for file in (adapters_pb2, inference_pb2, server_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert calls <= in_cli_words.words.keys()
