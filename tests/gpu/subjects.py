"""All that is checked, in the order of the issue."""

from __future__ import annotations

from typing import Final

from tests.gpu import attention, fp8, harness, lora, nf4, pointwise, sampling
from tests.gpu.subject import Subject

SUBJECTS: Final[tuple[Subject, ...]] = (
    *harness.SUBJECTS,
    *lora.SUBJECTS,
    *nf4.SUBJECTS,
    *fp8.SUBJECTS,
    *attention.SUBJECTS,
    *pointwise.SUBJECTS,
    *sampling.SUBJECTS,
)
