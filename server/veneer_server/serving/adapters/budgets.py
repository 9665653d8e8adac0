"""The memory budgets of adapters: their current values, and how to change them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from veneer_registry.errors import AdapterBudgetExceeded

from veneer_server.engine_client.client import EngineClient
from veneer_server.logs import get_logger
from veneer_server.sizing.memory_plan import MemoryPlan, MemoryTooSmall
from veneer_server.telemetry.metrics import Metrics
from veneer_server.wire.messages import BudgetsState

__all__ = ["AdapterBudgets"]

_log = get_logger(__name__)


class AdapterBudgets:
    """The current budgets. Belongs to one event loop.

    Attributes:
        host, device: budgets in bytes.
        memory: the memory plan that includes them.
    """

    def __init__(
        self,
        host: int,
        device: int,
        memory: MemoryPlan,
        *,
        engine: EngineClient,
        metrics: Metrics,
        plan: Callable[[int, int], MemoryPlan],
    ) -> None:
        """Args: plan: makes the plan for other budgets; raises `MemoryTooSmall`."""
        self.host = host
        self.device = device
        self.memory = memory
        self._engine = engine
        self._metrics = metrics
        self._plan = plan
        self._turn = asyncio.Lock()
        metrics.set_budgets(host=host, device=device)

    async def update(self, host: int | None, device: int | None) -> BudgetsState:
        """Change the budgets; None keeps one as it is. Adapters over a lowered budget are
        evicted as soon as no running request uses them.

        Raises:
            AdapterBudgetExceeded: the budgets do not fit the machine together with the rest
                of the plan, or pinned adapters alone take more. Nothing has changed.
            FailedPrecondition: this server's role has no engine.
        """
        # One at a time: two changes that each fit the machine may not fit together.
        async with self._turn:
            wanted = (
                self.host if host is None else host,
                self.device if device is None else device,
            )
            try:
                memory = self._plan(*wanted)
            except MemoryTooSmall as error:
                raise AdapterBudgetExceeded(str(error)) from error
            state = await self._engine.update_budgets(host_bytes=host, device_bytes=device)
            self.host, self.device = state.host_budget, state.device_budget
            self.memory = memory
            self._metrics.set_budgets(host=self.host, device=self.device)
        if (host, device) != (None, None):
            _log.info("budgets", host_bytes=self.host, device_bytes=self.device)
        return state
