"""The command ``veneer``: talk to a Veneer server."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from typing import Annotated, Final

import typer
from veneer_registry.command_line import Program, TextCommand
from veneer_registry.errors import (
    DeadlineExceeded,
    InvalidField,
    ModelLoading,
    ServerUnreachable,
    Unavailable,
    VeneerError,
)

from veneer_client.cli import adapter, chat, example, generate, login, plan, push, usage
from veneer_client.cli import server as server_commands
from veneer_client.cli.adapter import adapter_cli
from veneer_client.cli.context import (
    DebugFlag,
    GlobalOptions,
    JsonFlag,
    ServerOption,
    VersionFlag,
    connect,
    doing,
    errors_shown,
    find_server,
)
from veneer_client.cli.login_flags import CaFlag, CertFlag, KeyFlag, ProfileFlag, keep_login
from veneer_client.cli.show import as_json, info_rows, print_rows
from veneer_client.reflection import ReflectionClient
from veneer_client.server_records import ServingStatus

__all__ = ["cli", "main"]

_EXAMPLES = """
Examples:

  veneer generate "Why is the sky blue?"                     the base model

  veneer generate -a chat "Why is the sky blue?"             with an adapter

  veneer chat -a chat                                        chat, turn by turn

  veneer adapter push runs/sql/adapter --name sql            publish an adapter

  veneer adapter watch                                       watch changes live

  veneer --install-completion                                Tab completes names too

  veneer --server gpu1:50051 adapter ls                      use another server

Variables: VENEER_SERVER is the server's address (https://HOST:PORT for TLS), VENEER_API_KEY
your API key, VENEER_CA the CA certificates to trust; `veneer login` saves all three.
VENEER_ACTOR is your name in the history of a server without keys (default: user@host).
Operators choose a tenant with --tenant or VENEER_TENANT.
"""

_GUESSES: Final = {
    "list": "veneer ls",
    "models": "veneer ls",
    "delete": "veneer rm",
    "remove": "veneer rm",
    "upload": "veneer push",
    "publish": "veneer push",
    "add": "veneer push",
    "download": "veneer pull",
    "get": "veneer pull",
    "load": "veneer adapter activate",
    "unload": "veneer adapter evict",
    "run": "veneer generate",
    "ask": "veneer generate",
    "complete": "veneer generate",
    "completion": "veneer --install-completion",
    "status": "veneer health",
    "ping": "veneer health",
    "version": "veneer --version",
    "help": "veneer -h",
    "serve": "veneer-server",
    "server": "veneer-server",
    "start": "veneer-server",
    "up": "veneer-server",
    "doctor": "veneer-server doctor",
    "key": "veneer-server key",
    "train": "veneer-train",
    "bench": "veneer-loadtest",
    "loadtest": "veneer-loadtest",
}

cli = Program(
    help="Talk to a Veneer server: generate, and manage adapters.",
    epilog=_EXAMPLES,
    guesses=_GUESSES,
)
cli.add_typer(adapter_cli, name="adapter")


@cli.callback()
def place(
    context: typer.Context,
    server: Annotated[
        str | None,
        typer.Option(
            "--server",
            envvar="VENEER_SERVER",
            metavar="HOST:PORT",
            help="Server address; also accepted after the subcommand.",
            show_default=False,
        ),
    ] = None,
    profile: ProfileFlag = None,
    ca: CaFlag = None,
    cert: CertFlag = None,
    key: KeyFlag = None,
    tenant: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Act in this tenant instead of your own (operators only)."
        ),
    ] = None,
    debug: DebugFlag = False,
    version: VersionFlag = False,
) -> None:
    """Talk to a Veneer server: generate, and manage adapters."""
    keep_login(profile=profile, ca=ca, cert=cert, key=key)
    if tenant is not None:
        os.environ["VENEER_TENANT"] = tenant
    context.obj = GlobalOptions(server, debug)


cli.command(cls=TextCommand, epilog=generate.EXAMPLES)(generate.generate)
cli.command(epilog=chat.EXAMPLES)(chat.chat)
cli.command(epilog=example.EXAMPLES)(example.example)
cli.command("ls", epilog="Examples:\n\n  veneer ls\n\n  veneer ls --prefix sql")(adapter.ls)
cli.command("ps", epilog="Examples:\n\n  veneer ps")(adapter.ps)
cli.command(epilog=push.EXAMPLES)(push.push)
cli.command(epilog=push.PULL_EXAMPLES)(push.pull)
cli.command("show", epilog="Examples:\n\n  veneer show sql\n\n  veneer show sql --full")(
    adapter.show
)
cli.command("rm", epilog="Examples:\n\n  veneer rm sql\n\n  veneer rm sql@1a2b3c4d5e6f")(
    adapter.rm
)
cli.command(epilog=login.EXAMPLES)(login.login)
cli.command()(login.logout)
cli.command(epilog=plan.EXAMPLES)(plan.plan)
cli.command(epilog=usage.EXAMPLES)(usage.usage)
cli.command(epilog=server_commands.BUDGETS_EXAMPLES)(server_commands.budgets)
cli.command("self-test", epilog=server_commands.SELF_TEST_EXAMPLES)(server_commands.self_test)


@cli.command(epilog="Examples:\n\n  veneer info\n\n  veneer info --json | jq .budgets")
def info(
    context: typer.Context,
    json_: JsonFlag = False,
    server: ServerOption = None,
    debug: DebugFlag = False,
) -> None:
    """Show the server's base model, device and budgets."""
    with errors_shown(context, debug), connect(context, server) as client:
        answer = client.info()
        if json_:
            print(as_json(answer))
        else:
            print_rows({"server": client.address, **info_rows(answer)})


