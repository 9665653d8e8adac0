"""A fake server and both clients for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner
from veneer_client.cli.main import cli

from tests.adapter_files import write_adapter
from tests.unit.client.drivers import Driver, driver
from tests.unit.client.fake_server import FakeServer
from tests.unit.client.wire import Wire


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        yield fake


@pytest.fixture(params=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def client(kind: str, server: FakeServer) -> Iterator[Driver]:
    with driver(kind, server.address) as made:
        yield made


@pytest.fixture
def wire(server: FakeServer) -> Iterator[Wire]:
    made = Wire(server.address)
    yield made
    made.close()


@pytest.fixture
def run(server: FakeServer) -> Callable[..., Any]:
    """Run a command line against the fake server, set by VENEER_SERVER."""

    def invoke(*args: str, env: dict[str, str] | None = None, **kwargs: object) -> Any:
        place = {"VENEER_SERVER": server.address, "COLUMNS": "200"}
        named = {"prog_name": "veneer"}
        return CliRunner().invoke(cli, args, env=place | (env or {}), **named, **kwargs)

    return invoke


@pytest.fixture
def adapter_folder(tmp_path: Path) -> Path:
    """A valid adapter of 2.5 MiB, with a file that does not belong in a bundle."""
    folder = tmp_path / "adapter"
    rng = np.random.default_rng(1)
    key = "base_model.model.model.layers.0.self_attn.q_proj"
    write_adapter(
        folder,
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": 8,
            "lora_alpha": 16,
            "target_modules": ["q_proj"],
        },
        {
            f"{key}.lora_A.weight": rng.normal(0, 0.02, (8, 40_000)).astype(np.float32),
            f"{key}.lora_B.weight": rng.normal(0, 0.02, (42_000, 8)).astype(np.float32),
        },
    )
    (folder / "training_args.bin").write_bytes(b"a pickle")
    return folder
