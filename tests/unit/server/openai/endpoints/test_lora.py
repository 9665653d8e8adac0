"""vLLM's adapter endpoints: folders of the server's machine become adapters of the registry."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import pytest_asyncio
from veneer_proto.v1 import adapters_pb2
from veneer_server.access.edit_keys import add_key
from veneer_server.serving import local_folders

from tests.planted import planted
from tests.unit.server.openai.kit import BASE, TEXT, error_of, post
from tests.unit.server.rpc.front_harness import Front, make_adapter, running, upload

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROLES = ("inference", "publisher", "admin")
OF_LINKS = "put the file itself there"
"""The fix of a link that leads nowhere or away, and of what is no file."""


@dataclass
class Loading:
    """A front with a root, and a client of its gateway with a key of each role."""

    front: Front
    http: httpx.AsyncClient
    root: Path
    keys: dict[str, str]

    async def post(self, path: str, role: str = "publisher", **fields: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {self.keys[role]}"}
        return await self.http.post(path, json=fields, headers=headers)

    async def load(self, name: str, path: Path | str, **more: Any) -> httpx.Response:
        return await self.post(
            "/v1/load_lora_adapter", lora_name=name, lora_path=str(path), **more
        )

    async def unload(self, name: str, **more: Any) -> httpx.Response:
        return await self.post("/v1/unload_lora_adapter", lora_name=name, **more)

    async def models(self) -> list[str]:
        headers = {"authorization": f"Bearer {self.keys['publisher']}"}
        listed = (await self.http.get("/v1/models", headers=headers)).json()
        return [model["id"] for model in listed["data"]]

    @property
    def metadata(self) -> Any:
        return (("authorization", f"Bearer {self.keys['admin']}"),)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(
    base_folder: Path, front_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Loading]:
    data = tmp_path_factory.mktemp("loading")
    file, root = data / "keys.toml", data / "roots" / "adapters"
    root.mkdir(parents=True)
    keys = {
        role: add_key(file, name=role, tenant="default", roles=[role], expires=None).key
        for role in ROLES
    }
    async with running(
        base_folder,
        front_cache,
        data,
        openai_listen="127.0.0.1:0",
        keys_file=str(file),
        lora_root=str(root),
        max_adapter_bytes="64KiB",
    ) as front:
        url = f"http://{front.addresses['openai']}"
        async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=30) as http:
            yield Loading(front, http, root, keys)


@pytest_asyncio.fixture(loop_scope="module")
async def loading(server: Loading) -> Loading:
    for name in await server.models():
        if name != BASE:
            await server.unload(name, role="admin")
    shutil.rmtree(server.root)
    server.root.mkdir()
    server.front.engine.reset()
    return server


async def test_load_use_replace_unload(loading: Loading) -> None:
    """As TRL does it: a name for each policy, or AIBrix: by the list of models."""
    folder = make_adapter(loading.root / "policy-1")
    (folder / "optimizer.pt").write_text("what trainers leave")
    answer = await loading.load("policy", folder)
    assert (answer.status_code, answer.text) == (
        200,
        "Success: LoRA adapter 'policy' added successfully.",
    )
    assert await loading.models() == [BASE, "policy"]
    assert loading.front.engine.activations, "it is in memory before the answer"
    headers = {"authorization": f"Bearer {loading.keys['inference']}"}
    used = await loading.http.post(
        "/v1/completions", json={**TEXT, "model": "policy"}, headers=headers
    )
    assert used.headers["veneer-adapter-tier"] == "device"

    shutil.rmtree(folder)  # it was copied
    again = make_adapter(loading.root / "policy-2", seed=2)
    refused = await loading.load("policy", again)
    assert (refused.status_code, error_of(refused)["param"]) == (400, "lora_name")
    replaced = await loading.load("policy", again, load_inplace=True)
    assert replaced.status_code == 200
    after = await loading.http.post(
        "/v1/completions", json={**TEXT, "model": "policy"}, headers=headers
    )
    assert after.headers["veneer-revision"] != used.headers["veneer-revision"]

    gone = await loading.unload("policy")
    assert (gone.status_code, gone.text) == (
        200,
        "Success: LoRA adapter 'policy' removed successfully.",
    )
    assert await loading.models() == [BASE]
    missing = await loading.unload("policy", lora_int_id=1)
    assert (missing.status_code, error_of(missing)["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("load", "unload"),
    [
        (  # AIBrix's controller, and its runtime beside the engine
            {"lora_name": "qwen-lora.v1", "lora_path": "PATH"},
            {"lora_name": "qwen-lora.v1"},
        ),
        (
            {"lora_name": "qwen-lora.v1", "lora_path": "PATH"},
            {"lora_name": "qwen-lora.v1", "lora_int_id": None},
        ),
        (  # TRL's asynchronous trainers
            {"lora_name": "trl-0-v3", "lora_path": "PATH", "load_inplace": False},
            {"lora_name": "trl-0-v3"},
        ),
    ],
)
async def test_the_bodies_that_programs_send(
    loading: Loading, load: dict[str, Any], unload: dict[str, Any]
) -> None:
    """As read in their code: they look for the name in the list of models first, take any
    status but 200 (AIBrix 201 as well) for a failure, and publish again after a restart."""
    headers = {
        "authorization": f"Bearer {loading.keys['publisher']}",
        "content-type": "application/json",
    }
    given = load | {"lora_path": str(make_adapter(loading.root / "there"))}
    for _ in range(2):
        assert load["lora_name"] not in await loading.models()
        for path, body in (("load", given), ("unload", unload)):
            answer = await loading.http.post(
                f"/v1/{path}_lora_adapter", content=json.dumps(body), headers=headers
            )
            assert answer.status_code == 200, answer.text
            assert (load["lora_name"] in await loading.models()) is (path == "load")


async def test_a_name_of_the_hub_is_no_folder(loading: Loading) -> None:
    """What AIBrix makes of ``huggingface://org/adapter``."""
    answer = await loading.load("a", "org/adapter")
    assert (answer.status_code, error_of(answer)["param"]) == (400, "lora_path")


