"""Fetches from object stores: S3 as moto serves it, and a stub of Google's JSON interface."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer
from veneer_registry.errors import AdapterInvalid, InvalidField
from veneer_server.adapters.fetching.fetchers import Fetchers, FetchSettings
from veneer_server.adapters.fetching.uris import parse_uri

from tests.refused import refused
from tests.unit.server.rpc.front_harness import make_adapter
from tests.web_folder import Answer, web_folder

WEIGHTS = "adapter_model.safetensors"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


async def fetched(
    tmp_path: Path, uri: str, *allowed: str, most: int = 1 << 20
) -> dict[str, bytes]:
    settings = FetchSettings(
        tmp_path / "staging", allowed=allowed, most_bytes=most, deadline_s=60
    )
    async with Fetchers(settings).fetched(parse_uri(uri), "default") as folder:
        return contents(folder)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The endpoint of a server that speaks S3, with the bucket ``adapters``."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An adapter's folder, which is also at ``s3://adapters/lora/sql``."""
    for name, value in {
        "AWS_ENDPOINT_URL": s3,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "open-sesame",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    import botocore.session

    client = botocore.session.get_session().create_client("s3")
    client.create_bucket(Bucket="adapters")
    folder = make_adapter(tmp_path / "a", template="{{ 1 }}")
    for file in folder.iterdir():
        for prefix in ("lora/sql", "else"):
            client.put_object(
                Bucket="adapters", Key=f"{prefix}/{file.name}", Body=file.read_bytes()
            )
    client.delete_object(Bucket="adapters", Key=f"else/{WEIGHTS}")
    return folder


@pytest.mark.push
async def test_s3(bucket: Path, tmp_path: Path) -> None:
    allowed = ("s3://adapters/lora/ 127.0.0.0/8", "s3://adapters/else 127.0.0.0/8")
    found = await fetched(tmp_path, "s3://adapters/lora/sql", *allowed)
    assert found == contents(bucket)
    with refused(AdapterInvalid, file=WEIGHTS, cause="missing"):
        await fetched(tmp_path, "s3://adapters/else", *allowed)
    with refused(AdapterInvalid, file=WEIGHTS, cause="size"):
        await fetched(tmp_path, "s3://adapters/lora/sql", *allowed, most=100)
    with refused(InvalidField, field="uri", cause="not_allowed"):
        await fetched(tmp_path, "s3://adapters/other", *allowed)
    # The endpoint's address is private, and nobody has named it.
    with refused(InvalidField, field="uri", cause="address"):
        await fetched(tmp_path, "s3://adapters/lora/sql", "s3://adapters/lora/")


async def test_gs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a")
    with web_folder() as web:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{web.port}")
        for file in folder.iterdir():
            data, key = file.read_bytes(), f"lora%2Fsql%2F{file.name}"
            facts = {
                "name": f"lora/sql/{file.name}",
                "bucket": "adapters",
                "size": str(len(data)),
                "generation": "1",
                "kind": "storage#object",
            }
            about = Answer(
                json.dumps(facts).encode(), headers={"content-type": "application/json"}
            )
            web.answers[f"/storage/v1/b/adapters/o/{key}"] = about
            web.answers[f"/download/storage/v1/b/adapters/o/{key}?alt=media"] = Answer(data)
        found = await fetched(tmp_path, "gs://adapters/lora/sql", "gs://adapters/ 127.0.0.1")
        asked = set(web.paths())
    assert found == contents(folder), asked
