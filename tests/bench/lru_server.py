"""Run ``veneer-server`` with plain LRU eviction, for comparison:
``python -m tests.bench.lru_server [FLAGS OF veneer-server]``."""

from __future__ import annotations

import sys
from unittest.mock import patch

from veneer_server.engine.residency.eviction import EvictionOrder

from tests.bench.residency import LeastRecentlyUsed
from tests.other_engine import engine_of

_AS_ENGINE = "--as-engine"


def _engine() -> None:
    from veneer_server.engine.process import main

    with patch.object(EvictionOrder, "key", LeastRecentlyUsed.key):
        main()


def _front() -> None:
    from veneer_server.__main__ import main

    with engine_of("tests.bench.lru_server", _AS_ENGINE):
        main()


if __name__ == "__main__":
    if sys.argv[1:2] == [_AS_ENGINE]:
        del sys.argv[1]
        _engine()
    else:
        _front()
