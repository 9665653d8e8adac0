"""Chat templates render as with Hugging Face, within limits."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from veneer_registry.errors import InvalidField, TemplateFailed
from veneer_server.text.prompts import check_roles
from veneer_server.text.template import (
    MAX_TEMPLATE,
    ChatTemplate,
    read_base_template,
)

from tests.refused import refused

USER = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("role", "template", "known"),
    [
        ("usr", "{{ messages[0].role }}", False),
        ("usr", "{% if m.role == 'usr' %}", True),
        ("observation", '{% if m.role == "observation" %}', True),
        ("observation", "{# observation #}", False),
        ("USER", "{{ messages[0].role }}", False),
        ("developer", "", True),
        ("critic", "{# don't #}{% if m.role == 'critic' %}", True),
        ("critic", """{{ "don't" }}{% if m.role in ['judge', "critic"] %}""", True),
        ("critic", "critic' 'critic", False),
    ],
)
def test_a_role_that_no_template_has_is_refused(role: str, template: str, known: bool) -> None:
    with contextlib.nullcontext() if known else refused(InvalidField, field="messages[1].role"):
        check_roles([{"role": "user"}, {"role": role}], template)


class Searched(str):
    """Counts how often it is looked through."""

    times = 0

    def __contains__(self, part: object) -> bool:
        self.times += 1
        return super().__contains__(str(part))

    def split(self, *args: Any, **more: Any) -> list[str]:
        self.times += 1
        return super().split(*args, **more)


@pytest.mark.parametrize("roles", [["critic"], [f"critic {n}" for n in range(4096)]])
def test_a_template_is_not_searched_for_each_message(roles: list[str]) -> None:
    """On the event loop: 4,096 messages with a role at the end of 64 KB took 0.9 s."""
    template = Searched("a" * 60_000 + "".join(f"'{role}'" for role in roles))
    check_roles([{"role": roles[n % len(roles)]} for n in range(4096)], template)
    assert template.times <= 2
    with refused(InvalidField, field="messages[4096].role"):
        check_roles(
            [*({"role": role} for role in roles * (4096 // len(roles))), {"role": "x"}],
            template,
        )
    assert template.times <= 4
    common = Searched("")
    check_roles(USER * 4096, common)
    assert not common.times


def test_the_base_template(base_folder: Path) -> None:
    source, special = read_base_template(base_folder)
    assert source is not None
    assert ChatTemplate(source, special).render(USER) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
        "Face<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_what_hugging_face_templates_use() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'skip' %}{% continue %}"
        "{% endif %}{{ m | tojson }}{% endfor %}\n"
        "  {% generation %}x{% endgeneration %}{{ strftime_now('%Y') | length }}"
    )
    rendered = ChatTemplate(source, {"bos_token": "<s>"}).render(
        [{"role": "skip", "content": "-"}, {"role": "user", "content": "é"}]
    )
    assert rendered == '<s>{"role": "user", "content": "é"}x4'


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages[7].content.nothing }}", "no element 7"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ range(999999999) | list }}", "too big"),
    ],
)
def test_failures_say_why(source: str, why: str) -> None:
    with refused(TemplateFailed, cause="rendering") as caught:
        ChatTemplate(source, {}).render(USER)
    assert why in caught.value.message, "Jinja's words, or the template's"


def test_syntax_and_size_are_checked_when_compiled() -> None:
    with refused(TemplateFailed, cause="syntax"):
        ChatTemplate("{% if %}", {})
    with refused(TemplateFailed, cause="template_size"):
        ChatTemplate("x" * (MAX_TEMPLATE + 1), {})


def test_output_is_bounded() -> None:
    loop = "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}"
    with refused(TemplateFailed, cause="output_size"):
        ChatTemplate(loop, {}).render(USER)


def test_templates_in_tokenizer_config(tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"chat_template": "A", "eos_token": {"content": "</s>"}}')
    assert read_base_template(tmp_path) == ("A", {"eos_token": "</s>"})
    config.write_text('{"chat_template": [{"name": "default", "template": "B"}]}')
    assert read_base_template(tmp_path) == ("B", {})
    (tmp_path / "chat_template.jinja").write_text("C")
    assert read_base_template(tmp_path) == ("C", {})
    assert read_base_template(tmp_path / "none") == (None, {})


CHATS = [
    USER,
    [{"role": "system", "content": " Be brief. "}, *USER],
    [*USER, {"role": "assistant", "content": "Hello\n"}, {"role": "user", "content": "é\"'<"}],
]
LLAMA_STYLE = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|' + message['role'] + '|>\\n' + message['content'] | trim }}
    {%- if not loop.last %}{{ '\\n' }}{% endif %}
    {% if message.role == 'assistant' %}{{ message | tojson(indent=2) }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt and not messages[-1].role == 'assistant' %}
    {{- '<|assistant|>' }}
{%- endif %}
"""


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("which", ["base", "llama"])
def test_the_same_text_as_transformers(
    base_folder: Path, chat: list[dict[str, str]], which: str
) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    source, special = read_base_template(base_folder)
    source = LLAMA_STYLE if which == "llama" else source
    assert source is not None
    (expected,), _ = render_jinja_template(
        [chat], chat_template=source, add_generation_prompt=True, **special
    )
    assert ChatTemplate(source, special).render(chat) == expected
