"""Measure the cost of 100,000 registered adapters: ``python -m tests.bench.registered``.

First a separate process creates the folder: tiny adapters with distinct content, put into the
real store by `Store.commit` and into the real catalog in one transaction. Only for this, fsync
is disabled (100,000 publishes would take hours and measure the disk). The manifests in the
catalog have as many modules as an adapter on every projection of SmolLM2-135M, since reading
and parsing depend on the size of rows; the files on disk have one module. Every tenth name has
an alias. ``--data-dir`` keeps the folder and reuses it.

Then this process, with all imports done, opens the folder and queries it. Memory is how much
its resident size grows by opening. Files are in the page cache. ``--grpc`` also starts the real
server, a separate process on the same cores, on the folder and lists over gRPC.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from rich.console import Console
from rich.table import Table
from veneer_client.local import LocalServer
from veneer_proto.v1 import adapters_pb2, adapters_pb2_grpc
from veneer_registry.catalog import Catalog
from veneer_registry.errors import AdapterNotFound
from veneer_registry.registry import Registry
from veneer_registry.upkeep import verify
from veneer_server.rpc.convert import encode_token

from tests.bench.registered_folder import make_folder, name_of
from tests.unit.registry.kit import BASE, make_adapter, push

LOOKUPS = 5_000
PAGES = 100
CHANGES = 10

console = Console(width=110)


# ------------------------------------------------------------------------ measurements


@dataclasses.dataclass
class Figures:
    """Rows of the table: what, p50, p99, unit, bar (a limit for the p99 or the only figure)."""

    rows: list[tuple[str, float, float | None, str, float | None]] = dataclasses.field(
        default_factory=list
    )

    def one(self, what: str, value: float, unit: str, bar: float | None = None) -> None:
        self.rows.append((what, value, None, unit, bar))

    def many(self, what: str, seconds: list[float], unit: str, bar: float | None) -> None:
        scale = {"us": 1e6, "ms": 1e3}[unit]
        p50, p99 = np.quantile(seconds, [0.5, 0.99]) * scale
        self.rows.append((what, float(p50), float(p99), unit, bar))

    def table(self) -> Table:
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("")
        for column in ("p50", "p99", "bar", ""):
            table.add_column(column, justify="right")
        for what, p50, p99, unit, bar in self.rows:
            met = bar is None or p50 < bar
            table.add_row(
                what,
                f"{p50:.1f} {unit}",
                "" if p99 is None else f"{p99:.1f} {unit}",
                "" if bar is None else f"< {bar:g} {unit}",
                "" if bar is None else "kept" if met else "MISSED",
            )
        return table


def timed(calls: Iterator[Callable[[], object]]) -> list[float]:
    """Time each call in seconds, including calls that raise `AdapterNotFound`."""
    took = []
    for call in calls:
        start = time.perf_counter()
        with contextlib.suppress(AdapterNotFound):
            call()
        took.append(time.perf_counter() - start)
    return took


def resident_mb() -> float:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 1e6


def measure(data_dir: Path, count: int, seed: int) -> Figures:
    figures, draw = Figures(), random.Random(seed)
    before = resident_mb()
    # Upgrade an older catalog first, which also copies it; this is not measured.
    Catalog(data_dir / "catalog.sqlite").close()
    start, cpu = time.perf_counter(), time.process_time()
    registry = Registry.open(data_dir, BASE)
    figures.one("Registry.open", time.perf_counter() - start, "s", 3)
    figures.one("Registry.open, CPU time", time.process_time() - cpu, "s")
    figures.one("memory", resident_mb() - before, "MB", 300)
    with registry:
        assert len(registry) == count, f"{len(registry)} names in {data_dir}, not {count}"
        _lookups(registry, figures, draw, count)
        _pages(registry, figures, draw, count)
        _changes(registry, figures, data_dir)
        figures.one("memory after all that", resident_mb() - before, "MB")
    start = time.perf_counter()
    found = verify(data_dir)
    took = time.perf_counter() - start
    assert not found.damaged, found.damaged[:3]
    figures.one("store verify", found.weights / took, "adapters/s")
    return figures


def _lookups(registry: Registry, figures: Figures, draw: random.Random, count: int) -> None:
    numbers = [draw.randrange(count) for _ in range(LOOKUPS)]
    names = [name_of(number) for number in numbers]
    exact = [f"{name}@{registry.resolve(name).revision}" for name in names]
    short = [spec[: spec.index("@") + 13] for spec in exact]
    aliased = [f"{name_of(number // 10 * 10)}/prod" for number in numbers]
    missing = {
        "a name with a typo": [_typo(name, draw) for name in names],
        "a name with one digit more": [f"{name}{draw.randrange(10)}" for name in names],
        "a random name": [_random_name(draw) for _ in names],
    }
    for what, specs in {
        "a name": names,
        "name@revision": exact,
        "name@short revision": short,
        "name/alias": aliased,
        **missing,
    }.items():
        took = timed(lambda s=spec: registry.resolve(s) for spec in specs)  # type: ignore[misc]
        figures.many(f"resolve {what}", took, "us", 50)
    took = timed(lambda n=name: registry.acquire(n).release() for name in names)  # type: ignore[misc]
    figures.many("acquire and release", took, "us", None)


def _typo(name: str, draw: random.Random) -> str:
    at = draw.randrange(1, len(name))
    return f"{name[:at]}{draw.choice('xyz_')}{name[at + 1 :]}"


def _random_name(draw: random.Random) -> str:
    return "".join(draw.choices("abcdefghijklmnopqrstuvwxyz0123456789-", k=24)).lstrip("-")


def _filters(draw: random.Random, count: int) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return functions that make random filters for a page, by name."""

    def place() -> str:
        return name_of(draw.randrange(count))

    return {
        "at a random place": lambda: {"after": place()},
        "of a team's prefix": lambda: {"prefix": place()[:9]},
        "with a common label": lambda: {"after": place(), "labels": {"stage": "dev"}},
        "with a team's label": lambda: {"labels": {"team": place()[5:8]}},
        "with a rare label": lambda: {"labels": {"rare": "yes"}},
        "with a label that none has": lambda: {"labels": {"rare": "no"}},
        "of a prefix, with a label": lambda: {
            "prefix": place()[:6],
            "labels": {"stage": "prod"},
        },
    }


