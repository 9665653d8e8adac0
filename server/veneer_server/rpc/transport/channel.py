"""gRPC's own settings: what a connection may hold and how long."""

from __future__ import annotations

from typing import Final

from veneer_server.rpc.transport.receiving import MAX_MESSAGE, WINDOW

__all__ = [
    "HANDSHAKE_LIMIT_S",
    "IDLE_LIMIT_S",
    "MAX_METADATA",
    "MAX_PENDING",
    "SPARE_STREAMS",
    "channel_options",
]

IDLE_LIMIT_S: Final = 300.0
"""A connection without calls is closed after this long; clients open another unasked."""

HANDSHAKE_LIMIT_S: Final = 10.0
"""How long a new connection may take to speak HTTP/2."""

MAX_METADATA: Final = 16 << 10
"""Bytes of a call's headers."""

MAX_PENDING: Final = 3000
"""Calls that have come and are not accepted yet; each holds its headers. gRPC refuses more,
and of its own some from 1,000 on, chosen at random: whose they are is no matter to it."""

SPARE_STREAMS: Final = 64
"""Calls on one connection beside as many as run and wait in the engine."""


def channel_options(
    *, reader_limit_s: float, connections: int, generations: int
) -> list[tuple[str, int]]:
    """Options of the gRPC server.

    Args:
        reader_limit_s: a connection whose other end answers no ping, since its process is
            stopped or its machine gone, is closed after this long while it has calls.
        connections: that may be open; more are closed as they come.
        generations: requests that run and wait in the engine, at most.
    """
    limit_ms = max(1_000, int(reader_limit_s * 1000))
    return [
        # Without this a second server would take half of this one's calls.
        ("grpc.so_reuseport", 0),
        # Clients ask every 20 s whether a quiet server still lives; gRPC's own
        # rule (5 minutes) would close their connections for it.
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.keepalive_time_ms", limit_ms * 2 // 3),
        ("grpc.keepalive_timeout_ms", limit_ms // 3),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_allowed_incoming_connections", connections),
        ("grpc.max_connection_idle_ms", int(IDLE_LIMIT_S * 1000)),
        ("grpc.server_handshake_timeout_ms", int(HANDSHAKE_LIMIT_S * 1000)),
        ("grpc.http2.settings_timeout", int(HANDSHAKE_LIMIT_S * 1000)),
        ("grpc.max_concurrent_streams", generations + SPARE_STREAMS),
        ("grpc.server.max_pending_requests", MAX_PENDING),
        ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING),
        ("grpc.max_receive_message_length", MAX_MESSAGE),
        ("grpc.max_metadata_size", MAX_METADATA),
        ("grpc.absolute_max_metadata_size", MAX_METADATA),
        # A stream that is not being read may send this much and no more. Without the
        # first, gRPC widens the window by what it measures, up to 64 MiB on loopback.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", WINDOW),
    ]
