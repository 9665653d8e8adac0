"""What chats that are slow to render, or to tokenize, do to other callers' chats."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from veneer_proto.v1 import inference_pb2 as pb
from veneer_server.access.caller import Caller as CallerValue
from veneer_server.access.principal import ANYONE, Principal
from veneer_server.queues.fairness import Fairness, Sender

from tests.unit.server.access.tenants_kit import Caller, Shared, shared
from tests.unit.server.rpc.front_harness import failure, make_adapter

pytestmark = [pytest.mark.push, pytest.mark.asyncio(loop_scope="module")]

ACCUMULATING = (
    "{% set ns = namespace(system_prompt='', first=true) %}"
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{% if ns.first %}{% set ns.system_prompt = ns.system_prompt + message['content'] %}"
    "{% set ns.first = false %}"
    "{% else %}{% set ns.system_prompt = ns.system_prompt + '\\n\\n' + message['content'] %}"
    "{% endif %}{% endif %}{% endfor %}"
    "{{ bos_token }}{{ ns.system_prompt }}"
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "<|User|>{{ message['content'] }}{% endif %}{% endfor %}<|Assistant|>"
)
"""As DeepSeek V3's public template gathers system prompts: in quadratic time."""


def chat(*contents: str, role: str = "user") -> pb.ChatInput:
    return pb.ChatInput(
        messages=[pb.ChatMessage(role=role, content=content) for content in contents]
    )


SYSTEM = "x" * 890 + "\N{DUCK}"
"""With one such character, Python takes four bytes for each."""


def hostile(messages: int = 4096) -> pb.ChatInput:
    """Takes 25 s of CPU time to render by `ACCUMULATING`."""
    return chat(*[SYSTEM] * messages, role="system")


def based_on(base: Path, folder: Path, template: str) -> Path:
    """The same base with another chat template."""
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(
    base_folder: Path, front_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Shared]:
    """Its base has the same template as the adapters."""
    folder = tmp_path_factory.mktemp("slow")
    base = based_on(base_folder, folder / "base", ACCUMULATING)
    async with shared(base, front_cache, folder / "data") as made:
        yield made


async def answer(caller: Caller, adapter: str, messages: pb.ChatInput) -> Any:
    request = pb.GenerateRequest(
        adapter=adapter, messages=messages, stopping=pb.StoppingOptions(max_tokens=2)
    )
    return await caller.front.inference.Generate(request, metadata=caller.metadata)


async def test_one_chat_does_not_switch_a_template_off_for_others(
    server: Shared, tmp_path: Path
) -> None:
    bad = server.caller("team-a")
    others = [server.caller("team-a", "inference"), server.caller("team-b")]
    folder = make_adapter(tmp_path / "adapter", template=ACCUMULATING)
    for tenant in (bad, others[1]):
        await tenant.push(folder, "public")
    refused = await failure(answer(bad, "public", hostile()))
    assert (refused.reason, refused.metadata.get("cause")) == ("TEMPLATE_FAILED", "too_slow")
    assert "fewer" in refused.message, "what the sender can do"
    for caller in (*others, bad):
        await answer(caller, "public", chat("Hi"))
    await bad.push(folder, "public-again")
    await answer(bad, "public-again", chat("Hi"))


@pytest.mark.parametrize("adapter", ["", "public"])
async def test_others_are_answered_while_slow_chats_are_rendered(
    server: Shared, tmp_path: Path, adapter: str
) -> None:
    bad, beside, other = (
        server.caller("team-a"),
        server.caller("team-a", "publisher", "inference"),
        server.caller("team-b"),
    )
    folder = make_adapter(tmp_path / "adapter", template=ACCUMULATING)
    for tenant in (bad, other):
        await tenant.push(folder, "public", allow_replace=True)
    # Smaller each time, so that none is refused for what is known about another.
    slow = [
        asyncio.create_task(failure(answer(bad, adapter, hostile(4096 - 100 * n))))
        for n in range(2)
    ]
    await asyncio.sleep(0)
    for caller in (beside, other, bad) * 3:
        await answer(caller, adapter, chat("Hi", "there"))
    assert not all(task.done() for task in slow)
    for refused in await asyncio.gather(*slow):
        assert refused.reason == "TEMPLATE_FAILED"
        assert refused.metadata["cause"] == "too_slow"


async def test_the_bases_template_can_be_killed_wherever_it_is_rendered(server: Shared) -> None:
    """It ran for 48 s in a thread of the front, which nothing can end."""
    bad = server.caller("team-a")
    messages = [{"role": "system", "content": SYSTEM}] * 4096
    for path, body in (
        ("/v1/chat/completions", {"messages": messages}),
        ("/tokenize", {"messages": messages}),
        ("/v1/responses", {"input": messages}),
    ):
        said = await bad.http("POST", path, model="base", **body)
        assert said.status_code == 400, (path, said.text[:300])
        assert "the base's chat template needs more than 2 s" in said.text, path


async def test_whose_turn_a_call_uses(server: Shared) -> None:
    """A tenant's key has one, however many connections it opens."""
    caller = server.caller("team-c", "inference")
    await answer(caller, "", chat("Hi"))
    found = server.front.engine.submitted[-1].sender
    assert found.party == ("team-c", "team-c-inference", "")
    assert found.connection.startswith("ipv4:127.0.0.1:")


def sender_of(
    connection: str, principal: Principal = ANYONE, fairness: Fairness | None = None
) -> Sender:
    """Whose turn a call uses that has these."""
    return CallerValue(principal, fairness or Fairness(), peer=connection).sender


@pytest.mark.parametrize(
    ("connection", "host"),
    [
        ("ipv4:192.0.2.7:40000", "192.0.2.7"),
        ("192.0.2.7:40001", "192.0.2.7"),
        ("ipv6:%5B::ffff:192.0.2.7%5D:40002", "192.0.2.7"),
        ("ipv6:%5B2001:db8:1:2::7%5D:40003", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::8:40004", "2001:db8:1:2::/64"),
        ("ipv6:[fe80::1%25eth0]:40005", "fe80::/64"),
        ("unix:/run/veneer.sock", "unix"),
        ("", ""),
    ],
)
async def test_without_keys_hosts_take_turns(connection: str, host: str) -> None:
    """Over both doors; a host has as many IPv6 addresses of a network as it likes."""
    found = sender_of(connection)
    assert found == Sender("default", host, "", connection)


async def test_a_gateways_users_take_turns_whichever_connection_they_share() -> None:
    gateway = Principal("gateway", "team-a", frozenset({"inference"}), gateway=True)
    found = sender_of("ipv4:192.0.2.7:40000", gateway, Fairness("team-a", "ann"))
    assert found == Sender("team-a", "gateway", "ann", "")