async def test_a_folder_without_any_file_of_an_adapter(loading: Loading) -> None:
    (loading.root / "empty").mkdir()
    answer = await loading.load("a", loading.root / "empty")
    assert (answer.status_code, error_of(answer)["param"]) == (400, "spec.files")


async def test_loads_of_one_name_at_once(loading: Loading) -> None:
    folders = [make_adapter(loading.root / f"{at}", seed=at) for at in range(4)]
    answers = await asyncio.gather(*(loading.load("one", folder) for folder in folders))
    assert sorted(answer.status_code for answer in answers) == [200, 400, 400, 400]
    assert await loading.models() == [BASE, "one"]


async def test_what_is_uploaded_takes_an_admin_to_unload(
    loading: Loading, tmp_path: Path
) -> None:
    folder = make_adapter(tmp_path / "a")
    await loading.front.adapters.UploadAdapter(
        upload(folder, "kept"), metadata=loading.metadata
    )
    refused = await loading.unload("kept")
    assert (refused.status_code, error_of(refused)["code"]) == (403, "permission_denied")
    assert await loading.models() == [BASE, "kept"]
    assert (await loading.unload("kept", role="admin")).status_code == 200


async def test_events_history_and_audit_are_those_of_an_upload(loading: Loading) -> None:
    watch = loading.front.adapters.WatchAdapters(
        adapters_pb2.WatchAdaptersRequest(), metadata=loading.metadata
    )
    while (await watch.read()).event != adapters_pb2.ADAPTER_EVENT_SYNCED:
        pass
    await loading.load("told", make_adapter(loading.root / "a"))
    await loading.unload("told")
    kinds = set()
    while adapters_pb2.ADAPTER_EVENT_DELETED not in kinds:
        event = await watch.read()
        assert event.adapter.name == "told"
        kinds.add(event.event)
    watch.cancel()
    assert adapters_pb2.ADAPTER_EVENT_PUBLISHED in kinds
    request = adapters_pb2.GetHistoryRequest(name="told")
    history = await loading.front.adapters.GetHistory(request, metadata=loading.metadata)
    assert {entry.actor for entry in history.entries} == {"publisher"}
    lines: list[dict[str, Any]] = []
    while len(lines) < 2:  # a thread writes them
        await asyncio.sleep(0)
        text = (loading.front.data_dir / "audit.jsonl").read_text("utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
        lines = [line for line in lines if line.get("adapter") == "told"]
    assert [(line["method"], line["who"], line["outcome"]) for line in lines] == [
        ("POST /v1/load_lora_adapter", "publisher", "OK"),
        ("POST /v1/unload_lora_adapter", "publisher", "OK"),
    ]
    assert all(len(line["revision"]) == 64 for line in lines)
    assert str(loading.root) not in json.dumps(lines)


# ----------------------------------------------------------------------- what is refused


def outside(loading: Loading) -> Path:
    """A valid adapter beside the root."""
    return make_adapter(loading.root.parent / "adapters-secret", seed=5)


async def test_paths_outside_the_roots_are_refused_alike(loading: Loading) -> None:
    secret = outside(loading)
    link = loading.root / "link"
    link.symlink_to(secret)
    (loading.root / "up").symlink_to("..")
    texts = set()
    for path in (
        secret,
        secret.with_name("no-such-folder"),
        loading.root,
        f"{loading.root}/../adapters-secret",
        link,
        loading.root / "up" / "adapters-secret",
        "adapters-secret",
        "org/name",
        f"{loading.root}-secret",
        "/",
    ):
        answer = await loading.load("stolen", path)
        assert (answer.status_code, error_of(answer)["param"]) == (400, "lora_path"), path
        texts.add(error_of(answer)["message"].replace(str(path), "PATH"))
    assert len(texts) == 2, texts  # one is about '..'
    assert await loading.models() == [BASE]


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("adapter_model.safetensors", lambda to, secret: to.symlink_to(secret)),
        ("adapter_model.safetensors", lambda to, secret: os.mkfifo(to)),
        ("adapter_model.safetensors", lambda to, secret: to.mkdir()),
        ("adapter_model.safetensors", lambda to, secret: to.symlink_to(to)),
        ("adapter_model.safetensors", lambda to, secret: to.write_bytes(bytes(65 << 10))),
        ("adapter_model.safetensors", lambda to, secret: None),
        ("chat_template.jinja", lambda to, secret: to.symlink_to("/etc/hostname")),
    ],
    ids=["link", "fifo", "folder", "loop", "large", "missing", "template"],
)
async def test_files_that_are_not_the_adapters_are_refused(
    loading: Loading, name: str, make: Any
) -> None:
    folder = make_adapter(loading.root / "a")
    (folder / name).unlink(missing_ok=True)
    make(folder / name, outside(loading) / name)
    answer = await loading.load("bad", folder)
    assert answer.status_code == 400, answer.text
    assert error_of(answer)["code"] == "adapter_invalid"
    assert await loading.models() == [BASE]


