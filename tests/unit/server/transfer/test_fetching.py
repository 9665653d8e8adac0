"""The parts of the fetching process: addresses, the sandbox, deadlines, rates."""

from __future__ import annotations

import ipaddress
import json
import os
import random
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import msgspec
import pytest
from veneer_registry.child_python import child_python
from veneer_registry.errors import Aborted, InvalidField, QuotaExceeded
from veneer_server.adapters.fetching import addresses, fetchers, web
from veneer_server.adapters.fetching.allowed import AllowList
from veneer_server.adapters.fetching.fetchers import Fetchers, FetchSettings
from veneer_server.adapters.fetching.process import Fetch
from veneer_server.adapters.fetching.uris import Origin, parse_uri
from veneer_server.adapters.fetching.web import WebClient
from veneer_server.wire.frames import framed

from tests.planted import planted
from tests.refused import refused
from tests.web_folder import Answer, dripping, web_folder

PRIVATE = (
    "127.0.0.1",
    "10.1.2.3",
    "192.168.0.1",
    "172.16.0.1",
    "169.254.169.254",
    "0.0.0.0",
    "100.64.0.1",
    "224.0.0.1",
    "255.255.255.255",
    "240.0.0.1",
    "192.0.2.1",
    "198.18.0.1",
    "::1",
    "::",
    "fe80::1",
    "fc00::1",
    "fd00:ec2::254",
    "ff02::1",
    "2001:db8::1",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe",
    "2002:7f00:1::",
    "2002:a9fe:a9fe::1",
    "::127.0.0.1",
    "fe80::1%lo",
    "nonsense",
)
PUBLIC = ("8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808")


NOT_GLOBAL = (
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/29",
    "192.0.0.8/32",
    "192.0.0.170/31",
    "192.0.0.0/24",
    "192.0.2.0/24",
    "192.88.99.0/24",
    "192.88.99.2/32",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "240.0.0.0/4",
    "255.255.255.255/32",
    "::1/128",
    "::/128",
    "64:ff9b:1::/48",
    "100::/64",
    "100:0:0:1::/64",
    "2001::/32",
    "2001:2::/48",
    "2001:10::/28",
    "2001:db8::/32",
    "2002::/16",
    "3fff::/20",
    "5f00::/16",
    "fc00::/7",
    "fe80::/10",
    # In other registries: multicast, site-local, IPv4-compatible, unallocated.
    "224.0.0.0/4",
    "ff00::/8",
    "fec0::/10",
    "::/96",
    "::ffff:0:0:0/96",
    "4000::/2",
    "8000::/2",
)
"""From IANA's special-purpose address registries: what they do not list as globally reachable
(false, or not applicable). ``::ffff:0:0/96`` counts as the address inside."""


def test_no_range_that_iana_lists_as_not_global_is_contacted() -> None:
    rng = random.Random(seed := random.randrange(2**32))
    print(f"{seed=}")
    contacted = set()
    for text in NOT_GLOBAL:
        net = ipaddress.ip_network(text)
        inside = [rng.randrange(net.num_addresses) for _ in range(50)]
        for offset in {0, net.num_addresses - 1, *inside}:
            address = net[offset]
            forms = [str(address)]
            if net.version == 4:
                forms += [f"::ffff:{address}", f"64:ff9b::{address}"]
            contacted |= {form for form in forms if addresses.may_contact(form, ())}
            assert all(addresses.may_contact(form, (net,)) for form in forms), (
                "but where the operator names the network"
            )
    assert sorted(contacted) == []


def test_addresses() -> None:
    assert [text for text in PRIVATE if addresses.may_contact(text, ())] == []
    assert all(addresses.may_contact(text, ()) for text in PUBLIC)
    named = (ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("fd00::/8"))
    found = [text for text in PRIVATE if addresses.may_contact(text, named)]
    assert found == ["10.1.2.3", "fd00:ec2::254"]
    assert addresses.may_contact("::ffff:10.0.0.1", named)


