"""Row 7: random histories of registry and adapter memory, checked by plain Python models."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, Phase, core, settings
from hypothesis.reporting import with_reporter
from hypothesis.stateful import run_state_machine_as_test
from veneer_registry import editing, index
from veneer_registry.adapter import AdapterRef
from veneer_registry.entry import Entry
from veneer_server.engine.residency.ledger import Ledger
from veneer_server.engine.residency.residency import Residency

from tests.planted import planted
from tests.torture.registry_rules import RegistryRules
from tests.torture.row import Control, Outcome, Scale
from tests.torture.store_and_memory import StoreAndMemory

ROW = 7
TITLE = "registry and adapter memory against models"
BAR = "2,000 histories of 50 steps of each: 0 divergences"
STEPS = 50
MACHINES = (RegistryRules, StoreAndMemory)

Machine = type[RegistryRules]


def histories(machine: Machine, count: int, seed: int, phases: Sequence[Phase]) -> str:
    """Play ``count`` histories; return "" or the first divergence, shrunk if ``phases``
    allows."""
    wanted = settings(
        max_examples=count,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        print_blob=True,
        report_multiple_bugs=False,
        phases=phases,
        suppress_health_check=list(HealthCheck),
    )
    printed: list[str] = []
    seeded = patch.object(core, "global_force_seed", seed)
    with seeded, quiet(), with_reporter(lambda text: printed.append(str(text))):
        try:
            run_state_machine_as_test(machine, settings=wanted)  # type: ignore[no-untyped-call]
        except (Exception, pytest.fail.Exception) as error:
            # Any exception is a divergence: the model did not expect it.
            return f"{machine.__name__}, seed {seed}: {_told(error, printed)}"
    return ""


def _told(error: BaseException, printed: list[str]) -> str:
    lines = "\n".join([*printed, *getattr(error, "__notes__", ())]).splitlines()
    steps = [line.strip() for line in lines if line.startswith("state.") and "=" in line]
    what = str(error).split("\n")[0] or _where(error)
    return f"{type(error).__name__}: {what}, after: {'; '.join(steps)}"


def _where(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return ""
    return f"{trace.tb_frame.f_code.co_name}, line {trace.tb_lineno}"


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings of recovery and repair about their findings, which are normal here."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def run(scale: Scale) -> Outcome:
    """Play 2,000 histories of each machine, or 50."""
    count = scale.pick(50, 2000)
    RegistryRules.seen.clear()
    # Shrinking a divergence to the shortest history may take minutes.
    phases = scale.pick((Phase.generate,), (Phase.generate, Phase.shrink))
    found = [histories(machine, count, scale.seed, phases) for machine in MACHINES]
    failures = tuple(failure for failure in found if failure)
    seen = Counter(RegistryRules.seen)
    figure = (
        f"2 x {count} histories of up to {STEPS} steps, {len(failures)} divergences: "
        f"{seen['published']} publishes, {seen['restarts']} restarts, {seen['loaded']} loads"
    )
    notes = (", ".join(f"{what} {number}" for what, number in seen.most_common()),)
    return Outcome(figure, BAR, failures, notes)


# ------------------------------------------------------------------- planted bugs


def _beyond(self: Entry, retain: int) -> tuple[AdapterRef, ...]:
    superseded = [ref for ref in self.revisions if ref != self.current]
    return tuple(superseded[retain if self.retain is None else self.retain :])


def _holds_are_not_counted() -> AbstractContextManager[Any]:
    return patch.multiple(
        Residency,
        try_hold=Residency.ready,
        unhold=lambda self, digest: None,
        integrity=lambda self, held, leased: iter(()),
    )


Plant = Callable[[], AbstractContextManager[Any]]

PLANTED: dict[str, tuple[Machine, Plant]] = {
    "retention forgets what aliases mean": (
        RegistryRules,
        lambda: patch.object(Entry, "beyond", _beyond),
    ),
    "a held adapter is evicted": (StoreAndMemory, _holds_are_not_counted),
    "a sweep takes what requests lease": (
        StoreAndMemory,
        lambda: planted(index, " and key not in self._leases", ""),
    ),
    "an alias rolls back to what was deleted": (
        RegistryRules,
        lambda: planted(editing, "replace(alias, previous=())", "replace(alias)"),
    ),
    "pins do not count when room is made": (
        StoreAndMemory,
        lambda: patch.object(Ledger, "pin_keeps", lambda self, entry, tier: False),
    ),
    "lower budgets drop nothing": (
        StoreAndMemory,
        lambda: patch(
            "veneer_server.engine.residency.residency.shrink", lambda ledger, waiting: []
        ),
    ),
}


def controls(scale: Scale) -> Iterator[Control]:
    """Use the same machines on broken products; the quick form has the first three."""
    for name in list(PLANTED)[: scale.pick(3, None)]:
        machine, plant = PLANTED[name]
        with plant():
            caught = histories(machine, scale.pick(200, 3000), scale.seed, (Phase.generate,))
        yield Control(name, caught)
