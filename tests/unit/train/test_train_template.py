from __future__ import annotations

from typing import Any

import pytest
from veneer_registry.errors import TemplateFailed
from veneer_train.template import render, with_generation_marks

from tests.refused import refused

SPECIAL: dict[str, Any] = {"eos_token": "<|im_end|>"}
QWEN2 = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
)


def turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pairs]


@pytest.mark.parametrize(
    "messages",
    [
        turns(("user", "Hi"), ("assistant", "Ho")),
        turns(
            ("system", "S"),
            ("user", "a"),
            ("assistant", "b\n\nc"),
            ("user", ""),
            ("assistant", "é😀"),
        ),
        turns(("user", "assistant\n<|im_end|>"), ("assistant", "{{ 1 }}{% generation %}")),
        turns(("user", "no answer")),
    ],
)
@pytest.mark.parametrize("which", ["smollm", "qwen2"])
def test_marks_change_no_byte_and_cover_exactly_what_was_said(
    tokenizer: Any, which: str, messages: list[dict[str, str]]
) -> None:
    template = tokenizer.chat_template if which == "smollm" else QWEN2
    marked = with_generation_marks(template)
    rendered = render(template, marked, messages, SPECIAL)
    plain = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    assert rendered.text == plain
    said = [m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant"]
    assert [rendered.text[a:b] for a, b in rendered.spans] == said


def test_a_template_with_marks_is_left_alone() -> None:
    template = "{%- generation -%}{{ messages[0].content }}{% endgeneration %}"
    assert with_generation_marks(template) == template


@pytest.mark.parametrize("template", ["{{ messages[0]['content'] }}", "", QWEN2 + QWEN2])
def test_a_template_that_cannot_be_marked_is_refused(template: str) -> None:
    with refused(TemplateFailed, cause="no_marks"):
        with_generation_marks(template)


def test_a_marked_template_that_renders_other_text_is_refused() -> None:
    marked = with_generation_marks(QWEN2).replace("+ '<|im_end|>' }}{% endg", "}}{% endg")
    assert marked != with_generation_marks(QWEN2)
    with refused(TemplateFailed, cause="other_text"):
        render(QWEN2, marked, turns(("user", "a"), ("assistant", "b")), SPECIAL)


def test_a_template_that_raises_is_an_error_of_ours() -> None:
    broken = "{{ raise_exception('roles must alternate') }}"
    with refused(TemplateFailed, cause="raised", why="roles must alternate"):
        render(broken, broken, turns(("user", "a")), SPECIAL)
