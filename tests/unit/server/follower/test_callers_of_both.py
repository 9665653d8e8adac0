"""A follower and its registry know callers in one way, or the follower does not follow."""

from __future__ import annotations

from collections.abc import Awaitable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from veneer_proto.v1 import adapters_pb2 as pb
from veneer_proto.v1 import adapters_pb2_grpc, replication_pb2
from veneer_registry.errors import FailedPrecondition
from veneer_server.access.edit_keys import add_key
from veneer_server.follower import link
from veneer_server.replication.states import BeginFeed
from veneer_server.rpc import replication_service

from tests.pki import Pki
from tests.ports import free_port
from tests.refused import refused
from tests.unit.server.follower.pair import bearer, until
from tests.unit.server.rpc.front_harness import Front, failure, make_adapter, running, upload

ROLES: dict[str, Any] = {"default": "operator", "team-a": "admin", "team-b": "admin"}


class Keys:
    """A keys file with a key for each of `ROLES`; the operator's is the follower's own too."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "keys.toml"
        self.of = {
            tenant: add_key(
                self.file, name=tenant, tenant=tenant, roles=[role], expires=None
            ).key
            for tenant, role in ROLES.items()
        }
        self.own = folder / "own"
        self.own.write_text(self.of["default"])

    @property
    def flags(self) -> dict[str, str]:
        return {"keys_file": str(self.file)}

    @property
    def shown(self) -> dict[str, str]:
        """Flags of a follower that shows its key."""
        return {"registry_key_file": str(self.own)}


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path)


@pytest.fixture
def start(base_folder: Path, front_cache: Path, tmp_path: Path) -> Any:
    """Starts a server in a folder of that name."""

    def started(name: str, **flags: Any) -> Any:
        return running(base_folder, front_cache, tmp_path / name, **flags)

    return started


@contextmanager
def not_telling() -> Iterator[None]:
    """The registry is of a version that does not say how it knows callers."""
    with pytest.MonkeyPatch.context() as patch:
        to_wire = replication_service.to_wire

        def older(message: Any) -> replication_pb2.FollowResponse:
            if isinstance(message, BeginFeed):
                message = replace(message, asks_callers=None)
            return to_wire(message)

        patch.setattr(replication_service, "to_wire", older)
        yield


def following(registry: Front) -> dict[str, str]:
    return {"role": "engine", "registry": registry.addresses["grpc"]}


@pytest.mark.push
@pytest.mark.parametrize("tells", [nullcontext, not_telling])
@pytest.mark.parametrize("asks", ["follower", "registry"])
async def test_a_follower_does_not_start_if_only_one_of_them_asks_who_calls(
    start: Any, keys: Keys, asks: str, tells: Any
) -> None:
    """Also above a registry of a version that does not tell."""
    asking = {asks: keys.flags}
    with tells():
        async with start("registry", **asking.get("registry", {})) as registry:
            flags = {**following(registry), **keys.shown, **asking.get("follower", {})}
            with refused(FailedPrecondition, cause="callers"):
                async with start("follower", **flags):
                    pytest.fail("it serves")


@pytest.mark.push
@pytest.mark.parametrize("tells", [nullcontext, not_telling])
@pytest.mark.parametrize("asking", [True, False])
async def test_a_follower_follows_what_knows_callers_as_it_does(
    start: Any, keys: Keys, asking: bool, tells: Any, tmp_path: Path
) -> None:
    flags = keys.flags if asking else {}
    who = {"metadata": bearer(keys.of["team-b"])} if asking else {}
    with tells():
        async with (
            start("registry", **flags) as registry,
            start("follower", **following(registry), **keys.shown, **flags) as follower,
        ):
            messages = upload(make_adapter(tmp_path / "one", seed=1), "one")
            await follower.adapters.UploadAdapter(messages, **who)
            await registry.adapters.GetAdapter(pb.GetAdapterRequest(name="one"), **who)


@pytest.mark.push
async def test_a_registry_that_asks_nobody_after_its_restart_is_not_followed(
    start: Any, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is known is served, and changes are refused. Back with its keys, it is followed."""
    monkeypatch.setattr(link, "REFUSED_WAIT_S", 0.05)
    listen = {"listen": f"127.0.0.1:{free_port()}"}
    who = {"metadata": bearer(keys.of["team-b"])}
    asking = start("registry", **keys.flags, **listen)
    registry = await asking.__aenter__()
    flags = {**following(registry), **keys.shown, **keys.flags}
    async with start("follower", **flags) as follower:

        async def push(name: str) -> None:
            messages = upload(make_adapter(tmp_path / name, seed=1), name)
            await follower.adapters.UploadAdapter(messages, **who)

        async def listed() -> list[str]:
            found = await follower.adapters.ListAdapters(pb.ListAdaptersRequest(), **who)
            return [each.name for each in found.adapters]

        async def told(cause: str) -> bool:
            why = await failure(
                follower.adapters.DeleteAdapter(pb.DeleteAdapterRequest(name="one"), **who)
            )
            return why.metadata.get("cause") == cause

        await push("one")
        await until(lambda: _is(listed(), ["one"]))
        await asking.__aexit__(None, None, None)
        async with start("registry", **listen) as open_to_all:
            await open_to_all.push(make_adapter(tmp_path / "open", seed=2), "one")
            await until(lambda: told("callers"))
            assert await listed() == ["one"]
            await open_to_all.adapters.GetAdapter(pb.GetAdapterRequest(name="one"))
        async with start("registry", **keys.flags, **listen):
            await until(lambda: _succeeds(push("two")))
            await until(lambda: _is(listed(), ["one", "two"]))


