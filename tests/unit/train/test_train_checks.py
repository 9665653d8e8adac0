"""What counts as a right answer, and what a hostile answer cannot do."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
from veneer_registry.errors import InvalidField, Unimplemented
from veneer_train import checks, sandbox, sandboxed
from veneer_train.checks import Score, passes, require_sandbox, validate
from veneer_train.config import DataConfig
from veneer_train.data import load_file
from veneer_train.recipes import chat, code, sql
from veneer_train.sandbox import run_python

from tests.refused import refused

SQL = {
    "sql": {
        "setup": "CREATE TABLE t (a INTEGER, b TEXT);\n"
        "INSERT INTO t VALUES (1, 'x'), (2, 'y'), (3, 'x');"
    }
}


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("SELECT a FROM t WHERE b = 'x'", True),
        ("SELECT a FROM t WHERE b = 'x' ORDER BY a DESC;", True),  # the same rows
        ("```sql\nSELECT a FROM t WHERE b = 'x';\n```\nThat is it.", True),
        ("SELECT a, b FROM t WHERE b = 'x';", False),
        ("SELECT a FROM t;", False),
        ("SELEC a", False),
        ("", False),
        ("DELETE FROM t; SELECT 1", False),
        ("ATTACH DATABASE 'veneer-check' AS other", False),
    ],
)
def test_sql_is_judged_by_what_it_returns(answer: str, right: bool) -> None:
    assert passes(SQL, answer, "SELECT a FROM t WHERE b = 'x';") is right


def test_order_counts_where_it_was_asked_for() -> None:
    expected = "SELECT a FROM t ORDER BY a DESC;"
    assert passes(SQL, "SELECT a FROM t ORDER BY a DESC", expected)
    assert not passes(SQL, "SELECT a FROM t ORDER BY a", expected)


def test_sql_that_does_not_end_is_stopped() -> None:
    endless = (
        "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT max(x) FROM n"
    )
    assert not passes(SQL, endless, "SELECT 1;")


def test_sql_of_few_but_long_steps_is_stopped() -> None:
    """Steps of seconds each, of which it has a thousand: hours."""
    long = (
        "WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c LIMIT 1000) SELECT "
        "sum(instr(hex(zeroblob(400000)), hex(zeroblob(200000 + i)) || '1')) FROM c"
    )
    assert not passes(SQL, long, "SELECT 0;")


def test_judging_sql_leaves_this_process_as_it_was() -> None:
    with closing(sqlite3.connect(":memory:")) as other:
        before = other.execute("PRAGMA hard_heap_limit").fetchall()
        assert passes(SQL, "SELECT a FROM t", "SELECT a FROM t;")
        validate(SQL, "SELECT a FROM t;")
        assert other.execute("PRAGMA hard_heap_limit").fetchall() == before == [(0,)]


def test_sql_that_no_process_can_hold_is_wrong_and_a_broken_judge_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not passes(SQL, "SELECT '\ud800'", "SELECT 1;")
    program = tmp_path / "broken.py"
    program.write_text("import there_is_none")
    monkeypatch.setattr(checks, "SQL_PROGRAM", program)
    with pytest.raises(RuntimeError) as caught:
        passes(SQL, "SELECT 1", "SELECT 1;")
    assert "there_is_none" in str(caught.value)


def test_sql_cannot_take_our_memory() -> None:
    assert not passes(SQL, "SELECT length(zeroblob(900000000))", "SELECT 900000000;")


def test_sql_may_not_write() -> None:
    assert not passes(SQL, "UPDATE t SET a = 0 RETURNING a", "SELECT 0 FROM t;")


def test_an_order_within_is_no_order() -> None:
    expected = "SELECT a FROM (SELECT a FROM t ORDER BY a LIMIT 2);"
    assert passes(SQL, "SELECT a FROM t WHERE a < 3 ORDER BY a DESC", expected)


def test_whole_numbers_are_whole() -> None:
    setup = {"sql": {"setup": "CREATE TABLE n (x INTEGER);"}}
    assert not passes(setup, "SELECT 1234567", "SELECT 1234568")
    assert passes(setup, "SELECT 0.1 + 0.2", "SELECT 0.3")


def test_a_signature_is_the_same_however_it_is_spaced() -> None:
    check = {"python": {"signature": "add(a: int,b=0)"}}
    assert passes(check, "def add(a: int, b=0):\n    return a + b", "")


PYTHON = {"python": {"signature": "add(a, b)", "tests": "assert add(2, 3) == 5"}}


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("def add(a, b):\n    return a + b", True),
        ("import math\n\ndef add(a, b):\n    return math.fsum((a, b))", True),
        ("def add(a, b):\n    return a - b", False),
        ("def plus(a, b):\n    return a + b\nadd = plus", False),  # not as asked
        ("Here it is:\n\ndef add(a, b):\n    return a + b", False),  # not code alone
        ("import sys\n\ndef add(a, b):\n    return 0\n\nsys.exit(0)", False),
        ("import os\n\ndef add(a, b):\n    return 0\n\nos._exit(0)", False),
    ],
)
def test_python_is_judged_by_running_it(answer: str, right: bool) -> None:
    assert passes(PYTHON, answer, "") is right


WRONG = "def add(a, b):\n    return 0\n"
RIGHT = "def add(a, b):\n    return a + b\n"
TESTS = {"python": {"tests": "assert add(2, 3) == 5\nassert add(-1, 1) == 0"}}
FORGED = """
import os
for descriptor in range(64):
    for verdict in (b"confined\\nended\\n", b"done", b"ok\\n", b"True\\nTrue\\n"):
        try:
            os.write(descriptor, verdict)
        except OSError:
            pass
