"""Plant bugs in our Python code, each as an edit of its source.

This replaces the code object of the edited function, not the function itself, so that modules
that imported it run the planted bug too. An edit that no longer fits the source is an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FunctionType, ModuleType
from typing import Any


def edited(module: ModuleType, old: str, new: str) -> tuple[FunctionType, CodeType]:
    """Return the function of ``module`` whose source contains ``old``, and its code with
    ``new`` instead.

    Raises:
        LookupError: ``old`` is not in the source exactly once, or is not in a function.
    """
    source = inspect.getsource(module)
    if source.count(old) != 1:
        raise LookupError(f"{source.count(old)} times in {module.__name__}: {old!r}")
    line = source[: source.index(old)].count("\n") + 1
    changed = compile(source.replace(old, new), inspect.getfile(module), "exec")
    codes = {(c.co_qualname, c.co_firstlineno): c for c in _codes(changed)}
    for function in _functions(module):
        code = function.__code__
        last = max(number or 0 for _, _, number in code.co_lines())
        if code.co_firstlineno <= line <= last:
            return function, codes[code.co_qualname, code.co_firstlineno]
    raise LookupError(f"in no function of {module.__name__}: {old!r}")


@contextmanager
def planted(module: ModuleType, old: str, new: str) -> Iterator[None]:
    """Run ``module`` with ``new`` in place of ``old`` until the context exits."""
    function, code = edited(module, old, new)
    right, function.__code__ = function.__code__, code
    try:
        yield
    finally:
        function.__code__ = right


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from _codes(each)


def _functions(owner: Any) -> Iterator[FunctionType]:
    """Yield the functions that are defined in a module or class."""
    module = owner.__name__ if isinstance(owner, ModuleType) else owner.__module__
    for each in vars(owner).values():
        if isinstance(each, property):
            each = each.fget
        found = inspect.unwrap(getattr(each, "__func__", each)) if callable(each) else each
        if isinstance(found, FunctionType) and found.__module__ == module:
            yield found
        elif inspect.isclass(found) and found.__module__ == module and found is not owner:
            yield from _functions(found)
