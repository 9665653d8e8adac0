"""What pages state about the product is what its code does today: metrics and their labels,
numbers, fields of JSON requests, model families, what is unimplemented, and README's picture.

Each test is about a kind of statement that the code once left behind.
"""

from __future__ import annotations

import ast
import html
import importlib
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml
from prometheus_client import CollectorRegistry
from typer.testing import CliRunner
from veneer_client.cli.main import cli
from veneer_proto.v1 import inference_pb2
from veneer_registry.errors import InvalidField
from veneer_server.follower.follower import Follower
from veneer_server.models.config import SUPPORTED
from veneer_server.openai.extensions import Ignored, Unknown
from veneer_server.openai.fields import (
    IGNORED,
    REFUSED,
    ChatFields,
    CompletionFields,
    parse_fields,
)
from veneer_server.openai.http.cors import Cors
from veneer_server.openai.messages import MessageFields
from veneer_server.openai.responses import ResponseFields
from veneer_server.openai.routes import Edge
from veneer_server.quotas.usage import UsageBook
from veneer_server.telemetry.metrics import Metrics
from veneer_server.telemetry.replication_series import FollowerSeries, RegistrySeries
from veneer_server.telemetry.usage_series import UsageSeries
from veneer_server.telemetry.vllm_names import VllmSeries

from tests.docs.pages import REPOSITORY, pages
from tests.docs.shapes import difference
from tests.docs.terminal import COMMANDS, WIDTH
from tests.unit.client.fake_server import FakeServer

DOCS = REPOSITORY / "docs"
PICTURE = DOCS / "terminal.svg"
PACKAGES = ("adapters_registry", "clients", "server", "training", "loadtest")
CODE = re.compile(r"`([^`]+)`")
PARENTHESIS = re.compile(r"\([^()]*\)")


def all_pages() -> list[Path]:
    return [*pages(), REPOSITORY / "ARCHITECTURE.md", REPOSITORY / "SECURITY.md"]


def named(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def paragraphs(page: Path) -> Iterator[str]:
    """Paragraphs, items of lists and rows of tables, each in one line, without code blocks."""
    text = re.sub(r"(?ms)^```.*?^```", "", page.read_text("utf-8"))
    for block in re.split(r"\n\s*\n|\n(?=\s*[-|] ?)", text):
        yield " ".join(block.split())


def sentences(page: Path) -> Iterator[str]:
    for paragraph in paragraphs(page):
        yield from re.split(r"(?<=[.;:])\s+(?=[A-Z`*])", paragraph)


# --------------------------------------------------------------------------- metrics


def on_the_page() -> list[tuple[str, frozenset[str]]]:
    """Metric and labels of each row of monitoring.md's tables."""
    found = []
    for line in (DOCS / "monitoring.md").read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        names = CODE.findall(cells[0])
        if not line.startswith("| `") or len(cells) != 3 or names[0].startswith("Veneer"):
            continue
        labels = frozenset(CODE.findall(PARENTHESIS.sub("", cells[1])))
        for name in names:
            if name.startswith("vllm:"):
                common = "level" in labels or "finished_reason" in labels or not labels
                found.append((name, labels | {"model_name", "engine"} if common else labels))
            else:
                found.append((name if name.startswith("grpc_") else f"veneer_{name}", labels))
    return found


def of_the_server(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, frozenset[str]]]:
    """Metric and labels of everything that a server of any role can expose."""
    collectors: list[Any] = []

    def keep(self: CollectorRegistry, collector: Any) -> None:
        collectors.append(collector)

    monkeypatch.setattr(CollectorRegistry, "register", keep)
    metrics = Metrics()
    core = SimpleNamespace(gate=None, metrics=metrics)
    Edge(cast("Any", None), cast("Any", core), cast("Any", None), cast("Any", None))
    book = cast("UsageBook", SimpleNamespace(totals={}, stored={}))
    followers = FollowerSeries()
    cache = type("Cache", (), {"bytes": 0, "evictions": 0, "damaged_found": 0})
    cache.__len__ = lambda _: 0  # type: ignore[attr-defined]
    standing = SimpleNamespace(connected=True, lag_s=0.0)
    link = SimpleNamespace(connects=0, resyncs=0)
    fetching = SimpleNamespace(fetched=0, failed=0, fetched_bytes=0)
    follower = SimpleNamespace(standing=standing, link=link, cache=cache(), fetching=fetching)
    followers.watch(cast("Follower", follower), metrics.registry)
    collectors += [UsageSeries(book), RegistrySeries(lambda: 0)]
    collectors += [VllmSeries(metrics, model="base", kv_tokens=16)]
    found = []
    for collector in collectors:
        simple = hasattr(collector, "labels")  # a counter, gauge or histogram
        for family in collector.collect():
            if family.name.startswith("process_"):
                continue
            source = collector if simple else family
            # private: prometheus_client has no other way to ask for labels without series
            labels = frozenset(source._labelnames)
            name = family.name + ("_total" if family.type == "counter" else "")
            found.append((name, labels))
    return found