"""


@pytest.mark.parametrize(
    "answer",
    [
        WRONG + "import os\nos._exit(0)",
        WRONG + "import sys\nsys.exit(0)",
        WRONG + "raise SystemExit",
        WRONG + FORGED,
        WRONG + FORGED + "os._exit(0)",
        WRONG + "print('2 passed')",
        "class Any:\n    def __eq__(self, other): return True\n"
        "\ndef add(a, b):\n    return Any()",
        "class Any(int):\n    def __eq__(self, other): return True\n"
        "    __hash__ = int.__hash__\n\ndef add(a, b):\n    return Any()",
        "import builtins\nbuiltins.AssertionError = lambda *told: SystemExit(0)\n" + WRONG,
        "import ast, json, sys\nast.literal_eval = json.loads = lambda text: 5\n" + WRONG,
        "import sys\nframe = sys._getframe()\nwhile frame.f_back: frame = frame.f_back\n"
        "told = str(frame.f_globals) + str(frame.f_locals)\nimport re\n"
        "found = dict(re.findall(r'(add.[^=]*.) == (-?[0-9]+)', told))\n"
        "def add(a, b):\n    return int(found[f'add({a}, {b})'])",
        "import gc\n"
        "def add(a, b):\n    return next(o for o in gc.get_objects() if o == {'expected': 5})",
        "def add(a, b):\n    while True: pass",
        "def add(a, b):\n    return add(a, b)",
        "import threading\nlock = threading.Lock()\n"
        "def add(a, b):\n    assert lock.acquire(timeout=0) is False\n    return a + b",
        "",
        "def add(a, b)",
        "-" * 19_000 + "1",
        "(" * 19_000,
        "x" + ".x" * 9_000 + "\n" + RIGHT.replace("a + b", "a - b"),
        "def add(a, b):\n    return [" * 1 + "[" * 100 + "]" * 100 + "]",
        "def add(a, b):\n    return 'x' * 100_000",
        "def add(a, b):\n    return 10 ** 5000",
        "def add(a, b):\n    return bytearray(1 << 33) and a + b",
        "x = [0] * (1 << 30)\n" + RIGHT,
    ],
)
def test_an_answer_cannot_be_counted_as_right_by_a_trick(answer: str) -> None:
    assert passes(TESTS, RIGHT, "")
    assert not passes(TESTS, answer, "")


@pytest.mark.parametrize(
    "deed",
    [
        "import socket\n    socket.socket()",
        "import socket\n    socket.socketpair()",
        "import socket\n    socket.create_connection(('127.0.0.1', 1))",
        "import subprocess\n    subprocess.run(['true'])",
        "import os\n    assert os.system('true') == 0",
        "import os\n    os.fork()",
        "import os\n    os.execv('/bin/true', ['true'])",
        "import os\n    os.posix_spawn('/bin/true', ['true'], {})",
        "import threading\n    threading.Thread(target=print).start()",
        "import _posixsubprocess\n    _posixsubprocess.fork_exec([b'true'], [b'/bin/true'], "
        "True, (), None, [], -1, -1, -1, -1, -1, -1, 3, 4, True, False, 0, None, None, None, "
        "-1, None, True)",
        "open('here', 'w')",
        "open('/tmp/veneer-here', 'w')",
        "open('/etc/passwd').read()",
        "open('/proc/self/environ').read()",
        "import os\n    os.listdir('/')",
        "import os\n    os.stat('/etc/passwd')",
        "import os\n    os.remove('x')",
        "import os\n    os.chdir('/')",
        "import os\n    os.kill(os.getpid(), 0)",
        "import os\n    os.kill(os.getppid(), 9)",
        "import os, signal\n    os.nice(1)",
        "import resource\n    resource.setrlimit(resource.RLIMIT_CPU, (9, 9))",
        "import resource\n    resource.prlimit(0, resource.RLIMIT_CPU)",
        "import ctypes",
        "import mmap, os\n    mmap.mmap(os.memfd_create('x'), 1)",
        "import os\n    os.environ['PATH']",
        "import time\n    time.sleep(1)",
        "import numpy",
        "import veneer_train",
    ],
)
def test_an_answer_cannot_leave_the_sandbox(deed: str) -> None:
    """The function is right but for the deed, which must raise; in a control it is caught."""
    lines = f"def add(a, b):\n    {deed}\n    return a + b"
    assert not passes(TESTS, lines, "")
    inside = deed.replace("\n    ", "\n        ")
    caught = f"def add(a, b):\n    try:\n        {inside}\n    except Exception: return a + b"
    assert passes(TESTS, caught, ""), "it failed for another reason"


def test_an_answer_sees_nothing_of_our_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENEER_SECRET", "1")
    (found,) = run_python("import os", ["list(os.environ)"]).values
    assert found in ("[]", "['LC_CTYPE']"), "the latter is set by Python itself"


def test_an_answer_may_use_the_standard_library() -> None:
    source = "import datetime, re\nfrom collections import Counter\nfrom os.path import join"
    asked = {
        "re.sub('a', 'b', 'aa')": "'bb'",
        "Counter('aab')['a']": "2",
        "datetime.datetime.strptime('2020', '%Y').year": "2020",
        "join('a', 'b')": "'a/b'",
        "'\xe9'.encode('latin-1').decode('latin-1')": "'\\xe9'",
        "[(1,), {2}, {3: None}, set(), 0.5]": "[(1,), {2}, {3: None}, set(), 0.5]",
    }
    assert run_python(source, list(asked)).values == tuple(asked.values())


DATACLASS = """
from dataclasses import dataclass

