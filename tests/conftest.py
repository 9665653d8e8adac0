"""Fixtures shared by the whole suite."""

from __future__ import annotations

import gc
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from veneer_server.engine import process
from veneer_server.engine.execution.backend_choice import Chosen
from veneer_server.models.source import import_bundled
from veneer_server.wire.messages import EngineConfig

from tests import places, seeds, suite_time, tiers
from tests.backends_ran import RAN, check, missing, with_asked

# As in `veneer-server`: gRPC's fork handlers sometimes fail in a child with a `preexec_fn`, if
# this process runs a server.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

# Imports and collected tests are a million objects, which each collection would visit.
gc.disable()

BEGAN = time.monotonic()

SEED = seeds.seed()
os.environ[seeds.VARIABLE] = str(SEED)  # workers and programs that tests start draw from it too

# A busy machine is no failure: no deadlines.
hypothesis.settings.register_profile(
    "suite",
    deadline=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("suite")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = str(SEED)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test draws the same whichever tests ran before it."""
    random.seed(f"{SEED} {item.nodeid}")
    torch.manual_seed(random.getrandbits(63))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _asked_backend() -> Iterator[None]:
    """Engines inside a test use the suite's settings (see `tests.backends_ran`), and are native
    if possible."""
    chosen = process.choose

    def choose(config: EngineConfig, *rest: Any) -> Chosen:
        config = with_asked(config)
        device, dtype, num_blocks = rest[:3]
        found = chosen(config, device, dtype, num_blocks)  # the placement is of those threads
        elsewhere = device.type != "cpu" or dtype != torch.bfloat16
        torch_wanted = config.backend == "torch" or elsewhere
        check(found.name, torch_wanted=torch_wanted, why=found.why_not_native)
        return found

    process.choose = choose
    yield
    process.choose = chosen


# ------------------------------------------------------------- what the whole run ran with

NOT_NATIVE = 6
"""Exit status, which pytest does not use: no engine was native where one can be. Running tests
again (`tests.rerun`) would not change that."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--tier",
        choices=tiers.NAMES,
        help="run one tier of the suite (see tests/tiers.py); without it, every test runs",
    )
    parser.addoption(
        "--whole",
        action="store_true",
        help="the run is of a whole tier: fail if no engine was native where one can be",
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not even import a file that has no test of the tier."""
    tier = config.getoption("tier")
    return True if tier and not tiers.may_hold(collection_path, tier) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if tier := config.getoption("tier"):
        others = [item for item in items if tiers.of(item) != tier]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if tiers.of(item) == tier]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Count the engines of an xdist worker that has ended."""
    RAN.update(getattr(node, "workeroutput", {}).get("backends", {}))


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["backends"] = dict(RAN)
    elif session.config.getoption("whole") and missing(RAN):
        session.exitstatus = NOT_NATIVE


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int) -> None:
    terminalreporter.write_line(f"{seeds.VARIABLE}={SEED} repeats these inputs")
    ran = ", ".join(f"{name}: {count}" for name, count in sorted(RAN.items()))
    terminalreporter.write_line(f"engines by backend: {ran or 'none'}")
    if not terminalreporter.config.getoption("whole"):
        return
    outcomes = ("passed", "failed", "error", "skipped", "xfailed")
    tests = sum(len(terminalreporter.stats.get(outcome, ())) for outcome in outcomes)
    if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        tier = terminalreporter.config.getoption("tier") or suite_time.ALL
        suite_time.record(tier, tests, time.monotonic() - BEGAN)
    if wrong := missing(RAN):
        terminalreporter.write_line(f"FAILED: {wrong}", red=True)


@pytest.fixture(scope="session")
def cache_dir() -> Path:
    """Folder of imported bases; `make test` fills it before the suite starts."""
    return places.cache_dir()


@pytest.fixture(scope="session")
def base_folder(cache_dir: Path) -> Path:
    """The real base: SmolLM2-135M-Instruct as a Hugging Face folder."""
    return import_bundled(cache_dir).path
