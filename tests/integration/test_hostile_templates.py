"""Chat templates come with adapters, so a server must outlive any of them.

Each case is uploaded and used through the real server while a stream runs beside it.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from veneer_proto.v1 import inference_pb2 as pb

from tests.server_harness import Server, read_files

pytestmark = [
    pytest.mark.push,
    pytest.mark.real_base,
    pytest.mark.asyncio(loop_scope="session"),
]

HOSTILE = {
    "loops for ever": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    ),
    "writes gigabytes": ("{% for a in range(99999) %}{{ 'x' * 99999 }}{% endfor %}"),
    "fills the memory": "{{ ('x' * 2000000000) | length }}",
    "doubles a string": (
        "{% set n = namespace(s='x') %}{% for i in range(60) %}"
        "{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s | length }}"
    ),
    "raises megabytes": "{{ raise_exception(messages[0].content * 20_000_000) }}",
    "recurses": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "climbs to object": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "climbs by a function": "{{ raise_exception.__globals__.os }}",
    "climbs by a helper": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "climbs by format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "climbs by attr": "{{ ((''|attr('__class__'))|attr('__mro__'))[1] }}",
    "changes the messages": "{{ messages.append(1) }}",
    "includes a file": "{% include '/etc/passwd' %}",
}


@pytest.mark.parametrize("case", HOSTILE)
async def test_a_hostile_template_is_refused_and_harms_nobody(
    case: str, server: Server, real_adapters: dict[str, Path]
) -> None:
    files = read_files(next(iter(real_adapters.values())))
    files["chat_template.jinja"] = HOSTILE[case].encode()
    await server.push_files(files, "hostile", allow_replace=True)
    beside = server.stream(prompt="One, two,", stopping={"max_tokens": 8, "ignore_eos": True})
    chat = pb.ChatInput(messages=[pb.ChatMessage(role="user", content="Hi")])
    refused, _ = await asyncio.gather(
        server.refused(server.generate(adapter="hostile", messages=chat)), beside.rest()
    )
    assert (refused.code, refused.reason) == ("INVALID_ARGUMENT", "TEMPLATE_FAILED")
    assert "root:" not in refused.message
    assert len(refused.message) < 1000
    # Its weights are as good as before: a plain prompt is answered.
    answer = await server.generate(adapter="hostile", prompt="One,", stopping={"max_tokens": 2})
    assert answer.provenance.adapter == "hostile"
