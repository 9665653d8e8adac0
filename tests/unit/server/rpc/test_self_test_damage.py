"""The self-test with damage planted in memory, in the serving path and on disk."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from veneer_registry.fingerprint import weights_fingerprint
from veneer_server.engine.execution import model_runner
from veneer_server.models.source import BaseDamaged
from veneer_server.serving.self_test import ProbeAnswers, judge
from veneer_server.step.adapter_table import GroupViews

from tests.planted import planted
from tests.refused import refused
from tests.tiny_llama import make_tiny_llama
from tests.unit.server.rpc.self_test_kit import NAMES, Bench, bench

Damage = Callable[[Bench], None]


def exchange(made: Bench) -> None:
    one, two = made.ref("one").weights_digest, made.ref("two").weights_digest
    made.tables[one], made.tables[two] = made.tables[two], made.tables[one]


def perturb_one_b(made: Bench) -> None:
    """A tenth more, in one of the 21 matrices B."""
    views = made.table("two").views[3][1]
    assert views is not None
    views.expands[0][0].mul_(1.1)


def scale(made: Bench) -> None:
    """A scaling that is half as much again, in every module."""
    table = made.table("one")

    def scaled(views: GroupViews | None) -> GroupViews | None:
        if views is None:
            return None
        return replace(views, expands=tuple((b, 1.5 * by) for b, by in views.expands))

    table.views = tuple(tuple(map(scaled, column)) for column in table.views)


def lose_a_group(made: Bench) -> None:
    table = made.table("three")
    table.views = (table.views[0], (None,) * 3, *table.views[2:])


def not_finite(made: Bench) -> None:
    made.table("two").run.fill_(torch.inf)


@pytest.mark.push
@pytest.mark.parametrize(
    ("damage", "wrong"),
    [
        (exchange, ["one", "two"]),
        (perturb_one_b, ["two"]),
        (scale, ["one"]),
        (lose_a_group, ["three"]),
        (not_finite, ["two"]),
    ],
)
async def test_a_damaged_copy_fails_and_no_other(
    damage: Damage, wrong: list[str], tmp_path: Path
) -> None:
    async with bench(tmp_path) as made:
        assert await made.failed(*NAMES) == []
        damage(made)
        assert await made.failed(*NAMES) == wrong
        # The healthy ones pass whatever is tested beside them.
        well = [name for name in NAMES if name not in wrong]
        assert await made.failed(*well) == []


async def test_damage_of_the_base_s_own_weights_is_found(tmp_path: Path) -> None:
    """One linear of one layer, zeroed where it serves from: all that is served is wrong. The
    reference is of the base's files; what was loaded would agree with itself."""
    async with bench(tmp_path) as made:
        assert await made.failed(*NAMES) == []
        weight = made.harness.runner.backend.weights.layers[1].down.weight  # type: ignore[attr-defined]
        kept = weight.clone()
        weight.zero_()
        assert await made.failed(*NAMES) == ["base", *NAMES]
        weight.copy_(kept)
        assert await made.failed(*NAMES) == []


async def test_a_base_whose_files_changed_cannot_be_compared(tmp_path: Path) -> None:
    """That is said, and nothing else: neither that it passes, nor that what serves is wrong."""
    fingerprint = weights_fingerprint(make_tiny_llama(tmp_path / "base"))
    async with bench(tmp_path, weights_fingerprint=fingerprint) as made:
        assert await made.failed() == []
        file = tmp_path / "base" / "model.safetensors"
        # Another file of that name: the engine has the old one mapped.
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.unlink()
        file.write_bytes(data)
        with refused(BaseDamaged, cause="changed"):
            await made.failed()
        file.write_bytes(data[:-100])
        with refused(BaseDamaged, cause="unreadable"):
            await made.failed()


@pytest.mark.push
async def test_an_exchange_says_whose_answer_it_is(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        await made.run(*NAMES)
        exchange(made)
        report = await made.run(*NAMES)
        _, one, two, three = report.verdicts
        assert one.max_difference > 1 > one.bound > one.nearest_other
        assert made.ref("two").short in one.detail
        assert made.ref("one").short in two.detail
        assert "evict" in one.detail
        assert three.passed


async def test_adapters_that_are_not_applied_all_answer_as_the_base(
    tmp_path: Path,
) -> None:
    gone = planted(model_runner, "return tuple(segments)", "return ()")
    async with bench(tmp_path) as made:
        with gone:
            report = await made.run(*NAMES)
        assert [v.passed for v in report.verdicts] == [True, False, False, False]
        assert all("the base" in v.detail for v in report.verdicts[1:])


async def test_rows_that_get_their_neighbours_adapter_fail(
    tmp_path: Path,
) -> None:
    """A segment that begins a row late, as a wrong row range would."""
    shifted = planted(
        model_runner, "Segment(row_starts[begin], row", "Segment(row_starts[begin] + 1, row"
    )
    async with bench(tmp_path) as made:
        with shifted:
            assert await made.failed(*NAMES) == list(NAMES)


async def test_files_that_are_damaged_fail_and_the_others_are_tested(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        await made.run("one")  # resident; "two" is not
        for name in ("one", "two"):
            file = made.registry.weights_folder(made.ref(name)) / "adapter_model.safetensors"
            file.chmod(0o600)
            data = bytearray(file.read_bytes())
            data[-50] ^= 1
            file.write_bytes(data)
        report = await made.run(*NAMES)
        base, one, two, three = report.verdicts
        assert (base.passed, one.passed, two.passed, three.passed) == (True, False, False, True)
        for verdict in (one, two):
            assert "push the adapter again" in verdict.detail
            assert math.isnan(verdict.max_difference)
        assert report.adapters_mixed == 2  # "one" answers from memory


# ---------------------------------------------------------------------------- judgement


def answers(*served: tuple[str, list[float], list[float]]) -> list[ProbeAnswers]:
    return [ProbeAnswers(name, got, wanted) for name, got, wanted in served]


def test_within_the_bound_but_nearer_to_another_is_wrong() -> None:
    """The bound alone would let both pass."""
    given = answers(("", [-5.0], [-5.0]), ("a", [-2.45], [-2.0]), ("b", [-2.3], [-2.6]))
    verdicts = judge(given, 0.5)
    assert [v.passed for v in verdicts] == [True, False, False]
    assert "as b should" in verdicts[1].detail
    assert verdicts[1].nearest_other == pytest.approx(0.15)
    # A bound that is wider than what lies between them cannot tell, and says so.
    verdicts = judge(given, 0.65)
    assert [v.passed for v in verdicts] == [True, True, True]
    assert ["cannot distinguish" in v.detail for v in verdicts] == [False, True, True]


@pytest.mark.parametrize("spoiled", [float("nan"), float("inf")])
def test_what_is_not_a_number_never_passes(spoiled: float) -> None:
    for got, wanted in (([spoiled, -1.0], [-1.0, -1.0]), ([-1.0, -1.0], [-1.0, spoiled])):
        verdict, _ = judge(answers(("a", got, wanted), ("b", [-9.0] * 2, [-9.0] * 2)), 0.5)
        assert not verdict.passed


def test_a_missing_log_probability_never_passes() -> None:
    (verdict,) = judge(answers(("", [-1.0], [-1.0, -2.0])), 0.5)
    assert not verdict.passed
