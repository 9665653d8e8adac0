"""The correctness gate: speed is measured only if the systems compute the same thing."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from veneer_client import AsyncClient, Tokens, VeneerError

from veneer_loadtest.peers.peft import PeftPeerProcess
from veneer_loadtest.peers.peft_messages import PeftScore, Scored
from veneer_loadtest.quantiles import percentile
from veneer_loadtest.results import AnswersGate, ReferenceGate

MEAN_BOUND: Final = 0.2
P99_BOUND: Final = 1.0
"""Nats per token. Both sides multiply the same NF4 weights in bf16 (8 bits of
mantissa), but in a different order, through all layers. Measured on SmolLM2-135M against the
same weights in fp32: PEFT is off by 0.095 on average over prompts of random tokens
(which are unlikely, so that errors are large) and 0.033 over greedy answers, ours by
0.081 and 0.031; the two differ by 0.106 and 0.040, 99th percentile 0.36. The bounds
are about twice that, since they must hold for any base."""

REGRET_BOUND: Final = 0.1
"""Nats per token by which a greedy answer may fall short of PEFT's likeliest tokens under its
own adapter: 0 except at near ties, which rounding decides (about 0.01 is usual)."""

DISTINCT: Final = 2.0
"""A wrong adapter must change log-probabilities by at least this many times the difference
between the two systems: otherwise the gate could not detect a mix-up, and fails."""


DISTINCT_PEER: Final = 1.5
"""The same bound for a peer whose base rounds the weights differently: vLLM in bfloat16 and
llama.cpp in Q4_0 measured 1.7 to 3.1, answers of mixed-up adapters less than 1."""


ALONE_BOUND: Final = 0.5
"""Assumed regret under a wrong adapter, in nats per token, if there is no other adapter to
score a peer's answers under. Wrong adapters usually have about this."""


class GateFailed(VeneerError):
    """A system does not compute what PEFT computes."""

    code = "FAILED_PRECONDITION"
    reason = "GATE_FAILED"


@dataclass(frozen=True, slots=True)
class GateRequest:
    """A request of the gate: its adapter and the prompt's token ids."""

    adapter: str
    prompt: tuple[int, ...]


