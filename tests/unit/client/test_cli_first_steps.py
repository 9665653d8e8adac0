"""What a new user of ``veneer`` types and gets wrong, and what the command says then."""

from __future__ import annotations

import http.server
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from typer.main import get_command
from veneer_client.cli.main import cli
from veneer_client.cli.words import in_cli_words
from veneer_client.client import Client
from veneer_proto.v1 import adapters_pb2, inference_pb2, server_pb2

from tests.unit.client.fake_server import FakeServer, Refusal

Run = Callable[..., Any]


# ------------------------------------------------------------------------ commands


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("list", "veneer ls"),
        ("delete", "veneer rm"),
        ("remove", "veneer rm"),
        ("upload", "veneer push"),
        ("download", "veneer pull"),
        ("load", "veneer adapter activate"),
        ("unload", "veneer adapter evict"),
        ("status", "veneer health"),
        ("models", "veneer ls"),
        ("run", "veneer generate"),
        ("ask", "veneer generate"),
        ("version", "veneer --version"),
        ("serve", "veneer-server"),
        ("server", "veneer-server"),
        ("start", "veneer-server"),
        ("train", "veneer-train"),
        ("bench", "veneer-loadtest"),
        ("history", "veneer adapter history"),
        ("rollback", "veneer adapter rollback"),
        ("alias", "veneer adapter alias"),
        ("evict", "veneer adapter evict"),
        ("genrate", "veneer generate"),
        ("rollbak", "veneer adapter rollback"),
        ("adapter list", "veneer adapter ls"),
        ("adapter delete", "veneer adapter rm"),
        ("adapter upload", "veneer adapter push"),
        ("adapter download", "veneer adapter pull"),
        ("adapter load", "veneer adapter activate"),
        ("adapter unload", "veneer adapter evict"),
        ("adapter info", "veneer adapter show"),
        ("adapter rolback", "veneer adapter rollback"),
        ("adapter generate", "veneer generate"),
    ],
)
def test_a_guessed_command_is_answered_with_the_right_one(
    typed: str, meant: str, run: Run
) -> None:
    failed = run(*typed.split(), "x")
    assert failed.exit_code == 2
    assert f"`{meant}`" in failed.stderr


def test_a_word_without_likeness_is_answered_with_the_list(run: Run) -> None:
    failed = run("xyzzy")
    assert failed.exit_code == 2
    assert "'veneer -h'" in failed.stderr


def test_every_command_that_is_suggested_exists() -> None:
    def runs(words: list[str]) -> bool:
        command: Any = get_command(cli)
        for word in words:
            command = command.commands.get(word)
            if command is None:
                return False
        return True

    def check(group: Any, path: str) -> None:
        for word, meant in group.guesses.items():
            assert word not in group.commands, f"{path} {word} is a command"
            first, *words = meant.split()
            if first == "veneer" and not words[0].startswith("-"):
                assert runs(words), meant
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                check(command, f"{path} {name}")

    check(get_command(cli), "veneer")


def test_push_pull_and_show_need_no_second_word(
    server: FakeServer, run: Run, adapter_folder: Any
) -> None:
    done = run("push", str(adapter_folder), "--name", "short")
    assert (done.exit_code, "published: short@" in done.stdout) == (0, True), done.stderr
    assert run("show", "short").exit_code == 0
    assert "--force" in run("pull", "-h").stdout


def test_a_wrong_choice_is_named_without_pythons_words(run: Run) -> None:
    failed = run("adapter", "activate", "chat", "--tier", "disk")
    assert failed.exit_code == 2
    assert "'host', 'device'" in failed.stderr
    assert "Value error" not in failed.stderr
    assert "remote" not in run("adapter", "activate", "-h").stdout


def test_a_push_without_a_name_suggests_one(run: Run, tmp_path: Path) -> None:
    for given, suggested in (
        ("runs/My SQL/", "my-sql"),
        ("hf://org/sql-lora@main", "sql-lora"),
        ("s3://bucket/path/x", "x"),
        ("/", "my-adapter"),
    ):
        failed = run("push", given)
        assert failed.exit_code == 1
        assert f"such as --name {suggested}\n" in failed.stderr.replace("\r", "")