def _pages(registry: Registry, figures: Figures, draw: random.Random, count: int) -> None:
    for what, options in _filters(draw, count).items():
        took = timed(lambda o=options: registry.list(**o()) for _ in range(PAGES))  # type: ignore[misc]
        figures.many(f"100 listed {what}", took, "ms", 20)


def _changes(registry: Registry, figures: Figures, data_dir: Path) -> None:
    with tempfile.TemporaryDirectory(dir=data_dir) as scratch:
        folders = [make_adapter(Path(scratch) / f"{n}", seed=n) for n in range(CHANGES)]
        took = timed(
            lambda n=n, f=folder: push(registry, f"new-{n}", f)  # type: ignore[misc]
            for n, folder in enumerate(folders)
        )
    figures.many("publish one more, with its fsyncs", took, "ms", None)
    took = timed(lambda n=n: registry.delete(f"new-{n}") for n in range(CHANGES))  # type: ignore[misc]
    figures.many("delete it", took, "ms", None)


def measure_grpc(data_dir: Path, count: int, seed: int, figures: Figures) -> None:
    """Page through the real front. Listings ignore that its base is not the adapters'."""
    draw = random.Random(seed)
    start = time.perf_counter()
    with (
        LocalServer(["--data-dir", str(data_dir)]) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = adapters_pb2_grpc.AdapterServiceStub(channel)
        _page(stub, {})
        figures.one("veneer-server, until it answers", time.perf_counter() - start, "s")
        for what, options in _filters(draw, count).items():
            took = timed(lambda o=options: _page(stub, o()) for _ in range(PAGES))  # type: ignore[misc]
            figures.many(f"gRPC: 100 listed {what}", took, "ms", 20)


def _page(stub: Any, options: dict[str, Any]) -> object:
    return stub.ListAdapters(
        adapters_pb2.ListAdaptersRequest(
            page_size=100,
            page_token=encode_token(options.get("after", "")),
            name_prefix=options.get("prefix", ""),
            labels=options.get("labels", {}),
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=100_000, help="registered names")
    parser.add_argument("--data-dir", type=Path, help="keep the folder there, and use it again")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--grpc", action="store_true", help="list through the real server too")
    args = parser.parse_args()
    print(f"{args.count} adapters, seed {args.seed}")
    with tempfile.TemporaryDirectory() as scratch:
        data_dir = args.data_dir or Path(scratch)
        if not (data_dir / "catalog.sqlite").exists():
            start = time.perf_counter()
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                pool.submit(make_folder, data_dir, args.count).result()
            print(f"made in {time.perf_counter() - start:.0f} s")
        figures = measure(data_dir, args.count, args.seed)
        if args.grpc:
            measure_grpc(data_dir, args.count, args.seed, figures)
    console.print(figures.table())


if __name__ == "__main__":
    main()
