"""kill -9 at any moment of a publish: what was acknowledged exists, the rest does not."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
from veneer_registry.registry import Registry
from veneer_registry.stored_adapter import verify_weights

from tests.unit.registry.kit import BASE, make_adapter, push

CHILD = '''
import os, signal, sys
from pathlib import Path

data, adapters, point = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
from tests.unit.registry.kit import BASE, push
from veneer_registry.registry import Registry

count = 0
def step(event, args):
    """Dies at the n-th system call that changes the disk."""
    global count
    if event in EVENTS:
        count += 1
        if count == point:
            os.kill(os.getpid(), signal.SIGKILL)

EVENTS = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "sqlite3.connect", "open"}
registry = Registry.open(data, BASE)
real_fsync, real_execute = os.fsync, registry._core.catalog._writer.execute
def fsync(fd):
    step("os.rename", ())
    real_fsync(fd)
    step("os.rename", ())
os.fsync = fsync
sys.addaudithook(step)

class Writer:
    """The connection, with a chance to die before and after each statement."""
    def __getattr__(self, name):
        return getattr(real_writer, name)
    def execute(self, *args):
        step("os.rename", ())
        result = real_writer.execute(*args)
        step("os.rename", ())
        return result
real_writer, registry._core.catalog._writer = registry._core.catalog._writer, Writer()

for name in ("1", "2", "3"):
    ref = push(registry, "chat", adapters / name, allow_replace=True).record.ref
    print(name, ref.revision, flush=True)
registry.close()
print("done", count, flush=True)
'''


def run(data: Path, adapters: Path, point: int) -> list[list[str]]:
    result = subprocess.run(
        [sys.executable, "-c", CHILD, str(data), str(adapters), str(point)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[3],  # so that the child can import this package
    )
    assert result.returncode in (0, -9), result.stderr
    return [line.split() for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for number in (1, 2, 3):
        make_adapter(folder / str(number), seed=number)
    return folder


@pytest.mark.push
def test_kill_at_every_kind_of_moment(tmp_path: Path, adapters: Path) -> None:
    whole = run(tmp_path / "whole", adapters, 0)
    assert whole[-1][0] == "done"
    points = int(whole[-1][1])
    assert points > 100
    revisions = dict(whole[:3])
    seed = random.randrange(1 << 30)
    print("seed", seed)
    chosen = sorted(random.Random(seed).sample(range(1, points), 12))
    for point in chosen:
        data = tmp_path / str(point)
        acknowledged = [line for line in run(data, adapters, point) if line[0] != "done"]
        with Registry.open(data, BASE, retain_superseded=5) as registry:
            kept = (
                [record.ref for record in registry.revisions("chat")] if len(registry) else []
            )
            found = [ref.revision for ref in kept]
            # All acknowledged ones that retention keeps, in order; at most one more,
            # which was committed but not yet acknowledged.
            expected = [revision for _, revision in reversed(acknowledged)][:3]
            assert found[-len(expected) :] == expected if expected else len(found) <= 1, point
            assert len(found) <= len(expected) + 1, point
            for ref in kept:
                verify_weights(registry.weights_folder(ref), ref.weights_digest)
            store = data / "store"
            assert list((store / "staging").iterdir()) == []
            assert {p.name for p in (store / "weights").iterdir()} == {
                ref.weights_digest for ref in kept
            }
            assert {p.name for p in (store / "revisions").iterdir()} == set(found)
            again = push(registry, "chat", adapters / "3", allow_replace=True)
            assert again.record.ref.revision == revisions["3"]
