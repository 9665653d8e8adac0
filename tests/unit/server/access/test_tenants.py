"""What one tenant's calls tell another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
from veneer_server.access.edit_keys import add_key

from tests.unit.server.rpc.front_harness import prompt, running


async def test_prefixes_are_shared_within_a_tenant_only(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    """How many prompt tokens were cached would say that another tenant has asked the same. That
    a scope keeps prefixes apart is shown by the scheduler's histories."""
    file = tmp_path / "keys.toml"
    keys = [
        add_key(file, name=name, tenant=tenant, roles=["inference"], expires=None).key
        for name, tenant in (("one", "a"), ("two", "a"), ("three", "b"))
    ]
    async with running(
        base_folder,
        front_cache,
        tmp_path / "front",
        keys_file=str(file),
        openai_listen="127.0.0.1:0",
    ) as front:
        for key in keys:
            metadata: Any = (("authorization", f"Bearer {key}"),)
            await front.inference.Generate(prompt(), metadata=metadata)
            async with httpx.AsyncClient(trust_env=False) as http:
                url = f"http://{front.addresses['openai']}/v1/completions"
                body = {"model": "smollm2-135m", "prompt": "Hello", "max_tokens": 1}
                headers = {"authorization": f"Bearer {key}"}
                assert (await http.post(url, json=body, headers=headers)).status_code == 200
        scopes = [request.cache_scope for request in front.engine.submitted]
    assert scopes == ["a", "a", "a", "a", "b", "b"]
