"""The seed of a run's random inputs.

`VENEER_TEST_SEED=N` repeats a run's inputs: every test, attack and torture row draws from this
seed (`tests/conftest.py` seeds each test from it and the test's own name, so that it draws the
same alone). ``.ci/run`` takes it from the hash of the tree, so that a change is judged by the
same inputs twice; everything else draws a new one.
"""

from __future__ import annotations

import os
import random
from typing import Final

VARIABLE: Final = "VENEER_TEST_SEED"


def seed() -> int:
    """Return the seed that the environment gives, or a random one."""
    given = os.environ.get(VARIABLE)
    return int(given) if given else random.SystemRandom().randrange(1 << 30)