@dataclass
class Pair:
    a: int
    b: int

def add(a, b):
    return Pair(a, b).a + Pair(a, b).b
"""


@pytest.mark.parametrize("future", ["", "from __future__ import annotations\n"])
def test_an_answer_may_define_a_dataclass(future: str) -> None:
    assert passes(TESTS, future + DATACLASS, "")
    assert passes({"python": {}}, (future + DATACLASS).strip(), "")


def test_an_answer_runs_without_our_own_future_imports() -> None:
    source = "import __future__\ndef f(a: int): return a"
    told = "f.__annotations__['a'] is int"
    assert run_python(source, [told]).values == ("True",)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from collections import Counter\ndef f(): return Counter('aab')", "{'a': 2, 'b': 1}"),
        (
            "from collections import defaultdict as D\ndef f(): return D(int, a=2)",
            "{'a': 2}",
        ),
        ("from collections import OrderedDict as D\ndef f(): return D(a=1)", "{'a': 1}"),
        (
            "from collections import namedtuple\nP = namedtuple('P', 'x y')\n"
            "def f(): return [P(1, 2)]",
            "[(1, 2)]",
        ),
        ("import enum\nclass E(enum.IntEnum):\n    A = 1\ndef f(): return E.A", "1"),
        ("import enum\nclass E(enum.StrEnum):\n    A = 'x'\ndef f(): return E.A", "'x'"),
        ("class F(float): pass\ndef f(): return F(0.5)", "0.5"),
        ("class L(list): pass\ndef f(): return L([1])", "[1]"),
        ("def f(): return frozenset({1, 2})", "{1, 2}"),
    ],
)
def test_a_subclass_s_value_counts_as_python_compares_it(source: str, expected: str) -> None:
    exec(f"{source}\nassert f() == {expected}", {})  # negative control: Python's own assert
    assert passes({"python": {"tests": f"assert f() == {expected}"}}, source, "")


def test_code_that_prints_without_end_costs_us_no_memory() -> None:
    flood = (
        "import os\nwhile True:\n    for n in range(64):\n        try: os.write(n, b'x' * 9999)"
    )
    flood += "\n        except OSError: pass"
    before = psutil.Process().memory_info().rss
    assert not run_python(flood).ended
    assert psutil.Process().memory_info().rss - before < 50 << 20


def test_nothing_is_left_running() -> None:
    run_python("import threading\nlock = threading.Lock()\nlock.acquire()\nwhile True: pass")
    assert not [
        each for each in psutil.Process().children() if "sandboxed" in str(each.cmdline())
    ]


def test_without_a_sandbox_no_code_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A FAKE program takes the sandbox's place: as on a machine without seccomp."""
    program = tmp_path / "sandboxed.py"
    text = Path(sandboxed.__file__).read_text("utf-8")
    program.write_text(
        text.replace("_PR_SET_SECCOMP: Final = 22", "_PR_SET_SECCOMP: Final = 222")
    )
    monkeypatch.setattr(sandbox, "PROGRAM", program)
    with refused(Unimplemented, cause="no_sandbox"):
        passes(TESTS, RIGHT, "")
    with refused(Unimplemented, cause="no_sandbox"):
        require_sandbox([TESTS])
    require_sandbox([SQL])  # runs no code


