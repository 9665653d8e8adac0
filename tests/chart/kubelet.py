"""Plays what a node does with a pod of the chart: its files, start, probes and end."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
from grpc_health.v1 import health_pb2, health_pb2_grpc
from veneer_server.access.edit_keys import add_key

from tests.backends_ran import check_ready_line, server_environment
from tests.chart.pods import Pod, image_variables
from tests.pki import Pki
from tests.ports import free_port

_READY_S = 120


@dataclass
class Node:
    """A pod's container as a process here; its paths are below ``root``, its ports others."""

    pod: Pod
    root: Path
    cache_dir: Path
    """Stands for the pod's own, since it has the base already."""
    ports: dict[str, int]
    key: str
    pki: Pki
    process: asyncio.subprocess.Process | None = None

    def here(self, text: str) -> str:
        """An argument, with the paths, ports and names of this machine."""
        moved = {m["mountPath"]: f"{self.root}{m['mountPath']}" for m in self._mounts}
        moved[self.pod.flag("cache-dir")] = str(self.cache_dir)
        longest = sorted(map(re.escape, moved), key=len, reverse=True)
        # At once: what one of them becomes may contain another.
        text = re.sub("|".join(longest), lambda found: moved[found[0]], text)
        for name, port in self.pod.ports.items():
            text = text.replace(f":{port}", f":{self.ports[name]}")
        for alias in self.pod.spec.get("hostAliases", ()):
            text = text.replace(alias["hostnames"][0], "localhost")
        return text.replace("0.0.0.0", "127.0.0.1")

    @property
    def _mounts(self) -> list[dict[str, Any]]:
        return list(self.pod.container["volumeMounts"])

    # ------------------------------------------------------------------- probes

    async def probe(self, kind: str) -> bool:
        """Run one of the container's probes once, as its node would."""
        probe = self.pod.container[kind]
        within = float(probe["timeoutSeconds"])
        try:
            async with asyncio.timeout(within):
                return await self._probed(probe)
        except (OSError, TimeoutError, httpx.HTTPError, grpc.aio.AioRpcError):
            return False

    async def _probed(self, probe: dict[str, Any]) -> bool:
        if "grpc" in probe:
            asked = probe["grpc"]
            at = f"127.0.0.1:{self._port(asked['port'])}"
            async with grpc.aio.insecure_channel(at) as channel:
                stub: Any = health_pb2_grpc.HealthStub(channel)
                request = health_pb2.HealthCheckRequest(service=asked.get("service", ""))
                answer = await stub.Check(request)
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
        if "httpGet" in probe:
            asked = probe["httpGet"]
            url = f"{asked['scheme'].lower()}://127.0.0.1:{self._port(asked['port'])}"
            headers = {each["name"]: each["value"] for each in asked.get("httpHeaders", ())}
            # A node does not check the certificate.
            async with httpx.AsyncClient(verify=False, trust_env=False) as http:
                answer = await http.get(url + asked["path"], headers=headers)
            return 200 <= answer.status_code < 400
        if "tcpSocket" in probe:
            port = self._port(probe["tcpSocket"]["port"])
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            return True
        return await self._run(probe["exec"]["command"]) == 0

    def _port(self, named: str | int) -> int:
        by_number = {number: name for name, number in self.pod.ports.items()}
        return self.ports[by_number[named] if isinstance(named, int) else named]

    async def _run(self, command: list[str]) -> int:
        """Run a command of the image, in the container."""
        own = Path(sys.executable).with_name(command[0])
        program = str(own) if own.exists() else command[0]
        process = await asyncio.create_subprocess_exec(
            program,
            *map(self.here, command[1:]),
            env=self._environment(),
            stdout=asyncio.subprocess.DEVNULL,
        )
        try:
            return await process.wait()
        finally:
            if process.returncode is None:
                process.kill()

    def _environment(self) -> dict[str, str]:
        image = {k: v for k, v in image_variables().items() if k.startswith("VENEER_")}
        return {**image, **server_environment(), "HOME": f"{self.root}/var/lib/veneer"}

    # ------------------------------------------------------------------- life

    async def start(self) -> None:
        """Start the server; returns before it is ready."""
        with (self.root / "server.log").open("wb") as log:
            self.process = await asyncio.create_subprocess_exec(
                str(Path(sys.executable).with_name("veneer-server")),
                *map(self.here, self.pod.args),
                *("--device", "cpu"),
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env=self._environment(),
            )

    async def ready(self) -> None:
        """Wait until the server says that it is ready."""
        assert self.process is not None
        assert self.process.stdout is not None
        line = await asyncio.wait_for(self.process.stdout.readline(), _READY_S)
        assert b"ready" in line, (self.root / "server.log").read_text()
        check_ready_line(line.decode(), ())

    async def pre_stop(self) -> None:
        """Run the container's preStop hook to its end."""
        command = self.pod.container["lifecycle"]["preStop"]["exec"]["command"]
        assert await self._run(command) == 0

    def terminate(self) -> None:
        """Send the signal that follows the hook."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)

    async def ended(self, within: float) -> int:
        """The exit status. Raises TimeoutError where a node would send SIGKILL."""
        assert self.process is not None
        return await asyncio.wait_for(self.process.wait(), within)

    # ------------------------------------------------------------------- callers

    def channel(self) -> grpc.aio.Channel:
        """A caller's connection to the gRPC port."""
        at = f"localhost:{self.ports['grpc']}"
        if not self.pod.flag("tls-cert"):
            return grpc.aio.insecure_channel(at)
        pair: tuple[bytes | None, bytes | None] = (None, None)
        if self.pod.flag("tls-client-ca"):
            cert, key = self.pki.client("probe")
            pair = (Path(key).read_bytes(), Path(cert).read_bytes())
        return grpc.aio.secure_channel(
            at, grpc.ssl_channel_credentials(Path(self.pki.ca_file).read_bytes(), *pair)
        )

    def http(self) -> httpx.AsyncClient:
        """A caller's client of the HTTP port."""
        tls = bool(self.pod.flag("tls-cert"))
        context = ssl.create_default_context(cafile=self.pki.ca_file)
        if self.pod.flag("tls-client-ca"):
            context.load_cert_chain(*self.pki.client("probe"))
        return httpx.AsyncClient(
            base_url=f"{'https' if tls else 'http'}://localhost:{self.ports['http']}",
            headers={"authorization": f"Bearer {self.key}"},
            verify=context,
            trust_env=False,
            timeout=120,
        )

    @property
    def metadata(self) -> Any:
        """A caller's key, for gRPC."""
        return (("authorization", f"Bearer {self.key}"),)


