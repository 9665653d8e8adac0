"""The front process under test; see `front_harness`."""

from __future__ import annotations

from tests.unit.server.rpc.conftest import front, front_cache, module_front

__all__ = ["front", "front_cache", "module_front"]