@contextmanager
def resolving(
    monkeypatch: pytest.MonkeyPatch, *answers: list[str]
) -> Iterator[list[tuple[str, int]]]:
    """Names have these addresses, one list for each question; yields where is connected."""
    connected: list[tuple[str, int]] = []
    rest = iter(answers)

    def lookup(host: str, port: int, **kwargs: Any) -> list[Any]:
        found = next(rest, None)
        assert found is not None, "asked once more than it should be"
        return [
            (
                socket.AF_INET6 if ":" in text else socket.AF_INET,
                socket.SOCK_STREAM,
                6,
                "",
                (text, port),
            )
            for text in found
        ]

    class Recorded(socket.socket):
        def connect(self, address: Any) -> None:
            connected.append(address)

    with monkeypatch.context() as patch:
        patch.setattr(addresses.socket, "getaddrinfo", lookup)
        patch.setattr(addresses.socket, "socket", Recorded)
        yield connected


def test_a_name_is_resolved_once_and_connected_as_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    origin = Origin("models.example.com", 443)
    with resolving(monkeypatch, ["8.8.8.8"], ["127.0.0.1"]) as connected:
        addresses.connect(origin, (), 1.0).close()
    assert connected == [("8.8.8.8", 443)]
    with resolving(monkeypatch, ["127.0.0.1", "169.254.169.254", "8.8.4.4"]) as connected:
        addresses.connect(origin, (), 1.0).close()
    assert connected == [("8.8.4.4", 443)]
    with (
        resolving(monkeypatch, ["127.0.0.1", "fd00::1"]) as connected,
        refused(InvalidField, field="uri", cause="address") as caught,
    ):
        addresses.connect(origin, (), 1.0)
    assert connected == []
    assert "127.0.0.1" not in caught.value.message, "what a name means inside is not told"


def test_a_check_that_is_left_out_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        planted(addresses, "if may_contact(str(each[4][0]), named)]", "]"),
        resolving(monkeypatch, ["127.0.0.1"]) as connected,
    ):
        addresses.connect(Origin("models.example.com", 443), (), 1.0).close()
    assert connected == [("127.0.0.1", 443)]


def test_entries() -> None:
    allowed = AllowList(
        [
            "https://localhost:8443/",
            "https://10.0.0.5/a",
            "https://[::1]/",
            "https://models.internal/ 10.0.0.0/8 fd00::/8",
            "hf://org/repo@main",
            "s3://bucket/prefix/",
        ]
    )

    def networks(uri: str) -> list[str] | None:
        entry = allowed.entry(parse_uri(uri))
        return None if entry is None else [str(network) for network in entry.networks]

    assert networks("https://localhost:8443/x") == ["127.0.0.0/8", "::1/128"]
    assert networks("https://localhost/x") is None
    assert networks("https://10.0.0.5/a/b") == ["10.0.0.5/32"]
    assert networks("https://[0:0:0:0:0:0:0:1]/x") == ["::1/128"]
    assert networks("https://MODELS.internal:443/x") == ["10.0.0.0/8", "fd00::/8"]
    assert networks("hf://org/repo@main/below") == []
    assert networks("hf://org/repo@other") is None
    assert networks("s3://bucket/prefix") == []
    assert networks("s3://bucket/prefixed") is None
    for wrong in ("file:///srv", "http://x/", "x", "https://a/ 10.0.0.0/40", "https://a/../"):
        with refused(InvalidField, key="fetch_allow"):
            AllowList([wrong])
    for wrong in ("hf://", "s3://bucket/ FILE", "x FILE"):
        with refused(InvalidField, key="fetch_token"):
            Fetchers(FetchSettings(Path("/nowhere"), tokens=[wrong]))


def test_a_body_that_drips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "WINDOW_S", 0.2)
    loopback = (ipaddress.ip_network("127.0.0.0/8"),)
    with web_folder() as server:
        server.answers["/x"] = Answer(partial(dripping, server.ended), length=1000)
        with refused(Aborted, file="x", cause="rate"):
            WebClient(lambda hop: loopback, least_rate=1000).get(
                f"http://localhost:{server.port}/x", BytesIO(), most=1000, file="x"
            )