def test_each_metric_is_on_the_page_once_with_its_labels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    page, server = on_the_page(), of_the_server(monkeypatch)
    names = [name for name, _ in page]
    assert sorted(names) == sorted(set(names)), "a metric has one row"
    assert dict(page) == dict(server)


def table(page: str, title: str) -> Iterator[list[str]]:
    """Rows of the first table after a heading."""
    text = (DOCS / page).read_text("utf-8").partition(f"\n{title}\n")[2].partition("\n## ")[0]
    for line in text.splitlines():
        if line.startswith("| ") and not line.startswith("| ---"):
            yield [cell.strip() for cell in line.strip("|").split(" | ")]


def test_the_alerts_on_the_page_are_those_of_the_rules() -> None:
    rules = (REPOSITORY / "deploy" / "prometheus" / "rules.yml").read_text("utf-8")
    rows = table("monitoring.md", "## Alerts")
    shown = [name for cells in rows for name in CODE.findall(cells[0])]
    assert sorted(shown) == sorted(re.findall(r"- alert: (\w+)", rules))


def test_the_log_events_on_the_page_are_logged() -> None:
    logged = set()
    for file in (REPOSITORY / "server").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                logged.add(node.value)
    rows = [*table("monitoring.md", "## Logs")][1:]
    shown = {name for cells in rows for name in CODE.findall(cells[0])}
    assert len(shown) > 10
    assert shown - logged == set()


# --------------------------------------------------------------------------- numbers

# fmt: off
BOUNDS = [
    # Page, its words, and the constant behind each number.
    ("monitoring.md", "the 256 that have waited longest",
     "engine.scheduling.step_limits.SchedulerLimits.planned_adapters"),
    ("monitoring.md", "at most 200 names each", "telemetry.adapter_series.MAX_NAMES"),
    ("monitoring.md", "at most 200 of them", "telemetry.adapter_series.MAX_NAMES"),
    ("monitoring.md", "the first 50 tenants", "telemetry.tenant_series.MAX_TENANTS"),
    ("monitoring.md", "the first 200. All further", "telemetry.adapter_series.MAX_NAMES"),
    ("monitoring.md", "At most 512 names", "telemetry.vllm_names.MAX_ROUTED"),
    ("adapters-by-uri.md", "at most 5, are checked", "adapters.fetching.web.MOST_REDIRECTS"),
    ("adapters-by-uri.md", "30 names tried in a minute",
     "serving.registering.MOST_A_MINUTE"),
    ("openai.md", "a `top_logprobs` of at most 20", "serving.checks.MAX_TOP_LOGPROBS"),
    ("openai.md", "at most 16 KiB", "text.turns.MAX_KWARGS"),
    ("adapters.md", "At most eight uploads", "serving.uploads.MAX_AT_ONCE"),
    ("adapters.md", "received at 8 MiB/s", "queues.upload_flow.BYTES_A_SECOND"),
    ("security.md", "16 KiB a minute of each", "access.audit.CALLER_BYTES"),
    ("security.md", "are rotated at 64 MiB", "access.audit.MOST_BYTES"),
    ("security.md", "The last 2,400 hours", "quotas.usage_store.MAX_HOURS"),
    ("security.md", "at most every 5 s", "access.tokens.FETCH_S"),
    ("security.md", "for 2 s they have", "queues.connection_places.STALLED_S"),
    ("security.md", "sent less than 8 KiB", "queues.connection_places.PROGRESS"),
    ("security.md", "from -100 to 100", "queues.fairness.MAX_PRIORITY"),
    ("scale.md", "UNAVAILABLE after 15 s", "rpc.replication_service.AWAY_S"),
    ("scale.md", "answers 256 calls of followers", "rpc.open_calls.MAX_OTHER_CALLS"),
    ("scale.md", "counts for 5 s after", "replication.states.LEASE_S"),
    ("openai.md", "one to 8 calls", "serving.tool_use.MAX_FORCED_CALLS"),
]
# fmt: on
NUMBER = re.compile(r"(\d[\d,]*)(?: (KiB|MiB))?")
CLAIM = re.compile(r"\b(?:at most|the first|first) (?=\d)", re.IGNORECASE)
PAGES_OF_BOUNDS = ("monitoring.md", "adapters-by-uri.md", "openai.md")


