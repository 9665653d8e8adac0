"""Marks which text of a rendered chat template the assistant wrote.

transformers gives an exact assistant mask for templates with
``{% generation %}`` marks, but few base models have them. Templates of the ChatML
family print a whole turn in one expression; `with_generation_marks` splits that
expression, so that the marked template renders the same bytes. `render` checks
this for each sample: a mask that is nearly right would teach the model to write
the user's turns.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from transformers.utils.chat_template_utils import render_jinja_template
from veneer_registry.errors import TemplateFailed

_MARK: Final = re.compile(r"\{%-?\s*generation\s*-?%\}")

# {{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}
# where a line feed may be escaped or literal.
_CHATML_TURN: Final = re.compile(
    r"\{\{\s*'<\|im_start\|>'\s*\+\s*message(?:\['role'\]|\.role)\s*\+\s*'(?:\\n|\n)'\s*\+\s*"
    r"(?P<content>message(?:\['content'\]|\.content))\s*\+\s*"
    r"'<\|im_end\|>'\s*\+\s*'(?:\\n|\n)'\s*\}\}"
)
_MARKED_TURN: Final = (
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ CONTENT + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ CONTENT + '<|im_end|>' + '\\n' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text, and the character ranges that the assistant wrote.

    Attributes:
        text: input of the tokenizer, byte for byte what the server renders.
        spans: half-open ranges of ``text``; each includes the end-of-turn token, since the
            model must learn to stop.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


def with_generation_marks(template: str) -> str:
    """``template`` with ``{% generation %}`` around the assistant's text.

    Raises:
        TemplateFailed: the template has no marks and is not of the ChatML family.
    """
    if _MARK.search(template):
        return template
    marked, count = _CHATML_TURN.subn(
        lambda match: _MARKED_TURN.replace("CONTENT", match["content"]), template
    )
    if count != 1:
        raise TemplateFailed(
            "the base's chat template has no {% generation %} marks and is not a template "
            "that Veneer can mark: give a marked copy as data.template, or set data.loss_on: "
            "all",
            metadata={"cause": "no_marks"},
        )
    return marked


def render_prompt(
    template: str, messages: Sequence[dict[str, str]], special: dict[str, Any]
) -> str:
    """The prompt before a model's answer to ``messages``; raises as `render`."""
    return _render(template, messages, special, mask=False, answer=True)[0]


def _render(
    template: str,
    messages: Sequence[dict[str, str]],
    special: dict[str, Any],
    *,
    mask: bool,
    answer: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    try:
        texts, spans = render_jinja_template(
            conversations=[list(messages)],
            chat_template=template,
            return_assistant_tokens_mask=mask,
            add_generation_prompt=answer,
            **special,
        )
    except Exception as error:  # a template is code and may raise anything
        raise TemplateFailed(
            f"the chat template refuses these messages: {error}",
            metadata={"cause": "raised", "why": str(error)[:200]},
        ) from error
    return texts[0], list(spans[0]) if mask else []


def render(
    template: str,
    marked: str,
    messages: Sequence[dict[str, str]],
    special: dict[str, Any],
) -> Rendered:
    """Render ``messages`` and find the assistant's characters.

    Args:
        template: what the server will render.
        marked: the same template after `with_generation_marks`.
        special: the tokenizer's special tokens by name (``special_tokens_map``).

    Raises:
        TemplateFailed: the template refuses the messages, or the marked one renders
            different text.
    """
    text, _ = _render(template, messages, special, mask=False)
    with_marks, spans = _render(marked, messages, special, mask=True)
    # The marks must not change the text.
    if with_marks != text:
        raise TemplateFailed(
            "the marked chat template renders different text than the original: give a "
            "template with {% generation %} marks as data.template",
            metadata={"cause": "other_text"},
        )
    return Rendered(text, tuple(spans))
