"""TLS on every port, with certificates that change and clients that need one."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import httpx
import psutil
import pytest
from veneer_client import AsyncClient, RetryPolicy, Text
from veneer_registry.errors import (
    InvalidField,
    ServerUnreachable,
    Unauthenticated,
    VeneerError,
)
from veneer_server.access.certificates import Certificates
from veneer_server.access.edit_keys import add_key
from veneer_server.config import ConfigInvalid, load_config
from veneer_server.system.descriptors import HANDSHAKES

from tests.bench.rotation import serial
from tests.pki import Pki
from tests.places import REPOSITORY
from tests.refused import refused
from tests.unit.server.rpc.front_harness import Front, running, until


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path / "pki")


def wait_for_a_look() -> None:
    """The files are looked at ten times a second at most."""
    end = time.monotonic() + 0.1
    while time.monotonic() <= end:
        pass


def content(file: str) -> bytes:
    return Path(file).read_bytes()


def put(file: str, data: bytes | None) -> None:
    """Write a file, or remove it."""
    if data is None:
        Path(file).unlink()
    else:
        Path(file).write_bytes(data)


@asynccontextmanager
async def front_with(
    base_folder: Path, front_cache: Path, data: Path, pki: Pki, **flags: str
) -> AsyncIterator[Front]:
    files = {"tls_cert": pki.cert, "tls_key": pki.key, **flags}
    cert, key = pki.client("harness.example.org")
    credentials = grpc.ssl_channel_credentials(*map(content, (pki.ca_file, key, cert)))
    async with running(
        base_folder,
        front_cache,
        data,
        credentials=credentials,
        openai_listen="127.0.0.1:0",
        **files,
    ) as front:
        yield front


@pytest.mark.push
async def test_every_port_speaks_tls_and_renews_without_a_failed_call(
    base_folder: Path, front_cache: Path, tmp_path: Path, pki: Pki
) -> None:
    async with front_with(base_folder, front_cache, tmp_path / "front", pki) as front:
        ports = front.addresses
        stop, calls = asyncio.Event(), 0

        async def call() -> None:
            nonlocal calls
            while not stop.is_set():
                async with AsyncClient(f"https://{ports['grpc']}", ca=pki.ca_file) as client:
                    assert (await client.generate(Text("Hello"), max_tokens=1)).text
                calls += 1

        async def ask(path: str, port: str) -> None:
            async with httpx.AsyncClient(verify=pki.ca_file, trust_env=False) as http:
                while not stop.is_set():
                    answer = await http.get(f"https://{ports[port]}{path}")
                    assert answer.status_code == 200

        callers = [
            asyncio.create_task(call()),
            asyncio.create_task(ask("/v1/models", "openai")),
        ]
        for _ in range(5):
            before = await asyncio.to_thread(serial, ports["grpc"], pki.ca_file)
            pki.renew()
            for port in ("grpc", "openai", "metrics"):
                # Looked at ten times a second at most.
                while await asyncio.to_thread(serial, ports[port], pki.ca_file) == before:
                    pass
        stop.set()
        await asyncio.gather(*callers)
        assert calls
        async with httpx.AsyncClient(verify=pki.ca_file, trust_env=False) as http:
            page = await http.get(f"https://{ports['metrics']}/metrics")
            assert "veneer_ready 1.0" in page.text
        with pytest.raises(httpx.HTTPError):
            async with httpx.AsyncClient(trust_env=False) as http:
                await http.get(f"http://{ports['openai']}/v1/models")


def test_files_that_do_not_fit_together_leave_the_last_pair(pki: Pki) -> None:
    certificates = Certificates(Path(pki.cert), Path(pki.key))
    first = certificates.current
    right = content(pki.key)
    other = pki.ca.issue_cert("localhost")
    for wrong in (other.private_key_pem.bytes(), b"", b"nonsense", None):
        put(pki.key, wrong)
        wait_for_a_look()
        assert certificates.current is first
    put(pki.key, right)
    pki.renew()
    wait_for_a_look()
    assert certificates.current is not first


async def test_clients_with_certificates_are_known_by_their_names(
    base_folder: Path, front_cache: Path, tmp_path: Path, pki: Pki
) -> None:
    file = tmp_path / "keys.toml"
    key = add_key(file, name="app", tenant="default", roles=["inference"], expires=None).key
    file.write_text(
        file.read_text() + '\n[certificates."trainer.example.org"]\nroles = ["metrics"]\n'
        '[certificates."app.example.org"]\nroles = ["inference"]\n'
    )
    async with front_with(
        base_folder,
        front_cache,
        tmp_path / "front",
        pki,
        tls_client_ca=pki.ca_file,
        keys_file=str(file),
    ) as front:
        address = f"https://{front.addresses['grpc']}"

        async def told(cert: tuple[str, str] | None, api_key: str | None = None) -> str:
            files = {} if cert is None else {"cert": cert[0], "key": cert[1]}
            client = AsyncClient(address, ca=pki.ca_file, api_key=api_key, **files)
            async with client:
                try:
                    await client.generate(Text("Hello"), max_tokens=1, timeout_s=20)
                except VeneerError as error:
                    return error.reason
            return "yes"

        known, unknown = pki.client("app.example.org"), pki.client("other.example.org")
        strange = Pki(tmp_path / "strange").client("app.example.org")
        assert await told(known) == "yes"
        assert await told(pki.client("trainer.example.org")) == "PERMISSION_DENIED"
        assert await told(unknown) == "UNAUTHENTICATED"
        assert await told(unknown, key) == "yes"
        assert await told(None, key) == "SERVER_UNREACHABLE"
        assert await told(strange, key) == "SERVER_UNREACHABLE"
        for cert, status in ((known, 200), (unknown, 401)):
            context = ssl.create_default_context(cafile=pki.ca_file)
            context.load_cert_chain(*cert)
            async with httpx.AsyncClient(verify=context, trust_env=False) as http:
                answer = await http.get(f"https://{front.addresses['openai']}/v1/models")
                assert answer.status_code == status


@pytest.mark.parametrize(
    ("flags", "key"),
    [
        ({"tls_cert": "cert.pem"}, "tls_key"),
        ({"tls_key": "key.pem"}, "tls_cert"),
        ({"tls_client_ca": "ca.pem"}, "tls_client_ca"),
    ],
)
def test_flags_that_belong_together(tmp_path: Path, flags: dict[str, str], key: str) -> None:
    for name in flags.values():
        (tmp_path / name).write_text("")
    given = {flag: str(tmp_path / name) for flag, name in flags.items()}
    with refused(ConfigInvalid, key=key):
        load_config({**given, "data_dir": str(tmp_path / "d")}, {})


def test_an_open_address_names_what_would_protect_it(tmp_path: Path, pki: Pki) -> None:
    file = tmp_path / "keys.toml"
    add_key(file, name="a", tenant="default", roles=["inference"], expires=None)
    tls = {"tls_cert": pki.cert, "tls_key": pki.key}
    keys = {"keys_file": str(file)}
    for listen in ("listen", "metrics_listen", "openai_listen", "admin_listen"):
        for given, named, not_named in (
            ({}, ["--tls-cert", "--keys-file", "--insecure"], []),
            (tls, ["--keys-file"], ["--tls-cert"]),
            (keys, ["--tls-cert"], ["--keys-file"]),
        ):
            with pytest.raises(ConfigInvalid) as caught:
                load_config({listen: "0.0.0.0:0", **given}, {})
            for flag in named:
                assert flag in caught.value.message
            for flag in not_named:
                assert flag not in caught.value.message
        load_config({listen: "0.0.0.0:0", **tls, **keys}, {})
        load_config({listen: "0.0.0.0:0", "insecure": "true"}, {})


@pytest.mark.parametrize("which", ["cert", "key"])
def test_unusable_files_are_named(pki: Pki, which: str) -> None:
    file = Path(pki.cert if which == "cert" else pki.key)
    file.write_bytes(b"nonsense")
    with refused(InvalidField, key="tls_cert"):
        Certificates(Path(pki.cert), Path(pki.key))
    file.unlink()
    with refused(InvalidField, file=str(file)):
        Certificates(Path(pki.cert), Path(pki.key))


async def test_no_key_is_unauthenticated_in_the_client(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    file = tmp_path / "keys.toml"
    add_key(file, name="a", tenant="default", roles=["inference"], expires=None)
    async with (
        running(base_folder, front_cache, tmp_path / "front", keys_file=str(file)) as front,
        AsyncClient(front.addresses["grpc"]) as client,
    ):
        with refused(Unauthenticated, cause="no_credential"):
            await client.info()


async def test_strangers_that_do_not_speak_tls_disturb_nobody(
    base_folder: Path, front_cache: Path, tmp_path: Path, pki: Pki
) -> None:
    """Half a handshake, none, and noise, on every port, while others call."""
    async with front_with(base_folder, front_cache, tmp_path / "front", pki) as front:
        open_: list[asyncio.StreamWriter] = []
        for address in filter(None, front.addresses.values()):
            host, _, port = address.rpartition(":")
            for noise in (
                b"",
                b"\x16\x03\x01",
                b"GET / HTTP/1.1\r\n\r\n",
                b"PRI * HTTP/2.0\r\n",
            ):
                for _ in range(50):
                    _, writer = await asyncio.open_connection(host, int(port))
                    writer.write(noise)
                    open_.append(writer)

        def waiting() -> int:
            """Connections that are open, to both HTTP ports."""
            ports = {int(front.addresses[p].rpartition(":")[2]) for p in ("openai", "metrics")}
            found = psutil.Process().net_connections("tcp")
            return sum(c.laddr.port in ports and c.status == "ESTABLISHED" for c in found)

        await until(lambda: waiting() <= 2 * HANDSHAKES)
        async with AsyncClient(f"https://{front.addresses['grpc']}", ca=pki.ca_file) as client:
            assert (await client.generate(Text("Hello"), max_tokens=1)).text
        async with httpx.AsyncClient(verify=pki.ca_file, trust_env=False) as http:
            for port, path in (("openai", "/v1/models"), ("metrics", "/metrics")):
                answer = await http.get(f"https://{front.addresses[port]}{path}")
                assert answer.status_code == 200
        for writer in open_:
            writer.close()


async def test_handshakes_of_one_host_end_none_of_another(
    base_folder: Path, front_cache: Path, tmp_path: Path, pki: Pki
) -> None:
    """A client that is slow to say hello, beside a host that begins many handshakes."""
    async with front_with(base_folder, front_cache, tmp_path / "front", pki) as front:
        context = ssl.create_default_context(cafile=pki.ca_file)
        for name, path in (("openai", "/v1/models"), ("metrics", "/metrics")):
            host, _, port = front.addresses[name].rpartition(":")
            reader, slow = await asyncio.open_connection(host, int(port))
            others = [
                await asyncio.open_connection(host, int(port), local_addr=("127.0.0.9", 0))
                for _ in range(3 * HANDSHAKES)
            ]
            await slow.start_tls(context, server_hostname="localhost")
            slow.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            for _, writer in (*others, (reader, slow)):
                writer.close()


@pytest.mark.push
async def test_a_client_is_told_what_is_wrong_with_its_address(
    base_folder: Path, front_cache: Path, tmp_path: Path, pki: Pki
) -> None:
    async with front_with(base_folder, front_cache, tmp_path / "front", pki) as front:
        address = front.addresses["grpc"]
        async with AsyncClient(f"https://{address}", retry=RetryPolicy(attempts=1)) as client:
            with refused(ServerUnreachable, cause="certificate") as untrusted:
                await client.info(timeout_s=20)
            for inside in ("handshake", "SSL", "UNKNOWN", "ipv4"):
                assert inside not in untrusted.value.message
        async with AsyncClient(address, retry=RetryPolicy(attempts=1)) as client:
            with pytest.raises(ServerUnreachable) as caught:
                await client.info(timeout_s=20)
            assert "https://" in caught.value.message
    async with running(base_folder, front_cache, tmp_path / "plain") as front:
        address = f"https://{front.addresses['grpc']}"
        async with AsyncClient(
            address, ca=pki.ca_file, retry=RetryPolicy(attempts=1)
        ) as client:
            with refused(ServerUnreachable, cause="no_tls"):
                await client.info(timeout_s=20)


@pytest.fixture
def made(tmp_path: Path) -> tuple[str, str]:
    """Certificate and key, as the command makes them; a second time it refuses."""
    out = tmp_path / "tls"
    command = [REPOSITORY / ".venv" / "bin" / "veneer-server", "tls", "self-signed"]
    command += ["--name", "localhost", "--name", "127.0.0.1", "--out", str(out)]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    assert str(out / "cert.pem") in told.stdout
    assert (out / "key.pem").stat().st_mode & 0o077 == 0
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (again.returncode, "--out" in again.stderr) == (1, True)
    return str(out / "cert.pem"), str(out / "key.pem")


async def test_a_self_signed_certificate_serves_those_who_have_it(
    base_folder: Path, front_cache: Path, tmp_path: Path, made: tuple[str, str]
) -> None:
    cert, key = made
    async with running(
        base_folder,
        front_cache,
        tmp_path / "front",
        credentials=grpc.ssl_channel_credentials(content(cert)),
        openai_listen="127.0.0.1:0",
        tls_cert=cert,
        tls_key=key,
    ) as front:
        async with AsyncClient(f"https://{front.addresses['grpc']}", ca=cert) as client:
            assert (await client.generate(Text("Hello"), max_tokens=1)).text
        async with httpx.AsyncClient(verify=cert, trust_env=False) as http:
            answer = await http.get(f"https://{front.addresses['openai']}/v1/models")
            assert answer.status_code == 200