def test_ctrl_c_in_a_push_says_that_it_goes_on(
    run: Run, adapter_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Client, "push", interrupted)
    stopped = run("push", str(adapter_folder), "--name", "x")
    assert stopped.exit_code == 130
    assert "nothing was published" in stopped.stderr
    assert "the same command resumes" in stopped.stderr


def test_ctrl_c_says_what_is_left_of_a_uri_s_push_and_of_a_pull(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Client, "register", interrupted)
    monkeypatch.setattr(Client, "pull", interrupted)
    pushed = run("push", "hf://org/sql-lora", "--name", "x")
    assert (pushed.exit_code, "`veneer show x` shows which" in pushed.stderr) == (130, True)
    pulled = run("pull", "x", str(tmp_path / "x"))
    assert (pulled.exit_code, "nothing of it is kept" in pulled.stderr) == (130, True)


def test_a_folder_that_is_no_adapters_is_recognised(
    run: Run, tmp_path: Path, adapter_folder: Path
) -> None:
    assert (
        "the folder 'adapter' in it has one"
        in run("push", str(adapter_folder.parent), "--name", "x").stderr
    )
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    told = run("push", str(tmp_path / "model"), "--name", "x").stderr
    assert "holds a whole model" in told
    assert "veneer-server --base" in told


# ------------------------------------------------------------------------- prompts


def test_words_that_were_not_quoted(server: FakeServer, run: Run) -> None:
    for words in (("generate", "tell", "me", "more"), ("call", "GetAdapter", "{", "}")):
        failed = run(*words)
        assert (failed.exit_code, "spaces in quotes" in failed.stderr) == (2, True)
    assert server.calls == []


@pytest.mark.parametrize(
    "words", [("ls", "x"), ("health", "x"), ("push", "a", "b"), ("usage", "november")]
)
def test_an_argument_too_many_is_no_text_without_quotes(
    words: tuple[str, ...], server: FakeServer, run: Run
) -> None:
    failed = run(*words)
    assert failed.exit_code == 2
    assert f"({words[-1]})\n" in failed.stderr
    assert f"veneer {words[0]} -h" in failed.stderr
    assert server.calls == []


def test_an_empty_adapter_is_not_the_base(server: FakeServer, run: Run) -> None:
    for command in (("generate", "hi"), ("chat",)):
        failed = run(*command, "-a", "", input="hi\n")
        assert (failed.exit_code, "--adapter is empty" in failed.stderr) == (1, True)
    assert server.calls == []


def test_a_number_that_no_field_holds_names_its_flag(run: Run) -> None:
    failed = run("generate", "hi", "--max-tokens", "999999999999", "--seed", "1")
    assert failed.exit_code == 2
    assert "'--max-tokens'" in failed.stderr
    assert run("generate", "hi", "--timeout", "0").exit_code == 2
    missing = run("generate", "hi", "--json-schema", "nope.json").stderr
    assert "Errno" not in missing
    both = run("plan", "--like", "chat", "--rank", "4").stderr
    assert "--like chat implies rank" in both
    assert run("plan", "--rank", "0").exit_code == 2


@pytest.mark.parametrize("given", [("",), ("  \n",), ("--raw", ""), ("-",), ("--json", "")])
def test_an_empty_prompt_is_refused_before_a_call(
    given: tuple[str, ...], server: FakeServer, run: Run
) -> None:
    failed = run("generate", *given, input="")
    assert failed.exit_code == 1
    assert "the prompt is empty" in failed.stderr
    assert server.calls == []


def test_a_prompt_of_another_encoding_is_told(server: FakeServer, run: Run) -> None:
    failed = run("generate", os.fsdecode(b"caf\xe9"))
    assert (failed.exit_code, "not UTF-8" in failed.stderr) == (1, True)
    assert server.calls == []


def test_blank_text_may_be_continued_verbatim(server: FakeServer, run: Run) -> None:
    assert run("generate", "--raw", "\n").exit_code == 0
    assert server.calls[-1][1].prompt == "\n"


