"""What is checked, and with which bugs planted."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import torch
from triton.runtime.interpreter import InterpretedFunction


@dataclass(frozen=True, slots=True)
class Bug:
    """A wrong kernel: ``old``, which is exactly once in the module's source, is ``new``."""

    name: str
    module: ModuleType
    old: str
    new: str

    def fits(self) -> str:
        """The module's source with the bug.

        Raises:
            LookupError: ``old`` is not in it exactly once.
        """
        path = Path(str(self.module.__file__))
        source = path.read_text("utf-8")
        if source.count(self.old) != 1:
            raise LookupError(f"{self.name}: {source.count(self.old)} times in {path.name}")
        return source.replace(self.old, self.new)


@dataclass(frozen=True, slots=True)
class Subject:
    """Kernels that are checked together.

    Attributes:
        check: draws a shape, runs the kernels and compares; returns the shape in words and
            raises AssertionError for a wrong result.
    """

    name: str
    check: Callable[[Random], str]
    bugs: tuple[Bug, ...]


@contextmanager
def planted(bug: Bug) -> Iterator[None]:
    """The module's kernels are the wrong ones until the context exits.

    Raises:
        LookupError: the text is not in the module exactly once.
    """
    source = bug.fits()
    with tempfile.TemporaryDirectory() as scratch:
        # Kernels are read from their file again when they are first called.
        wrong = Path(scratch) / "planted.py"
        wrong.write_text(source, "utf-8")
        spec = importlib.util.spec_from_file_location("planted", wrong)
        assert spec is not None
        assert spec.loader is not None
        other = importlib.util.module_from_spec(spec)
        sys.modules["planted"] = other
        spec.loader.exec_module(other)
        right: dict[str, Any] = {}
        for name, value in vars(other).items():
            own = getattr(value, "__module__", "") == "planted"
            if isinstance(value, InterpretedFunction) or own:
                right[name] = getattr(bug.module, name)
                setattr(bug.module, name, value)
        try:
            yield
        finally:
            for name, value in right.items():
                setattr(bug.module, name, value)
            del sys.modules["planted"]


def close(
    name: str, got: torch.Tensor, expected: torch.Tensor, tolerance: torch.Tensor | float
) -> None:
    """Raises AssertionError: an element differs by more than its tolerance, or is NaN."""
    difference = (got.double() - expected.double()).abs()
    # A NaN is no smaller than anything.
    wrong = ~(difference <= tolerance)
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} wrong, at {place} "
            f"{got[place].item()} instead of {expected[place].item()}"
        )
