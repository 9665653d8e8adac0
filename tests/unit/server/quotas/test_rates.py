"""Token buckets and what requests take from them, without sockets."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import ExitStack, suppress

import pytest
from veneer_registry.errors import (
    InvalidField,
    QuotaExceeded,
    RateLimitExceeded,
    VeneerError,
)
from veneer_server.quotas import rates
from veneer_server.quotas.quota import Account, Quota, QuotaInvalid, parse_quota
from veneer_server.quotas.rates import Bucket, Quotas
from veneer_server.quotas.standing import duration, rate_headers

from tests.refused import refused
from tests.unit.server.quotas.kit import Clock


def account(id: str = "key:a", **limits: int) -> Account:
    return Account(id, Quota(**limits))


def take(quotas: Quotas, *accounts: Account, prompt: int = 0, new: int = 0) -> None:
    """A request that is answered."""
    with quotas.admit(accounts) as reserved:
        reserved.prompt(prompt)
        reserved.first_output(1)
        reserved.generated(new)


def ends(
    quotas: Quotas, one: Account, error: BaseException, *, prompt: int, new: int = 0
) -> None:
    """A request that ends with an error."""
    with suppress(type(error)), quotas.admit([one]) as reserved:
        reserved.prompt(prompt)
        if new:
            reserved.first_output(1)
            reserved.generated(new)
        raise error


def test_no_more_than_the_limit_and_its_refill_in_any_time() -> None:
    """The stated bound, over random histories: of calls of which some fail, and of limits
    that stay."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(30):
        limit = rng.choice([1, 2, 7, 60])
        clock, served = Clock(), []
        quotas, one = Quotas(clock), account(requests_per_minute=limit)
        open_: list[ExitStack] = []
        for _ in range(400):
            clock.now += rng.choice([0.0, 0.0, 0.01, 60 / limit, rng.uniform(0, 30)])
            if open_ and rng.random() < 0.2:  # one that waited for long, and fails
                error = VeneerError("it fails")
                open_.pop(rng.randrange(len(open_))).__exit__(VeneerError, error, None)
                continue
            try:
                reserved = quotas.admit([one])
            except RateLimitExceeded:
                continue
            stack = ExitStack()
            stack.enter_context(reserved)
            if rng.random() < 0.3:
                open_.append(stack)
                continue
            reserved.first_output(1)
            stack.close()
            served.append(clock.now)
        for at, begin in enumerate(served):
            for n, end in enumerate(served[at:], 1):
                assert n <= limit * (1 + (end - begin) / 60) + 1e-6


def test_the_wait_that_is_told_is_enough_and_not_too_long() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(300):
        clock = Clock(rng.uniform(0, 1e6))
        quotas, one = Quotas(clock), account(tokens_per_minute=rng.randint(1, 10**6))
        limit = one.quota.tokens_per_minute or 0
        take(quotas, one, prompt=rng.randint(1, limit), new=rng.randint(0, limit))
        wanted = rng.randint(1, limit)
        try:
            take(quotas, one, prompt=wanted)
        except RateLimitExceeded as error:
            wait_s = error.retry_after_s or 0.0
        else:
            continue
        for _ in range(5):  # the whole request may need more than its first token
            clock.now += wait_s - 0.002
            if wait_s > 0.002:
                with pytest.raises(RateLimitExceeded):
                    take(quotas, one, prompt=wanted)
            clock.now += 0.002
            try:
                take(quotas, one, prompt=wanted)
                break
            except RateLimitExceeded as error:
                wait_s = error.retry_after_s or 0.0
        else:
            pytest.fail("never let in")


def test_an_answer_goes_on_and_the_next_request_waits() -> None:
    clock = Clock()
    quotas, one = Quotas(clock), account(tokens_per_minute=60)
    with quotas.admit([one]) as reserved:
        reserved.prompt(10)
        reserved.first_output(1)
        for _ in range(110):
            reserved.generated(1)
    with refused(RateLimitExceeded, account="key:a", limit="tokens_per_minute", used="120"):
        take(quotas, one)
    clock.now += 60.9
    with pytest.raises(RateLimitExceeded):
        take(quotas, one)
    clock.now += 0.1
    take(quotas, one, prompt=1)


def test_tokens_that_came_late_are_refilled_from_then_on() -> None:
    clock = Clock()
    quotas, one = Quotas(clock), account(tokens_per_minute=60)
    with quotas.admit([one]) as reserved:
        reserved.prompt(1)
        reserved.first_output(1)
        clock.now += 59.0
        reserved.generated(60)
    assert quotas.left([one])["tokens"] == (60, 0, 60.0)


def test_a_prompt_that_never_fits_says_so() -> None:
    quotas, one = Quotas(Clock()), account(tokens_per_minute=50)
    with pytest.raises(QuotaExceeded) as caught:
        take(quotas, one, prompt=51)
    assert caught.value.retry_after_s is None
    assert "never" in caught.value.message
    take(quotas, one, prompt=50)  # and it gave back its request


def test_requests_at_once_and_those_that_wait() -> None:
    quotas, one = Quotas(Clock()), account(running_requests=4, waiting_requests=2)
    with quotas.admit([one], 2) as first:
        with refused(RateLimitExceeded, limit="waiting_requests"):
            quotas.admit([one])
        first.first_output(2)
        with quotas.admit([one], 2), refused(RateLimitExceeded, limit="running_requests"):
            quotas.admit([one])
        with refused(QuotaExceeded, limit="running_requests", allowed="4"):
            quotas.admit([one], 16)
    with quotas.admit([one], 2) as again:
        again.first_output(2)
        with pytest.raises(RateLimitExceeded):
            quotas.admit([one], 3)


