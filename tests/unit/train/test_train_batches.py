"""Packing does not change the loss; each epoch has its order; bucketing saves padding."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from veneer_train.batches import Order, collate, collate_packed, pack
from veneer_train.data import IGNORE, TrainingSample

from tests.unit.train.test_train_run import config, run


def samples(lengths: Sequence[int], seed: int = 0) -> list[TrainingSample]:
    draw = random.Random(seed)
    made = []
    for line, length in enumerate(lengths, start=1):
        ids = tuple(draw.randrange(3, 250) for _ in range(length))
        masked = length // 3
        made.append(TrainingSample(ids, (IGNORE,) * masked + ids[masked:], line))
    return made


def losses(model: Any, batch: dict[str, torch.Tensor]) -> float:
    """Sum over learned tokens."""
    labels = batch.pop("labels")[:, 1:]
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits[:, :-1].float()
    return float(
        torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum"
        )
    )


def test_samples_in_a_row_do_not_see_each_other(tiny_base: Path) -> None:
    """fp32: the same sums but for rounding. The control lets them see each other."""
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    given = samples([9, 30, 14, 22, 5, 1, 40])
    rows = pack(given, 48)
    assert len(rows) < len(given)
    assert any(len(row) > 2 for row in rows)
    apart = sum(losses(model, collate([sample])) for sample in given)
    assert losses(model, collate_packed(rows)) == pytest.approx(apart, rel=1e-5)
    joined = collate_packed(rows)
    length = joined["input_ids"].shape[1]
    joined["position_ids"] = torch.arange(length).expand(len(rows), -1)
    assert losses(model, joined) != pytest.approx(apart, rel=1e-5)


def test_rows_hold_every_sample_once_and_no_more_than_fits() -> None:
    seed = random.randrange(1 << 30)
    draw = random.Random(seed)
    given = samples([draw.randrange(2, 60) for _ in range(200)], seed)
    rows = pack(given, 50)
    packed = sorted(s.line for row in rows for s in row)
    assert packed == [s.line for s in given], f"seed {seed}"
    for row in rows:
        length = sum(len(s.input_ids) for s in row)
        assert length <= 50 or len(row) == 1, f"seed {seed}"
    tokens = sum(len(s.input_ids) for s in given)
    assert len(rows) <= 2 * tokens / 50 + 1, f"seed {seed}"


@pytest.mark.parametrize("bucketed", [False, True])
def test_an_epoch_has_every_sample_once_in_an_order_of_its_own(bucketed: bool) -> None:
    seed = random.randrange(1 << 30)
    draw = random.Random(seed)
    lengths = [draw.randrange(5, 500) for _ in range(101)]
    order = Order(101, seed, lengths=lengths if bucketed else None, batch=4)
    first, second = list(order), []
    order.set_epoch(1)
    second = list(order)
    assert sorted(first) == sorted(second) == list(range(101)), f"seed {seed}"
    assert first != second, f"seed {seed}"
    order.set_epoch(0)
    assert list(order) == first, f"seed {seed}"


def test_buckets_save_padding() -> None:
    seed = random.randrange(1 << 30)
    draw = random.Random(seed)
    lengths = [draw.randrange(5, 500) for _ in range(256)]

    def padding(order: Sequence[int]) -> int:
        batches = [order[i : i + 8] for i in range(0, 256, 8)]
        return sum(8 * max(lengths[i] for i in b) - sum(lengths[i] for i in b) for b in batches)

    plain = padding(list(Order(256, seed)))
    assert padding(list(Order(256, seed, lengths=lengths, batch=8))) < plain / 3, f"seed {seed}"


def test_a_packed_run_learns(tiny_base: Path, chats: Path, tmp_path: Path) -> None:
    chosen = config(
        tiny_base, chats, tmp_path / "mine", data={"packing": True}, train={"batch": 1}
    )
    rows = run(chosen)
    measured = [row["val_loss"] for row in rows if row["event"] == "eval"]
    assert measured[-1] < measured[0]