_HEALTH_EXAMPLES = """
Examples:

  veneer health && echo ready

  veneer-server & veneer health --wait 60s && veneer generate "Hello"
"""


@cli.command(epilog=_HEALTH_EXAMPLES)
def health(
    context: typer.Context,
    wait: Annotated[
        str, typer.Option(metavar="TIME", help="How long to wait for it to be ready: 60s, 2m.")
    ] = "0s",
    server: ServerOption = None,
    debug: DebugFlag = False,
) -> None:
    """Check whether the server is ready; exit status 0 if it is.

    A server is ready once it answers generate calls, or with --role registry accepts changes.
    """
    with errors_shown(context, debug), connect(context, server) as client:
        try:
            client.wait_until_ready(_duration(wait), told=_teller())
            status = ServingStatus.SERVING
        except (ServerUnreachable, DeadlineExceeded):
            raise
        except Unavailable as error:
            _teller()(error)
            status = ServingStatus.NOT_SERVING
    print(status.value)
    if status is not ServingStatus.SERVING:
        raise typer.Exit(1)


def _teller() -> Callable[[VeneerError], None]:
    """Return a callback that reports on standard error what the server that we wait for is
    doing, once per step."""
    said = ""

    def tell(why: VeneerError) -> None:
        nonlocal said
        match why:
            case ModelLoading():
                now = f"loading: {doing(why)}"
            case ServerUnreachable():
                now = f"waiting for a server at {why.metadata.get('address')}"
            case _:
                now = why.message
        # Do not repeat a step in which only the figures have changed.
        if (part := now.rpartition(":")[0]) != said:
            said = part
            print(now, file=sys.stderr)

    return tell


def _duration(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|h)?", text.strip())
    if match is None:
        raise InvalidField(
            f"--wait {text!r} is not a duration: give 60s or 2m", metadata={"field": "wait"}
        )
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2] or "s"]


_CALL_EXAMPLES = """
Examples:

  veneer call                                                lists all methods

  veneer call GetServerInfo

  veneer call GetAdapter '{"name": "sql"}'

  veneer call GenerateStream '{"prompt": "Once", "stopping": {"max_tokens": 8}}'
"""


@cli.command(cls=TextCommand, epilog=_CALL_EXAMPLES)
def call(
    context: typer.Context,
    method: Annotated[
        str,
        typer.Argument(help="Method, or package.Service/Method.", show_default=False),
    ] = "",
    request: Annotated[
        str,
        typer.Argument(help="The request as JSON; - reads standard input.", show_default=False),
    ] = "",
    timeout: Annotated[
        float | None, typer.Option(help="Timeout in seconds.", min=0.001)
    ] = None,
    server: ServerOption = None,
    debug: DebugFlag = False,
) -> None:
    """Call any gRPC method with a JSON request; methods are found by server reflection."""
    address = find_server(context, server)
    # Messages are not translated: a user who calls methods by name knows the fields' names.
    with errors_shown(context, debug, str), ReflectionClient(address) as client:
        if method:
            body = sys.stdin.read() if request == "-" else request
            for answer in client.call(method, body, timeout_s=timeout):
                print(answer, flush=True)
            return
        for found in client.methods():
            takes = ("stream " if found.client_streaming else "") + found.request
            gives = ("stream " if found.server_streaming else "") + found.answer
            print(f"{found.name} ({takes}) -> {gives}")


def main() -> None:
    """Entry point of the console script."""
    cli()


if __name__ == "__main__":
    main()
