"""Several samples of one prompt, top log-probabilities and stop tokens, over a socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

import grpc
import pytest
from veneer_proto.v1 import inference_pb2 as pb
from veneer_registry.errors import NonFiniteOutput
from veneer_server.serving.samples import SampleStreams, sample_seed
from veneer_server.text.tokenizer import TextTokenizer
from veneer_server.wire.messages import Constraint, SamplingParams, SequenceOutput

from tests.unit.server.rpc.fake_engine import fake_tokens
from tests.unit.server.rpc.front_harness import Front, failure, prompt, until

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def tokenizer(base_folder: Path) -> TextTokenizer:
    return TextTokenizer.from_folder(base_folder)


def samples(n: int, **output: bool) -> pb.GenerateRequest:
    return prompt(sampling=pb.SamplingOptions(seed=7), output=pb.OutputOptions(n=n, **output))


async def test_samples_have_seeds_of_their_own_and_the_same_in_both_calls(
    front: Front, tokenizer: TextTokenizer
) -> None:
    ids = tokenizer.encode("Hello there", add_special_tokens=True)
    expected = [fake_tokens("", ids, sample_seed(7, i), 4) for i in range(3)]
    assert len({tuple(tokens) for tokens in expected}) == 3

    whole = await front.inference.Generate(samples(3, echo=True))
    assert list(whole.token_ids) == expected[0]
    assert [list(other.token_ids) for other in whole.others] == expected[1:]
    texts = ["Hello there" + tokenizer.decode(tokens) for tokens in expected]
    assert [whole.text, *(o.text for o in whole.others)] == texts
    assert {o.finish_reason for o in whole.others} == {pb.FINISH_REASON_LENGTH}
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(ids), 12)
    assert whole.usage.cached_prompt_tokens == 16

    messages = [m async for m in front.inference.GenerateStream(samples(3, echo=True))]
    for index in range(3):
        own = [m for m in messages if m.index == index]
        assert [t for m in own for t in m.token_ids] == expected[index]
        assert "".join(m.text for m in own) == texts[index]
        reasons = [m.finish_reason for m in own]
        assert reasons[-1] == pb.FINISH_REASON_LENGTH
        assert not any(reasons[:-1])
    assert messages[0].index == 0
    assert [m.HasField("final") for m in messages].index(True) == len(messages) - 1
    assert messages[-1].final.usage == whole.usage


async def test_the_first_sample_is_what_one_sample_alone_is(front: Front) -> None:
    alone = await front.inference.Generate(samples(1))
    several = await front.inference.Generate(samples(2))
    assert alone.token_ids == several.token_ids
    assert not alone.others


async def test_the_others_are_submitted_when_the_first_token_has_come(front: Front) -> None:
    front.engine.pace = asyncio.Semaphore(0)
    call = front.inference.GenerateStream(samples(4))
    reading = asyncio.ensure_future(anext(aiter(call)))
    await until(lambda: front.engine.in_flight == 1)
    assert front.engine.places.taken == 1
    assert len(front.engine.submitted) == 1
    front.engine.pace.release()
    await reading
    await until(lambda: front.engine.in_flight == front.engine.places.taken == 4)
    call.cancel()
    await until(lambda: front.engine.places.taken == 0)
    assert (front.engine.in_flight, front.engine.cancelled) == (0, 4)


async def test_prompt_logprobs_come_once(front: Front) -> None:
    request = samples(3, echo=True, logprobs=True)
    messages = [m async for m in front.inference.GenerateStream(request)]
    assert [bool(m.prompt_logprobs) for m in messages].count(True) == 1
    assert messages[0].prompt_logprobs
    assert [s.prompt_logprobs for s in front.engine.submitted] == [True, False, False]
    assert all(len(m.logprobs) == len(m.token_ids) for m in messages)


async def test_one_failed_sample_fails_the_call_and_ends_the_others(front: Front) -> None:
    front.engine.script = [
        SequenceOutput(1, [1000]),
        NonFiniteOutput("not finite: lower the temperature"),
    ]
    failed = await failure(front.inference.Generate(samples(3)))
    assert failed.reason == "NON_FINITE_OUTPUT"
    await until(lambda: front.engine.in_flight == front.engine.places.taken == 0)


async def test_a_stop_string_ends_its_sample_only(
    front: Front, tokenizer: TextTokenizer
) -> None:
    ids = tokenizer.encode("one stop two", add_special_tokens=False)
    front.engine.script = [SequenceOutput(1, [token]) for token in ids]
    request = samples(3)
    request.stopping.stop.append("stop")
    whole = await front.inference.Generate(request)
    assert {whole.text, *(o.text for o in whole.others)} == {"one "}
    assert front.engine.cancelled == 3


async def test_a_request_that_finds_no_place_is_refused_before_anything_is_submitted(
    front: Front,
) -> None:
    """One place is enough: its samples have it one after the other."""
    front.engine.places.taken = front.engine.places.capacity
    try:
        failed = await failure(front.inference.Generate(samples(3)))
        assert (failed.code, failed.reason) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "QUEUE_FULL",
        )
        assert front.engine.submitted == []
        front.engine.places.taken = front.engine.places.capacity - 1
        assert len((await front.inference.Generate(samples(3))).others) == 2
    finally:
        front.engine.places.taken = 0


async def test_top_logprobs_are_beside_each_entry(
    front: Front, tokenizer: TextTokenizer
) -> None:
    request = prompt(output=pb.OutputOptions(echo=True, logprobs=True, top_logprobs=3))
    whole = await front.inference.Generate(request)
    for entry in (*whole.logprobs, *whole.prompt_logprobs):
        assert [t.token_id for t in entry.top] == [entry.token_id + i for i in range(3)]
        assert [t.logprob for t in entry.top] == [-0.5, -1.5, -2.5]
    without = await front.inference.Generate(prompt(output=pb.OutputOptions(logprobs=True)))
    assert without.logprobs
    assert not any(entry.top for entry in without.logprobs)


async def test_a_stop_token_is_reported_but_not_shown(
    front: Front, tokenizer: TextTokenizer
) -> None:
    ids = tokenizer.encode("one two three", add_special_tokens=False)
    front.engine.script = [
        SequenceOutput(1, ids[:1]),
        SequenceOutput(1, ids[1:], finish="stop"),
    ]
    request = prompt(stopping=pb.StoppingOptions(stop_token_ids=[ids[-1]], max_tokens=9))
    whole = await front.inference.Generate(request)
    assert (whole.text, list(whole.token_ids)) == ("one two", ids)
    assert front.engine.submitted[0].stop_token_ids == [ids[-1]]


async def test_every_option_reaches_the_engine(front: Front) -> None:
    sampling = pb.SamplingOptions(
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.05,
        seed=2**64 - 1,
        repetition_penalty=1.1,
        presence_penalty=-0.5,
        frequency_penalty=0.25,
        logit_bias={17: -100.0, 49151: 2.5},
    )
    constraint = pb.Constraint(choice=pb.Choices(texts=["yes", "no"]))
    await front.inference.Generate(
        prompt(sampling=sampling, constraint=constraint, use_prefix_cache=False)
    )
    await front.inference.Generate(prompt())
    first, second = front.engine.submitted
    assert first.sampling == SamplingParams(
        temperature=0.5,
        top_k=40,
        top_p=0.9,
        seed=2**64 - 1,
        min_p=0.05,
        repetition_penalty=1.1,
        presence_penalty=-0.5,
        frequency_penalty=0.25,
        logit_bias={17: -100.0, 49151: 2.5},
    )
    assert first.constraint == Constraint("choice", '["yes", "no"]')
    assert (first.use_prefix_cache, second.use_prefix_cache) == (False, True)
    assert second.constraint is None


async def test_streams_take_turns_and_close_whole() -> None:
    closed: list[str] = []

    async def counting(name: str, gate: asyncio.Event) -> AsyncGenerator[SequenceOutput, None]:
        try:
            await gate.wait()
            for number in range(50):
                yield SequenceOutput(1, [number])
        finally:
            closed.append(name)

    open_gate, shut_gate = asyncio.Event(), asyncio.Event()
    open_gate.set()
    streams = SampleStreams()
    for index, name in enumerate("ab"):
        streams.add(index, counting(name, open_gate))
    streams.add(2, counting("never", shut_gate))
    turns = [(await streams.next())[0] for _ in range(21)]
    assert abs(turns.count(0) - turns.count(1)) <= 1
    assert turns[-1] == 0
    await streams.close(1)  # its turn had come
    assert {(await streams.next())[0] for _ in range(5)} == {0}
    await streams.aclose()
    await streams.aclose()
    assert closed == ["b", "a", "never"]


async def test_a_cancel_while_streams_are_closed_leaves_none_open() -> None:
    """Their places are given back then: the engine must have heard of each."""
    closing, go_on = asyncio.Event(), asyncio.Event()
    closed: list[int] = []

    async def sample(index: int) -> AsyncGenerator[SequenceOutput, None]:
        try:
            if index == 0:
                yield SequenceOutput(1, [5])
            await asyncio.Event().wait()
        finally:
            closing.set()
            await go_on.wait()
            closed.append(index)

    streams = SampleStreams()
    for index in range(3):
        streams.add(index, sample(index))
    assert (await streams.next())[0] == 0
    waiting = asyncio.create_task(streams.next())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait({waiting})
    ending = asyncio.create_task(streams.aclose())
    await closing.wait()
    for _ in range(2):
        ending.cancel()
        await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await ending
    assert sorted(closed) == [0, 1, 2]


async def test_what_was_read_and_not_given_is_told() -> None:
    """A caller who leaves between two outputs: usage counts them."""

    async def sample(index: int) -> AsyncGenerator[SequenceOutput, None]:
        yield SequenceOutput(1, [5] * (index + 1))
        await asyncio.Event().wait()

    streams = SampleStreams()
    for index in range(3):
        streams.add(index, sample(index))
    assert (await streams.next())[0] == 0
    for _ in range(5):
        await asyncio.sleep(0)
    await streams.aclose()
    assert streams.dropped == 2 + 3