@asynccontextmanager
async def running_pod(pod: Pod, root: Path, cache_dir: Path) -> AsyncIterator[Node]:
    """Make the pod's volumes, and a node that can start it; its process is gone at the end."""
    for mount in pod.container["volumeMounts"]:
        (root / mount["mountPath"].lstrip("/")).mkdir(parents=True)
    pki = Pki(root / "pki")
    key = _write_secrets(pod, root, pki)
    node = Node(pod, root, cache_dir, {name: free_port() for name in pod.ports}, key, pki)
    try:
        yield node
    finally:
        if node.process is not None and node.process.returncode is None:
            node.process.kill()
            await node.process.wait()


def _write_secrets(pod: Pod, root: Path, pki: Pki) -> str:
    """The files of the Secrets as Kubernetes lays them out: links to links, so that all of
    them change at once. Returns an API key."""
    probe_cert, probe_key = pki.client("probe")
    keys = root / "keys.toml"
    made = add_key(keys, name="caller", tenant="default", roles=["inference"], expires=None)
    files = {
        "/run/secrets/keys": {"keys.toml": keys},
        "/run/secrets/tls": {"tls.crt": Path(pki.cert), "tls.key": Path(pki.key)},
        "/run/secrets/clients": {"ca.crt": Path(pki.ca_file)},
        "/run/secrets/probe": {
            "ca.crt": Path(pki.ca_file),
            "tls.crt": Path(probe_cert),
            "tls.key": Path(probe_key),
        },
    }
    for mount in pod.mounted("secret"):
        folder = root / mount.lstrip("/")
        data = folder / "..2026_11_28"
        data.mkdir()
        os.symlink(data.name, folder / "..data")
        for name, source in files[mount].items():
            (data / name).write_bytes(source.read_bytes())
            (data / name).chmod(0o440)
            os.symlink(f"..data/{name}", folder / name)
    return made.key
