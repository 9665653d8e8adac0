"""The program ``veneer-ray``. Ray is imported by the commands that need it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Final

import typer
from veneer_registry.command_line import Program
from veneer_registry.errors import VeneerError

from veneer_ray.settings import RayCluster

_EXAMPLES = """
Examples:

  veneer-ray up --replicas 2 --data-dir /tmp/cluster      here, until Ctrl-C

  veneer-ray up --replicas 2 -- --kv-cache-bytes 2GiB     with flags of veneer-server

  veneer-ray up --address auto --replicas 4 --gpus 1      in a running Ray cluster

  veneer-ray scale 1                                      remove engines once they are idle
"""

_DEFAULT_DATA: Final = Path.home() / ".local/share/veneer/ray"
_NAME: Final = "veneer"
_STATUS_ROW: Final = "{:<10} {:<12} {}"

cli = Program(
    help="Run a registry and engines of Veneer on Ray Serve, behind one address.",
    epilog=_EXAMPLES,
)

Address = Annotated[
    str,
    typer.Option(metavar="ADDRESS", help="A running Ray cluster; auto: this machine's."),
]

Name = Annotated[
    str,
    typer.Option(metavar="NAME", help="Name of the Serve application, for several of them."),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"veneer {version('veneer')}")
        raise typer.Exit


@cli.callback()
def _top(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Run a registry and engines of Veneer on Ray Serve, behind one address."""


@cli.command("up")
def _up(
    server_args: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[-- FLAGS]", help="veneer-server flags, passed to all servers."
        ),
    ] = None,
    replicas: Annotated[int, typer.Option(help="Minimum number of engines.")] = 1,
    most_replicas: Annotated[
        int,
        typer.Option(help="Maximum number of engines, scaled by load; 0: always --replicas."),
    ] = 0,
    ingresses: Annotated[int, typer.Option(help="Number of ingress (routing) processes.")] = 1,
    data_dir: Annotated[
        Path, typer.Option(help="Data folder of the registry and of the engines' caches.")
    ] = _DEFAULT_DATA,
    registry: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Address of the registry.")
    ] = "127.0.0.1:50060",
    grpc_port: Annotated[
        int, typer.Option(help="Port of the gRPC API, on all interfaces.")
    ] = 50051,
    http_host: Annotated[str, typer.Option(help="Address of the OpenAI API.")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(help="Port of the OpenAI API.")] = 8000,
    cpus: Annotated[
        float,
        typer.Option(help="CPUs reserved per engine, also its threads; 0: none reserved."),
    ] = 0.0,
    gpus: Annotated[float, typer.Option(help="GPUs per engine.")] = 0.0,
    drain: Annotated[
        float,
        typer.Option(help="Seconds that a removed engine may take to finish its requests."),
    ] = 600.0,
    wait: Annotated[
        float, typer.Option(help="Seconds that a request may wait for an engine to accept it.")
    ] = 30.0,
    registry_key_file: Annotated[
        Path | None, typer.Option(help="File with an operator's key, for the engines.")
    ] = None,
    address: Address = "",
    name: Name = _NAME,
) -> None:
    """Deploy the registry, the engines and the ingress; run until Ctrl-C unless --address is
    given."""
    cluster = RayCluster(
        data_dir=data_dir.absolute(),
        replicas=replicas,
        most_replicas=most_replicas,
        ingresses=ingresses,
        registry=registry,
        http_host=http_host,
        http_port=http_port,
        grpc_port=grpc_port,
        cpus=cpus,
        gpus=gpus,
        drain_s=drain,
        wait_s=wait,
        key_file=registry_key_file and registry_key_file.absolute(),
        server_args=tuple(server_args or ()),
    )
    _connect(address)
    from ray import serve

    from veneer_ray.application import deploy

    # After Ray has set its own. A second signal must not stop the clean-up.
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, _stop)
    try:
        here = deploy(cluster, name)
        print(
            f"ready: gRPC on port {grpc_port} and HTTP on http://{http_host}:{http_port} of "
            f"{here}, {replicas} engines",
            flush=True,
        )
        if not address:
            threading.Event().wait()
    except _Stopped:
        if address:
            raise typer.Exit(130) from None
    finally:
        if not address:  # this Ray is ours
            serve.shutdown()


class _Stopped(BaseException):
    """A signal has asked the program to stop."""


def _stop(*_: object) -> None:
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, signal.SIG_IGN)
    raise _Stopped


@cli.command("scale")
def _scale(
    replicas: Annotated[int, typer.Argument(help="Engines.")],
    address: Address = "auto",
    name: Name = _NAME,
) -> None:
    """Change the number of engines. Removed engines finish their requests first."""
    _connect(address)
    from veneer_ray.application import scale

    scale(replicas, name)


@cli.command("status")
def _status(address: Address = "auto", name: Name = _NAME) -> None:
    """Show the deployments and their status."""
    _connect(address)
    from veneer_ray.application import status

    found = status(name)
    if found is None:
        print("not deployed")
        raise typer.Exit(1)
    print(f"{found.status.value} {found.message}".strip())
    print(_STATUS_ROW.format("", "status", "replicas"))
    for part, deployment in found.deployments.items():
        states = ", ".join(
            f"{count} {state.value}" if hasattr(state, "value") else f"{count} {state}"
            for state, count in deployment.replica_states.items()
        )
        print(_STATUS_ROW.format(part, deployment.status.value, states))


@cli.command("down")
def _down(address: Address = "auto", name: Name = _NAME) -> None:
    """Remove the application once its running requests have finished. Other applications, Serve
    and Ray stay."""
    _connect(address)
    from veneer_ray.application import remove

    if not remove(name):
        print("not deployed")
        raise typer.Exit(1)


def _connect(address: str) -> None:
    """Connect to a Ray cluster, or start one on this machine only."""
    # Ray sends usage statistics to its makers by default.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A cluster that Ray starts itself requires this token, but a program that joins it sends
    # the token only if this variable is set before Ray is imported.
    if (Path.home() / ".ray" / "auth_token").exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    if address:
        ray.init(address=address, log_to_driver=False)
    else:
        # "local" starts a new cluster: otherwise Ray would join one that runs, or ran, here.
        ray.init(address="local", include_dashboard=False)


def main() -> None:
    """Entry point."""
    try:
        cli()
    except VeneerError as error:
        print(f"veneer-ray: {error}", file=sys.stderr)
        sys.exit(2)
