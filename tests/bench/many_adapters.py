"""Measure how many adapters one process can hold, and how many mappings they take:
``python -m tests.bench.many_adapters``.

It loads a tiny adapter again and again with real loader processes, and keeps every copy. Linux
allows a process 65,530 mappings (vm.max_map_count).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from veneer_registry.format import weights_digest
from veneer_server.adapters.loader_process import LoaderSetup
from veneer_server.adapters.loaders import HostCopy, Loaders
from veneer_server.wire.messages import AdapterSource

from tests.unit.registry.kit import SHAPES, make_adapter


def main() -> None:
    """Load adapters and print the figures; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, default=70_000)
    wanted: int = parser.parse_args().adapters
    with tempfile.TemporaryDirectory() as folder:
        path = make_adapter(Path(folder) / "a")
        source = AdapterSource(weights_digest(path), str(path), 0, "chat@000000000000")
        reader = Loaders(
            LoaderSetup(dict(SHAPES), 2, "bfloat16"), torch.bfloat16, count=1, pinned=False
        )
        copies: list[HostCopy] = []
        began = time.monotonic()
        try:
            while len(copies) < wanted:
                copies.append(reader.read(source)[0])
                if len(copies) % 10_000 == 0:
                    print(f"{len(copies)} adapters, {_mappings()} mappings", flush=True)
            last = copies[-1].run
            if not all(torch.equal(each.run, last) for each in copies):
                sys.exit("some copies differ")
        finally:
            reader.close()
        print(
            f"{len(copies)} adapters of {last.nbytes} bytes, {_mappings()} mappings of the "
            f"process, {time.monotonic() - began:.0f} s"
        )


def _mappings() -> int:
    return len(Path("/proc/self/maps").read_text("utf-8").splitlines())


if __name__ == "__main__":
    main()
