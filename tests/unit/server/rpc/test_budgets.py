"""Budgets changed by two operators at the same time."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from veneer_registry.errors import AdapterBudgetExceeded
from veneer_server.serving.changes import AdapterBudgets
from veneer_server.sizing.memory_plan import KvCachePlan, MemoryPlan, MemoryTooSmall

from tests.unit.server.rpc.cancelling import BUDGET, server

MACHINE = 3 * BUDGET
"""What both budgets together may take."""


async def test_changes_that_do_not_fit_together_are_not_both_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(host: int, device: int) -> MemoryPlan:
        if host + device > MACHINE:
            raise MemoryTooSmall(f"{host + device} bytes do not fit")
        return MemoryPlan((), KvCachePlan(0, 0, 1, 1), kv_token_bytes=0)

    async with server(tmp_path, monkeypatch) as made:
        budgets = AdapterBudgets(
            BUDGET,
            BUDGET,
            plan(BUDGET, BUDGET),
            engine=made.engine,
            metrics=made.metrics,
            plan=plan,
        )
        host, device = await asyncio.gather(
            budgets.update(2 * BUDGET, None),
            budgets.update(None, 2 * BUDGET),
            return_exceptions=True,
        )
        assert not isinstance(host, BaseException)
        assert isinstance(device, AdapterBudgetExceeded)
        assert (budgets.host, budgets.device) == (2 * BUDGET, BUDGET)
