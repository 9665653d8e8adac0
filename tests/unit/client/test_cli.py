"""The command ``veneer`` against the fake server, in this process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from veneer_client.cli.show import byte_size
from veneer_proto.v1 import inference_pb2
from veneer_registry.bundle_files import ALLOWED_FILES

from tests.unit.client.fake_server import FakeServer, Refusal

Run = Callable[..., Any]


def test_place_of_the_server(server: FakeServer, run: Run) -> None:
    elsewhere = {"VENEER_SERVER": "127.0.0.1:1"}
    assert run("info").exit_code == 0
    assert run("--server", server.address, "info", env=elsewhere).exit_code == 0
    assert run("info", "--server", server.address, env=elsewhere).exit_code == 0
    inner_wins = run("--server", "127.0.0.1:1", "adapter", "ls", "--server", server.address)
    assert inner_wins.exit_code == 0
    assert run("info", env=elsewhere).exit_code == 1


def test_error_is_one_line(run: Run) -> None:
    failed = run("info", env={"VENEER_SERVER": "127.0.0.1:1"})
    assert failed.exit_code == 1
    assert failed.stdout == ""
    assert len(failed.stderr.strip().splitlines()) == 1
    assert failed.stderr.startswith("error: no Veneer server answers at 127.0.0.1:1: start")


@pytest.mark.parametrize("args", [("--debug", "info"), ("info", "--debug")])
def test_debug_shows_the_trace(args: tuple[str, ...], run: Run) -> None:
    failed = run(*args, env={"VENEER_SERVER": "127.0.0.1:1"})
    assert failed.exit_code == 1
    assert "Traceback" in failed.stderr
    assert "error: no Veneer server answers" in failed.stderr


def test_suggestion_is_shown(run: Run) -> None:
    failed = run("adapter", "show", "chatt")
    assert failed.exit_code == 1
    assert "did you mean chat?" in failed.stderr


def test_markup_in_a_message_is_text(server: FakeServer, run: Run) -> None:
    server.refusals.append(Refusal(grpc.StatusCode.ABORTED, "[red]x[/red] [oops", "ABORTED"))
    assert "[red]x[/red] [oops" in run("info").stderr


def test_generate(server: FakeServer, run: Run) -> None:
    done = run("generate", "-a", "chat", "hello", "--max-tokens", "2", "--temperature", "0")
    assert done.exit_code == 0
    assert done.stdout == "0 1 \n"
    assert done.stderr.strip() == (
        "truncated at 2 tokens (see --max-tokens) · queue 2.0 ms · load 41 ms (disk) · first "
        "token 88 ms · 10 tok/s · chat@abababababab"
    )
    ((_, request),) = server.calls
    assert request.messages.messages[0].content == "hello"
    assert request.sampling.temperature == 0.0
    assert request.sampling.HasField("temperature")
    assert not request.sampling.HasField("top_p")


def test_generate_raw_from_a_pipe(server: FakeServer, run: Run) -> None:
    done = run("generate", "--raw", "-", "--stop", "x", "--stop", "y", input="from a pipe")
    assert done.exit_code == 0
    assert "base" in done.stderr
    ((_, request),) = server.calls
    assert request.prompt == "from a pipe"
    assert list(request.stopping.stop) == ["x", "y"]


def test_generate_json(run: Run) -> None:
    answer = json.loads(run("generate", "--raw", "hi", "-a", "chat", "--json").stdout)
    assert answer["text"] == "chat>hi"
    assert answer["finish_reason"] == "stop"
    assert answer["provenance"]["tier"] == "disk"


def test_generate_with_every_flag(server: FakeServer, run: Run, tmp_path: Path) -> None:
    flags = "--min-p 0.125 --repetition-penalty 1.5 --presence-penalty 1 --frequency-penalty -1"
    flags += " --logit-bias 7=-100 --logit-bias 8=2.5 --stop-token-id 3 --stop-token-id 4"
    flags += " --top-logprobs 5 --no-prefix-cache --timeout 30 --regex a+ --top-p 0.5 --top-k 0"
    done = run("generate", "--raw", "hi", *flags.split(), "--json")
    assert done.exit_code == 0, done.stderr
    ((_, request),) = server.calls
    assert request == inference_pb2.GenerateRequest(
        prompt="hi",
        sampling=inference_pb2.SamplingOptions(
            top_p=0.5,
            top_k=0,
            min_p=0.125,
            repetition_penalty=1.5,
            presence_penalty=1,
            frequency_penalty=-1,
            logit_bias={7: -100, 8: 2.5},
        ),
        stopping=inference_pb2.StoppingOptions(stop_token_ids=[3, 4]),
        output=inference_pb2.OutputOptions(logprobs=True, top_logprobs=5),
        use_prefix_cache=False,
        constraint=inference_pb2.Constraint(regex="a+"),
    )


def test_schema_from_a_file_or_as_it_stands(
    server: FakeServer, run: Run, tmp_path: Path
) -> None:
    file = tmp_path / "schema.json"
    file.write_text('{"type": "object"}')
    for given in (str(file), ' {"type": "object"}'):
        assert run("generate", "hi", "--json-schema", given).exit_code == 0
        assert json.loads(server.calls[-1][1].constraint.json_schema) == {"type": "object"}
    run("generate", "hi", "--choice", "yes", "--choice", "no")
    assert list(server.calls[-1][1].constraint.choice.texts) == ["yes", "no"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--json-schema", "nowhere.json"), "No such file"),
        (("--json-schema", "{"), "is not a JSON schema"),
        (("--json-schema", "[1]"), "is not a JSON schema"),
        (("--logit-bias", "7"), "ID=BIAS"),
        (("--regex", "a", "--choice", "b"), "give one of them"),
    ],
)
def test_flags_that_make_no_sense(
    flags: tuple[str, ...], says: str, server: FakeServer, run: Run
) -> None:
    failed = run("generate", "hi", *flags)
    assert failed.exit_code == 1
    assert says in failed.stderr
    assert len(failed.stderr.strip().splitlines()) == 1
    assert server.calls == []


def test_samples_and_top_logprobs_are_shown(server: FakeServer, run: Run) -> None:
    top = [inference_pb2.TopLogprob(token_id=9, logprob=-0.25)]
    score = inference_pb2.TokenLogprob(token_id=7, logprob=-0.5, top=top)
    server.on_generate = lambda request: inference_pb2.GenerateResponse(
        text="red",
        token_ids=[7],
        logprobs=[score],
        finish_reason=inference_pb2.FINISH_REASON_STOP,
        others=[
            inference_pb2.Sample(text="blue", finish_reason=inference_pb2.FINISH_REASON_STOP)
        ],
    )
    done = run("generate", "hi", "--n", "2", "--top-logprobs", "1")
    assert done.stdout == "[1] red\n[2] blue\n"
    assert "7:-0.500  of  9:-0.250" in done.stderr, "a server of before names no tokens"
    assert server.calls[-1][1].output.n == 2
    score.token, score.top[0].token = " red", "\n"
    done = run("generate", "hi", "--n", "2", "--top-logprobs", "1")
    assert '" red":-0.500  of  "\\n":-0.250' in done.stderr


def test_pins(server: FakeServer, run: Run) -> None:
    server.add("chat")
    assert run("adapter", "pin", "chat").stdout.endswith("is pinned\n")
    assert server.adapters["chat"].pinned
    assert run("adapter", "unpin", "chat").stdout.endswith("is in disk, unpinned\n")
    assert not server.adapters["chat"].pinned


def test_usage(server: FakeServer, run: Run) -> None:
    period = ("--start", "2026-11-01", "--end", "2026-12-01T02:00+02:00")
    shown = run("usage", "--tenant", "team-a", *period).stdout
    assert "2026-11-01 00:00 to 2026-12-01 00:00 UTC" in shown
    for text in ("team-a", "1,234", "1.500"):
        assert text in shown
    report = json.loads(run("usage", "--json", *period).stdout)
    assert report["end"] == "2026-12-01T00:00:00+00:00"
    assert report["tenants"][0]["adapter_byte_hours"] == 1.5 * (1 << 30)
    (_, request), *_ = server.calls
    assert (request.tenant, request.start.ToSeconds()) == ("team-a", 1793491200)
    assert run("usage", "--end", "soon").exit_code == 1


def test_plan_is_an_exit_status_too(server: FakeServer, run: Run) -> None:
    fits = run("plan", "--rank", "8", "--module", "q_proj", "--adapters", "2")
    assert fits.exit_code == 0, fits.output
    assert "3 on the device, 4 on the host" in fits.stdout
    assert "5 at once, limited by kv cache" in fits.stdout
    short = run("plan", "--like", "chat", "--concurrency", "9", "--context", "64")
    assert (short.exit_code, "raise --kv-cache-bytes" in short.stdout) == (1, True)
    assert json.loads(run("plan", "--json").stdout)["sequences"]["limited_by"] == "kv cache"
    first, second, third = (request for _, request in server.calls)
    assert (first.shape.rank, list(first.shape.modules), first.adapters) == (8, ["q_proj"], 2)
    assert (second.like, second.concurrency, second.context_length) == ("chat", 9, 64)
    assert third.WhichOneof("adapter") is None


def complete(server: str, *words: str) -> list[str]:
    """What Tab offers after these words, as a shell asks for it."""
    done = subprocess.run(
        [Path(sys.executable).with_name("veneer")],
        env={
            **os.environ,
            "VENEER_SERVER": server,
            "_VENEER_COMPLETE": "complete_bash",
            "COMP_WORDS": "veneer " + " ".join(words),
            "COMP_CWORD": str(len(words)),
        },
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.push
def test_names_and_revisions_are_completed(server: FakeServer) -> None:
    for name in ("sql", "sql-long", "chat"):
        server.add(name)
    assert complete(server.address, "generate", "-a", "sq") == ["sql", "sql-long"]
    assert complete(server.address, "adapter", "show", "c") == ["chat"]
    assert complete(server.address, "chat", "-a", "sql@7") == ["sql@73716c73716c"]
    elsewhere = "--server", server.address
    assert complete("127.0.0.1:1", *elsewhere, "adapter", "rm", "ch") == ["chat"]


@pytest.mark.push
def test_without_a_server_tab_is_silent() -> None:
    assert complete("127.0.0.1:1", "generate", "-a", "sq") == []
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        address = f"127.0.0.1:{deaf.getsockname()[1]}"
        assert complete(address, "adapter", "show", "c") == []


def test_push(server: FakeServer, run: Run, adapter_folder: Path) -> None:
    done = run(
        "adapter",
        "push",
        str(adapter_folder),
        "--name",
        "chat",
        "--label",
        "team=a=b",
        "--replace",
        "--activate",
    )
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("published: chat@")
    assert "skipped: training_args.bin" in done.stderr
    assert "warning: server says" in done.stderr
    spec = server.uploads[0].spec
    assert dict(spec.labels) == {"team": "a=b"}
    assert (spec.allow_replace, spec.activate) == (True, True)
    assert {file.name for file in spec.files} <= set(ALLOWED_FILES)


def test_push_dry_run(server: FakeServer, run: Run, adapter_folder: Path) -> None:
    done = run("adapter", "push", str(adapter_folder), "--name", "chat", "--dry-run")
    assert done.stdout.startswith("valid: chat@")
    assert server.uploads[0].spec.validate_only


def test_push_refuses_a_malformed_label(
    server: FakeServer, run: Run, adapter_folder: Path
) -> None:
    failed = run("adapter", "push", str(adapter_folder), "--name", "chat", "--label", "team")
    assert failed.exit_code == 1
    assert "KEY=VALUE" in failed.stderr
    assert server.calls == []


def test_adapter_commands(server: FakeServer, run: Run) -> None:
    assert "no adapters" in run("adapter", "ls").stdout
    server.add("chat")
    assert "chat@" in run("adapter", "ls").stdout
    assert "publish" not in run("adapter", "ls", "--label", "team=none").stdout
    assert json.loads(run("adapter", "ls", "--json").stdout)[0]["name"] == "chat"
    assert "(current)" in run("adapter", "show", "chat").stdout
    assert json.loads(run("adapter", "show", "chat", "--json").stdout)["adapter"]["rank"] == 4
    done = run("adapter", "activate", "chat", "--tier", "host", "--pin")
    assert done.stdout.strip().endswith("is in host, pinned")
    assert "freed 200 B" in run("adapter", "evict", "chat", "--mode", "fail_if_busy").stdout
    assert run("adapter", "rm", "chat", "--etag", "e1").stdout.startswith("deleted chat (")
    assert server.calls[-1][1].etag == "e1"


def test_health_is_an_exit_status(server: FakeServer, run: Run) -> None:
    assert run("health").exit_code == 0
    server.ready = False
    waiting = run("health")
    assert (waiting.exit_code, waiting.stdout.strip()) == (1, "not_serving")


def test_health_waits(server: FakeServer, run: Run) -> None:
    server.ready = False

    def get_ready() -> None:
        while not server.calls:
            time.sleep(0.01)
        server.ready = True

    threading.Thread(target=get_ready, daemon=True).start()
    waited = run("health", "--wait", "60s")
    assert (waited.exit_code, waited.stdout.strip()) == (0, "serving")
    assert len(server.calls) > 1
    server.ready = False
    assert run("health", "--wait", "0.3s").stdout.strip() == "not_serving"
    assert run("health", "--wait", "soon").exit_code == 1
    elsewhere = {"VENEER_SERVER": "127.0.0.1:1"}
    assert "no Veneer server" in run("health", "--wait", "0.3s", env=elsewhere).stderr


def test_info(run: Run) -> None:
    shown = run("info").stdout
    assert "fake-base" in shown
    assert "base 1.0 KiB + kv_cache 2.0 KiB = 3.0 KiB of 4.0 KiB" in shown
    assert "front 512 B, engine 2.5 KiB" in shown
    assert json.loads(run("info", "--json").stdout)["context_length"] == 128
    assert "yes: send pushes and all other changes there" in shown


@pytest.mark.parametrize(
    "method",
    [
        "GetServerInfo",
        "veneer.v1.ServerService/GetServerInfo",
        "/veneer.v1.ServerService/GetServerInfo",
        "veneer.v1.ServerService.GetServerInfo",
    ],
)
def test_call_unary(method: str, run: Run) -> None:
    assert json.loads(run("call", method).stdout)["version"] == "9.9"


def test_call_stream(run: Run) -> None:
    done = run("call", "GenerateStream", '{"prompt": "x", "stopping": {"max_tokens": 2}}')
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line.get("text") for line in lines] == ["0 ", "1 ", None]
    assert lines[-1]["final"]["finish_reason"] == "FINISH_REASON_LENGTH"


@pytest.mark.parametrize("mode", ['"EVICT_MODE_FAIL_IF_BUSY"', "2", '"2"'])
def test_call_takes_an_enum_by_name_and_number(mode: str, run: Run, server: FakeServer) -> None:
    assert run("call", "EvictAdapter", f'{{"name": "chat", "mode": {mode}}}').exit_code == 0
    assert server.calls[-1][1].mode == 2


def test_call_lists_methods(run: Run) -> None:
    lines = run("call").stdout.splitlines()
    assert (
        "veneer.v1.AdapterService/UploadAdapter (stream veneer.v1.UploadAdapterRequest) "
        "-> veneer.v1.UploadAdapterResponse" in lines
    )
    assert any(line.startswith("grpc.health.v1.Health/Check ") for line in lines)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("Nope",), "`veneer call` lists them"),
        (("GetAdapter", '{"nam": 1}'), "its fields: name"),
        (("GetAdapter", "{"), "does not fit veneer.v1.GetAdapterRequest"),
        (("EvictAdapter", '{"name": "chat", "mode": "x"}'), "one of EVICT_MODE_"),
        (("UploadAdapter",), "use `veneer adapter push`"),
        (("GetAdapter", '{"name": "chatt"}'), "no such adapter"),
    ],
)
def test_call_errors(args: tuple[str, ...], says: str, run: Run) -> None:
    failed = run("call", *args)
    assert failed.exit_code == 1
    assert says in failed.stderr
    assert len(failed.stderr.strip().splitlines()) == 1


def test_every_help_has_examples(run: Run) -> None:
    commands = [(), ("adapter",)]
    commands += [(c,) for c in ("generate", "chat", "info", "health", "plan", "call")]
    commands += [(c,) for c in ("budgets", "self-test", "usage")]
    commands += [("adapter", c) for c in ("push", "ls", "show", "activate", "evict", "rm")]
    commands += [("adapter", c) for c in ("pin", "unpin", "watch", "alias", "aliases")]
    commands += [("adapter", c) for c in ("rollback", "label", "retain", "history")]
    for command in commands:
        done = run(*command, "--help")
        assert done.exit_code == 0
        assert "Examples:" in done.stdout, command


def test_ctrl_c_ends_with_130(server: FakeServer) -> None:
    server.hold = threading.Event()
    process = subprocess.Popen(
        [sys.executable, "-m", "veneer_client.cli.main", "generate", "hi"],
        env={**os.environ, "VENEER_SERVER": server.address},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A suite started in the background inherits an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    assert process.stdout.read(2) == b"0 ", "the answer has begun"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in errors


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (4_939_072, "4.7 MiB"),
        (1 << 50, "1024.0 TiB"),
    ],
)
def test_byte_size(size: int, text: str) -> None:
    assert byte_size(size) == text


def test_words_of_other_programs(server: FakeServer, run: Run) -> None:
    assert "no adapter is in memory" in run("ps").stdout
    server.add("chat")
    assert run("ls").stdout == run("adapter", "ls").stdout
    assert "no adapter is in memory" in run("ps").stdout, "it is on disk"
    (adapter,) = server.adapters.values()
    adapter.tier = inference_pb2.TIER_HOST
    assert "chat@" in run("ps").stdout
    assert json.loads(run("ps", "--json").stdout)[0]["name"] == "chat"
    assert run("rm", "chat").exit_code == 0
    assert "no adapters" in run("ls").stdout
