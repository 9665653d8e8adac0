"""The ``code`` recipe: docstring to Python function, code and nothing else.

The samples are the functions of the running Python's standard library (PSF
licence): the request is made from the docstring's first paragraph, the answer
is the function as `ast.unparse` prints it, with the imports it needs, without
comments, prose or a code fence. Functions that use names of their module are
left out, since an answer must stand alone. The set depends on the Python version,
so training records its hash.
"""

from __future__ import annotations

import ast
import builtins
import random
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

Sample: TypeAlias = dict[str, Any]

_SKIPPED: Final = frozenset(
    {"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "ensurepip"}
    | {"site-packages", "dist-packages", "pydoc_data", "encodings", "__pycache__"}
)
_MIN_CHARS: Final = 80
_MAX_CHARS: Final = 900
_MAX_SUMMARY: Final = 200
_HELD_OUT: Final = 5
"""One function in this many goes to validation: enough to measure a pass rate."""
_NOT_A_REQUEST: Final = re.compile(r"deprecat|internal|obsolete|-->|->|\b(?:msvc|xxx)\b", re.I)
_BUILTINS: Final = frozenset(dir(builtins))
# Docstrings that start with another word are quoted verbatim.
_VERBS: Final = frozenset(
    re.findall(
        "[a-z]+",
        """
        add adjust apply build calculate call change check clear collect combine compare
        compile complete compute concatenate convert copy count create decode delete
        determine divide encode escape evaluate execute extract fetch fill filter find
        format generate get give guess handle initialize insert invoke iterate join list
        load locate look make merge move normalize open pack parse perform pop prepare print
        process produce quote raise read register remove rename replace report reset resolve
        return reverse round run save scan search select send set skip sort split start stop
        strip swap test translate trim try turn unpack unquote update validate verify walk
        wrap write yield
        """,
    )
)


@dataclass(frozen=True, slots=True)
class _Function:
    summary: str
    signature: str
    code: str


def third_person(verb: str) -> str:
    """ "return" -> "returns", "search" -> "searches", "try" -> "tries"."""
    if re.search(r"(s|x|z|ch|sh)$", verb):
        return verb + "es"
    if re.search(r"[^aeiou]y$", verb):
        return verb[:-1] + "ies"
    return verb + "s"


def _imports(tree: ast.Module) -> dict[str, str]:
    """Top-level name -> the statement that imports it."""
    found: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.asname or alias.name.split(".")[0]
                found[name] = ast.unparse(ast.Import(names=[alias]))
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                if "._" in f".{node.module}.{alias.name}":
                    continue  # private parts of the library are bad examples
                statement = ast.ImportFrom(module=node.module, names=[alias], level=0)
                found[alias.asname or alias.name] = ast.unparse(statement)
    return found


def _free_names(function: ast.FunctionDef) -> set[str]:
    """Names that the function reads but does not define (close enough for a filter)."""
    loaded: set[str] = set()
    bound: set[str] = {function.name}
    for node in ast.walk(function):
        if isinstance(node, ast.Name):
            (loaded if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.ExceptHandler):
            bound.add(node.name or "")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Global | ast.Nonlocal):
            loaded |= {f"{name} (of the module)" for name in node.names}
    return loaded - bound - _BUILTINS


def _summary(docstring: str) -> str:
    first = " ".join(docstring.strip().split("\n\n")[0].split())
    return first.split(">>>")[0].strip()


def _functions(source: str) -> Iterator[_Function]:
    tree = ast.parse(source)
    imports = _imports(tree)
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef) or node.decorator_list:
            continue
        summary = _summary(ast.get_docstring(node) or "")
        free = _free_names(node)
        if not 10 <= len(summary) <= _MAX_SUMMARY or not free <= imports.keys():
            continue
        if len(node.body) < 2 or node.name.startswith("__") or _NOT_A_REQUEST.search(summary):
            continue
        yield from _trimmed(node, summary, [imports[name] for name in sorted(free)])


def _trimmed(node: ast.FunctionDef, summary: str, imports: list[str]) -> Iterator[_Function]:
    old, new = node.name, node.name.lstrip("_")
    for inner in ast.walk(node):  # rename a private function, and its recursive calls
        if isinstance(inner, ast.Name) and inner.id == old:
            inner.id = new
    node.name = new
    node.body[0] = ast.Expr(ast.Constant(summary))
    body = ast.unparse(ast.fix_missing_locations(node))
    if _MIN_CHARS <= len(body) <= _MAX_CHARS:
        signature = f"{new}({ast.unparse(node.args)})"
        head = "\n".join(imports) + "\n\n" if imports else ""
        yield _Function(summary, signature, head + body)


def _request(function: _Function, rng: random.Random) -> str:
    first, _, rest = function.summary.partition(" ")
    verb = first.lower()
    quoted = (
        f"Write a Python function: {function.summary}",
        f"Write a Python function {function.signature}: {function.summary}",
    )
    if verb in _VERBS:
        acts = f"{third_person(verb)} {rest}"
    elif verb.endswith("s") and {verb[:-1], verb[:-2]} & _VERBS:
        acts = f"{verb} {rest}"
    else:
        return rng.choice(quoted)
    acts = acts.rstrip(".")
    return rng.choice(
        (
            f"Write a function that {acts}.",
            f"Write a function that {acts}.",
            f"Write a Python function that {acts}.",
            *quoted,
        )
    )


def _sample(function: _Function, request: str) -> Sample:
    # Check the function's signature only if the request gives it.
    asked = function.signature if function.signature in request else ""
    return {
        "messages": [
            {"role": "user", "content": request},
            {"role": "assistant", "content": function.code},
        ],
        "check": {"python": {"signature": asked}},
    }


def build_from(folder: Path, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Training and validation samples from the ``*.py`` files under ``folder``."""
    rng = random.Random(seed)  # nosec B311
    functions: dict[str, _Function] = {}
    for path in sorted(folder.rglob("*.py")):
        if _SKIPPED.intersection(path.relative_to(folder).parts):
            continue
        try:
            source = path.read_text("utf-8")
            found = list(_functions(source))
        except (SyntaxError, UnicodeDecodeError):
            continue  # some files of the library are meant for older interpreters
        functions.update((function.code, function) for function in found)
    samples = [
        _sample(function, _request(function, rng)) for _, function in sorted(functions.items())
    ]
    rng.shuffle(samples)
    held_out = len(samples) // _HELD_OUT
    return samples[held_out:], samples[:held_out]


def build(seed: int) -> tuple[list[Sample], list[Sample]]:
    """Training and validation samples from the running Python's standard library."""
    return build_from(Path(sysconfig.get_paths()["stdlib"]), seed)
