"""Runs the self-test and returns its findings as plain data."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from veneer_server.backends.cuda.self_test.cases import CASES, CaseInputs


@dataclass(frozen=True, slots=True)
class CudaReport:
    """The findings of a self-test.

    Attributes:
        wrong: for each case that failed, a description of the failure.
        checked: names of all cases that were run.
        seconds: duration of the whole test, compilation included.
    """

    wrong: dict[str, str]
    checked: tuple[str, ...]
    seconds: float


def run(device: torch.device, seeds: int = 1) -> CudaReport:
    """Run every case ``seeds`` times, with different numbers each time."""
    began, wrong = time.perf_counter(), {}
    for name, case in CASES.items():
        try:
            found = sum(
                compared.wrong
                for seed in range(seeds)
                for compared in case(CaseInputs(device, seed))
            )
            if found:
                wrong[name] = f"{found} numbers are wrong"
        except Exception as error:  # a compiler's errors have no common class
            wrong[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return CudaReport(wrong, tuple(CASES), time.perf_counter() - began)