@pytest.mark.parametrize(
    ("name", "size", "fix"),
    [
        ("adapter_model.safetensors", 65 << 10, "--max-adapter-bytes"),
        ("chat_template.jinja", 65 << 10, "make it smaller"),
    ],
)
async def test_who_sends_too_large_a_file_is_told_what_to_change(
    loading: Loading, name: str, size: int, fix: str
) -> None:
    folder = make_adapter(loading.root / "a")
    (folder / name).write_bytes(bytes(size))
    told = error_of(await loading.load("large", folder))
    assert (told["code"], fix in told["message"]) == ("adapter_invalid", True), told
    assert OF_LINKS not in told["message"]


@pytest.mark.parametrize(
    ("number", "of_links"),
    [(errno.EACCES, False), (errno.EPERM, False), (errno.ENOENT, True), (errno.ELOOP, True)],
)
async def test_a_file_is_to_be_made_readable_where_it_is(
    loading: Loading, monkeypatch: pytest.MonkeyPatch, number: int, of_links: bool
) -> None:
    """A FAKE fault: tests may run as root, whom file modes do not stop."""
    folder = make_adapter(loading.root / "a")

    def fails(path: Any, *rest: Any, **more: Any) -> int:
        if path == "adapter_config.json":
            raise OSError(number, os.strerror(number))
        return os.open(path, *rest, **more)

    faulty = SimpleNamespace(**{**vars(os), "open": fails})
    monkeypatch.setattr(local_folders, "os", faulty)
    told = error_of(await loading.load("locked", folder))
    assert (told["code"], OF_LINKS in told["message"]) == ("adapter_invalid", of_links), told


