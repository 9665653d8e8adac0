"""Start servers on damaged folders: ``python -m tests.torture.at_rest_worker BASE``.

It imports everything once, then reads one JSON object per line and answers each with one. Every
start happens in a forked process, so that a start that ends in SIGBUS or SIGSEGV is a result
("died") and does not end the run. The server is the real `App` on real sockets with the real
engine code, whose loop runs on a thread (`tests.torture.in_process`).

Requests::

    {"folder": F, "names": [...], "push": {name: adapter folder}}
        -> {"answers": {name: [token, ...] | refusal}, "pushed": {...}, "log": [...]}
        -> {"refused": refusal, "log": [...]}     the server refused to start
        -> {"died": "signal 7"} or {"crashed": traceback}

A refusal is {"code", "reason", "message"}. ``log`` has the lines at WARNING and above. With
``"planted": NAME`` that start has one of the bugs in `PLANTED`.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

# Imported before the forks, so that a start takes half a second instead of seconds. The modules
# of transformers are the ones that it imports when it loads a 4-bit Llama.
import accelerate  # noqa: F401
import bitsandbytes  # noqa: F401
import grpc
import numpy.ma  # noqa: F401
import transformers
import transformers.integrations.bitsandbytes
import transformers.models.llama.modeling_llama
import transformers.quantizers.quantizer_bnb_4bit
import veneer_server.backends.native.decoder  # noqa: F401
from veneer_registry import opening, quarantine
from veneer_registry.errors import VeneerError
from veneer_server.models import (
    loader,  # noqa: F401
    sealed,
)
from veneer_server.text import prompts  # noqa: F401

from tests.planted import planted
from tests.server_harness import read_files, refusal, request, upload_messages
from tests.torture.in_process import in_process

PROMPT = [11, 45, 301, 77, 8, 130, 256, 19]
TOKENS = 6
SETTINGS = {
    "quantization": "nf4",
    "dtype": "bfloat16",
    "log_format": "json",
    "kv_cache_bytes": "4MiB",
    "host_cache_bytes": "64MiB",
    "device_adapter_bytes": "64MiB",
}


class Lines(logging.Handler):
    """Keeps log lines at WARNING and above."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        fields = getattr(record, "veneer_fields", {})
        told = " ".join(f"{key}={value}" for key, value in fields.items())
        self.lines.append(f"{record.levelname} {record.getMessage()} {told}".strip())


async def start(base: str, asked: dict[str, Any]) -> dict[str, Any]:
    """Start once, get one greedy answer per name, and stop."""
    answers: dict[str, Any] = {}
    pushed: dict[str, Any] = {}
    async with in_process(Path(base), Path(asked["folder"]), **SETTINGS) as server:
        for name, folder in asked.get("push", {}).items():
            messages = upload_messages(read_files(Path(folder)), name, allow_replace=True)
            try:
                await server.adapters.UploadAdapter(messages)
                pushed[name] = "pushed"
            except grpc.aio.AioRpcError as error:
                pushed[name] = vars(refusal(error))
        for name in asked["names"]:
            try:
                answer = await server.inference.Generate(
                    request(
                        token_ids=PROMPT,
                        adapter=name,
                        stopping={"max_tokens": TOKENS, "ignore_eos": True},
                    )
                )
                answers[name] = list(answer.token_ids)
            except grpc.aio.AioRpcError as error:
                answers[name] = vars(refusal(error))
        if asked.get("snapshot"):
            # Copied while running, as after a crash: the catalog's log is not merged into its
            # file.
            shutil.copytree(Path(asked["folder"]), Path(asked["snapshot"]))
    return {"answers": answers, "pushed": pushed}


def one(base: str, asked: dict[str, Any]) -> dict[str, Any]:
    """Do `start`, and return any outcome, also a failure."""
    lines = Lines()
    logging.getLogger("veneer_server").addHandler(lines)
    logging.getLogger("veneer_registry").addHandler(lines)
    try:
        return {**asyncio.run(start(base, asked)), "log": lines.lines}
    except VeneerError as error:
        said = {"code": error.code, "reason": error.reason, "message": error.message}
        return {"refused": said, "log": lines.lines}
    except BaseException:
        return {"crashed": traceback.format_exc(), "log": lines.lines}


def _start_without_a_catalog() -> AbstractContextManager[Any]:
    return patch.multiple(opening, check_catalog=lambda *_: None, check_pair=lambda *_: None)


PLANTED: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "the cache of 4-bit weights is trusted": lambda: planted(
        sealed, "if digest != sealed.sha256:", "if False:"
    ),
    "damaged weights are deleted": lambda: planted(
        quarantine, "move_away(folder, to)", "remove(folder)"
    ),
    "a start goes on without a catalog": _start_without_a_catalog,
}
"""Bugs that the judge must detect."""


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    # A start collects garbage: each fork would visit, and so copy, all imported objects.
    gc.collect()
    gc.freeze()
    serve(given.base)


def serve(base: str) -> None:
    """Answer requests until the input ends."""
    print("ready", flush=True)
    for line in sys.stdin:
        with tempfile.NamedTemporaryFile("w+", suffix=".json") as result:
            pid = os.fork()
            if pid == 0:
                # The answer goes through a file, since anything could print to stdout.
                os.dup2(2, 1)
                asked = json.loads(line)
                with PLANTED[asked["planted"]]() if asked["planted"] else nullcontext():
                    answer = one(base, asked)
                result.write(json.dumps(answer))
                result.flush()
                os._exit(0)
            _, status = os.waitpid(pid, 0)
            text = Path(result.name).read_text()
            if os.WIFSIGNALED(status):
                text = json.dumps({"died": f"signal {os.WTERMSIG(status)}", "log": []})
            print(text or json.dumps({"died": f"status {status}", "log": []}), flush=True)


if __name__ == "__main__":
    main()