def _answer(tokens: int, *others: int) -> inference_pb2.GenerateResponse:
    """Samples of so many tokens; those of 8 were cut."""

    def reason(count: int) -> Any:
        cut = count == 8
        return inference_pb2.FINISH_REASON_LENGTH if cut else inference_pb2.FINISH_REASON_STOP

    made = inference_pb2.GenerateResponse(
        text="first",
        token_ids=range(tokens),
        finish_reason=reason(tokens),
        usage=inference_pb2.Usage(prompt_tokens=3, completion_tokens=tokens + sum(others)),
    )
    for count in others:
        made.others.add(text="more", token_ids=range(count), finish_reason=reason(count))
    return made


def test_samples_are_counted_each(server: FakeServer, run: Run) -> None:
    server.on_generate = lambda request: _answer(8, 8, 5)
    done = run("generate", "--n", "3", "hello")
    assert done.exit_code == 0
    assert "[1] was cut after 8 tokens" in done.stderr
    assert "[2] was cut after 8 tokens" in done.stderr
    assert "[3] was cut" not in done.stderr
    assert "3 samples, 21 tokens in all" in done.stderr
    assert "cut after 21" not in done.stderr


def test_only_a_later_sample_was_cut(server: FakeServer, run: Run) -> None:
    server.on_generate = lambda request: _answer(5, 8)
    assert "[2] was cut after 8 tokens" in run("generate", "-n", "2", "hello").stderr


OPEN = '{"type": "object", "properties": {"name": {"type": "string"}}}'
NESTED = json.dumps(
    {
        "type": "object",
        "additionalProperties": False,
        "properties": {"of": {"type": "array", "items": json.loads(OPEN)}},
    }
)
CLOSED = '{"type": "object", "properties": {}, "additionalProperties": false}'


@pytest.mark.parametrize("more", [(), ("--n", "2"), ("--json",)])
@pytest.mark.parametrize("schema", [OPEN, NESTED])
def test_cut_json_is_said_with_its_likely_cause(
    schema: str, more: tuple[str, ...], server: FakeServer, run: Run
) -> None:
    server.on_generate = lambda request: _answer(8, 8)
    done = run("generate", "hi", "--max-tokens", "8", "--json-schema", schema, *more)
    assert "the JSON is incomplete" in done.stderr
    assert '"additionalProperties": false' in done.stderr
    if "--json" in more:
        json.loads(done.stdout)


def test_cut_json_of_a_closed_schema_and_other_cut_constraints(
    server: FakeServer, run: Run
) -> None:
    done = run("generate", "hi", "--max-tokens", "8", "--json-schema", CLOSED)
    assert "the JSON is incomplete" in done.stderr
    assert "additionalProperties" not in done.stderr
    done = run("generate", "hi", "--max-tokens", "8", "--regex", "a+")
    assert "does not match the regular expression yet" in done.stderr
    assert "incomplete" not in run("generate", "hi", "--max-tokens", "8").stderr


# -------------------------------------------------------------------- veneer call