@pytest.mark.parametrize(
    ("tests", "right"),
    [
        ("assert add(1, 2) == 3", True),
        ("assert add('a', 'b') == 'ab'\nassert add([1], [2]) == [1, 2]", True),
        ("assert add((1,), ()) == (1,)\nassert not add(0, 0)\nassert add(1, 0)", True),
        ("assert add(0.1, 0.2) == 0.3", True),
        ("assert add([0.1], [0.2]) == [0.1, 0.3]", False),
        ("assert add(1, 2) == '3'", False),
        ("assert add(1, 2) is None", False),
        ("assert not add(1, 2)", False),
        ("assert add(1)", False),
    ],
)
def test_tests_compare_values(tests: str, right: bool) -> None:
    assert passes({"python": {"tests": tests}}, RIGHT, "") is right


def test_code_may_be_fenced_where_tests_judge_it_and_not_where_form_is_judged() -> None:
    fenced = f"Here it is:\n\n```python\n{RIGHT}```\nThat adds."
    assert passes(TESTS, fenced, "")
    assert not passes({"python": {}}, fenced, "")
    assert passes({"python": {}}, RIGHT, "")


def test_an_interval_holds_the_share() -> None:
    """Wilson's for 8 of 10: 0.490 to 0.943."""
    score = Score(8, 10)
    assert (score.low, score.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert Score(0, 10).low == pytest.approx(0)
    assert Score(10, 10).high == pytest.approx(1)


@pytest.mark.parametrize(
    "check",
    [
        {"regex": "("},
        {"python": {"tests": 5}},
        {"python": {"signature": "add(a"}},
        {"python": {"tests": "import math"}},
        {"python": {"tests": "assert add(1, 2) == add(2, 1)"}},
        {"python": {"tests": "assert add(1, 2) > 2"}},
        {"python": {"tests": "assert add(1, 2) == b'x'"}},
        {"python": {"tests": "assert add(1, 2) == [1 + 2j]"}},
        {"python": {"tests": "assert add(1, 2) == ..."}},
        {"python": {"tests": "assert add(1, 2) == 1e999"}},
        {"python": {"tests": "assert add(1, 2) == {[]: 1}"}},
        {"sql": {"setup": "CREATE TABEL t"}},
        {},
        {"exact": False},
        {"exact": True, "regex": "x"},
        {"sql": {}},
        {"other": 1},
        [],
        "x",
    ],
)
def test_a_check_that_is_none_is_refused(check: object) -> None:
    with refused(InvalidField, field="check"):
        validate(check, "")


def test_a_bad_check_names_its_line(tokenizer: Any, jsonl: Callable[..., Path]) -> None:
    good = {"prompt": "a", "completion": "b"}
    path = jsonl(good, {**good, "check": {"sqll": {}}})
    with refused(InvalidField, file="data.jsonl", line=2, cause="check"):
        load_file(path, DataConfig(train=str(path)), tokenizer, "")


def test_every_recipe_s_own_answers_pass() -> None:
    """And an answer of another sample does not (but for tables that happen to agree)."""
    for recipe in (chat, code, sql):
        _, val = recipe.build(0)
        told = [(s["check"], s["messages"][-1]["content"]) for s in val if "check" in s][:25]
        assert len(told) >= 15, recipe.__name__
        assert all(passes(check, answer, answer) for check, answer in told), recipe.__name__


def test_sql_answers_of_other_samples_fail() -> None:
    train, val = sql.build(0)
    answers = [s["messages"][-1]["content"] for s in val]
    wrong = [
        passes(sample["check"], answers[n - 1], answers[n]) for n, sample in enumerate(val)
    ]
    assert sum(wrong) < 0.1 * len(wrong)
    schemas = [
        {s["messages"][0]["content"].split("\n\n")[0] for s in part} for part in (train, val)
    ]
    assert not schemas[0] & schemas[1]  # what is measured was never seen


def test_the_sql_recipe_is_the_same_for_the_same_seed() -> None:
    assert json.dumps(sql.build(3)) == json.dumps(sql.build(3))
    assert sql.build(3) != sql.build(4)


_MANY = "WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c LIMIT 300000) "


@pytest.mark.parametrize(
    "statement",
    [
        _MANY + "SELECT zeroblob(1000000) FROM c",
        f"SELECT {', '.join(['zeroblob(1000000)'] * 1900)}",
        _MANY + "SELECT hex(zeroblob(400000)) || i AS v FROM c ORDER BY v",
        _MANY + "SELECT count(*) FROM (SELECT DISTINCT zeroblob(900000) || i FROM c)",
    ],
    ids=["rows", "columns", "sorted", "distinct"],
)
def test_a_statement_takes_neither_memory_nor_disk(statement: str) -> None:
    """Each asks for more than 1 GB. Asked in a process whose memory and files end before that,
    and with it its children's."""
    code = (
        "import resource, sys\n"
        "from veneer_train.checks import passes\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\n"
        f"assert not passes({{'sql': {{'setup': ''}}}}, {statement!r}, 'SELECT 1')\n"
        "assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 600_000\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