async def _is(awaited: Awaitable[Any], wanted: Any) -> bool:
    return await awaited == wanted


async def _succeeds(call: Awaitable[Any]) -> bool:
    try:
        await call
    except grpc.aio.AioRpcError:
        return False
    return True


@pytest.mark.push
async def test_a_key_of_another_tenant_at_the_registry_changes_nothing(
    start: Any, keys: Keys, tmp_path: Path
) -> None:
    """Both ask for keys, and their files differ."""
    other = tmp_path / "other.toml"
    text = keys.file.read_text()
    assert text.count('tenant = "team-b"') == 1
    other.write_text(text.replace('tenant = "team-b"', 'tenant = "team-a"'))
    async with (
        start("registry", keys_file=str(other)) as registry,
        start("follower", **following(registry), **keys.shown, **keys.flags) as follower,
    ):
        messages = upload(make_adapter(tmp_path / "one", seed=1), "one")
        await registry.adapters.UploadAdapter(messages, metadata=bearer(keys.of["team-a"]))
        request = pb.DeleteAdapterRequest(name="one")
        call = follower.adapters.DeleteAdapter(request, metadata=bearer(keys.of["team-b"]))
        why = await failure(call)
        assert (why.reason, why.metadata["cause"]) == ("PERMISSION_DENIED", "passed_on")
        # An operator who acts in the tenant is one at both.
        visiting = (*bearer(keys.of["default"]), ("veneer-tenant", "team-a"))
        await follower.adapters.DeleteAdapter(request, metadata=visiting)


@pytest.mark.push
async def test_nobody_acts_by_the_certificate_of_the_follower(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    """The connection to the registry has the follower's, which may do everything there."""
    pki, keys = Pki(tmp_path / "pki"), Keys(tmp_path)
    keys.file.write_text(
        keys.file.read_text()
        + '\n[certificates."follower.example.org"]\nroles = ["operator"]\n'
        '[certificates."ann.example.org"]\nroles = ["admin"]\n'
        '[certificates."bob.example.org"]\ntenant = "team-b"\nroles = ["admin"]\n'
    )
    tls = {
        "tls_cert": pki.cert,
        "tls_key": pki.key,
        "tls_client_ca": pki.ca_file,
        **keys.flags,
    }

    def shown(name: str) -> grpc.ChannelCredentials:
        cert, key = pki.client(f"{name}.example.org")
        files = [Path(each).read_bytes() for each in (pki.ca_file, key, cert)]
        return grpc.ssl_channel_credentials(*files)

    cert, key = pki.client("follower.example.org")
    own = {"registry_ca": pki.ca_file, "registry_cert": cert, "registry_cert_key": key}
    ann = shown("ann")
    async with (
        running(
            base_folder, front_cache, tmp_path / "registry", credentials=ann, **tls
        ) as registry,
        running(
            base_folder,
            front_cache,
            tmp_path / "follower",
            **{**following(registry), **own, **tls},
            credentials=ann,
        ) as follower,
        grpc.aio.secure_channel(follower.addresses["grpc"], shown("bob")) as bobs,
    ):
        await registry.push(make_adapter(tmp_path / "one", seed=1), "one")
        request = pb.DeleteAdapterRequest(name="one")
        for stub in (adapters_pb2_grpc.AdapterServiceStub(bobs), follower.adapters):
            why = await failure(stub.DeleteAdapter(request))
            assert (why.reason, why.metadata["cause"]) == ("PERMISSION_DENIED", "certificate")
        await registry.adapters.GetAdapter(pb.GetAdapterRequest(name="one"))
        # With a key of its own a caller passes, whatever certificate it shows.
        await follower.adapters.DeleteAdapter(request, metadata=bearer(keys.of["default"]))
