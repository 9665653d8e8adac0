"""gRPC's own settings: what a connection may hold, and for how long."""

from __future__ import annotations

from typing import Final

from veneer_server.rpc.transport.receiving import MAX_MESSAGE, WINDOW
from veneer_server.system.descriptors import UNREAD

__all__ = [
    "HANDSHAKE_LIMIT_S",
    "IDLE_LIMIT_S",
    "MAX_METADATA",
    "MAX_PENDING",
    "SPARE_STREAMS",
    "channel_options",
]

IDLE_LIMIT_S: Final = 300.0
"""A connection without calls is closed after this long; clients reconnect by themselves."""

HANDSHAKE_LIMIT_S: Final = 10.0
"""How long a new connection may take for the HTTP/2 handshake."""

MAX_METADATA: Final = 16 << 10
"""Bytes of a call's headers."""

MAX_PENDING: Final = 3000
"""Calls received but not accepted yet; each holds its headers. gRPC refuses any beyond this.
By default it would refuse some from 1,000 on, chosen at random, whoever made them."""

SPARE_STREAMS: Final = 64
"""Streams per connection in addition to the engine's running and queued requests."""


def channel_options(
    *, reader_limit_s: float, connections: int, generations: int
) -> list[tuple[str, int]]:
    """Options of the gRPC server.

    Args:
        reader_limit_s: a connection with calls is closed once its peer has not answered a
            ping for this long, because its process is stopped or its machine is gone.
        connections: most that may be open. `Connections` closes some of those beyond; gRPC
            closes any beyond another `UNREAD` as they arrive.
        generations: most requests that may run or wait in the engine.
    """
    limit_ms = max(1_000, int(reader_limit_s * 1000))
    return [
        # Otherwise a second server on the port would take half of this one's calls.
        ("grpc.so_reuseport", 0),
        # Clients ping a quiet server every 20 s. gRPC's default minimum interval
        # (5 minutes) would close their connections for it.
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.keepalive_time_ms", limit_ms * 2 // 3),
        ("grpc.keepalive_timeout_ms", limit_ms // 3),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_allowed_incoming_connections", connections + UNREAD),
        ("grpc.max_connection_idle_ms", int(IDLE_LIMIT_S * 1000)),
        ("grpc.server_handshake_timeout_ms", int(HANDSHAKE_LIMIT_S * 1000)),
        ("grpc.http2.settings_timeout", int(HANDSHAKE_LIMIT_S * 1000)),
        ("grpc.max_concurrent_streams", generations + SPARE_STREAMS),
        ("grpc.server.max_pending_requests", MAX_PENDING),
        ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING),
        ("grpc.max_receive_message_length", MAX_MESSAGE),
        ("grpc.max_metadata_size", MAX_METADATA),
        ("grpc.absolute_max_metadata_size", MAX_METADATA),
        # A stream that is not being read may send WINDOW bytes and no more. With its probe
        # on, gRPC widens the window by what it measures, up to 64 MiB on loopback.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", WINDOW),
    ]