@pytest.mark.parametrize(
    ("method", "body", "says"),
    [
        ("EvictAdapter", '{"name": "a", "mode": []}', "mode: give a string"),
        ("EvictAdapter", '{"name": "a", "mode": {}}', "mode: give a string"),
        ("EvictAdapter", '{"name": "a", "mode": "x"}', "EVICT_MODE_DRAIN"),
        ("ActivateAdapter", '{"name": "a", "tier": ["a"]}', "TIER_HOST"),
        ("Generate", "[1]", "give an object"),
        ("Generate", "[]", "give an object"),
        ("Generate", "5", "give an object"),
        ("Generate", "null", "give an object"),
        ("Generate", '{"prompt": {"a": 1}}', "prompt: give a string"),
        ("Generate", '{"stopping": 5}', "stopping: give an object"),
        ("Generate", '{"stopping": {"stop": "a"}}', "stopping.stop: give a list"),
        ("Generate", '{"stopping": {"stop": [[]]}}', "stopping.stop[0]: give a string"),
        ("Generate", '{"tools": [1]}', "tools[0]: give an object"),
        ("Generate", '{"sampling": {"logit_bias": []}}', "sampling.logit_bias: give an object"),
        ("Generate", '{"sampling": {"logit_bias": {"a": 1}}}', "sampling.logit_bias"),
        ("Generate", '{"priority": {}}', "priority: give a number"),
        ("Generate", '{"useprefix": true}', "did you mean use_prefix_cache"),
        ("Generate", '{"stopping": {"max_token": 1}}', "did you mean stopping.max_tokens"),
        ("Generate", "not json", "line 1 column 1"),
    ],
)
def test_json_that_does_not_fit_is_explained(
    method: str, body: str, says: str, run: Run
) -> None:
    failed = run("call", method, body)
    assert failed.exit_code == 1
    assert says in failed.stderr
    for inside in ("unhashable", "iterable", "bytes-like", "TypeError", "int()", "Failed to"):
        assert inside not in failed.stderr


def test_json_that_fits_still_does(server: FakeServer, run: Run) -> None:
    body = {
        "prompt": "a",
        "sampling": {"logit_bias": {"7": "-1.5"}, "seed": "12", "temperature": 0},
        "stopping": {"maxTokens": 3, "stop": ["x"]},
        "usePrefixCache": None,
    }
    assert run("call", "Generate", json.dumps(body)).exit_code == 0
    request = server.calls[-1][1]
    assert (request.stopping.max_tokens, request.sampling.seed) == (3, 12)
    assert run("call", "EvictAdapter", '{"name": "chat", "mode": 2}').exit_code == 0


# --------------------------------------------------------------------- addresses


@pytest.fixture
def http_port() -> Iterator[int]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield listening.server_port
        listening.shutdown()
        thread.join()


@pytest.mark.parametrize("command", ["info", "call", "health"])
def test_an_http_port_is_recognised(command: str, http_port: int, run: Run) -> None:
    failed = run(command, "--server", f"127.0.0.1:{http_port}")
    assert failed.exit_code == 1
    assert f"127.0.0.1:{http_port} answers, but not in gRPC" in failed.stderr
    assert "--listen" in failed.stderr
    for inside in ("SETTINGS", "UNAVAILABLE", "HTTP/2", "ipv4:"):
        assert inside not in failed.stderr


def test_why_nobody_answers_is_said_in_plain_words(run: Run) -> None:
    refused = run("info", "--server", "127.0.0.1:1").stderr
    assert "(connection refused)" in refused
    assert "UNKNOWN" not in refused
    nowhere = run("info", "--server", "nohost.invalid:50051").stderr
    assert "no host has this name" in nowhere
    assert "lookup error" not in nowhere


# --------------------------------------------------------------------------- words


def test_every_method_that_a_command_calls_has_the_commands_name() -> None:
    others = {"Follow", "FetchWeights"}  # between servers
    for file in (adapters_pb2, inference_pb2, server_pb2):
        for service in file.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                if method.name not in others:
                    told = in_cli_words(f"{method.name} requires the role admin")
                    assert told.startswith("`veneer "), method.name


def test_every_enums_value_has_the_flags_value() -> None:
    told = in_cli_words("`tier` must be TIER_HOST or TIER_DEVICE")
    assert told == "--tier must be host or device"
    assert in_cli_words("use EVICT_MODE_FAIL_IF_BUSY") == "use fail-if-busy"
    assert in_cli_words("'TIER_HOST' is what you sent") == "'TIER_HOST' is what you sent"


def test_a_budget_that_is_refused_names_this_commands_flag(
    server: FakeServer, run: Run
) -> None:
    told = "--device-adapter-bytes 1 holds no adapter; --host-cache-bytes is enough"
    server.refusals.append(
        Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, told, "ADAPTER_BUDGET_EXCEEDED")
    )
    failed = run("budgets", "--device", "1")
    assert failed.stderr.strip() == "error: --device 1 holds no adapter; --host is enough"
