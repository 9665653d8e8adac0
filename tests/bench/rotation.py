"""Rotate keys and certificates under load: ``python -m tests.bench.rotation``.

It starts the real server with keys and TLS. Callers over gRPC and HTTP, some on one connection
and some on a new connection for each call, send requests all the time. Every two seconds, for
five minutes, the callers get a new key, the old key is revoked as soon as no call with it is
being sent, and the certificate is replaced. The exit status is 1 unless

- no valid call fails: neither a call sent with a key that was not revoked, nor a stream that
  was running when its key was revoked,
- the very next call with an old key is refused, by gRPC, HTTP and the metrics port,
- new connections to every port get the new certificate.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import socket
import ssl
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
from veneer_client import AsyncClient, RetryPolicy, Text
from veneer_registry.errors import Unauthenticated
from veneer_server.access.edit_keys import NewKey, add_key, revoke_key

from tests.pki import Pki
from tests.places import cache_dir
from tests.server_harness import running_server

PERIOD_S: Final = 2.0
SECONDS: Final = 300.0
PORTS: Final = ("grpc", "openai", "metrics")
ONCE: Final = RetryPolicy(attempts=1)


@dataclass
class Report:
    """Counts of calls, and failures.

    Attributes:
        calls: calls that were answered, by kind.
        failures: valid calls that failed, and old keys and certificates that still worked.
        certificate_s: seconds from a renewal to the first connection with the new certificate.
    """

    rotations: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    failures: list[str] = field(default_factory=list)
    certificate_s: list[float] = field(default_factory=list)


class Rotation:
    """Callers of a running server, and the rotation of their keys and its certificate."""

    def __init__(
        self, addresses: Mapping[str, str], pki: Pki, keys_file: Path, model: str
    ) -> None:
        self.report = Report()
        self._url = {port: f"https://{addresses[port]}" for port in PORTS}
        self._address = {port: addresses[port] for port in PORTS}
        self._pki = pki
        self._file = keys_file
        self._model = model
        self._key = self._new_key()
        self._on_their_way: Counter[str] = Counter()
        self._stop = False

    async def run(self, callers: int, more: Callable[[], bool], period_s: float) -> Report:
        """Rotate while ``more`` returns True."""
        kinds = (self._grpc, self._grpc_anew, self._http, self._http_anew)
        async with asyncio.TaskGroup() as group:
            for number in range(callers):
                group.create_task(kinds[number % len(kinds)]())
            try:
                while more():
                    began = time.monotonic()
                    await self._rotate()
                    await asyncio.sleep(max(0.0, period_s - (time.monotonic() - began)))
            finally:
                self._stop = True
        return self.report

    # -------------------------------------------------------------------- rotating

    def _new_key(self) -> NewKey:
        return add_key(
            self._file, name="rotated", tenant="default", roles=["operator"], expires=None
        )

    async def _rotate(self) -> None:
        old = self._key
        async with (
            self._client(old.key) as client,
            client.generate_stream(
                Text("Tell me of the sea."), max_tokens=24, ignore_eos=True
            ) as stream,
        ):
            arriving = aiter(stream)
            await anext(arriving)
            self._key = await asyncio.to_thread(self._new_key)
            while self._on_their_way[old.key]:  # noqa: ASYNC110 - a bench, no event
                await asyncio.sleep(0.001)
            await asyncio.to_thread(revoke_key, self._file, old.id)
            await self._must_be_refused(old.key)
            try:
                async for _ in arriving:
                    pass
                self.report.calls["a stream that its key did not outlive"] += 1
            except Exception as error:
                self.report.failures.append(f"a stream ended with its key: {error}")
        await self._renew()
        self.report.rotations += 1

    async def _must_be_refused(self, key: str) -> None:
        headers = {"authorization": f"Bearer {key}"}
        async with self._client(key) as client:
            try:
                await client.info()
                self.report.failures.append("gRPC takes a revoked key")
            except Unauthenticated:
                self.report.refused += 1
        async with self._http_client() as http:
            for port, path in (("openai", "/v1/models"), ("metrics", "/metrics")):
                answer = await http.get(f"{self._url[port]}{path}", headers=headers)
                if answer.status_code == 401:
                    self.report.refused += 1
                else:
                    self.report.failures.append(f"{port} takes a revoked key")

    async def _renew(self) -> None:
        before = {port: await asyncio.to_thread(self._serial, port) for port in PORTS}
        await asyncio.to_thread(self._pki.renew)
        began = time.monotonic()
        for port in PORTS:
            # The server checks at most ten times a second.
            while await asyncio.to_thread(self._serial, port) == before[port]:
                if time.monotonic() - began > 30:
                    self.report.failures.append(f"{port} keeps its old certificate")
                    return
        self.report.certificate_s.append(time.monotonic() - began)

    def _serial(self, port: str) -> str:
        return serial(self._address[port], self._pki.ca_file)

    # --------------------------------------------------------------------- callers

    def _client(self, key: str) -> AsyncClient:
        return AsyncClient(
            self._url["grpc"], api_key=key, ca=self._pki.ca_file, retry=ONCE, timeout_s=60
        )

    def _http_client(self) -> httpx.AsyncClient:
        context = ssl.create_default_context(cafile=self._pki.ca_file)
        return httpx.AsyncClient(verify=context, trust_env=False, timeout=60)

    @asynccontextmanager
    async def _call(self, kind: str) -> AsyncIterator[str]:
        """Count one valid call; yield the key to use."""
        key = self._key.key
        self._on_their_way[key] += 1
        try:
            yield key
            self.report.calls[kind] += 1
        except Exception as error:
            self.report.failures.append(f"{kind}: {type(error).__name__}: {error}")
            await asyncio.sleep(0.1)
        finally:
            self._on_their_way[key] -= 1

    async def _ask(self, client: AsyncClient) -> None:
        assert (await client.generate(Text("Hello"), max_tokens=4)).text

    async def _grpc(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            clients: dict[str, AsyncClient] = {}
            while not self._stop:
                async with self._call("gRPC, a connection for each key") as key:
                    if key not in clients:
                        clients[key] = await stack.enter_async_context(self._client(key))
                    await self._ask(clients[key])

    async def _grpc_anew(self) -> None:
        while not self._stop:
            async with self._call("gRPC, a new connection") as key, self._client(key) as client:
                await self._ask(client)

    async def _post(self, http: httpx.AsyncClient, key: str) -> None:
        answer = await http.post(
            f"{self._url['openai']}/v1/completions",
            json={"model": self._model, "prompt": "Hello", "max_tokens": 4},
            headers={"authorization": f"Bearer {key}"},
        )
        answer.raise_for_status()

    async def _http(self) -> None:
        async with self._http_client() as http:
            while not self._stop:
                async with self._call("HTTP, one connection") as key:
                    await self._post(http, key)

    async def _http_anew(self) -> None:
        while not self._stop:
            async with self._call("HTTP, a new connection") as key, self._http_client() as http:
                await self._post(http, key)


def serial(address: str, ca: str) -> str:
    """Return the serial number of the certificate that a new connection gets."""
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context(cafile=ca)
    with (
        socket.create_connection((host, int(port)), timeout=20) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        found: Any = connection.getpeercert()
    return str(found["serialNumber"])


async def bench(seconds: float, callers: int) -> Report:
    with tempfile.TemporaryDirectory(prefix="veneer-rotation-") as folder:
        pki, keys_file = Pki(Path(folder) / "pki"), Path(folder) / "keys.toml"
        add_key(keys_file, name="first", tenant="default", roles=["metrics"], expires=None)
        async with running_server(
            Path(folder) / "data",
            cache_dir(),
            *("--tls-cert", pki.cert, "--tls-key", pki.key, "--keys-file", str(keys_file)),
        ) as server:
            addresses = {
                "grpc": server.address,
                "openai": server.openai,
                "metrics": server.metrics,
            }
            rotation = Rotation(addresses, pki, keys_file, "smollm2-135m")
            end = time.monotonic() + seconds
            return await rotation.run(callers, lambda: time.monotonic() < end, PERIOD_S)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.rotation", description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--callers", type=int, default=8)
    given = parser.parse_args()
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    report = asyncio.run(bench(given.seconds, given.callers))
    print(f"{report.rotations} rotations; calls with a revoked key refused: {report.refused}")
    for kind, count in sorted(report.calls.items()):
        print(f"{count:8} answered: {kind}")
    slowest = max(report.certificate_s, default=0.0)
    print(f"a new certificate is at every port after {slowest:.2f} s at most")
    for failure in report.failures[:20]:
        print(f"FAILED  {failure}")
    print(f"{len(report.failures)} valid calls failed, or worse")
    return int(bool(report.failures) or report.rotations == 0)


if __name__ == "__main__":
    sys.exit(main())
