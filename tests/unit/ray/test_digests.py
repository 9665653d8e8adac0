"""Names become digests for routing, by a look-up that may fail. No Ray is needed."""

from __future__ import annotations

import asyncio

from veneer_proto.v1 import adapters_pb2, inference_pb2
from veneer_ray.calls import Metadata
from veneer_ray.digests import Digests
from veneer_ray.wanted import of_body, of_request

ALICE: Metadata = (("authorization", "Bearer alice"), ("traceparent", "00-1"))
BOB: Metadata = (("authorization", "Bearer bob"),)


class Registry:
    """FAKE: counts look-ups, and answers or fails as told."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Metadata]] = []
        self.revision = 1
        self.away = False
        self.now = 0.0

    async def __call__(self, name: str, caller: Metadata) -> str:
        self.asked.append((name, caller))
        if self.away:
            raise ConnectionError
        return f"{name}-{dict(caller).get('authorization')}-{self.revision}"

    def digests(self) -> Digests:
        return Digests(self, lambda: self.now)


async def test_a_name_is_looked_up_once_for_each_caller() -> None:
    registry = Registry()
    digests = registry.digests()
    found = await asyncio.gather(*(digests.of("chat", ALICE) for _ in range(5)))
    assert found == ["chat-Bearer alice-1"] * 5
    assert await digests.of("chat", BOB) == "chat-Bearer bob-1", "another tenant's name"
    assert registry.asked == [("chat", ALICE[:1]), ("chat", BOB)]


async def test_the_base_is_not_looked_up() -> None:
    registry = Registry()
    assert await registry.digests().of("", ALICE) == ""
    assert not registry.asked


async def test_an_old_answer_is_used_while_a_new_one_is_asked_for() -> None:
    registry = Registry()
    digests = registry.digests()
    await digests.of("chat", BOB)
    registry.revision, registry.now = 2, 60.0
    assert await digests.of("chat", BOB) == "chat-Bearer bob-1"
    await asyncio.wait(asyncio.all_tasks() - {asyncio.current_task()})
    assert await digests.of("chat", BOB) == "chat-Bearer bob-2"
    assert len(registry.asked) == 2


async def test_without_the_registry_what_was_known_stays_and_a_name_stands_for_itself() -> None:
    registry = Registry()
    digests = registry.digests()
    await digests.of("chat", BOB)
    registry.away, registry.now = True, 60.0
    assert await digests.of("chat", BOB) == "chat-Bearer bob-1"
    assert await digests.of("new", BOB) == "?new"


async def test_what_a_grpc_request_wants() -> None:
    digests = Registry().digests()
    request = inference_pb2.GenerateRequest(adapter="chat", session_key="s")
    request.stopping.max_tokens = 10
    wanted = await of_request(request, digests, BOB)
    assert (wanted.digest, wanted.session) == ("chat-Bearer bob-1", "s")
    request.stopping.max_tokens = 1000
    assert (await of_request(request, digests, BOB)).work > wanted.work
    named = adapters_pb2.ActivateAdapterRequest(name="chat")
    assert (await of_request(named, digests, BOB)).digest == "chat-Bearer bob-1"
    assert (await of_request(inference_pb2.GenerateRequest(), digests, BOB)).digest == ""


async def test_what_an_http_request_wants_whatever_it_holds() -> None:
    digests = Registry().digests()
    for body in ({}, {"model": 3}, {"model": ["chat"]}):
        assert (await of_body(body, digests, ())).digest == ""
    wanted = await of_body(
        {"model": "chat", "max_tokens": "many", "messages": {"no": "list"}, "user": 7},
        digests,
        (("authorization", "Bearer bob"),),
    )
    assert (wanted.digest, wanted.session) == ("chat-Bearer bob-1", "")
    assert wanted.work >= 1
    assert (await of_body({"model": "c", "max_tokens": -900}, digests, ())).work >= 1
