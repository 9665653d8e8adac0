"""A disk that cannot read an adapter's file for a while: no damage, and no quarantine."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from veneer_proto.v1 import adapters_pb2
from veneer_registry.lora_config import CONFIG_FILE
from veneer_registry.weights import WEIGHTS_FILE

from tests.server_harness import running_server
from tests.tiny_llama import SHAPES, make_lora, make_tiny_llama

pytestmark = pytest.mark.asyncio

# FAKE fault in every process of the server: modes refuse nothing to root.
FAULT = """
import os
real = os.open
def broken(path, *rest, **more):
    if os.fsdecode(path).endswith({file!r}) and os.path.exists({flag!r}):
        with open({flag!r}) as flag:
            number = int(flag.read())
        raise OSError(number, os.strerror(number), path)
    return real(path, *rest, **more)
os.open = broken
"""

# FAKE fault in the loader, once after the flag is written. "read": the system refuses to read
# the file, which opened. "map": a page of it cannot be read, for which the system sends SIGBUS.
FAULT_ONCE = """
import mmap, os, sys

def fails(path, kind):
    try:
        with open({flag!r}) as flag:
            wanted = flag.read().split()
        if [kind, os.path.basename(path)] == wanted:
            os.unlink({flag!r})
            return True
    except FileNotFoundError:
        pass
    return False

def opened(path, *rest, **more):
    # Reading the address 0 of a process is an I/O error.
    return real(("/proc/self/mem" if fails(os.fsdecode(path), "read") else path), *rest, **more)

def mapped(fileno, length, **more):
    if not fails(os.readlink(f"/proc/self/fd/{{fileno}}"), "map"):
        return real_mmap(fileno, length, **more)
    gone = os.memfd_create("gone")
    os.ftruncate(gone, os.fstat(fileno).st_size)
    pages = real_mmap(gone, length, **more)
    os.ftruncate(gone, 0)
    return pages

if "veneer_server.adapters.loader_process" in sys.orig_argv:
    real, real_mmap, os.open, mmap.mmap = os.open, mmap.mmap, opened, mapped
"""


def plant(fault: str, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every Python process that starts from now on run this first."""
    site.mkdir()
    (site / "sitecustomize.py").write_text(fault, "utf-8")
    path = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    monkeypatch.setenv("PYTHONPATH", path)


@pytest.mark.push
async def test_a_file_that_cannot_be_read_for_a_while(
    cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_tiny_llama(tmp_path / "base", seed=1)
    broken, other = (
        make_lora(tmp_path / name, seed=seed, modules=tuple(SHAPES))
        for seed, name in enumerate(("broken", "other"))
    )
    flag = tmp_path / "flag"
    fault = FAULT.format(file="adapter_model.safetensors", flag=str(flag))
    plant(fault, tmp_path / "site", monkeypatch)
    async with running_server(tmp_path / "data", cache_dir, "--base", str(base)) as server:
        await server.push(broken, "broken")
        await server.push(other, "other")
        await server.generate(prompt="Hi", adapter="other")
        for number in (errno.EIO, errno.EACCES):
            flag.write_text(str(number), "utf-8")
            refused = await server.refused(server.generate(prompt="Hi", adapter="broken"))
            assert (refused.code, refused.reason) == ("UNAVAILABLE", "DISK_FAILED"), refused
            assert os.strerror(number) in refused.metadata["why"]
            assert str(tmp_path) not in str(refused), "paths are the operator's"
            assert refused.retry_after_s
            assert (await server.generate(prompt="Hi", adapter="other")).token_ids
            flag.unlink()
            assert (await server.generate(prompt="Hi", adapter="broken")).token_ids
            await server.adapters.EvictAdapter(adapters_pb2.EvictAdapterRequest(name="broken"))


async def test_what_a_request_gets_when_reading_fails_once(
    cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_tiny_llama(tmp_path / "base", seed=1)
    adapter = make_lora(tmp_path / "adapter", seed=0, modules=tuple(SHAPES))
    flag = tmp_path / "flag"
    plant(FAULT_ONCE.format(flag=str(flag)), tmp_path / "site", monkeypatch)
    async with running_server(tmp_path / "data", cache_dir, "--base", str(base)) as server:
        await server.push(adapter, "a")
        evict = adapters_pb2.EvictAdapterRequest(name="a")
        right = (await server.generate(prompt="Hi", adapter="a")).token_ids
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            await server.adapters.EvictAdapter(evict)
            flag.write_text(f"read {file}", "utf-8")
            refused = await server.refused(server.generate(prompt="Hi", adapter="a"))
            assert not flag.exists(), "the fault has happened"
            assert (refused.code, refused.reason) == ("UNAVAILABLE", "DISK_FAILED"), refused
            assert os.strerror(errno.EIO) in refused.metadata["why"]
            assert refused.retry_after_s
            again = await server.generate(prompt="Hi", adapter="a")
            assert again.token_ids == right
        await server.adapters.EvictAdapter(evict)
        flag.write_text(f"map {WEIGHTS_FILE}", "utf-8")
        answer = await server.generate(prompt="Hi", adapter="a")
        assert not flag.exists(), "the fault has happened"
        assert answer.token_ids == right, "another loader has read it"
        (restarts,) = (await server.metric("veneer_adapter_loader_restarts_total")).values()
        assert restarts == 1
