"""gRPC's view of the server's certificate."""

from __future__ import annotations

from typing import Any

import grpc

from veneer_server.access.certificates import Certificates, Pair

__all__ = ["grpc_credentials"]


def grpc_credentials(certificates: Certificates) -> grpc.ServerCredentials:
    """Each new connection gets the newest certificate."""
    last = certificates.current

    def newest() -> Any:
        nonlocal last
        pair = certificates.current
        if pair is last:
            return None  # no change
        last = pair
        return _configuration(pair)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(last), newest, require_client_authentication=last.client_ca is not None
    )


def _configuration(pair: Pair) -> Any:
    return grpc.ssl_server_certificate_configuration([(pair.key, pair.chain)], pair.client_ca)
