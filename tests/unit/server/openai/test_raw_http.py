"""Raw bytes on a socket: requests that two parsers could read differently are refused, and the
connection is closed."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path

import httpx
import pytest
from veneer_server.openai.http.strict import MAX_HEAD, MAX_HEADERS, MAX_SMALL_CHUNKS

from tests.unit.server.openai.kit import TEXT
from tests.unit.server.rpc.front_harness import Front, running
from tests.unit.server.rpc.test_hostile_fields import noise

pytestmark = pytest.mark.asyncio(loop_scope="module")

BODY = json.dumps(TEXT).encode()
CHUNKED = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
NEXT = b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
TE = b"Transfer-Encoding: chunked\r\n"


async def sent(front: Front, data: bytes) -> bytes:
    """All that the server answers until it closes the connection."""
    host, port = front.addresses["openai"].rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(data)
        answer = b""
        while piece := await reader.read(1 << 16):
            answer += piece
        return answer
    except ConnectionResetError:
        return answer
    finally:
        writer.close()


ODD: dict[str, bytes] = {
    "two equal lengths": HEAD + LENGTH + LENGTH + b"\r\n" + BODY,
    "two equal lengths in one": HEAD
    + b"Content-Length: %d, %d\r\n\r\n" % (len(BODY), len(BODY))
    + BODY,
    **{
        f"two of {name.decode()}": HEAD
        + LENGTH
        + b"%s: a\r\n%s: a\r\n\r\n" % (name, other)
        + BODY
        for name, other in (
            (b"Authorization", b"authorization"),
            (b"X-Api-Key", b"x-api-key"),
            (b"Api-Key", b"api-key"),
            (b"X-Veneer-Tenant",) * 2,
            (b"Veneer-Tenant",) * 2,
            (b"Origin",) * 2,
            (b"Sec-Fetch-Site",) * 2,
            (b"X-Llm-D-Inference-Fairness-Id",) * 2,
            (b"X-Gateway-Inference-Objective",) * 2,
            (b"X-Llm-D-Inference-Objective",) * 2,
        )
    },
    "two content types": HEAD + b"Content-Type: application/json\r\n" + LENGTH + b"\r\n" + BODY,
    "two content types in one": HEAD.replace(b"json", b"json, text/plain")
    + LENGTH
    + b"\r\n"
    + BODY,
    "two hosts in one": HEAD.replace(b"localhost", b"localhost, localhost")
    + LENGTH
    + b"\r\n"
    + BODY,
    "both lengths": HEAD + LENGTH + TE + b"\r\n" + CHUNKED,
    "both, the other way round": HEAD + TE + LENGTH + b"\r\n" + CHUNKED,
    "a length of 0 and chunks": HEAD + b"Content-Length: 0\r\n" + TE + b"\r\n" + CHUNKED,
    "two lengths": HEAD + LENGTH + b"Content-Length: 5\r\n\r\n" + BODY,
    "two lengths in one": HEAD + b"Content-Length: %d, 5\r\n\r\n" % len(BODY) + BODY,
    "a signed length": HEAD + b"Content-Length: +%d\r\n\r\n" % len(BODY) + BODY,
    "a negative length": HEAD + b"Content-Length: -1\r\n\r\n" + BODY,
    "a hexadecimal length": HEAD + b"Content-Length: 0x10\r\n\r\n" + BODY,
    "a length past any number": HEAD + b"Content-Length: " + b"9" * 40 + b"\r\n\r\n",
    "another coding": HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + CHUNKED,
    "chunked twice": HEAD + TE + TE + b"\r\n" + CHUNKED,
    "chunked, disguised": HEAD + b"Transfer-Encoding: xchunked\r\n" + LENGTH + b"\r\n" + BODY,
    "chunked with a tab": HEAD + b"Transfer-Encoding:\x0bchunked\r\n\r\n" + CHUNKED,
    "a space before the colon": HEAD + b"Content-Length : 5\r\n\r\n" + BODY,
    "a folded header": HEAD + b"X-A: b\r\n c\r\n" + LENGTH + b"\r\n" + BODY,
    "a folded length": HEAD + b"Transfer-Encoding:\r\n chunked\r\n\r\n" + CHUNKED,
    "LF alone": HEAD.replace(b"\r\n", b"\n") + LENGTH + b"\r\n" + BODY,
    "LF alone at the end": HEAD + LENGTH + b"\n" + BODY,
    "CR in a header": HEAD + b"X-A: b\rContent-Length: 5\r\n" + LENGTH + b"\r\n" + BODY,
    "NUL in a header": HEAD + b"X-A: b\x00\r\n" + LENGTH + b"\r\n" + BODY,
    "a header without a name": HEAD + b": b\r\n" + LENGTH + b"\r\n" + BODY,
    "an empty line in front": b"\r\n" + HEAD + LENGTH + b"\r\n" + BODY,
    "a bad chunk size": HEAD + TE + b"\r\nxyz\r\n" + BODY,
    "a negative chunk size": HEAD + TE + b"\r\n-5\r\n" + BODY,
    "a chunk size past any number": HEAD + TE + b"\r\n" + b"f" * 40 + b"\r\n",
    "a chunk longer than it says": HEAD + TE + b"\r\n3\r\nabcdef\r\n0\r\n\r\n",
    "LF alone after the last chunk": HEAD + TE + b"\r\n" + CHUNKED[:-2] + b"\n",
    "LF alone after a trailer": HEAD + TE + b"\r\n" + CHUNKED[:-2] + b"X-T: 1\n\r\n",
    "HTTP/1.0 in chunks": HEAD.replace(b"HTTP/1.1", b"HTTP/1.0") + TE + b"\r\n" + CHUNKED,
    "HTTP/1.2": HEAD.replace(b"HTTP/1.1", b"HTTP/1.2") + LENGTH + b"\r\n" + BODY,
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/0.9": b"GET /version\r\n\r\n",
    "no Host": b"GET /version HTTP/1.1\r\n\r\n",
    "two Hosts": b"GET /version HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 100 + b"\r\n\r\n",
    "a long head": HEAD + b"X-A: " + b"a" * (MAX_HEAD + 1),
    "a long head at once": HEAD + b"X-A: b\r\n" * 3000 + LENGTH + b"\r\n" + BODY,
    "many headers": HEAD + b"a:\r\n" * (MAX_HEADERS + 1) + LENGTH + b"\r\n" + BODY,
    "tiny chunks": HEAD + TE + b"\r\n" + b"1\r\n \r\n" * (MAX_SMALL_CHUNKS + 50),
}


@pytest.mark.parametrize("name", sorted(ODD))
async def test_what_is_ambiguous_is_refused_and_the_connection_closed(
    name: str, front: Front, caplog: pytest.LogCaptureFixture
) -> None:
    before = await scraped(front)
    with caplog.at_level(logging.INFO):
        # Were it read after all, or only a part, the next request would get an answer.
        answer = await sent(front, ODD[name] + NEXT)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.split(b" ")[1] in (b"400", b"431", b"501", b"505"), answer[:300]
    assert b"connection: close" in head.lower()
    error = json.loads(body)["error"]
    assert (error["type"] != "", error["code"]) == (True, "malformed_request")
    assert answer.count(b"HTTP/1.1 ") == 1, "nothing after it was read"
    assert front.engine.submitted == []
    assert noise(caplog.records) == []
    assert [r.getMessage() for r in caplog.records] == ["call refused"]
    assert await scraped(front) != before, "it is counted"


async def scraped(front: Front) -> list[str]:
    lines = (await front.metrics()).splitlines()
    return [
        line for line in lines if line.startswith('veneer_http_requests_total{path="other"')
    ]


GOOD: dict[str, bytes] = {
    "a length": HEAD + LENGTH + b"\r\n" + BODY,
    "chunks": HEAD + TE + b"\r\n" + CHUNKED,
    "an extension and a trailer": HEAD
    + TE
    + b"\r\n%x;a=b\r\n%s\r\n0\r\nX-T: 1\r\n\r\n" % (len(BODY), BODY),
    "some tiny chunks": HEAD
    + TE
    + b"\r\n"
    + b"".join(b"1\r\n%c\r\n" % byte for byte in BODY)
    + b"0\r\n\r\n",
    "HTTP/1.0": b"POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\n"
    + LENGTH
    + b"\r\n"
    + BODY,
}


@pytest.mark.parametrize("name", sorted(GOOD))
async def test_what_is_plain_is_served(name: str, front: Front) -> None:
    for pieces in ([GOOD[name]], [GOOD[name][at : at + 1] for at in range(len(GOOD[name]))]):
        host, port = front.addresses["openai"].rsplit(":", 1)
        reader, writer = await asyncio.open_connection(host, int(port))
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(0)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()


async def test_a_bad_chunk_in_the_middle_ends_the_call(front: Front) -> None:
    """The body is being read by then."""
    answer = await sent(front, HEAD + TE + b'\r\n3\r\n{"a\r\nzz\r\n')
    assert answer.startswith(b"HTTP/1.1 400")


async def test_rubbish_behind_a_request_does_not_touch_its_answer(front: Front) -> None:
    answer = await sent(front, GOOD["a length"] + b"rubbish\r\n\r\n")
    assert answer.count(b"HTTP/1.1 ") == 2
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"HTTP/1.1 400" in answer


# ------------------------------------------------------------------------------- hosts


async def get(address: str, host: str, **headers: str) -> httpx.Response:
    async with httpx.AsyncClient(trust_env=False) as client:
        return await client.get(f"http://{address}/version", headers={"host": host, **headers})


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:1",
        "localhost.",
        "127.0.0.1",
        "127.0.0.1:80",
        "127.8.8.8",
        "[::1]:5",
    ],
)
async def test_a_loopback_server_answers_to_its_own_names(front: Front, host: str) -> None:
    assert (await get(front.addresses["openai"], host)).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "localhost@evil.example",
        "127.0.0.1.evil.example",
        "192.168.0.1",
        "[::2]",
        "[::1",
        "",
        "é",
    ],
)
async def test_other_names_are_refused(front: Front, host: str) -> None:
    answer = await sent(
        front, b"GET /version HTTP/1.1\r\nConnection: close\r\nHost: %s\r\n\r\n" % host.encode()
    )
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 403"), answer
    error = json.loads(body)["error"]
    assert error["code"] == "host_not_allowed"
    assert "--allowed-hosts" in error["message"]
    assert b"x-request-id" in head


async def test_no_page_of_another_origin_reads_an_answer(front: Front) -> None:
    """No CORS headers; see also `test_browsers`."""
    address = front.addresses["openai"]
    async with httpx.AsyncClient(trust_env=False, base_url=f"http://{address}") as client:
        page = {"origin": "https://evil.example"}
        asked = await client.options(
            "/v1/completions", headers=page | {"access-control-request-method": "POST"}
        )
        read = await client.get("/v1/models", headers=page)
        form = await client.post(
            "/v1/completions", content=BODY, headers=page | {"content-type": "text/plain"}
        )
    assert asked.status_code == 405
    assert form.status_code == 403
    for answer in (asked, read, form):
        assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_other_names_may_be_allowed(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    flags = {"openai_listen": "127.0.0.1:0", "allowed_hosts": "Veneer.internal, gpu1"}
    async with running(base_folder, front_cache, tmp_path, **flags) as front:
        address = front.addresses["openai"]
        for host, status in (("veneer.internal", 200), ("GPU1:99", 200), ("localhost", 200)):
            assert (await get(address, host)).status_code == status
        assert (await get(address, "evil.example")).status_code == 403


@pytest.mark.push
async def test_what_others_can_reach_has_the_names_that_are_given(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    """It listens on all addresses, and is called by loopback alone."""
    for given, status in (("", 403), ("some.name", 200), ("gpu1", 403), ("*", 200)):
        data = tmp_path / (given.strip("*") or f"any{status}{len(given)}")
        flags = {"openai_listen": "0.0.0.0:0", "insecure": "true", "allowed_hosts": given}
        async with running(base_folder, front_cache, data, **flags) as front:
            port = front.addresses["openai"].rsplit(":", 1)[1]
            answer = await get(f"127.0.0.1:{port}", "some.name")
            assert answer.status_code == status


@pytest.mark.parametrize("close", [b"", b"Connection: close\r\n"])
async def test_the_sender_of_too_long_a_body_sees_the_answer(
    front: Front, close: bytes
) -> None:
    """Closed with bytes unread, a connection is reset, and the answer may be lost."""
    body = b"x" * (12 << 20)
    head = HEAD + close + b"Content-Length: %d\r\n\r\n" % len(body)
    for _ in range(3):
        host, port = front.addresses["openai"].rsplit(":", 1)
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(head + body)
            await writer.drain()
            answer = await reader.readuntil(b"\r\n\r\n")
        finally:
            writer.close()
        assert answer.startswith(b"HTTP/1.1 413 ")
