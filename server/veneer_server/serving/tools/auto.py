"""Grammars of answers that may call tools as they see fit.

In Hermes' format only, whose tag is text that nothing else begins with. The other formats'
calls begin with what may as well be text, or differ from one version to the next.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from veneer_server.serving.tools.schema import MAX_FORCED_CALLS, arguments_schema, without_words
from veneer_server.serving.tools.use import Tool, ToolUse
from veneer_server.text.replies.tools import hermes
from veneer_server.wire.messages import Constraint

__all__ = ["auto_grammar"]

_SPACES = {"x-guidance": {"whitespace_pattern": " ?"}}
"""As `veneer_server.constraints.grammar` has it for schemas."""

_FREE = r"""start: (head call)* TEXT
TEXT: /(.|\n)*/
"""
_ANSWER = r"""start: {calls} | answer
call: {tag} body
answer: %json {schema}
"""


def auto_grammar(
    use: ToolUse, answer: Constraint | None = None, *, special: bool = False
) -> Constraint:
    """Text with calls whose arguments fit their schemas, or either calls or an answer.

    The arguments of a tool that is not strict are any object.

    Args:
        answer: a JSON schema that an answer without calls must fit; None: any text.
        special: the opening tag is a special token.
    """
    tag = hermes.OPEN if special else json.dumps(hermes.OPEN)
    if answer is not None:
        more = MAX_FORCED_CALLS - 1 if use.parallel else 0
        calls = rf'call ("\n" call){{0,{more}}}' if more else "call"
        lark = _ANSWER.format(calls=calls, tag=tag, schema=_spaced(json.loads(answer.text)))
    elif special:
        lark = _FREE + f"head: TEXT {tag}\ncall: body\n"
    else:
        # The first tag ends the text before it.
        lark = _FREE + f"head[lazy]: TEXT {tag}\ncall: body\n"
    bodies = [_body(tool) for tool in use.tools]
    names = [f"body{number}" for number in range(len(bodies))]
    lark += f"body: {' | '.join(names)}\n"
    lark += "".join(f"{name}: {body}\n" for name, body in zip(names, bodies, strict=True))
    return Constraint("grammar", lark)


def _body(tool: Tool) -> str:
    """What follows the opening tag of a call."""
    name = json.dumps(tool.name, ensure_ascii=False)
    before = json.dumps(f'\n{{"name": {name}, "arguments": ')
    after = json.dumps(f"}}\n{hermes.CLOSE}")
    schema: Any = {"type": "object"}
    if tool.strict:
        # Descriptions would count towards the size of a constraint.
        schema = without_words(arguments_schema(tool.parameters))
    return f"{before} %json {_spaced(schema)} {after}"


def _spaced(schema: Mapping[str, Any] | bool) -> str:
    """A schema as JSON on one line, whose texts have few blanks between their parts."""
    return json.dumps({**_SPACES, **schema} if isinstance(schema, Mapping) else schema)
