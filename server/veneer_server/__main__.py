"""The command ``veneer-server``: parse the configuration, run the app."""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__" and not sys.flags.safe_path and sys.path[:1] == [os.getcwd()]:
    # `python -m` puts the current folder first, which may contain a msgspec.py. pip does
    # the same.
    del sys.path[0]

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from veneer_registry.command_line import Command, CommandGroup, Program
from veneer_registry.lock import OwnerLock

from veneer_server import __version__
from veneer_server.config import OPTIONS, ConfigInvalid, load_config
from veneer_server.operate.flags import Debug, Json, guarded, options, with_flags
from veneer_server.operate.key_cli import key_cli
from veneer_server.operate.model_cli import model_cli
from veneer_server.operate.picker_cli import picker
from veneer_server.operate.store_cli import store_cli
from veneer_server.operate.tls_cli import tls_cli

_EXAMPLES: Final = """
Examples:

  veneer-server                                  the bundled base on 127.0.0.1:50051

  veneer-server --base ~/models/Qwen3-1.7B --kv-cache-bytes 4GiB

  veneer-server --config veneer.toml --log-format json

  veneer-server model import smollm2-135m        download the bundled base now

  veneer-server doctor                           check whether this machine can serve

  veneer-server --install-completion             Tab completes commands and flags

Without a subcommand, `serve` runs; `veneer-server serve --help` lists its flags. Each flag is
also a key of the --config file (max_queue = 64) and a variable (VENEER_MAX_QUEUE=64); the
flag takes precedence, then the variable, then the file.
"""

_TOP_FLAGS: Final = (
    "-h",
    "--help",
    "--version",
    "--install-completion",
    "--show-completion",
)


class _Serve(Command):
    """The command `serve`. A positional argument gets a hint at --base, since other servers
    take the model that way."""

    after_too_many = ": the base model is given as --base MODEL"


class _ServeByDefault(CommandGroup):
    """Command group that gives flags without a subcommand to `serve`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        flags = args and args[0].startswith("-") and args[0] not in _TOP_FLAGS
        if flags or (not args and not ctx.resilient_parsing):
            args = ["serve", *args]
        return super().parse_args(ctx, args)

    def meant(self, ctx: Any, word: str) -> list[str]:
        """As `CommandGroup.meant`, and suggests --base for a model that is given without a
        flag, as other servers take it."""
        if "/" in word or os.path.isdir(word):
            return [f"veneer-server --base {word}"]
        return super().meant(ctx, word)

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        found = super().shell_complete(ctx, incomplete)
        if incomplete.startswith("-"):
            found += self.commands["serve"].shell_complete(ctx, incomplete)
        return found


cli = Program(
    help="Serve many LoRA adapters from one resident NF4 base model, over gRPC.",
    epilog=_EXAMPLES,
    cls=_ServeByDefault,
    no_args_is_help=False,
    guesses={
        "start": "veneer-server",
        "run": "veneer-server",
        "up": "veneer-server",
        "check": "veneer-server doctor",
        "download": "veneer-server model import",
        "keys": "veneer-server key",
        "version": "veneer-server --version",
        "stop": "kill -TERM PID, where `veneer-server doctor` names the PID; or Ctrl-C",
        "push": "veneer push",
        "generate": "veneer generate",
        "info": "veneer info",
        "health": "veneer health",
    },
)
cli.add_typer(model_cli, name="model")
cli.add_typer(store_cli, name="store")
cli.add_typer(key_cli, name="key")
cli.add_typer(tls_cli, name="tls")
cli.command("picker")(picker)

_SWITCH_S: Final = 0.0005
"""How long the event loop waits for the GIL while another thread decodes a large request.
Python's default, 5 ms, would be paid again after every system call of the loop."""


def _serve(config_file: Path | None, flags: dict[str, Any]) -> None:
    _open_standard_descriptors()
    # The engine is forked from a process that runs gRPC, and execs at once: gRPC's fork
    # handling has nothing to do, and would complain.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    # gRPC would print a line for each TLS handshake that fails, at any stranger's will.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    # By default SIGHUP ends the process. The app installs its own handler once it runs.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # Lets a background process write its log to the terminal (stty tostop).
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    config = load_config(flags, os.environ, config_file)
    # Locked before the app's imports, which take most of a start: a second server ends at once.
    lock = OwnerLock(config.data_dir)
    import uvloop

    from veneer_server.app import App
    from veneer_server.logs import configure
    from veneer_server.system.heap import configure_malloc

    configure_malloc()
    sys.setswitchinterval(_SWITCH_S)
    configure(config.log_format)
    logging.captureWarnings(True)

    async def run() -> None:
        await App(config, lambda line: print(line, flush=True), lock=lock).run_until_signal()

    try:
        uvloop.run(run())
    finally:
        _forget_closed_outputs()


def _open_standard_descriptors() -> None:
    """Open closed standard descriptors (``>&-``) on /dev/null: otherwise a socket would get
    their number, on which libuv aborts."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _forget_closed_outputs() -> None:
    """Do not retry output to a terminal that has closed: Python would exit with status 120,
    although the server stopped normally."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:  # None after `>&-`
                stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


@cli.command(epilog=_EXAMPLES, cls=_Serve)
@with_flags(OPTIONS)
def serve(
    *,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="TOML file of settings.")
    ] = None,
    host: Annotated[
        str | None, typer.Option("--host", help="Host part of --listen.", show_default=False)
    ] = None,
    port: Annotated[
        str | None, typer.Option("--port", help="Port part of --listen.", show_default=False)
    ] = None,
    debug: Debug = False,
    **flags: Any,
) -> None:
    """Load the base model and serve until SIGTERM or Ctrl-C."""
    guarded(lambda: _serve(config, {**flags, **_listen(host, port, flags)}), debug)


def _listen(host: str | None, port: str | None, flags: Mapping[str, Any]) -> dict[str, str]:
    """``--host`` and ``--port`` as ``--listen``."""
    if host is None and port is None:
        return {}
    if flags.get("listen") is not None:
        raise ConfigInvalid("--listen is given twice: give it, or --host and --port")
    (option,) = options("listen")
    usual_host, _, usual_port = option.default.rpartition(":")
    found = usual_host if host is None else host
    found = f"[{found}]" if ":" in found and not found.startswith("[") else found
    return {"listen": f"{found}:{usual_port if port is None else port}"}


@cli.command(
    epilog="""
Examples:

  veneer-server doctor                           the defaults

  veneer-server doctor --base ~/models/Qwen3-1.7B --device cuda --json

  veneer-server doctor --config veneer.toml      with the settings of a file
"""
)
@with_flags(OPTIONS)
def doctor(
    *,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="TOML file of settings.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
    **flags: Any,
) -> None:
    """Check whether this machine can serve a configuration; exit status 1 if it cannot.

    Checks packages, the device, the base model, memory, folders, ports and limits, and
    suggests a fix for each problem. Takes the flags of `serve`.
    """
    from veneer_server.operate.doctor.report import report

    def run() -> None:
        healthy = report(load_config(flags, os.environ, config), print, as_json=as_json)
        raise typer.Exit(0 if healthy else 1)

    guarded(run, debug)


@cli.callback(invoke_without_command=True)
def top(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Serve many LoRA adapters from one resident NF4 base model, over gRPC."""
    if version:
        print(f"veneer {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point."""
    cli()


if __name__ == "__main__":
    main()