def value(constant: str) -> int:
    module, _, name = f"veneer_server.{constant}".rpartition(".")
    if (of := module.rpartition("."))[2][:1].isupper():  # the default of a dataclass
        kind = getattr(importlib.import_module(of[0]), of[2])
        (default,) = (each.default for each in fields(kind) if each.name == name)
        return int(default)
    return int(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize(("page", "words", "constant"), BOUNDS)
def test_a_number_on_a_page_is_the_one_of_the_code(
    page: str, words: str, constant: str
) -> None:
    text = " ".join((DOCS / page).read_text("utf-8").split())
    assert words in text, "change the row above, too"
    number = NUMBER.search(words.replace("eight", "8"))
    assert number is not None
    unit = {"KiB": 1 << 10, "MiB": 1 << 20, None: 1}[number[2]]
    assert int(number[1].replace(",", "")) * unit == value(constant)


@pytest.mark.parametrize("page", PAGES_OF_BOUNDS)
def test_every_bound_in_a_page_s_text_is_compared(page: str) -> None:
    rows = [words for name, words, _ in BOUNDS if name == page]
    text = " ".join(" ".join(paragraphs(DOCS / page)).split())
    covered = [
        (at.start(), at.end()) for words in rows for at in re.finditer(re.escape(words), text)
    ]
    open_ones = [
        text[at.start() : at.end() + 40]
        for at in CLAIM.finditer(text)
        if not any(start <= at.start() < end for start, end in covered)
    ]
    assert open_ones == [], "add a row to BOUNDS"


def test_the_chart_s_defaults_on_the_page_are_those_of_its_values() -> None:
    file = REPOSITORY / "deploy" / "helm" / "veneer" / "values.yaml"
    values: Any = yaml.safe_load(file.read_text("utf-8"))
    compared, wrong = 0, []
    for cells in [*table("kubernetes.md", "## Values")][1:]:
        names = [name for name in CODE.findall(cells[0]) if re.fullmatch(r"[a-zA-Z.]+", name)]
        defaults = [each.strip("` ") for each in cells[1].split(", ")]
        for at, name in enumerate(names):
            found = values
            for step in name.split("."):
                found = found[step]
            if name.endswith(".resources"):
                limits = found["limits"]
                cores = [f"{limits['cpu']} cores"] if "cpu" in limits else []
                shown = [*cores, limits["memory"].replace("Gi", " GiB")]
                same = defaults == shown
            elif isinstance(found, bool):
                same = defaults[at] == ("on" if found else "off")
            elif isinstance(found, int) or (isinstance(found, str) and found):
                same = defaults[at] == str(found)
            else:
                continue
            compared += 1
            if not same:
                wrong.append(f"{name}: {cells[1]}, and values.yaml has {found}")
    assert compared > 8
    assert wrong == []


# --------------------------------------------------------------------------- unimplemented


def unimplemented() -> set[str]:
    """The fields and flags that are in the metadata of a raised Unimplemented."""
    found = set()
    for file in (REPOSITORY / "server").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            match node:
                case ast.Call(func=ast.Name("Unimplemented"), keywords=keywords):
                    for keyword in keywords:
                        if keyword.arg == "metadata" and isinstance(keyword.value, ast.Dict):
                            found |= {
                                each.value
                                for each in keyword.value.values
                                if isinstance(each, ast.Constant)
                            }
    return {str(each) for each in found}


def test_what_a_page_calls_unimplemented_is_so() -> None:
    known = unimplemented()
    assert {"adapters", "--lora-root"} <= known, "how the server says it has changed"
    wrong = []
    for page in all_pages():
        for sentence in sentences(page):
            if "UNIMPLEMENTED" in sentence:
                of = {name.rpartition(".")[2] for name in CODE.findall(sentence)}
                of -= {"UNIMPLEMENTED"}
                if not of or of - known:
                    wrong.append(f"{named(page)}: {sentence}")
    assert wrong == [], (
        "name the fields or flags in `code`, and only those of the server's list"
    )


LEFT_BEHIND = re.compile(
    r"\b(?:do|does|did) not exist yet|not (?:served|implemented)(?: with)? yet|"
    r"\bto be set (?:once|when)|to change once it does"
)
"""How pages and packages have promised what came later, and stayed as they were."""


def test_no_page_package_or_decision_waits_for_what_is_there() -> None:
    texts = {page: page.read_text("utf-8") for page in all_pages()}
    texts |= {page: page.read_text("utf-8") for page in (DOCS / "decisions").glob("*.md")}
    for package in PACKAGES:
        for file in (REPOSITORY / package).rglob("__init__.py"):
            texts[file] = ast.get_docstring(ast.parse(file.read_text("utf-8"))) or ""
    found = [
        f"{named(page)}: {hit[0]}"
        for page, text in sorted(texts.items())
        for hit in LEFT_BEHIND.finditer(" ".join(text.split()))
    ]
    assert found == [], "say what is refused today, and how"


# --------------------------------------------------------------------------- model families

FAMILIES = {
    "Llama": "llama",
    "Mistral": "mistral",
    "Qwen2": "qwen2",
    "Qwen3": "qwen3",
    **dict.fromkeys(("SmolLM", "SmolLM2", "SmolLM3", "Gemma", "Phi", "Mixtral", "Falcon"), ""),
    **dict.fromkeys(("Qwen", "DeepSeek", "OLMo", "Granite", "StableLM", "GPT-2"), ""),
}
"""Names as pages write them -> ``model_type``; "" if it is refused, or is the name of models
of another type (SmolLM2 is a Llama, SmolLM3 is refused)."""
NAME = "|".join(sorted(map(re.escape, FAMILIES), key=len, reverse=True))
LIST = re.compile(rf"(?:(?:{NAME})(?:, and |, | and )){{2,}}(?:{NAME})(?![\w.-])")


def lists_of_families(text: str) -> Iterable[str]:
    return (hit[0] for hit in LIST.finditer(PARENTHESIS.sub("", text).replace(" ,", ",")))


def test_pages_list_the_families_that_the_loader_takes() -> None:
    wrong, found = [], 0
    for page in all_pages():
        for each in lists_of_families(" ".join(page.read_text("utf-8").split())):
            found += 1
            if {FAMILIES[name] for name in re.findall(NAME, each)} != {*SUPPORTED}:
                wrong.append(f"{named(page)}: {each}")
    assert found, "no page says which families are served"
    assert wrong == []


def test_a_list_of_families_is_found() -> None:
    text = "serves Llama (SmolLM2 is one), Mistral, Qwen2 and SmolLM shapes"
    assert [*lists_of_families(text)] == ["Llama, Mistral, Qwen2 and SmolLM"]


# --------------------------------------------------------------------------- JSON requests


def bullet(words: str) -> set[str]:
    """The names in code of the item of openai.md's section "Fields" that begins so."""
    text = (DOCS / "openai.md").read_text("utf-8")
    section = text.partition("\n## Fields\n")[2].partition("\n## ")[0]
    (found,) = (
        each for each in re.split(r"\n(?=- )", section) if each.startswith(f"- {words}")
    )
    return {name for name in CODE.findall(found) if re.fullmatch(r"[a-z_]+", name)}


def test_the_page_s_lists_of_fields_are_those_of_the_code() -> None:
    assert bullet("**Refused**") == {*REFUSED}
    assert bullet("**Ignored**") == {*IGNORED}
    kinds = (ChatFields, CompletionFields, ResponseFields, MessageFields)
    served = {name for kind in kinds for name in kind.model_fields}
    text = (DOCS / "openai.md").read_text("utf-8")
    missing = [name for name in served if not re.search(rf"\b{name}\b", text)]
    assert missing == []


@pytest.mark.parametrize("field", ["nonsense", "max_token", "sufix"])
def test_an_unknown_field_is_treated_as_the_flag_says(field: str) -> None:
    """As openai.md says: in the request, and in a message."""
    message: dict[str, Any] = {"role": "user", "content": "Hi"}

    def ask(unknown: Unknown, value: object) -> str:
        ignored = Ignored(unknown)
        parse_fields(ChatFields, {"model": "m", "messages": [message], field: value}, ignored)
        body = {"model": "m", "messages": [{**message, field: value}]}
        parse_fields(ChatFields, body, ignored)
        return ignored.header

    for empty in (None, [], {}, ""):
        assert ask("refuse", empty) == ""
    assert ask("ignore", 1) == ""
    if field == "nonsense":
        assert ask("warn", 1) == "nonsense, messages[].nonsense"
    for unknown in ("refuse",) if field == "nonsense" else ("refuse", "warn"):
        with pytest.raises(InvalidField) as caught:
            ask(cast("Unknown", unknown), 1)
        assert str(caught.value.metadata["field"]).endswith(field)


# --------------------------------------------------------------------------- CORS


def test_a_page_on_cors_names_the_flag_that_turns_it_on() -> None:
    """Without the flag no answer has CORS headers; with it, answers to its origins have."""
    asked = {b"origin": b"https://chat.example.org"}
    assert not Cors(()).headers(asked)
    assert Cors(("https://chat.example.org",)).headers(asked)
    without = [
        named(page)
        for page in all_pages()
        if "CORS" in (text := page.read_text("utf-8")) and "--cors-origin" not in text
    ]
    assert without == []


# --------------------------------------------------------------------------- the picture


def picture() -> dict[str, list[str]]:
    """Command -> the lines of its output in docs/terminal.svg."""
    rows: dict[float, str] = {}
    text = PICTURE.read_text("utf-8")
    for at, words in re.findall(r'<text [^>]*? y="([\d.]+)"[^>]*>(.*?)</text>', text, re.S):
        shown = html.unescape(words).replace("\xa0", " ").replace("\n", "")
        rows[float(at)] = rows.get(float(at), "") + shown
    found: dict[str, list[str]] = {}
    for at in sorted(rows):
        if rows[at].startswith("$ "):
            found[rows[at].removeprefix("$ ")] = last = []
        elif found and rows[at].strip():
            last.append(rows[at].rstrip())
    return found


def summary(line: str) -> str:
    """The figures below an answer, without the name of what answered."""
    return line.rpartition(" · ")[0]


def test_the_picture_shows_what_the_command_line_prints_today() -> None:
    """`make terminal-svg` records it again."""
    shown = picture()
    assert [*shown] == [*COMMANDS]
    final = inference_pb2.GenerateStreamFinal(finish_reason=inference_pb2.FINISH_REASON_STOP)
    final.usage.completion_tokens = 3
    with FakeServer() as server, pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        place = {"VENEER_SERVER": server.address, "COLUMNS": str(WIDTH)}
        for command, lines in shown.items():
            words = shlex.split(command)
            if words[0] != "veneer":
                continue
            adapter = words[words.index("-a") + 1] if "-a" in words else ""
            server.pieces = [
                inference_pb2.GenerateStreamResponse(request_id="s", text="Hi", token_ids=[1]),
                inference_pb2.GenerateStreamResponse(request_id="s", final=final),
            ]
            server.pieces[1].final.provenance.CopyFrom(server.provenance(adapter))
            done = CliRunner().invoke(cli, words[1:], env=place)
            assert done.exit_code == 0, done.output
            printed = [line for line in done.output.splitlines() if line.strip()]
            match words[1]:
                case "generate":
                    assert difference(summary(lines[-1]), summary(printed[-1])) is None
                case "ls" | "ps":
                    assert difference(lines[0], printed[0]) is None
                case "health":  # the fake server does not load anything first
                    assert difference(lines[-1], printed[-1]) is None
                case _:
                    # Only the fake server warns. The picture wraps long lines.
                    printed = [line for line in printed if not line.startswith("warning: ")]
                    assert difference("\n".join(lines), "\n".join(printed)) is None
