"""A scenario's adapters and requests, from its seed or a trace: the same for every router."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from veneer_loadtest.load.trace import TraceLine
from veneer_loadtest.simulation.scenario import Scenario

_POOL = 1 << 16
_FIRST_TOKEN, _LAST_TOKEN = 1000, 49_000
"""Range of the bundled base's ordinary tokens."""
_SESSIONS = 4
"""Number of sessions of each adapter."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One request.

    Attributes:
        at_s: when it reaches the ingress.
        adapter: the adapter's number; None for the base.
        session: name of its session; "" for none.
        text: where its prompt begins in the pool of `prompts`; the same within a session.
    """

    number: int
    at_s: float
    adapter: int | None
    tenant: int
    prompt_tokens: int
    answer_tokens: int
    session: str
    text: int


def traffic(scenario: Scenario) -> Iterator[Asked]:
    """Yield all requests in order of arrival."""
    random = np.random.default_rng(scenario.seed)
    count, trace = scenario.count, scenario.trace
    adapters: list[int | None]
    if trace:
        order = np.arange(count)
        at = np.array([line.at_s for line in trace]) / scenario.speed
        adapters = numbered(trace)
        if not any(line.adapter for line in trace):
            adapters = _zipf(random, scenario.adapters, scenario.zipf, count).tolist()
        prompt = np.array([line.prompt_tokens for line in trace])
        answer = np.array([line.tokens for line in trace])
    else:
        at, drawn = _arrivals(scenario, random)
        adapters, order = drawn.tolist(), np.argsort(at, kind="stable")
        prompt = _lengths(random, scenario.prompt_tokens, count)
        answer = _lengths(random, scenario.answer_tokens, count)
    in_session = random.random(count) < scenario.session_share  # nosec B311 # not for secrets
    which = random.integers(0, _SESSIONS, count)
    text = random.integers(0, _POOL, count)
    for number, place in enumerate(order.tolist()):
        adapter = adapters[place]
        session, begin = "", int(text[place])
        if in_session[place]:
            session = f"{adapter}/{which[place]}"
            begin = ((adapter or 0) * 7919 + int(which[place]) * 104_729) % _POOL
        yield Asked(
            number=number,
            at_s=float(at[place]),
            adapter=adapter,
            tenant=(number if adapter is None else adapter) % scenario.tenants,
            prompt_tokens=int(prompt[place]),
            answer_tokens=int(answer[place]),
            session=session,
            text=begin,
        )


def numbered(trace: Sequence[TraceLine]) -> list[int | None]:
    """Return the number of each request's adapter: 0 for the one that is asked for most often,
    None for the base."""
    counts = Counter(line.adapter for line in trace if line.adapter)
    numbers = {name: number for number, (name, _) in enumerate(counts.most_common())}
    return [numbers.get(line.adapter) for line in trace]


def adapter_sizes(scenario: Scenario) -> list[int]:
    """Return each adapter's size in bytes. Ranks go to adapters at random, in numbers that come
    as close to their shares as whole adapters can."""
    count = scenario.adapters
    if not scenario.ranks:
        return [scenario.adapter_bytes] * count
    weights = np.array([weight for _, weight in scenario.ranks])
    ends = np.rint(np.cumsum(weights) / weights.sum() * count).astype(int)
    ranks = np.repeat([rank for rank, _ in scenario.ranks], np.diff(ends, prepend=0))
    np.random.default_rng([scenario.seed, 2]).shuffle(ranks)
    sizes: list[int] = (ranks * scenario.rank_bytes).tolist()
    return sizes


def _arrivals(
    scenario: Scenario, random: np.random.Generator
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Return when each request arrives and its adapter: random arrivals at a steady rate, and
    bursts."""
    count, (burst, burst_s) = scenario.requests, scenario.burst
    bursts = round(count * scenario.burst_share / burst)
    steady = count - bursts * burst
    seconds = count / scenario.rate
    times = [np.sort(random.random(steady)) * seconds]  # nosec B311 # not for secrets
    which = [_zipf(random, scenario.adapters, scenario.zipf, steady)]
    for _ in range(bursts):
        tenant = int(random.integers(min(scenario.tenants, scenario.adapters)))
        begin = float(random.random()) * max(0.0, seconds - burst_s)  # nosec B311 # not for secrets
        times.append(begin + random.random(burst) * burst_s)  # nosec B311 # not for secrets
        own = -(-(scenario.adapters - tenant) // scenario.tenants)
        ranks = _zipf(random, own, scenario.zipf, burst)
        which.append(tenant + ranks * scenario.tenants)
    return np.concatenate(times), np.concatenate(which)


def _zipf(
    random: np.random.Generator, count: int, exponent: float, size: int
) -> npt.NDArray[np.int64]:
    sums = np.cumsum(1.0 / np.arange(1, count + 1) ** exponent)
    drawn = np.searchsorted(sums, random.random(size) * sums[-1], side="right")  # nosec B311 # not for secrets
    return np.asarray(drawn, dtype=np.int64)


def _lengths(random: np.random.Generator, mean: int, size: int) -> npt.NDArray[np.int64]:
    low = max(1, mean // 2)
    return random.integers(low, 2 * mean - low, size, endpoint=True)


def prompts(seed: int, longest: int) -> list[int]:
    """Return a pool of random tokens; each prompt is a part of it."""
    random = np.random.default_rng([seed, 1])
    drawn: list[int] = random.integers(_FIRST_TOKEN, _LAST_TOKEN, _POOL + longest).tolist()
    return drawn
