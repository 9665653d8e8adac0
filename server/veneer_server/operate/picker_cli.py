"""``veneer-server picker``: the endpoint picker of a Gateway API InferencePool."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Annotated

import typer

from veneer_server.config import ConfigInvalid, kinds
from veneer_server.operate.flags import Debug, guarded


def picker(
    replica: Annotated[
        list[str],
        typer.Option(
            metavar="HOST:PORT",
            help="HTTP port of a replica started with --metrics-names vllm; repeatable. Each "
            "address of a host is one: in Kubernetes, a headless Service.",
        ),
    ],
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Address for the gateway's calls (gRPC).")
    ] = "127.0.0.1:9002",
    key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="API key with the role metrics, for the replicas."),
    ] = None,
    replica_ca: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="CA certificates (PEM) of the replicas, which then are asked over TLS; names "
            "in their certificates are not compared, since they are called by address.",
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(metavar="FILE", help="TLS certificate for --listen (PEM).")
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Its private key (PEM).")
    ] = None,
    log_format: Annotated[str, typer.Option(help="console or json.")] = "console",
    debug: Debug = False,
) -> None:
    """Choose replicas by adapter for a gateway: Envoy's ext_proc, as the Gateway API inference
    extension uses it. Callers are not asked for keys: only the gateway should reach it."""

    def run() -> None:
        from veneer_server.access.certificates import Certificates
        from veneer_server.logs import configure
        from veneer_server.picker.pool import Pool, Source
        from veneer_server.picker.service import serve

        for name, address in [*(("--replica", each) for each in replica), ("--listen", listen)]:
            try:
                kinds.ADDRESS.parse(address)
            except ValueError as error:
                raise ConfigInvalid(f"{name}: {address!r} is not allowed: {error}") from error
        if (tls_cert is None) != (tls_key is None):
            raise ConfigInvalid("--tls-cert and --tls-key belong together: give both")
        if log_format not in ("console", "json"):
            raise ConfigInvalid(f"--log-format: {log_format!r} is neither console nor json")
        configure("json" if log_format == "json" else "console")
        trusted = None
        if replica_ca is not None:
            trusted = ssl.create_default_context(cafile=replica_ca)
            trusted.check_hostname = False
        own = None
        if tls_cert is not None and tls_key is not None:
            own = Certificates(tls_cert, tls_key)
        asyncio.run(serve(Pool(Source(tuple(replica), key_file, trusted)), listen, own))

    guarded(run, debug)