def test_all_accounts_must_allow_it_and_a_refusal_takes_nothing() -> None:
    quotas = Quotas(Clock())
    key, tenant = (
        account("key:a", requests_per_minute=5),
        account("tenant:t", requests_per_minute=2),
    )
    other = account("key:b", requests_per_minute=5)
    take(quotas, key, tenant)
    take(quotas, other, tenant)
    for _ in range(10):
        with refused(RateLimitExceeded, account="tenant:t"):
            take(quotas, key, tenant)
    assert quotas.left([key])["requests"][1] == 4
    assert dict(rate_headers(quotas, [key, tenant]))["x-ratelimit-remaining-requests"] == "0"


def test_a_call_that_fails_gives_back_and_one_whose_caller_leaves_does_not() -> None:
    quotas, one = Quotas(Clock()), account(requests_per_minute=9, tokens_per_minute=90)
    ends(quotas, one, InvalidField("it fails"), prompt=30)
    assert [left[1] for left in quotas.left([one]).values()] == [9, 90]
    ends(quotas, one, asyncio.CancelledError(), prompt=30)
    assert [left[1] for left in quotas.left([one]).values()] == [8, 60]
    ends(quotas, one, InvalidField("it fails"), prompt=30, new=5)  # after work was done
    assert [left[1] for left in quotas.left([one]).values()] == [7, 25]


def test_a_limit_that_changes_counts_what_was_used() -> None:
    clock = Clock()
    quotas = Quotas(clock)
    for _ in range(50):
        take(quotas, account(requests_per_minute=60))
    assert quotas.left([account(requests_per_minute=100)])["requests"][1] == 50
    with pytest.raises(RateLimitExceeded):
        take(quotas, account(requests_per_minute=20))
    clock.now += 60 * 31 / 20
    take(quotas, account(requests_per_minute=20))


def test_a_limit_that_was_lifted_for_a_while_locks_nobody_out() -> None:
    clock = Clock()
    quotas = Quotas(clock)
    for _ in range(10_000):
        take(quotas, account(tokens_per_minute=10**9), prompt=5)
    take(quotas, account(requests_per_minute=1))
    with pytest.raises(RateLimitExceeded):
        take(quotas, account(requests_per_minute=1))


def test_a_clock_that_is_set_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    quotas, one = Quotas(), account(requests_per_minute=1)
    take(quotas, one)
    for jump in (-1e9, 1e9):
        monkeypatch.setattr(time, "time", lambda jump=jump: jump)
        with pytest.raises(RateLimitExceeded) as caught:
            take(quotas, one)
        assert 0 < (caught.value.retry_after_s or 0) <= 60


def test_what_is_remembered_is_bounded_and_what_runs_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rates, "MAX_ACCOUNTS", 100)
    quotas = Quotas(Clock())
    busy = account("token:busy", running_requests=1)
    with quotas.admit([busy]):
        for n in range(1000):
            take(quotas, account(f"token:{n}", requests_per_minute=1))
        with pytest.raises(RateLimitExceeded):
            quotas.admit([busy])
    with pytest.raises(RateLimitExceeded):  # the last ones are remembered
        take(quotas, account("token:999", requests_per_minute=1))
    take(quotas, account("token:0", requests_per_minute=1))
    assert quotas.remembered <= 100


def test_a_bucket_that_gives_back_late_gives_back_less() -> None:
    bucket = Bucket(0.0)
    bucket.take(60, 60, 0.0)
    bucket.take(60, 60, 60.0)
    bucket.give_back(60, 60, 0.0, 60.0)
    assert bucket.used(60, 60.0) == 60.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0s"),
        (0.0001, "1ms"),
        (0.012, "12ms"),
        (0.9999, "1s"),
        (1.0, "1s"),
        (8.64, "8.64s"),
        (59.9996, "1m0s"),
        (86.4, "1m26.4s"),
        (360.0, "6m0s"),
        (3600.0, "1h0m0s"),
    ],
)
def test_times_are_written_as_openai_writes_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"requests_per_minute": 0}, "requests_per_minute"),
        ({"requests_per_minute": -1}, "requests_per_minute"),
        ({"requests_per_minute": 1e30}, "requests_per_minute"),
        ({"requests_per_minute": 10**16}, "requests_per_minute"),
        ({"requests_per_minute": "60"}, "requests_per_minute"),
        ({"requests_per_minute": True}, "requests_per_minute"),
        ({"requests_per_minute": float("nan")}, "requests_per_minute"),
        ({"requests_per_minute": [1]}, "requests_per_minute"),
        ({"adapter_bytes": "much"}, "adapter_bytes"),
        ({"adapter_bytes": "0.2B"}, "adapter_bytes"),
        ({"requests-per-minute": 1}, "requests-per-minute"),
        ({"rpm": 1}, "rpm"),
        (60, ""),
        ([], ""),
    ],
)
def test_a_limit_that_is_none_is_refused(given: object, name: str) -> None:
    with pytest.raises(QuotaInvalid) as caught:
        parse_quota(given)
    assert caught.value.name == name


def test_names_are_suggested_and_defaults_can_be_lifted() -> None:
    with pytest.raises(QuotaInvalid) as caught:
        parse_quota({"token_per_minute": 1})
    assert "did you mean tokens_per_minute?" in str(caught.value)
    defaults = Quota(requests_per_minute=5, adapters=2)
    assert parse_quota({}, defaults) == defaults
    own = parse_quota({"requests_per_minute": "none", "adapter_bytes": "2GiB"}, defaults)
    assert own == Quota(adapters=2, adapter_bytes=2 << 30)
