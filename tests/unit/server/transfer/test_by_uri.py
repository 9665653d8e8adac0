"""Registration by URI, from a real front with real fetching processes and web servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from veneer_client import AsyncClient, Text
from veneer_registry.errors import (
    Aborted,
    AdapterExists,
    AdapterInvalid,
    AdapterNotFound,
    InternalError,
    InvalidField,
    VeneerError,
)

from tests.pki import Pki
from tests.refused import refused
from tests.unit.server.rpc.front_harness import Front, make_adapter, running, until
from tests.web_folder import Answer, WebFolder, dripping, endless, web_folder

pytestmark = pytest.mark.asyncio(loop_scope="module")

SECRET = "hf_open-sesame"
WEIGHTS = "adapter_model.safetensors"


@dataclass
class Site:
    """A front, and the web servers that it may or may not fetch from."""

    front: Front
    client: AsyncClient
    web: WebFolder
    """Allowed below ``/lora/``."""
    other: WebFolder
    """Not allowed."""
    hub: WebFolder
    """Without TLS."""
    root: Path
    """The --lora-root."""
    number: Iterator[int] = field(default_factory=lambda: iter(range(1000)))

    def folder(self, seed: int = 0) -> Path:
        """An adapter that is not below the root."""
        return make_adapter(self.root.parent / f"made-{next(self.number)}", seed=seed)

    async def register(self, uri: str, name: str = "a", **options: Any) -> Any:
        return await self.client.register(uri, name, **options)

    def staged(self) -> list[Path]:
        folder = self.front.data_dir / "fetching"
        return list(folder.iterdir()) if folder.exists() else []


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def module_site(
    base_folder: Path, front_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Site]:
    data = tmp_path_factory.mktemp("site")
    pki = Pki(data / "pki")
    root = data / "roots"
    root.mkdir()
    (data / "token").write_text(f"{SECRET}\n")
    left = data / "data" / "fetching" / "left"
    left.mkdir(parents=True)
    with (
        web_folder(pki.cert, pki.key) as web,
        web_folder(pki.cert, pki.key) as other,
        web_folder() as hub,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("SSL_CERT_FILE", pki.ca_file)
        patch.setenv("WEB_TOKEN", SECRET)
        async with (
            running(
                base_folder,
                front_cache,
                data,
                fetch_allow=f"{web.url}/lora/,hf://org/",
                fetch_token=f"{web.url}/lora/private/ env:WEB_TOKEN,hf:// {data / 'token'}",
                fetch_deadline="20",
                hf_endpoint=f"http://localhost:{hub.port}",
                lora_root=str(root),
                resolve=f"{web.url}/lora/lazy/{{name}}",
                max_adapter_bytes="64KiB",
            ) as front,
            AsyncClient(front.addresses["grpc"]) as client,
        ):
            assert not left.exists(), "what a killed server left is removed"
            yield Site(front, client, web, other, hub, root)


@pytest_asyncio.fixture(loop_scope="module")
async def site(module_site: Site) -> AsyncIterator[Site]:
    async for found in module_site.client.list():
        await module_site.client.delete(found.name)
    for web in (module_site.web, module_site.other, module_site.hub):
        web.answers.clear()
        web.asked.clear()
    yield module_site
    assert module_site.staged() == [], "what was fetched is removed"


# --------------------------------------------------------------------------- what works


@pytest.mark.push
async def test_a_web_folder(site: Site, tmp_path: Path) -> None:
    folder = make_adapter(site.root.parent / "with-template", seed=3, template="{{ 1 }}")
    site.web.serve("/lora/sql", folder)
    uri = f"{site.web.url}/lora/sql"
    checked = await site.register(uri, "sql", validate_only=True)
    assert (checked.published, await names(site)) == (False, [])
    pushed = await site.register(uri, "sql", labels={"from": "web"})
    assert (pushed.published, pushed.replaced) == (True, False)
    assert pushed.adapter.labels == {"from": "web"}
    await site.client.pull("sql", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(folder)
    assert not (await site.register(f"{uri}/", "sql")).published, "the same content"
    site.web.serve("/lora/sql", site.folder(seed=4))
    with refused(AdapterExists):
        await site.register(uri, "sql")
    assert (await site.register(uri, "sql", allow_replace=True)).replaced


async def test_a_folder_of_the_machine(site: Site) -> None:
    make_adapter(site.root / "team" / "sql")
    assert (await site.register(f"file://{site.root}/team/sql")).published
    for uri in (f"file://{site.folder()}", f"file://{site.root}", "file:///etc", "file:///"):
        with refused(InvalidField, field="uri"):
            await site.register(uri, "b")
    (site.root / "out").symlink_to(site.folder(seed=1))
    with refused(InvalidField, field="uri"):
        await site.register(f"file://{site.root}/out", "b")


async def test_the_hub(site: Site) -> None:
    """All files are of the commit that the first one is of."""
    folder, commit = site.folder(), "0123456789" * 4
    site.hub.serve(f"/org/sql/resolve/{commit}/v2", folder)
    config = (folder / "adapter_config.json").read_bytes()
    site.hub.answers["/org/sql/resolve/main/v2/adapter_config.json"] = Answer(
        config, headers={"x-repo-commit": commit}
    )
    assert (await site.register("hf://org/sql/v2")).published
    asked = site.hub.paths()
    assert asked[0] == "/org/sql/resolve/main/v2/adapter_config.json"
    assert all(path.startswith(f"/org/sql/resolve/{commit}/v2/") for path in asked[1:])
    assert {each.token for each in site.hub.asked} == {f"Bearer {SECRET}"}
    site.hub.asked.clear()
    site.hub.serve("/org/sql/resolve/v1.0", site.folder(seed=1))
    await site.register("hf://org/sql@v1.0", "b")
    assert site.hub.paths()[0] == "/org/sql/resolve/v1.0/adapter_config.json"


async def test_the_hub_leads_to_its_storage(site: Site) -> None:
    """To a place that the operator allows; the token stays behind."""
    folder = site.folder()
    site.hub.serve("/org/sql/resolve/main", folder)
    site.hub.answers[f"/org/sql/resolve/main/{WEIGHTS}"] = Answer(
        status=302, headers={"location": f"{site.web.url}/lora/blob?signature=x%2By"}
    )
    site.web.answers["/lora/blob?signature=x%2By"] = Answer((folder / WEIGHTS).read_bytes())
    assert (await site.register("hf://org/sql")).published
    assert [(each.path, each.token) for each in site.web.asked] == [
        ("/lora/blob?signature=x%2By", "")
    ]


async def test_a_token_for_its_own_place_only(site: Site) -> None:
    site.web.serve("/lora/private/sql", site.folder())
    site.web.serve("/lora/open", site.folder())
    await site.register(f"{site.web.url}/lora/private/sql")
    assert {each.token for each in site.web.asked} == {f"Bearer {SECRET}"}
    site.web.asked.clear()
    await site.register(f"{site.web.url}/lora/open", "b")
    assert {each.token for each in site.web.asked} == {""}


async def test_a_name_is_fetched_when_it_is_first_asked_for(site: Site) -> None:
    """Once for all who ask; and one that is not there is not looked for again at once."""
    site.web.serve("/lora/lazy/sql", site.folder())
    await asyncio.gather(*(site.client.generate(Text("x"), adapter="sql") for _ in range(4)))
    assert site.web.paths().count(f"/lora/lazy/sql/{WEIGHTS}") == 1
    site.web.asked.clear()
    for _ in range(3):
        with refused(AdapterNotFound, did_you_mean="sql"):
            await site.client.generate(Text("x"), adapter="sqk")
    assert len(site.web.asked) == 1
    site.web.asked.clear()
    for spec in ("sqj@0123456789ab", "sqj/prod", "../x"):
        with pytest.raises(VeneerError):
            await site.client.generate(Text("x"), adapter=spec)
    assert site.web.asked == []
    history = [line async for line in site.client.history("sql")]
    assert history[0].actor == "resolve"


# -------------------------------------------------------------------------- what does not


async def test_only_what_is_allowed(site: Site) -> None:
    for web in (site.web, site.other):
        web.serve("/lora/sql", site.folder())
        web.serve("/else", site.folder())
    for uri in (
        f"{site.web.url}/else",
        f"{site.web.url}/lorax",
        f"{site.web.url}",
        f"{site.other.url}/lora/sql",
        f"https://127.0.0.1:{site.web.port}/lora/sql",
        "hf://other/repo",
        "s3://bucket/lora",
        "gs://bucket/lora",
    ):
        with refused(InvalidField, field="uri", cause="not_allowed"):
            await site.register(uri)
    for uri in (
        f"{site.web.url}/lora/../else",
        f"{site.web.url}/lora/%2e%2e/else",
        f"{site.web.url}/lora/sql?x=1",
        f"{site.web.url}/lora//sql",
        f"{site.web.url}/lora/a\\b",
        f"https://user:{SECRET}@localhost:{site.web.port}/lora/sql",
        f"{site.web.url}/lora/{'x' * 3000}",
        "hf://org",
        "hf://org/re..po@..",
        "s3:///lora",
        "file://host/etc",
    ):
        with refused(InvalidField, field="uri", cause="malformed"):
            await site.register(uri)
    for uri in ("", "sql", "/lora/sql", "HTTPS://localhost/lora", "http://localhost/lora/sql"):
        with refused(InvalidField, field="uri", cause="scheme"):
            await site.register(uri)
    assert site.web.asked == site.other.asked == []


@pytest.mark.parametrize(
    "location",
    [
        "http://169.254.169.254/latest/meta-data/iam",
        "https://169.254.169.254/latest/meta-data/iam",
        "file:///etc/passwd",
        "gopher://localhost/",
        "https://{other}/lora/sql/" + WEIGHTS,
        "http://localhost:{hub_port}/lora/" + WEIGHTS,
        "https://localhost:{port}/else/" + WEIGHTS,
        "https://localhost:{port}/lora/%2e%2e/else/" + WEIGHTS,
        "https://127.0.0.1:{port}/lora/" + WEIGHTS,
        "https://u:p@localhost:{port}/lora/" + WEIGHTS,
        "//localhost:{other_port}/lora/" + WEIGHTS,
        "/else/" + WEIGHTS,
        "https://localhost:{port}/lora/sql/" + WEIGHTS,
        "https://[localhost]]:{port}/lora/",
        "",
    ],
)
async def test_redirects_are_checked(site: Site, location: str) -> None:
    """Elsewhere, or in a circle: an error, and nobody else is contacted."""
    site.web.serve("/lora/sql", site.folder())
    site.web.serve("/else", site.folder())
    site.other.serve("/lora/sql", site.folder())
    where = location.format(
        other=f"localhost:{site.other.port}",
        port=site.web.port,
        other_port=site.other.port,
        hub_port=site.hub.port,
    )
    site.web.answers[f"/lora/sql/{WEIGHTS}"] = Answer(status=302, headers={"location": where})
    with refused(InvalidField, field="uri", cause="redirect"):
        await site.register(f"{site.web.url}/lora/sql")
    assert site.other.asked == site.hub.asked == []
    assert all(path.startswith("/lora/sql/") for path in site.web.paths())


@pytest.mark.push
async def test_hostile_bodies(site: Site) -> None:
    endings = {
        "endless": (
            Answer(partial(endless, site.web.ended), length=-1), AdapterInvalid, "size",
        ),
        "huge": (Answer(b"x", length=10 << 30), AdapterInvalid, "size"),
        "short": (Answer(b"x" * 10, length=4000), Aborted, "cut_short"),
        "zipped": (
            Answer(b"x" * 10, headers={"content-encoding": "gzip"}), AdapterInvalid, "encoding",
        ),
        "gone": (Answer(status=410), AdapterInvalid, "missing"),
        "closed": (Answer(status=403), AdapterInvalid, "access"),
        "broken": (Answer(status=500), Aborted, "status"),
        "partial": (Answer(b"x" * 10, status=206), Aborted, "status"),
        "huge header": (Answer(b"", headers={"x": "y" * 70000}), Aborted, "cut_short"),
    }  # fmt: skip
    folder = site.folder()
    for what, (answer, error, cause) in endings.items():
        site.web.serve("/lora/sql", folder)
        site.web.answers[f"/lora/sql/{WEIGHTS}"] = answer
        with refused(error, cause=cause) as caught:
            await site.register(f"{site.web.url}/lora/sql")
        assert caught.value.metadata["file"] == WEIGHTS, what
    site.web.answers[f"/lora/sql/{WEIGHTS}"] = Answer((folder / WEIGHTS).read_bytes()[:-1])
    with refused(AdapterInvalid):  # as an upload that is cut short
        await site.register(f"{site.web.url}/lora/sql")
    site.web.serve("/lora/sql", folder)
    site.web.answers["/lora/sql/README.md"] = Answer(b"x" * (2 << 20))
    with refused(AdapterInvalid, file="README.md", cause="size"):
        await site.register(f"{site.web.url}/lora/sql")
    site.web.answers["/lora/sql/README.md"] = Answer(status=403)  # as S3 has it for no such key
    assert (await site.register(f"{site.web.url}/lora/sql")).published


async def test_a_caller_that_leaves_ends_the_fetch(site: Site) -> None:
    folder = site.folder()
    site.web.serve("/lora/sql", folder)
    site.web.answers[f"/lora/sql/{WEIGHTS}"] = Answer(
        partial(dripping, site.web.ended), length=4000
    )
    asking = asyncio.ensure_future(site.register(f"{site.web.url}/lora/sql"))
    await until(lambda: f"/lora/sql/{WEIGHTS}" in site.web.paths())
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await until(lambda: site.front.calls == 0)
    await until(lambda: site.staged() == [])
    with refused(AdapterNotFound):
        await site.client.get("a")


async def test_a_certificate_that_nobody_knows(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stranger = Pki(tmp_path / "pki")
    monkeypatch.setenv("SSL_CERT_FILE", stranger.ca_file)
    site.web.serve("/lora/sql", site.folder())
    with refused(Aborted, field="uri", cause="certificate"):
        await site.register(f"{site.web.url}/lora/sql")
    assert site.web.asked == []


async def test_secrets_are_told_to_nobody(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    site.web.answers["/lora/private/sql/adapter_config.json"] = Answer(status=403)
    errors: list[VeneerError] = []
    for uri in (f"{site.web.url}/lora/private/sql", f"{site.web.url}/lora/?{SECRET}"):
        with pytest.raises(VeneerError) as caught:
            await site.register(uri)
        errors.append(caught.value)
    monkeypatch.delenv("WEB_TOKEN")
    with refused(InternalError, cause="token") as missing:
        await site.register(f"{site.web.url}/lora/private/sql")
    assert "WEB_TOKEN" not in str(missing.value)
    assert SECRET not in caplog.text + "".join(map(str, errors))


async def test_a_lora_root_that_does_not_exist_is_logged(
    base_folder: Path, front_cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    missing = tmp_path / "lorra"
    async with running(base_folder, front_cache, tmp_path / "data", lora_root=str(missing)):
        assert "there is no such folder: check --lora-root" in caplog.messages


async def names(site: Site) -> list[str]:
    return [found.name async for found in site.client.list()]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