async def test_links_inside_the_roots_are_followed(loading: Loading) -> None:
    """As in a Hugging Face cache: files of a snapshot are links to blobs."""
    folder = make_adapter(loading.root / "snapshots" / "abc")
    blobs = loading.root / "blobs"
    blobs.mkdir()
    for at, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / f"{at}")
        file.symlink_to(f"../../blobs/{at}")
    (loading.root / "current").symlink_to("snapshots/abc")
    assert (await loading.load("cached", loading.root / "current")).status_code == 200


async def test_a_link_that_is_put_in_between_is_not_followed(
    loading: Loading, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret, folder = outside(loading), make_adapter(loading.root / "a")
    real = os.path.realpath

    def swapped(path: Any, *, strict: bool = False) -> str:
        found = real(path, strict=strict)
        if path == folder and strict:
            folder.rename(loading.root / "moved")
            folder.symlink_to(secret)
        return found

    monkeypatch.setattr(local_folders.os.path, "realpath", swapped)
    answer = await loading.load("stolen", folder)
    assert (answer.status_code, error_of(answer)["param"]) == (400, "lora_path")
    monkeypatch.undo()
    assert await loading.models() == [BASE]


def odd_paths(root: Path) -> dict[str, Path]:
    """Paths below a root that no file system opens, by what it says."""
    (root / "loop").symlink_to("pool")
    (root / "pool").symlink_to("loop")
    (root / "dangling").symlink_to("nothing")
    (root / "file").write_text("x")
    os.mkfifo(root / "fifo")
    adapter = make_adapter(root / "looped")
    (adapter / "README.md").unlink(missing_ok=True)
    (adapter / "README.md").symlink_to("README.md")
    return {
        "ELOOP": root / "loop",
        "ELOOP inside": root / "loop" / "a",
        "ENAMETOOLONG": root / ("n" * 256),
        "PATH_MAX": root.joinpath(*["m" * 200] * 18),
        "ENOENT": root / "missing",
        "a link to nothing": root / "dangling",
        "ENOTDIR": root / "file" / "a",
        "a file": root / "file",
        "a pipe": root / "fifo",
        "a file that is a loop": adapter,
    }


async def test_a_path_that_cannot_be_opened_is_the_caller_s_error(loading: Loading) -> None:
    for what, path in odd_paths(loading.root).items():
        answer = await loading.load("odd", path)
        assert answer.status_code == 400, (what, answer.text)
        assert error_of(answer)["code"] in ("invalid_field", "adapter_invalid", None), what
        assert "internal" not in answer.text.lower(), what


PASSING = (errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE, errno.ENOMEM)
LASTING = (errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EINVAL)
FAULTS = ("open", "listdir", "stat", "fstat", "pread")


@pytest.mark.parametrize("call", FAULTS)
async def test_no_error_of_the_system_is_a_bug(
    loading: Loading, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Errors that Linux knows, some drawn at random, at a FAKE fault in each call that reads
    the disk."""
    rng = random.Random(seed := random.randrange(2**32))
    print(f"{seed=}")
    folder = make_adapter(loading.root / "a")
    real, seen = os, set()
    for number in (*PASSING, *LASTING, *rng.sample(sorted(errno.errorcode), 6)):

        def fails(*_: Any, number: int = number, **more: Any) -> Any:
            raise OSError(number, os.strerror(number), str(folder))

        faulty = SimpleNamespace(**{**vars(real), call: fails})
        with monkeypatch.context() as patch:
            patch.setattr(local_folders, "os", faulty)
            answer = await loading.load("b", folder)
        seen.add(answer.status_code)
        assert answer.status_code in (400, 503), (errno.errorcode[number], answer.text)
        if number in PASSING:
            assert answer.status_code == 503, errno.errorcode[number]
            assert int(answer.headers["retry-after"]) >= 1
        if number in LASTING:
            assert answer.status_code == 400, errno.errorcode[number]
    assert seen == {400, 503}
    assert await loading.models() == [BASE]
    assert (await loading.load("b", folder)).status_code == 200


async def test_a_hole_is_seen(loading: Loading) -> None:
    link = loading.root / "link"
    link.symlink_to(outside(loading))
    right = "if os.path.commonpath([base, real]) != base or base == real:"
    wrong = f"return os.open(real, flags)\n            {right}"
    with planted(local_folders, right, wrong):
        assert (await loading.load("stolen", link)).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"lora_path": "/x"}, "lora_name"),
        ({"lora_name": "a"}, "lora_path"),
        ({"lora_name": "a/b", "lora_path": "/x"}, "lora_name"),
        ({"lora_name": "", "lora_path": "/x"}, "lora_name"),
        ({"lora_name": "a", "lora_path": ""}, "lora_path"),
        ({"lora_name": "a", "lora_path": "/x\0y"}, "lora_path"),
        ({"lora_name": "a", "lora_path": "/" * 5000}, "lora_path"),
        ({"lora_name": "a", "lora_path": "/x", "load_in_place": True}, "load_in_place"),
    ],
)
async def test_a_bad_field_is_named(
    loading: Loading, fields: dict[str, Any], param: str
) -> None:
    answer = await loading.post("/v1/load_lora_adapter", **fields)
    assert (answer.status_code, error_of(answer)["param"]) == (400, param), answer.text


async def test_without_roots_it_says_so(
    front: Front, http: httpx.AsyncClient, tmp_path: Path
) -> None:
    folder = make_adapter(tmp_path / "a")
    body = {"lora_name": "a", "lora_path": str(folder)}
    answer = await http.post("/v1/load_lora_adapter", json=body)
    assert (answer.status_code, error_of(answer)["code"]) == (501, "unimplemented")
    assert "--lora-root" in error_of(answer)["message"]
    assert (await post(http, TEXT)).status_code == 200
    answer = await http.get("/server_info", params={"config_format": "json"})
    assert answer.json()["vllm_config"]["lora_config"] is None


async def test_trl_learns_that_adapters_can_be_loaded(loading: Loading) -> None:
    """What `select_adapter_sync` of its asynchronous trainers reads, and its `VLLMClient`."""
    headers = {"authorization": f"Bearer {loading.keys['publisher']}"}
    answer = await loading.http.get("/server_info", headers=headers)
    config = answer.json()["vllm_config"]
    assert config["lora_config"]["max_lora_rank"] >= 64
    assert config["lora_config"]["max_loras"] >= 6, "a window of four policies, and two more"
    assert config["parallel_config"]["data_parallel_size"] == 1
    assert config["model_config"]["logprobs_mode"] == "raw_logprobs"
    assert config["weight_transfer_config"] is None
    assert (await loading.http.get("/server_info")).status_code == 401
