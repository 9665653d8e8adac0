"""A disk that cannot read an adapter's file for a while: no damage, and no quarantine."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from veneer_proto.v1 import adapters_pb2

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


@pytest.mark.push
async def test_a_file_that_cannot_be_read_for_a_while(
    cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_tiny_llama(tmp_path / "base", seed=1)
    broken, other = (
        make_lora(tmp_path / name, seed=seed, modules=tuple(SHAPES))
        for seed, name in enumerate(("broken", "other"))
    )
    site, flag = tmp_path / "site", tmp_path / "flag"
    site.mkdir()
    fault = FAULT.format(file="adapter_model.safetensors", flag=str(flag))
    (site / "sitecustomize.py").write_text(fault, "utf-8")
    path = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    monkeypatch.setenv("PYTHONPATH", path)
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
