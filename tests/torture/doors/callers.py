"""Send the same request over gRPC and HTTP, whole and streamed; return answers in one form."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp
import numpy as np
from veneer_proto.v1 import inference_pb2

BASE: Final = "smollm2-135m"
FORMS: Final = ("gRPC whole", "gRPC stream", "HTTP whole", "HTTP stream")
_FINISH: Final = {
    inference_pb2.FINISH_REASON_STOP: "stop",
    inference_pb2.FINISH_REASON_LENGTH: "length",
}


@dataclass(frozen=True, slots=True)
class Case:
    """A request. ``prompts`` are texts or token ids; a chat has ``messages`` instead.

    Attributes:
        logprobs: number of most likely tokens; None: no log-probabilities.
    """

    number: int
    prompts: tuple[str | tuple[int, ...], ...]
    messages: tuple[tuple[str, str], ...]
    adapter: str
    max_tokens: int
    stops: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    seed: int
    temperature: float
    n: int
    logprobs: int | None
    echo: bool
    usage_as_it_comes: bool

    @property
    def chat(self) -> bool:
        return bool(self.messages)


Score = tuple[str, float | None, dict[str, float]]
"""A token's label, its log-probability in float32, and the log-probabilities of the most likely
tokens. For a completion over HTTP these include the token itself."""


@dataclass(slots=True)
class Found:
    """One choice of an answer. Scores of the prompt come first."""

    text: str = ""
    finish: str = ""
    scores: list[Score] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Answer:
    """Choices by index (sample of a prompt), and the numbers of prompt, completion and cached
    tokens."""

    choices: dict[int, Found]
    usage: tuple[int, int, int]


def narrow(number: float | None) -> float | None:
    """Round to float32, as in gRPC's messages."""
    return None if number is None else float(np.float32(number))


class WrongShape(Exception):
    """An answer that does not have the form that its API promises."""


def check(holds: object, problem: str) -> None:
    """Raise `WrongShape` unless the condition holds."""
    if not holds:
        raise WrongShape(problem)


class Callers:
    """Calls the gRPC API and the HTTP API of one server."""

    def __init__(self, inference: Any, http: aiohttp.ClientSession) -> None:
        """Create callers.

        Args:
            inference: a gRPC stub.
            http: a session with the gateway's base URL.
        """
        self._inference = inference
        self._http = http

    async def all(self, case: Case) -> dict[str, Answer]:
        """Send a request in each form; return the answers by form."""
        calls: tuple[Callable[[Case], Any], ...] = (
            self._grpc_whole,
            self._grpc_stream,
            self._http_whole,
            self._http_stream,
        )
        answers = await asyncio.gather(*(call(case) for call in calls))
        return dict(zip(FORMS, answers, strict=True))

    # ------------------------------------------------------------------------ gRPC

    async def _grpc_whole(self, case: Case) -> Answer:
        choices: dict[int, Found] = {}
        usages = []
        for at, request in enumerate(grpc_requests(case)):
            answer = await self._inference.Generate(request)
            head = [_score(case, one) for one in answer.prompt_logprobs]
            for index, sample in enumerate((answer, *answer.others)):
                scores = [_score(case, one) for one in sample.logprobs]
                check(
                    not scores or len(scores) == len(sample.token_ids), "scores beside tokens"
                )
                choices[at * case.n + index] = Found(
                    sample.text, _FINISH[sample.finish_reason], head + scores
                )
            usages.append(answer.usage)
        return Answer(choices, _grpc_usage(usages))

    async def _grpc_stream(self, case: Case) -> Answer:
        choices: defaultdict[int, Found] = defaultdict(Found)
        usages = []
        for at, request in enumerate(grpc_requests(case)):
            final, head = None, list[Score]()
            async for message in self._inference.GenerateStream(request):
                check(final is None, "a message after the last one")
                choice = choices[at * case.n + message.index]
                check(not choice.finish, "a message after the sample's last one")
                choice.text += message.text
                head += [_score(case, one) for one in message.prompt_logprobs]
                scores = [_score(case, one) for one in message.logprobs]
                check(
                    not scores or len(scores) == len(message.token_ids), "scores beside tokens"
                )
                choice.scores += scores
                choice.finish = _FINISH.get(message.finish_reason, "")
                if message.HasField("final"):
                    final = message.final
                    check(final.finish_reason == message.finish_reason, "the last to end")
            check(final is not None, "a stream without a last message")
            for index in range(case.n):
                choice = choices[at * case.n + index]
                choice.scores[:0] = head
            usages.append(final.usage if final is not None else None)
        return Answer(dict(choices), _grpc_usage(usages))

    # ------------------------------------------------------------------------ HTTP

    async def _post(self, case: Case, body: Mapping[str, Any]) -> bytes:
        path = "/v1/chat/completions" if case.chat else "/v1/completions"
        async with self._http.post(path, json=body) as answer:
            data = await answer.read()
            check(answer.status == 200, f"status {answer.status}: {data[:200]!r}")
            return data

    async def _http_whole(self, case: Case) -> Answer:
        answer = json.loads(await self._post(case, http_body(case)))
        choices = {}
        for at, choice in enumerate(answer["choices"]):
            check(choice["index"] == at, "the order of choices")
            text = choice["message"]["content"] if case.chat else choice["text"]
            made = choices[at] = Found(text, choice["finish_reason"])
            _add_scores(made, case, choice["logprobs"])
        return Answer(choices, _http_usage(answer["usage"]))

    async def _http_stream(self, case: Case) -> Answer:
        options = {
            "include_usage": True,
            "continuous_usage_stats": case.usage_as_it_comes,
        }
        body = {**http_body(case), "stream": True, "stream_options": options}
        *events, done, rest = (await self._post(case, body)).split(b"\n\n")
        check(done == b"data: [DONE]" and not rest, f"the stream's end is {done!r}")
        choices: defaultdict[int, Found] = defaultdict(Found)
        *chunks, last = (json.loads(event.removeprefix(b"data: ")) for event in events)
        before = 0
        for chunk in chunks:
            (choice,) = chunk["choices"]
            made = choices[choice["index"]]
            check(not made.finish, "a chunk after the choice's last one")
            delta = choice["delta"].get("content", "") if case.chat else choice["text"]
            made.text += delta
            _add_scores(made, case, choice["logprobs"])
            made.finish = choice["finish_reason"] or ""
            if case.usage_as_it_comes:
                now = chunk["usage"]["completion_tokens"]
                check(now >= before, "fewer tokens than before")
                before = now
            else:
                check(chunk["usage"] is None, "usage that was not asked for")
        check(last["choices"] == [], "the last chunk has a choice")
        return Answer(dict(choices), _http_usage(last["usage"]))


