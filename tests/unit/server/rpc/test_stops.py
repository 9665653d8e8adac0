"""A stop string cuts text, tokens and numbers at the same place, however outputs were
merged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from veneer_proto.v1 import inference_pb2 as pb
from veneer_server.serving.records import FinishReason
from veneer_server.serving.samples import Sample
from veneer_server.text.tokenizer import TextTokenizer
from veneer_server.wire.messages import SequenceOutput

from tests.unit.server.rpc.front_harness import Front, prompt

PIECES = ("a", "b", "E", "N", "D", "EN", "ND", "xENDy", "é".encode()[:1], "é".encode()[1:], "")


class Pieces:
    """FAKE tokenizer: token n is the nth piece; the last is a special token."""

    strip_first_space = False

    def token_bytes(self, token: int) -> bytes:
        piece = PIECES[token]
        return piece if isinstance(piece, bytes) else piece.encode()


def output(tokens: Sequence[int], at: int, finish: FinishReason | None) -> SequenceOutput:
    """Of tokens from position ``at`` on, with numbers that tell them apart."""
    places = range(at, at + len(tokens))
    return SequenceOutput(
        1,
        list(tokens),
        logprobs=[-float(place) for place in places],
        top_logprobs=[[(place, -1.0)] for place in places],
        finish=finish,
    )


def seen(
    tokens: Sequence[int], ends: Sequence[int], stops: Sequence[str], finish: FinishReason
) -> tuple[object, ...]:
    """What a caller gets of outputs that end at ``ends``, read until one is the last."""
    sample = Sample(0, Pieces(), stops=stops, stop_token_ids=[len(PIECES) - 1])
    text = ""
    lists: tuple[list[object], ...] = ([], [], [])
    begin = 0
    for end in [*ends, len(tokens)]:
        last = end == len(tokens)
        delta = sample.delta(output(tokens[begin:end], begin, finish if last else None))
        text += delta.text
        for whole, part in zip(
            lists, (delta.tokens, delta.logprobs, delta.top_logprobs), strict=True
        ):
            assert part is not None
            whole.extend(part)
        if delta.finish is not None:
            return text, *lists, delta.finish
        begin = end
    raise AssertionError("no end")


@settings(max_examples=300, print_blob=True)
@given(
    tokens=st.lists(st.integers(0, len(PIECES) - 1), min_size=1, max_size=12),
    cuts=st.sets(st.integers(1, 11)),
    stops=st.lists(st.sampled_from(["END", "E", "bE", "é", "\ufffd", "aa"]), max_size=3),
    finish=st.sampled_from(["stop", "length"]),
)
@example(tokens=[0, 1, 2, 3, 4, 0, 0, 1], cuts=set(), stops=["END"], finish="length")
def test_what_a_caller_sees_does_not_depend_on_how_outputs_were_joined(
    tokens: list[int], cuts: set[int], stops: list[str], finish: FinishReason
) -> None:
    single = seen(tokens, range(1, len(tokens)), stops, finish)
    joined = seen(tokens, sorted(c for c in cuts if c < len(tokens)), stops, finish)
    assert joined == single


@pytest.mark.asyncio(loop_scope="module")
async def test_usage_and_logprobs_end_with_the_stop_string(
    front: Front, base_folder: Path
) -> None:
    tokenizer = TextTokenizer.from_folder(base_folder)
    ids = tokenizer.encode("one two stop three four", add_special_tokens=False)
    request = prompt(
        stopping=pb.StoppingOptions(stop=["stop"], max_tokens=9),
        output=pb.OutputOptions(logprobs=True),
    )
    answers = []
    for front.engine.script in (
        [output([token], at, None) for at, token in enumerate(ids)],
        [output(ids[:1], 0, None), output(ids[1:], 1, "length")],
    ):
        answers.append(await front.inference.Generate(request))
    for answer in answers:
        assert list(answer.token_ids) == ids[:3]
        assert [entry.logprob for entry in answer.logprobs] == [0, -1, -2]
        assert answer.usage.completion_tokens == 3
        assert answer.text == "one two "
        assert answer.finish_reason == pb.FINISH_REASON_STOP
