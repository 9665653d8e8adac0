"""Connections to the registry: its address, TLS and key files, and its errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from veneer_proto.v1 import (
    replication_pb2,
    replication_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)
from veneer_registry.errors import (
    DeadlineExceeded,
    InvalidField,
    Unavailable,
    VeneerError,
    error_for_reason,
)

from veneer_server.config import ServerConfig
from veneer_server.errors import DOMAIN
from veneer_server.follower.fetching import FilePart

_MOST_MESSAGE: Final = 64 << 20
"""Maximum bytes of a message. One name's state may have a thousand revisions."""

_KEY: Final = "registry_key_file"
_PEM: Final = ("registry_ca", "registry_cert_key", "registry_cert")

_NOBODYS_KEY: Final = "vn_00000000_nobody"
_ASK_S: Final = 5.0
"""Seconds that a registry may take to answer `refuses_strangers`."""

_OLD_CALLS_S: Final = 600.0
"""Seconds that calls may continue on the old connection once a certificate was renewed."""

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


class RegistryAddress:
    """The registry's address, and this server's credentials for it. Belongs to one event loop.

    Keys and certificates are read again for each connection and call, since they may be renewed
    while the server runs. While a file cannot be read, its last content is used.

    Attributes:
        address: ``HOST:PORT``.
    """

    def __init__(self, address: str, *, tls: bool, files: Mapping[str, Path]) -> None:
        """Args:
        files: key and certificate files by configuration key.

        Raises:
            InvalidField: a file cannot be read.
        """
        self.address = address
        self._tls = tls
        self._files = files
        self._known = {key: _read(path, key) for key, path in files.items()}

    @classmethod
    def of(cls, config: ServerConfig) -> RegistryAddress:
        """The configured address. Raises InvalidField if a file cannot be read."""
        address = config.registry
        tls = address.startswith("https://")
        paths = {key: getattr(config, key) for key in (*_PEM, _KEY)}
        return cls(
            address.removeprefix("https://").removeprefix("http://"),
            tls=tls or config.registry_ca is not None or config.registry_cert is not None,
            files={key: path for key, path in paths.items() if path is not None},
        )

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Metadata of this server's own calls."""
        key = self._now().get(_KEY)
        if key is None:
            return ()
        return (("authorization", f"Bearer {key.decode().strip()}"),)

    def pem(self) -> tuple[bytes | None, ...]:
        """CA certificates, private key and certificate, each None if not configured."""
        known = self._now()
        return tuple(known.get(key) for key in _PEM)

    def connect(self) -> grpc.aio.Channel:
        """A channel that shares no connections with others; it connects on first use."""
        if not self._tls:
            return grpc.aio.insecure_channel(self.address, options=_OPTIONS)
        credentials = grpc.ssl_channel_credentials(*self.pem())
        return grpc.aio.secure_channel(self.address, credentials, options=_OPTIONS)

    def _now(self) -> Mapping[str, bytes]:
        for key, path in self._files.items():
            with suppress(OSError):
                self._known[key] = path.read_bytes()
        return self._known


class RegistryChannel:
    """The channel for all calls except `Follow`, which has its own."""

    def __init__(self, place: RegistryAddress) -> None:
        self.place = place
        self._pem = place.pem()
        self._channel = place.connect()
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def channel(self) -> grpc.aio.Channel:
        """The current channel: a new one once a certificate is renewed. Calls on the old one
        may still finish."""
        pem = self.place.pem()
        if pem != self._pem:
            closing = asyncio.ensure_future(self._channel.close(_OLD_CALLS_S))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
            self._pem, self._channel = pem, self.place.connect()
        return self._channel

    async def close(self) -> None:
        """End all calls and close the channel."""
        for closing in self._closing:
            closing.cancel()
        await self._channel.close()

    def distrust(self, digest: str) -> None:
        """Do nothing: the registry has no alternative."""

    async def chunks(
        self, tenant: str, digest: str, file: str, offset: int
    ) -> AsyncIterator[FilePart]:
        """As `fetching.Remote`."""
        request = replication_pb2.FetchWeightsRequest(
            tenant=tenant, weights_digest=digest, file=file, offset=offset
        )
        stub: Any = replication_pb2_grpc.ReplicationServiceStub(self.channel)
        call = stub.FetchWeights(request, metadata=self.place.metadata)
        try:
            async for message in call:
                yield FilePart(message.size, message.offset, message.data, message.crc32)
        except grpc.aio.AioRpcError as error:
            raise to_error(error, self.place.address) from error
        finally:
            call.cancel()


async def refuses_strangers(channel: grpc.aio.Channel) -> bool:
    """Whether a registry refuses a key that nobody has; one without keys ignores it. Used for
    versions that do not say whether they authenticate. The registry's audit log gets a line.

    Raises:
        grpc.aio.AioRpcError: the call failed in another way.
    """
    stub: Any = server_pb2_grpc.ServerServiceStub(channel)
    key = (("authorization", f"Bearer {_NOBODYS_KEY}"),)
    try:
        await stub.GetServerInfo(
            server_pb2.GetServerInfoRequest(), metadata=key, timeout=_ASK_S
        )
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.UNAUTHENTICATED:
            raise
        return True
    return False


def to_error(error: grpc.aio.AioRpcError, address: str) -> VeneerError:
    """Rebuild the error that the registry raised; DeadlineExceeded or Unavailable if it did not
    answer."""
    for key, value in _pairs(error.trailing_metadata()):
        if key == "grpc-status-details-bin":
            with suppress(DecodeError):  # written by something in between
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


def _read(path: Path, key: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        flag = f"--{key.replace('_', '-')}"
        raise InvalidField(
            f"{flag} {path} cannot be read: {error.strerror or error}", metadata={"key": key}
        ) from error
