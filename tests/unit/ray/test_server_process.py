"""The server of a replica: when it counts as ready, and how long it runs. The server is a FAKE;
`veneer_ray.deployments.child`, which starts it, is the real one."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from veneer_ray.deployments.server_process import ServerProcess

SERVER = """
import json, pathlib, signal, sys
ports, stopped, does = sys.argv[1:]
def stop(*_):
    pathlib.Path(stopped).write_text("in order")
    sys.exit()
signal.signal(signal.SIGTERM, stop)
print("base already packed", flush=True)
if does == "fails":
    print("error: port 1 is taken: choose another with --listen", flush=True)
    sys.exit(3)
told = {"grpc": "a:1", "openai": "b:2", "metrics": "c:3"}
pathlib.Path(ports).write_text(json.dumps(told))
print("veneer ready  grpc=a:1", flush=True)
while True:
    signal.pause()
"""

REPLICA = """
import os, signal, sys
from pathlib import Path
from veneer_ray.deployments.server_process import ServerProcess
server = ServerProcess(lambda ports: [str(ports), "", "serves"], lambda code: None)
print(server._process.pid, flush=True)  # private: whose end is to be waited for
sys.stdin.readline()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(autouse=True)
def fake_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``python -m veneer_server`` runs in the processes of a test."""
    package = tmp_path / "path" / "veneer_server"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(SERVER)
    others = os.pathsep.join(filter(None, sys.path))
    monkeypatch.setenv("PYTHONPATH", f"{package.parent}{os.pathsep}{others}")


def test_a_line_with_ready_in_a_word_is_not_the_line_that_says_so(tmp_path: Path) -> None:
    lost: list[int] = []
    with pytest.raises(RuntimeError, match=r"did not start.* choose another with --listen"):
        ServerProcess(lambda ports: [str(ports), "", "fails"], lost.append)
    assert lost == [], "the error says it, which Serve shows"


def test_a_server_outlives_the_thread_that_started_it(tmp_path: Path) -> None:
    stopped, lost = tmp_path / "stopped", list[int]()
    made: list[ServerProcess] = []

    def start() -> None:
        flags = lambda ports: [str(ports), str(stopped), "serves"]  # noqa: E731
        made.append(ServerProcess(flags, lost.append))

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    while Path(f"/proc/self/task/{thread.native_id}").exists():
        os.sched_yield()  # the system ends it after Python; pytest's timeout bounds it
    (server,) = made
    assert (server.grpc, server.openai, server.metrics) == ("a:1", "b:2", "c:3")
    server.stop(30.0)
    assert stopped.read_text() == "in order"
    assert lost == []


def test_a_server_ends_with_its_replica() -> None:
    """Even with one that is killed."""
    replica = subprocess.Popen(
        [sys.executable, "-c", REPLICA],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert replica.stdout is not None
    fd = os.pidfd_open(int(replica.stdout.readline()))
    try:
        replica.communicate("end\n")
        assert replica.returncode == -signal.SIGKILL
        select.select([fd], [], [])  # until it has ended; pytest's timeout bounds it
    finally:
        os.close(fd)
