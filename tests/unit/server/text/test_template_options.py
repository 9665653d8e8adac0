"""What callers tell chat templates: variables, and a last message that is continued."""

from __future__ import annotations

from typing import Any

import pytest
from veneer_registry.errors import InvalidField, TemplateFailed
from veneer_server.text.template import ChatTemplate
from veneer_server.text.template_renderer import Renderer
from veneer_server.text.turns import (
    MAX_DEPTH,
    MAX_KWARGS,
    TemplateOptions,
    kwargs_of,
)

from tests.refused import refused

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well, "}]
TURNS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NO_TEXT = ('{"a": "\\ud800"}', '{"a": NaN}')
CONTINUED = TemplateOptions(add_generation_prompt=False, continue_final=True)


def test_variables_reach_the_template_but_replace_nothing_of_the_servers() -> None:
    template = ChatTemplate(
        "{{ bos_token }}{{ effort }}{{ deep.a[1] }}{{ messages | length }}",
        {"bos_token": "<s>"},
    )
    kwargs = {"effort": "low", "deep": {"a": [0, 7]}, "bos_token": "no"}
    assert template.render(CHAT, options=TemplateOptions(kwargs)) == "<s>low72"
    for name in ("messages", "tools", "add_generation_prompt", "chat_template"):
        with refused(InvalidField, field="template.kwargs"):
            TemplateOptions({name: []})


def test_variables_are_bounded() -> None:
    TemplateOptions({"a": "x" * (MAX_KWARGS - 10)})
    with refused(InvalidField, field="template.kwargs"):
        TemplateOptions({"a": "x" * MAX_KWARGS})
    for text in ("[1]", "{", "x" * (MAX_KWARGS + 1), "[" * 10_000, *NO_TEXT):
        with refused(InvalidField, field="template.kwargs"):
            kwargs_of(text)
    assert kwargs_of('{"a": [1, null]}') == {"a": [1, None]}
    TemplateOptions(deep(MAX_DEPTH))
    with refused(InvalidField, field="template.kwargs"):
        TemplateOptions(deep(MAX_DEPTH + 1))


def deep(levels: int) -> dict[str, Any]:
    value: Any = 1
    for _ in range(levels - 1):
        value = [value]
    return {"a": value}


def test_no_answer_is_begun_if_nobody_wants_one() -> None:
    template = ChatTemplate(TURNS, {})
    assert template.render(CHAT[:1]) == "<user>Hi</><assistant>"
    options = TemplateOptions(add_generation_prompt=False)
    assert template.render(CHAT[:1], options=options) == "<user>Hi</>"


@pytest.mark.parametrize("content", ["Well, ", "", "  two\nlines", "</>"])
def test_a_last_message_is_continued_where_it_ends(content: str) -> None:
    """Even if the template trims messages: what comes next is the model's to say."""
    chat = [CHAT[0], {"role": "assistant", "content": content}]
    rendered = ChatTemplate(TURNS, {}).render(chat, options=CONTINUED)
    assert rendered == f"<user>Hi</><assistant>{content.lstrip()}"
    raw = ChatTemplate(TURNS.replace(" | trim", ""), {}).render(chat, options=CONTINUED)
    assert raw == f"<user>Hi</><assistant>{content}"


def test_a_message_that_the_template_leaves_out_cannot_be_continued() -> None:
    with refused(TemplateFailed, cause="rendering"):
        ChatTemplate("{{ messages[0].content }}", {}).render(CHAT, options=CONTINUED)


async def test_uploaded_templates_get_the_same() -> None:
    templates = Renderer({})
    options = TemplateOptions(
        {"big": 10**30, "on": True}, add_generation_prompt=False, continue_final=True
    )
    source = "{{ big }}{{ on }}" + TURNS
    rendered = await templates.render(source, CHAT, options=options)
    await templates.close()
    assert rendered == f"{10**30}True<user>Hi</><assistant>Well, "


def test_an_effort_is_what_templates_know_it_by() -> None:
    assert TemplateOptions.of({}, "none", None, False).kwargs == {
        "reasoning_effort": "none",
        "enable_thinking": False,
    }
    given = TemplateOptions.of({"enable_thinking": False}, "high", None, True)
    assert given.kwargs == {"reasoning_effort": "high", "enable_thinking": False}
    assert given.continue_final
    assert not given.add_generation_prompt
    with refused(InvalidField, field="template.reasoning_effort"):
        TemplateOptions.of({}, "x" * 1000, None, False)
