"""Connections to the registry: where it is, how it is known, and its errors."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from veneer_proto.v1 import replication_pb2, replication_pb2_grpc
from veneer_registry.errors import (
    DeadlineExceeded,
    InvalidField,
    Unavailable,
    VeneerError,
    error_for_reason,
)

from veneer_server.config import ServerConfig
from veneer_server.errors import DOMAIN
from veneer_server.follower.fetching import Chunk

__all__ = ["RegistryChannel", "RegistryPlace", "to_error"]

_MOST_MESSAGE: Final = 64 << 20
"""Bytes of the state of one name: it may have a thousand revisions."""

_OPTIONS: Final = (
    ("grpc.max_receive_message_length", _MOST_MESSAGE),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.max_pings_without_data", 0),
    # The registry may be back at any time: followers converge within two seconds.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Otherwise channels share connections, and a half-open one is used again.
    ("grpc.use_local_subchannel_pool", 1),
)


@dataclass(frozen=True, slots=True)
class RegistryPlace:
    """Where the registry is, and what this server shows it.

    Attributes:
        address: ``HOST:PORT``.
        credentials: None for plain text.
        metadata: of this server's own calls.
    """

    address: str
    credentials: grpc.ChannelCredentials | None
    metadata: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, config: ServerConfig) -> RegistryPlace:
        """As configured. Raises InvalidField if a file cannot be read."""
        address = config.registry
        tls = address.startswith("https://") or config.registry_ca is not None
        address = address.removeprefix("https://").removeprefix("http://")
        credentials = None
        if tls or config.registry_cert is not None:
            credentials = grpc.ssl_channel_credentials(
                _read(config.registry_ca, "registry_ca"),
                _read(config.registry_cert_key, "registry_cert_key"),
                _read(config.registry_cert, "registry_cert"),
            )
        key = _read(config.registry_key_file, "registry_key_file")
        metadata: tuple[tuple[str, str], ...] = ()
        if key is not None:
            metadata = (("authorization", f"Bearer {key.decode().strip()}"),)
        return cls(address, credentials, metadata)

    def connect(self) -> grpc.aio.Channel:
        """A channel with connections of its own; it connects when it is first used."""
        if self.credentials is None:
            return grpc.aio.insecure_channel(self.address, options=_OPTIONS)
        return grpc.aio.secure_channel(self.address, self.credentials, options=_OPTIONS)


class RegistryChannel:
    """The connection for everything but following, which has its own."""

    def __init__(self, place: RegistryPlace) -> None:
        self.place = place
        self.channel = place.connect()
        self._stub: Any = replication_pb2_grpc.ReplicationServiceStub(self.channel)

    async def close(self) -> None:
        """End its calls."""
        await self.channel.close()

    def distrust(self, digest: str) -> None:
        """As `fetching.Remote`: there is no choice."""

    async def chunks(
        self, tenant: str, digest: str, file: str, offset: int
    ) -> AsyncIterator[Chunk]:
        """As `fetching.Remote`."""
        request = replication_pb2.FetchWeightsRequest(
            tenant=tenant, weights_digest=digest, file=file, offset=offset
        )
        call = self._stub.FetchWeights(request, metadata=self.place.metadata)
        try:
            async for message in call:
                yield Chunk(message.size, message.offset, message.data, message.crc32)
        except grpc.aio.AioRpcError as error:
            raise to_error(error, self.place.address) from error
        finally:
            call.cancel()


def to_error(error: grpc.aio.AioRpcError, address: str) -> VeneerError:
    """What the registry raised, or `Unavailable` if it did not answer."""
    for key, value in _pairs(error.trailing_metadata()):
        if key == "grpc-status-details-bin":
            with suppress(DecodeError):  # something between here and there wrote it
                if (known := _known(status_pb2.Status.FromString(value))) is not None:
                    return known
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded("the registry did not answer before the call's deadline")
    return Unavailable(
        "the registry does not answer: retry",
        metadata={"cause": "registry_away"},
        retry_after_s=1.0,
        detail=f"{address}: {error.code().name} {error.details()}",
    )


def _known(status: status_pb2.Status) -> VeneerError | None:
    info, retry_s = error_details_pb2.ErrorInfo(), None
    for detail in status.details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            detail.Unpack(info)
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            detail.Unpack(retry)
            retry_s = retry.retry_delay.ToNanoseconds() / 1e9
    if info.domain != DOMAIN:
        return None
    kind = error_for_reason(info.reason)
    return kind(status.message, metadata=dict(info.metadata), retry_after_s=retry_s)


def _pairs(metadata: Any) -> Sequence[tuple[str, bytes]]:
    return tuple(metadata or ())


def _read(path: Path | None, key: str) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        flag = f"--{key.replace('_', '-')}"
        raise InvalidField(
            f"{flag} {path} cannot be read: {error.strerror or error}", metadata={"key": key}
        ) from error
