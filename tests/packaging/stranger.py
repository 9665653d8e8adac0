"""What a new user does with an installation, and the expected results.

Standard library only, since it runs with any Python, on other installations than this one.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

WAIT = "300s"
"""Long, since the first start downloads and converts the base."""
RUN_SECONDS = 400
USUAL = "127.0.0.1:50051"
CONSTRAINTS = Path(__file__).resolve().parents[2] / ".ci" / "constraints" / "venv.txt"
"""Versions that CI installs."""


class Failed(Exception):
    """An installation does not do what it must; the message says what."""


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Print a stage's name and its duration."""
    print(f"-- {name}", flush=True)
    began = time.monotonic()
    yield
    print(f"   {time.monotonic() - began:.0f} s", flush=True)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Installation:
    """Where programs are, and the prefix of each command (`chroot ROOT`).

    Attributes:
        environment: all variables of its processes.
        folder: current folder of its processes, as a path outside the chroot.
    """

    environment: Mapping[str, str]
    folder: Path
    prefix: Sequence[str] = ()

    def popen(self, words: Sequence[str], **more: object) -> subprocess.Popen[str]:
        """Start a command."""
        return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
            [*self.prefix, *self._program(words)],
            env=dict(self.environment),
            cwd=self.folder,
            text=True,
            **more,
        )

    def run(self, *words: str, status: int = 0) -> str:
        """Standard output and error of a command with this exit status.

        Raises:
            Failed: it ends with another status.
        """
        print(f"   $ {' '.join(words)}", flush=True)
        process = self.popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        said = process.communicate(timeout=RUN_SECONDS)[0]
        if process.returncode != status:
            raise Failed(
                f"{' '.join(words)}: status {process.returncode}, not {status}: {said}"
            )
        return said

    def _program(self, words: Sequence[str]) -> list[str]:
        """The command with its program looked up in the installation's PATH, not in ours."""
        return ["/usr/bin/env", *words]


@dataclass(frozen=True)
class Login:
    """What a client needs of a server with TLS and keys.

    Attributes:
        ca: file with the certificate to trust, as a path outside the chroot.
    """

    key: str
    ca: Path


def must_say(said: str, *wanted: str) -> None:
    """Print the answer's first line, and check that the answer contains all of these."""
    print(f"     {(said.strip().splitlines() or [''])[0][:150]}", flush=True)
    for each in wanted:
        if each not in said:
            raise Failed(f"{each!r} is not in: {said}")


def use(
    place: Installation,
    serve: Sequence[str],
    log: Path,
    *,
    asked: Sequence[Sequence[str]] = (),
    login: Login | None = None,
) -> None:
    """Start the server, wait for it, get answers by gRPC and HTTP, stop it.

    Args:
        serve: the server's command, without addresses.
        asked: commands that must then succeed; the default address in them is replaced.
        login: of a server whose own settings give it TLS and keys: it then listens on all
            addresses, and its clients' settings name the certificate.

    Raises:
        Failed: with the end of the server's log.
    """
    grpc, http = free_port(), free_port()
    host, who = "127.0.0.1", {"VENEER_SERVER": f"127.0.0.1:{grpc}"}
    if login is not None:
        host = "0.0.0.0"
        who = {"VENEER_SERVER": f"https://localhost:{grpc}", "VENEER_API_KEY": login.key}
    here = Installation({**place.environment, **who}, place.folder, place.prefix)
    flags = (("listen", grpc), ("openai-listen", http), ("metrics-listen", 0))
    addresses = [f"--{flag}={host}:{port}" for flag, port in flags]
    with log.open("w") as told:
        server = place.popen([*serve, *addresses], stdout=told, stderr=told)
    try:
        with stage("the server starts"):
            _wait(here, server)
            for words in asked:
                here.run(*(word.replace(USUAL, f"127.0.0.1:{grpc}") for word in words))
            ready = _ready_line(log)
            must_say(ready, "backend=native (", ", prebuilt)")
            info = json.loads(here.run("veneer", "call", "GetServerInfo"))
            must_say(info["backend"], "native (", ", prebuilt)")
        with stage("it answers"):
            must_say(here.run("veneer", "example", "chat", "--push"), "published: chat@")
            question = "How do I cheer up a friend?"
            said = here.run(
                "veneer",
                "generate",
                "-a",
                "chat",
                question,
                "--max-tokens",
                "48",
                "--seed",
                "1",
            )
            must_say(said, "chat@", "first token")
            must_say(_ask_http(http, question, login), " ")
            if login is not None:
                _must_be_refused(here, http, login)
    except (Failed, OSError, subprocess.SubprocessError) as error:
        tail = log.read_text()[-3000:]
        raise Failed(f"{error}\nThe server said:\n{tail}") from error
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            status = server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
            raise Failed("the server did not stop within 60 s of SIGTERM") from None
    if status:
        raise Failed(f"the server stopped with status {status}")