# ---------------------------------------------------------------------------- requests


def grpc_requests(case: Case) -> list[inference_pb2.GenerateRequest]:
    """Build one gRPC request for each prompt, since a request has only one."""
    inputs: list[dict[str, Any]] = [
        {"prompt": prompt}
        if isinstance(prompt, str)
        else {"token_ids": inference_pb2.TokenIds(ids=prompt)}
        for prompt in case.prompts
    ]
    if case.chat:
        messages = [
            inference_pb2.ChatMessage(role=role, content=content)
            for role, content in case.messages
        ]
        inputs = [{"messages": inference_pb2.ChatInput(messages=messages)}]
    return [
        inference_pb2.GenerateRequest(
            adapter=case.adapter,
            sampling=inference_pb2.SamplingOptions(
                seed=case.seed, temperature=case.temperature
            ),
            stopping=inference_pb2.StoppingOptions(
                max_tokens=case.max_tokens,
                stop=case.stops,
                stop_token_ids=case.stop_token_ids,
                ignore_eos=case.ignore_eos,
            ),
            output=inference_pb2.OutputOptions(
                logprobs=case.logprobs is not None,
                top_logprobs=case.logprobs or 0,
                echo=case.echo,
                n=case.n,
            ),
            **given,
        )
        for given in inputs
    ]


def http_body(case: Case) -> dict[str, Any]:
    """Build the HTTP body. In every second case, fields at their defaults are left out."""
    body: dict[str, Any] = {
        "model": case.adapter or BASE,
        "max_tokens": case.max_tokens,
        "seed": case.seed,
        "temperature": case.temperature,
        "stop": case.stops[0] if len(case.stops) == 1 else case.stops,
        "stop_token_ids": case.stop_token_ids,
        "ignore_eos": case.ignore_eos,
        "n": case.n,
    }
    if case.chat:
        body["messages"] = [{"role": role, "content": text} for role, text in case.messages]
        if case.logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": case.logprobs}
    else:
        body["prompt"] = case.prompts[0] if len(case.prompts) == 1 else case.prompts
        body |= {"logprobs": case.logprobs, "echo": case.echo}
    if case.number % 2:
        body = {
            name: value
            for name, value in body.items()
            if value is not None and value is not False and value != ()
        }
    return body


# ----------------------------------------------------------------------------- answers


def _score(case: Case, one: Any) -> Score:
    tops = {top.token: top.logprob for top in one.top}
    if not case.chat:
        tops[one.token] = one.logprob
    return one.token, one.logprob, tops


def _add_scores(made: Found, case: Case, given: Any) -> None:
    if given is None:
        return
    check(case.logprobs is not None, "scores that were not asked for")
    if case.chat:
        for one in given["content"]:
            tops = {
                top["token"]: float(np.float32(top["logprob"])) for top in one["top_logprobs"]
            }
            made.scores.append((one["token"], narrow(one["logprob"]), tops))
        return
    made.offsets += given["text_offset"]
    parts = (given["tokens"], given["token_logprobs"], given["top_logprobs"])
    for token, logprob, likely in zip(*parts, strict=True):
        tops = {name: float(np.float32(score)) for name, score in (likely or {}).items()}
        made.scores.append((token, narrow(logprob), tops))


def _grpc_usage(usages: list[Any]) -> tuple[int, int, int]:
    return (
        sum(usage.prompt_tokens for usage in usages),
        sum(usage.completion_tokens for usage in usages),
        sum(usage.cached_prompt_tokens for usage in usages),
    )


def _http_usage(usage: dict[str, Any]) -> tuple[int, int, int]:
    prompt, completion = usage["prompt_tokens"], usage["completion_tokens"]
    check(usage["total_tokens"] == prompt + completion, "the total")
    return prompt, completion, usage["prompt_tokens_details"]["cached_tokens"]