def gate_requests(
    adapters: tuple[str, ...],
    *,
    count: int,
    prompt_tokens: tuple[int, int],
    vocab: int,
    seed: int,
) -> tuple[GateRequest, ...]:
    """Make ``count`` requests; request i uses adapter i modulo the number of adapters.

    Prompt lengths are spread evenly over ``prompt_tokens`` (both ends included)
    and shuffled; the ids are random ordinary tokens, so that no two prompts
    share a prefix.
    """
    rng = np.random.default_rng(seed)
    low, high = prompt_tokens
    lengths = rng.permutation(np.linspace(low, high, count).round().astype(int))
    # The first few hundred ids of most vocabularies are control and byte tokens.
    first = min(1000, vocab // 2)
    return tuple(
        GateRequest(
            adapter=adapters[i % len(adapters)],
            prompt=tuple(int(t) for t in rng.integers(first, vocab, int(length))),
        )
        for i, length in enumerate(lengths)
    )


async def check(
    client: AsyncClient,
    peer: PeftPeerProcess,
    requests: Sequence[GateRequest],
    tokens: int,
) -> ReferenceGate:
    """Let the server answer ``requests`` (one for each adapter) in one batch. Then score the
    answers, teacher-forced, on both sides, and in PEFT under every adapter.

    Raises:
        GateFailed: the systems differ by more than the bounds, an answer is not from its own
            adapter, or the adapters are too similar to tell.
    """
    rows = await asyncio.gather(*(_answer(client, request, tokens) for request in requests))
    adapters = [request.adapter for request in requests]
    differences: list[float] = []
    other_differences: list[float] = []
    regrets: list[float] = []
    other_regrets: list[float] = []
    for request, answer in zip(requests, rows, strict=True):
        row = [*request.prompt, *answer]
        ours = await _server_score(client, row, request.adapter)
        own = await peer.score(PeftScore(row=row, adapter=request.adapter))
        differences += _distances(ours, own.logprobs)
        regrets.append(_regret(own, len(answer)))
        for adapter in adapters:
            if adapter != request.adapter:
                other = await peer.score(PeftScore(row=row, adapter=adapter))
                other_differences += _distances(other.logprobs, own.logprobs)
                other_regrets.append(_regret(other, len(answer)))
    gate = ReferenceGate(
        tokens=len(differences),
        mean=_mean(differences),
        p99=percentile(differences, 0.99),
        worst=max(differences),
        mean_bound=MEAN_BOUND,
        p99_bound=P99_BOUND,
        other_adapter_mean=_mean(other_differences) if other_differences else None,
        regret=max(regrets),
        regret_bound=REGRET_BOUND,
        other_adapter_regret=_mean(other_regrets) if other_regrets else None,
        answers=len(requests),
    )
    if not _passes(gate):
        raise GateFailed(
            "the server's results differ from PEFT's, or the adapters are too similar to "
            f"tell, so its speed is meaningless: {gate}",
            metadata={"system": "veneer"},
        )
    return gate


async def check_answers(
    system: str,
    rows: Sequence[Sequence[int]],
    peer: PeftPeerProcess,
    requests: Sequence[GateRequest],
) -> AnswersGate:
    """Score a peer's answers to ``requests`` (one for each adapter), in PEFT.

    The peer's base rounds the same weights differently, so its answers diverge from PEFT's at
    near ties, and repeat themselves where PEFT's would. One answer alone does not show which
    adapter it came from; all answers together do.

    Raises:
        GateFailed: the answers are not clearly likelier under their own adapters than
            under others.
    """
    own: list[float] = []
    other: list[float] = []
    own_best = 0
    for request, answer in zip(requests, rows, strict=True):
        row = [*request.prompt, *answer]
        regrets = {
            each.adapter: _regret(
                await peer.score(PeftScore(row=row, adapter=each.adapter)), len(answer)
            )
            for each in requests
        }
        mine = regrets.pop(request.adapter)
        own.append(mine)
        other += regrets.values()
        own_best += all(mine < theirs for theirs in regrets.values())
    gate = AnswersGate(
        answers=len(own),
        own_best=own_best,
        regret=_mean(own),
        other_regret=_mean(other) if other else None,
    )
    elsewhere = gate.other_regret if gate.other_regret is not None else ALONE_BOUND
    if elsewhere < DISTINCT_PEER * gate.regret:
        raise GateFailed(
            f"{system} does not answer with the requested adapters: {gate}",
            metadata={"system": system},
        )
    return gate


def gate_line(gate: ReferenceGate) -> str:
    """Describe the gate's figures in one sentence."""
    text = (
        f"gate passed: log-probabilities differ from PEFT's by {gate.mean:.3f} nats on average "
        f"(bound {gate.mean_bound}), p99 {gate.p99:.2f} (bound {gate.p99_bound}), over "
        f"{gate.tokens} tokens; {gate.answers} answers miss PEFT's likeliest tokens by at most "
        f"{gate.regret:.3f} nats a token (bound {gate.regret_bound})"
    )
    if gate.other_adapter_mean is None or gate.other_adapter_regret is None:
        return text
    return (
        f"{text}; under another adapter these are {gate.other_adapter_mean:.2f} and "
        f"{gate.other_adapter_regret:.2f}"
    )


def answers_line(name: str, gate: AnswersGate) -> str:
    """Describe the figures of a peer's gate in one sentence."""
    text = (
        f"gate passed: answers of {name} miss PEFT's likeliest tokens by {gate.regret:.3f} "
        "nats a token"
    )
    if gate.other_regret is None:
        return text
    return (
        f"{text}, under other adapters by {gate.other_regret:.2f}; {gate.own_best} of "
        f"{gate.answers} are likeliest under their own"
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _distances(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [abs(a - b) for a, b in zip(ours, theirs, strict=True)]


def _regret(scored: Scored, answer: int) -> float:
    """Return the nats per token by which the last ``answer`` tokens fall short of the likeliest
    tokens."""
    missed = [best - own for own, best in zip(scored.logprobs, scored.best, strict=True)]
    return _mean(missed[-answer:])


def _passes(gate: ReferenceGate) -> bool:
    within = (
        gate.mean <= gate.mean_bound
        and gate.p99 <= gate.p99_bound
        and gate.regret <= gate.regret_bound
    )
    if gate.other_adapter_mean is None or gate.other_adapter_regret is None:
        return within
    return (
        within
        and gate.other_adapter_mean >= DISTINCT * gate.mean
        and gate.other_adapter_regret >= DISTINCT * gate.regret
    )


async def _answer(client: AsyncClient, request: GateRequest, tokens: int) -> tuple[int, ...]:
    """Return a greedy answer of exactly ``tokens`` tokens."""
    async with client.generate_stream(
        Tokens(request.prompt),
        adapter=request.adapter,
        max_tokens=tokens,
        temperature=0.0,
        ignore_eos=True,
        use_prefix_cache=False,
    ) as call:
        return tuple([token async for chunk in call for token in chunk.token_ids])


async def _server_score(client: AsyncClient, row: list[int], adapter: str) -> list[float]:
    """Return the log-probabilities of the row's tokens after the first."""
    answer = await client.generate(
        Tokens(tuple(row)),
        adapter=adapter,
        max_tokens=1,
        temperature=0.0,
        logprobs=True,
        echo=True,
    )
    return [item.logprob for item in answer.prompt_logprobs]