def _wait(here: Installation, server: subprocess.Popen[str]) -> None:
    """Wait until the server serves or has ended."""
    words = ("veneer", "health", "--wait", WAIT)
    print(f"   $ {' '.join(words)}", flush=True)
    waiting = here.popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while waiting.poll() is None:
        if server.poll() is not None:
            waiting.kill()
            waiting.wait()
            raise Failed(f"the server ended with status {server.returncode}")
        time.sleep(0.2)
    said = waiting.communicate()[0]
    must_say(said, "serving")
    if waiting.returncode:
        raise Failed(f"{' '.join(words)}: status {waiting.returncode}")


def _ready_line(log: Path) -> str:
    ready = [line for line in log.read_text().splitlines() if "veneer ready" in line]
    if not ready:
        raise Failed("the server serves, and has printed no ready line")
    return ready[0]


def _must_be_refused(here: Installation, port: int, login: Login) -> None:
    """Callers without a key, or with a wrong one."""
    keyless = {**here.environment, "VENEER_API_KEY": ""}
    stranger = Installation(keyless, here.folder, here.prefix)
    must_say(stranger.run("veneer", "ls", status=1), "authentication required")
    try:
        _ask_http(port, "Hello?", Login(f"{login.key}x", login.ca))
    except urllib.error.HTTPError as error:
        must_say(str(error), "401")
    else:
        raise Failed("a wrong key is answered")


def _ask_http(port: int, question: str, login: Login | None) -> str:
    """The answer to a request as an OpenAI client sends it."""
    body = {
        "model": "chat",
        "max_tokens": 32,
        "messages": [{"role": "user", "content": question}],
    }
    where, headers, tls = f"http://127.0.0.1:{port}", {"Content-Type": "application/json"}, None
    if login is not None:
        where, tls = f"https://localhost:{port}", ssl.create_default_context(cafile=login.ca)
        headers["Authorization"] = f"Bearer {login.key}"
    request = urllib.request.Request(
        f"{where}/v1/chat/completions", json.dumps(body).encode(), headers
    )
    print("   $ POST /v1/chat/completions", flush=True)
    with urllib.request.urlopen(request, timeout=60, context=tls) as answer:
        return str(json.load(answer)["choices"][0]["message"]["content"])


@functools.cache
def pip_environment() -> dict[str, str]:
    """The variables and files by which pip reaches packages here."""
    names = ("PIP_", "SSL_", "REQUESTS_", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
    found = {}
    asked = subprocess.check_output([sys.executable, "-m", "pip", "config", "list"], text=True)
    for line in asked.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.partition(".")
        if section in ("global", "install", "download"):
            words = str(ast.literal_eval(value)).split()
            found[f"PIP_{name.upper().replace('-', '_')}"] = " ".join(words)
    found |= {k: v for k, v in os.environ.items() if k.upper().startswith(names)}
    if os.environ.get("CI"):  # elsewhere a stranger gets the newest
        found["PIP_CONSTRAINT"] = f"{found.get('PIP_CONSTRAINT', '')} {CONSTRAINTS}".strip()
    return found
