"""Lead followers that have no card, and print why that fails: ``python -m ... BASE``. In a
process of its own, since it imports triton."""

from __future__ import annotations

import sys
from typing import NoReturn

from veneer_server.backends.cuda.chosen import CudaUnavailable
from veneer_server.backends.cuda.follower import lead
from veneer_server.wire.messages import EngineConfig


def _never(*_: object) -> NoReturn:
    raise AssertionError("a follower without a card is ready")


if __name__ == "__main__":
    base = sys.argv[1]
    config = EngineConfig(base, base, "tiny", "", backend="cuda", tensor_parallel=2)
    try:
        lead(config, 8, _never, _never)
    except CudaUnavailable as error:
        print(error)