async def test_a_fetch_has_a_deadline(tmp_path: Path) -> None:
    """Which a header or a body of one byte now and then cannot stretch."""
    with web_folder() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", f"http://localhost:{server.port}")
        server.answers["/org/a/resolve/main/adapter_config.json"] = Answer(
            partial(dripping, server.ended), length=1000
        )
        settings = FetchSettings(tmp_path / "staging", allowed=["hf://"], deadline_s=1.0)
        began = time.monotonic()
        with refused(Aborted, field="uri", cause="deadline"):
            async with Fetchers(settings).fetched(parse_uri("hf://org/a"), "default"):
                pass
        assert time.monotonic() - began < 1.0 + fetchers.GRACE_S
    assert list((tmp_path / "staging").iterdir()) == []


async def test_places_for_fetches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = Fetchers(FetchSettings(tmp_path, allowed=["hf://"]))
    monkeypatch.setattr(fetchers, "MAX_AT_ONCE", 0)
    with refused(QuotaExceeded, cause="fetches"):
        async with running.fetched(parse_uri("hf://org/a"), "default"):
            pass


def test_the_process_ends_with_the_front(tmp_path: Path) -> None:
    """Also while it waits for a host."""
    with web_folder() as server:
        server.answers["/org/a/resolve/main/adapter_config.json"] = Answer(
            partial(dripping, server.ended), length=1000
        )
        wanted = Fetch(
            "hf://org/a",
            str(tmp_path),
            ("hf://",),
            {},
            f"http://localhost:{server.port}",
            most_bytes=1000,
            deadline_s=300.0,
            least_rate=0,
        )
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                child_python("-m", fetchers.MODULE, str(theirs.fileno())),
                pass_fds=[theirs.fileno()],
            )
        with ours:
            ours.sendall(framed(msgspec.msgpack.encode(wanted)))
            while not server.asked:
                assert process.poll() is None
                time.sleep(0.01)
        assert process.wait() == 0


CONFINED = """
import json, os, socket, sys
from pathlib import Path
from veneer_server.adapters.fetching.sandbox import confine, limit
work, store = Path(sys.argv[1]), Path(sys.argv[2])
limit(file_bytes=1000, cpu_s=60)
found = {"confined": confine(work, [])}
def tried(what, do):
    try:
        do()
        found[what] = "done"
    except OSError as error:
        found[what] = type(error).__name__
tried("read", lambda: (store / "catalog.db").read_bytes())
tried("list", lambda: os.listdir(store))
tried("write", lambda: (store / "new").write_bytes(b"x"))
tried("remove", lambda: (store / "catalog.db").unlink())
(work / "link").symlink_to(store / "catalog.db")
tried("link", lambda: (work / "link").read_bytes())
tried("hard link", lambda: os.link(store / "catalog.db", work / "hard"))
tried("own", lambda: (work / "own").write_bytes(b"x"))
tried("large", lambda: (work / "large").write_bytes(b"x" * 2000))
tried("names", lambda: socket.getaddrinfo("localhost", 1))
import ssl, encodings.idna
ssl.create_default_context()
print(json.dumps(found))
"""


def test_the_process_sees_its_folder_and_no_store(tmp_path: Path) -> None:
    work, store = tmp_path / "work", tmp_path / "store"
    work.mkdir()
    store.mkdir()
    (store / "catalog.db").write_bytes(b"secret")
    ran = subprocess.run(
        child_python("-c", CONFINED, str(work), str(store)), capture_output=True, check=True
    )
    found = json.loads(ran.stdout)
    assert (found.pop("own"), found.pop("names")) == ("done", "done")
    assert found.pop("large") == "OSError", "a file has a limit"
    if not found.pop("confined"):
        pytest.skip("this kernel has no Landlock")
    denied = found.pop("hard link")
    assert denied in ("PermissionError", "OSError")
    assert set(found.values()) == {"PermissionError"}, found
    assert (store / "catalog.db").read_bytes() == b"secret"


def test_what_the_process_inherits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENEER_API_KEY", "open-sesame")
    monkeypatch.setenv("HF_TOKEN", "open-sesame")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "false")
    given = fetchers.environment(os.environ)
    assert "open-sesame" not in given.values()
    assert given["AWS_EC2_METADATA_DISABLED"] == "false", "the operator's choice"
    assert given["NO_GCE_CHECK"] == "true"
