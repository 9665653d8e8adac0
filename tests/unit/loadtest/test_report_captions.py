"""Captions tell what was drawn, and too few samples are told first."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from veneer_loadtest.html.page import page
from veneer_loadtest.results import CompareResult, Level

from tests.unit.loadtest import results_kit as kit
from tests.unit.loadtest.page_kit import Page


def few(level: Level, count: int) -> Level:
    return msgspec.structs.replace(
        level, first_token_ms=kit.distribution(400.0, 900.0, count=count)
    )


def warnings(*results: Any) -> list[str]:
    return [
        told for told in Page(page(list(results))).banners if told.startswith("Few samples")
    ]


@pytest.mark.parametrize(("count", "told"), [(9, True), (10, False)])
def test_few_first_tokens_of_a_load(count: int, told: bool) -> None:
    found = warnings(kit.run(few(kit.level(), count)))
    assert bool(found) is told
    if told:
        assert found[0].startswith("Few samples: 9 first tokens. With fewer than 10")
        assert found[0].endswith("give a larger --duration or --requests.")


def test_it_says_which_load() -> None:
    (found,) = warnings(kit.run(few(kit.level(1), 3), kit.level(8)))
    assert "3 first tokens of 1 adapter." in found
    assert "8 adapters" not in found


def test_nothing_measured_is_few() -> None:
    (found,) = warnings(kit.run(msgspec.structs.replace(kit.level(), first_token_ms=None)))
    assert "0 first tokens" in found


def test_few_samples_of_a_swap_and_of_its_uploads() -> None:
    whole = kit.swap()
    assert warnings(whole) == []
    cases = {
        case: msgspec.structs.replace(
            own, samples_ms=own.samples_ms[: 3 if case == "disk" else 12]
        )
        for case, own in whole.cases.items()
    }
    assert whole.churn is not None
    churn = msgspec.structs.replace(whole.churn, publishes=1)
    first, second = warnings(kit.swap(cases=cases, churn=churn))
    assert "3 requests a case." in first
    assert first.endswith("--samples.")
    assert "1 adapter uploaded while streams run." in second


def test_few_requests_of_a_comparison() -> None:
    assert warnings(kit.compare()) == []
    (found,) = warnings(kit.compare(workload={"adapters": ["a"], "tokens": 640}))
    assert "2 requests of a system at 1 stream" in found
    assert found.endswith("--repeat.")


def test_marks_that_are_not_drawn_are_not_explained() -> None:
    with_warmup = page([kit.run(kit.level(), load=kit.load(warmup_s=1.0))])
    assert "Shaded: warm-up. Dotted: no request was begun after it." in with_warmup
    assert "Of the whole load, warm-up included: at most 6 requests" in with_warmup
    without = page([kit.run(kit.level(), load=kit.load(warmup_s=0.0))])
    assert "Shaded" not in without
    assert "Dotted: no request was begun after it." in without
    assert "Of the whole load: at most 6 requests" in without


def open_loop(**own: Any) -> CompareResult:
    closed = kit.compare(**own)
    levels = [msgspec.structs.replace(lv, streams=0, rate=2.0) for lv in closed.levels[:1]]
    return msgspec.structs.replace(closed, levels=levels)


def captions(result: CompareResult) -> list[str]:
    return [
        part.partition("</figcaption>")[0] for part in page([result]).split("<figcaption>")[1:]
    ]


def test_a_ratio_is_told_where_what_it_compares_is_drawn() -> None:
    tokens, first = captions(kit.compare())
    assert "tokens/s / each peer" in tokens
    assert "2.00 x peft" in tokens
    assert " x peft" not in first
    tokens, first = captions(open_loop())
    assert " x peft" not in tokens
    assert "the request rate limits tokens/s" in tokens
    assert "median first token" in first
    assert "2.00 x peft" in first


def test_one_round_has_no_range() -> None:
    whole = kit.compare()
    alone = [
        msgspec.structs.replace(
            level,
            systems={
                name: msgspec.structs.replace(own, rounds=own.rounds[:1])
                for name, own in level.systems.items()
            },
        )
        for level in whole.levels
    ]
    tokens, _ = captions(msgspec.structs.replace(whole, levels=alone))
    assert tokens.endswith("Bars: one round.")


def test_each_tier_s_time_says_that_it_is_half() -> None:
    told = page([kit.run(kit.level())])
    assert "3 in DISK (half of their first tokens within 900 ms)" in told
