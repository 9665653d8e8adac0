"""Run a real Prometheus and promtool, installed by ``make tools``."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest

from tests.ports import free_port

REPOSITORY = Path(__file__).resolve().parent.parent
RULES = REPOSITORY / "deploy" / "prometheus" / "rules.yml"


def tool(name: str) -> str:
    """Return the path of a program from `make tools`. If it is missing, skip the test; in CI,
    fail it."""
    here = REPOSITORY / ".cache" / "tools" / "usr" / "bin" / name
    found = str(here) if here.exists() else shutil.which(name)
    if found is None:
        if os.environ.get("CI"):
            pytest.fail(f"{name} is missing: run `make tools`")
        pytest.skip(f"{name} is missing: run `make tools`")
    return found


class Prometheus:
    """A running Prometheus that scrapes a server every 200 ms."""

    def __init__(self, address: str) -> None:
        self._address = address

    async def query(self, promql: str) -> list[dict[str, Any]]:
        """Query an instant vector; each has ``metric`` (labels) and ``value`` (time, text)."""
        query = urlencode({"query": promql})
        answer = await self._get(f"/api/v1/query?{query}")
        assert answer["status"] == "success", answer
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found

    async def values(self, promql: str) -> dict[str, float]:
        """Return the value of each series, by its labels as JSON, except job, instance,
        name."""
        ours = ("__name__", "instance", "job")
        return {
            json.dumps({k: v for k, v in sorted(s["metric"].items()) if k not in ours}): float(
                s["value"][1]
            )
            for s in await self.query(promql)
        }

    async def scraped_after(self, moment: float) -> None:
        """Wait for a scrape that began after ``moment``, Unix seconds."""
        while True:
            if await self.query(f"timestamp(up) > {moment!r}"):
                return
            await asyncio.sleep(0.05)  # Prometheus reports scrapes only when queried

    async def _get(self, path: str) -> Any:
        def get() -> Any:
            with urlopen(f"http://{self._address}{path}", timeout=30) as answer:
                return json.load(answer)

        return await asyncio.to_thread(get)


@asynccontextmanager
async def running_prometheus(folder: Path, target: str) -> AsyncIterator[Prometheus]:
    """Run a Prometheus that scrapes ``target``, with our rules loaded."""
    program = tool("prometheus")
    address = f"127.0.0.1:{free_port()}"
    (folder / "prometheus.yml").write_text(
        "global: {scrape_interval: 200ms, scrape_timeout: 200ms, evaluation_interval: 1s}\n"
        f"rule_files: [{RULES}]\n"
        "scrape_configs:\n"
        "  - job_name: veneer\n"
        f"    static_configs: [{{targets: ['{target}']}}]\n"
    )
    with (folder / "prometheus.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            program,
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'tsdb'}",
            f"--web.listen-address={address}",
            stdout=log,
            stderr=log,
        )
    prometheus = Prometheus(address)
    try:
        async with asyncio.timeout(60):
            while True:
                assert process.returncode is None, (folder / "prometheus.log").read_text()
                try:
                    if await prometheus.query("up == 1"):
                        break
                except OSError:
                    pass
                await asyncio.sleep(0.05)
        yield prometheus
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
