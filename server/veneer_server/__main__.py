"""The command ``veneer-server``: parse the configuration, run the app."""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__" and not sys.flags.safe_path and sys.path[:1] == [os.getcwd()]:
    # `python -m` puts the current folder first, where a msgspec.py may lie. As pip does.
    del sys.path[0]

import inspect
import logging
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

import typer
from veneer_registry.command_line import Group, Program
from veneer_registry.errors import VeneerError
from veneer_registry.extras import missing_extra

from veneer_server import __version__
from veneer_server.config import OPTIONS, ConfigInvalid, Option, load_config

__all__ = ["main"]

_EXAMPLES: Final = """
Examples:

  veneer-server                                  the bundled base on 127.0.0.1:50051

  veneer-server --base ~/models/Qwen3-1.7B --kv-cache-bytes 4GiB

  veneer-server --config veneer.toml --log-format json

  veneer-server model import smollm2-135m        fetch the bundled base now

  veneer-server doctor                           what would serve on this machine

  veneer-server --install-completion             Tab completes commands and flags

Without a subcommand, `serve` runs; `veneer-server serve --help` lists its flags. Each flag is
also a key of the --config file (max_queue = 64) and a variable (VENEER_MAX_QUEUE=64); the
flag wins, then the variable, then the file.
"""

_TOP_FLAGS: Final = (
    "-h",
    "--help",
    "--version",
    "--install-completion",
    "--show-completion",
)


class _ServeByDefault(Group):
    """Flags without a subcommand belong to `serve`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        flags = args and args[0].startswith("-") and args[0] not in _TOP_FLAGS
        if flags or (not args and not ctx.resilient_parsing):
            args = ["serve", *args]
        return super().parse_args(ctx, args)

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
)
model_cli = Program(help="Base models on this machine.")
cli.add_typer(model_cli, name="model")
store_cli = Program(help="The adapters in a data folder.")
cli.add_typer(store_cli, name="store")

_SWITCH_S: Final = 0.0005
"""How long the event loop waits for the interpreter's lock while another thread decodes a large
request. Python's default, 5 ms, is paid again after every system call of the loop."""


def _serve(config_file: Path | None, flags: dict[str, Any]) -> None:
    _open_standard_descriptors()
    # The engine is forked from a process that runs gRPC, and becomes another program
    # at once: gRPC's own fork handling has nothing to do, and would complain.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    # From the first moment: the app says so once it runs. Its default ends the process.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # In the background of a terminal it still writes its log (stty tostop).
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    import uvloop

    from veneer_server.app import App
    from veneer_server.logs import configure
    from veneer_server.system.heap import configure_malloc

    configure_malloc()
    sys.setswitchinterval(_SWITCH_S)
    config = load_config(flags, os.environ, config_file)
    configure(config.log_format)
    logging.captureWarnings(True)

    async def run() -> None:
        await App(config, lambda line: print(line, flush=True)).run_until_signal()

    try:
        uvloop.run(run())
    finally:
        _forget_closed_outputs()


def _open_standard_descriptors() -> None:
    """Those that were closed (``>&-``) lead nowhere: a socket would get their number, and
    libuv aborts over one."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _forget_closed_outputs() -> None:
    """What could not be written to a terminal that has closed is not tried again: Python
    would end with status 120 for it, after a server that stopped as it should."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:  # as after `>&-`
                stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def _flag_parameter(option: Option) -> inspect.Parameter:
    default = f"default {option.default}" if option.default else "default: none"
    text = f"{option.help} [{option.variable}; {default}]"
    if option.switch:
        off = f"/--no-{option.flag[2:]}" if option.default == "true" else ""
        kind: Any = Annotated[bool | None, typer.Option(option.flag + off, help=text)]
    else:
        info = typer.Option(*option.flags, metavar=option.metavar, help=text)
        kind = Annotated[list[str] | None if option.repeated else str | None, info]
    return inspect.Parameter(
        option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind
    )


_Command = Callable[..., None]


def _with_flags(options: Sequence[Option]) -> Callable[[_Command], _Command]:
    """Give a command that takes ``**flags`` one parameter for each option."""

    def decorate(command: _Command) -> _Command:
        own = inspect.signature(command, eval_str=True)
        kept = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        parameters = [*kept, *map(_flag_parameter, options)]
        command.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


_Debug = Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")]
_CACHE: Final = tuple(option for option in OPTIONS if option.name == "cache_dir")


@cli.command(epilog=_EXAMPLES)
@_with_flags(OPTIONS)
def serve(
    *,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="TOML file of settings.")
    ] = None,
    host: Annotated[
        str | None, typer.Option("--host", help="The host of --listen.", show_default=False)
    ] = None,
    port: Annotated[
        str | None, typer.Option("--port", help="The port of --listen.", show_default=False)
    ] = None,
    debug: _Debug = False,
    **flags: Any,
) -> None:
    """Load the base model and serve until SIGTERM or Ctrl-C."""
    _guarded(lambda: _serve(config, {**flags, **_listen(host, port, flags)}), debug)


def _listen(host: str | None, port: str | None, flags: Mapping[str, Any]) -> dict[str, str]:
    """``--host`` and ``--port`` as ``--listen``."""
    if host is None and port is None:
        return {}
    if flags.get("listen") is not None:
        raise ConfigInvalid("--listen is given twice: give it, or --host and --port")
    (option,) = (option for option in OPTIONS if option.name == "listen")
    usual_host, _, usual_port = option.default.rpartition(":")
    found = usual_host if host is None else host
    found = f"[{found}]" if ":" in found and not found.startswith("[") else found
    return {"listen": f"{found}:{usual_port if port is None else port}"}


_Name = Annotated[str, typer.Argument(help="smollm2-135m, or a hub name.")]


@model_cli.command("import")
@_with_flags(_CACHE)
def import_model(name: _Name, *, debug: _Debug = False, **flags: Any) -> None:
    """Fetch and convert a base model, for example smollm2-135m; print its folder."""
    _guarded(lambda: _resolve(name, flags), debug)


@model_cli.command("path")
@_with_flags(_CACHE)
def model_path(name: _Name, *, debug: _Debug = False, **flags: Any) -> None:
    """Print the local Hugging Face folder of a base model; fetch it if need be."""
    _guarded(lambda: _resolve(name, flags), debug)


def _resolve(name: str, flags: dict[str, Any]) -> None:
    from veneer_server.logs import configure
    from veneer_server.models.source import resolve_base
    from veneer_server.progress import SINK, Display

    config = load_config(flags, os.environ)
    configure("console")
    SINK.set(Display())
    folder = resolve_base(
        name, config.cache_dir, progress=lambda line: print(line, file=sys.stderr, flush=True)
    )
    print(folder.path)


_DATA: Final = tuple(option for option in OPTIONS if option.name == "data_dir")
_UPLOADS: Final = tuple(o for o in OPTIONS if o.name in ("data_dir", "upload_ttl"))
_Json = Annotated[bool, typer.Option("--json", help="One JSON object.")]


@store_cli.command(
    "verify",
    epilog="""
Examples:

  veneer-server store verify                     beside a running server, too

  veneer-server store verify --data-dir /srv/veneer --quarantine
""",
)
@_with_flags(_DATA)
def store_verify(
    *,
    quarantine: Annotated[
        bool,
        typer.Option("--quarantine", help="Serve damaged weights no more (no server may run)."),
    ] = False,
    as_json: _Json = False,
    debug: _Debug = False,
    **flags: Any,
) -> None:
    """Read every stored byte and compare it with its digest; exit status 1 if one differs."""
    from veneer_server.operate.store_command import verify

    def run() -> None:
        folder = load_config(flags, os.environ).data_dir
        whole = verify(folder, print, quarantine=quarantine, as_json=as_json)
        raise typer.Exit(0 if whole else 1)

    _guarded(run, debug)


@store_cli.command(
    "gc",
    epilog="""
Examples:

  veneer-server store gc --dry-run

  veneer-server store gc --upload-ttl 0 --quarantine
""",
)
@_with_flags(_UPLOADS)
def store_gc(
    *,
    quarantine: Annotated[
        bool, typer.Option("--quarantine", help="Remove what lies in quarantine, too.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what.")] = False,
    as_json: _Json = False,
    debug: _Debug = False,
    **flags: Any,
) -> None:
    """Remove what no adapter needs, and old parts of uploads.

    A running server does so by itself.
    """
    from veneer_server.operate.store_command import collect

    def run() -> None:
        config = load_config(flags, os.environ)
        collect(
            config.data_dir,
            print,
            upload_hours=config.upload_ttl,
            quarantine=quarantine,
            dry_run=dry_run,
            as_json=as_json,
        )

    _guarded(run, debug)


@store_cli.command(
    "recover",
    epilog="""
Examples:

  veneer-server store recover                    the catalog is gone, damaged or too old

  veneer-server store recover --data-dir /srv/veneer --json
""",
)
@_with_flags(_DATA)
def store_recover(*, as_json: _Json = False, debug: _Debug = False, **flags: Any) -> None:
    """Rebuild the catalog from what can be read of it and from the stored adapters.

    Every stored file is compared with its digest. The old catalog is kept beside the new one.
    What only the catalog knew and cannot be read (aliases, history, retention, pins) is lost.
    No server may run.
    """
    from veneer_server.operate.store_command import recover

    _guarded(
        lambda: recover(load_config(flags, os.environ).data_dir, print, as_json=as_json), debug
    )


@cli.command(
    epilog="""
Examples:

  veneer-server doctor                           the defaults

  veneer-server doctor --base ~/models/Qwen3-1.7B --device cuda --json

  veneer-server doctor --config veneer.toml      what `serve` would be started with
"""
)
@_with_flags(OPTIONS)
def doctor(
    *,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="TOML file of settings.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    debug: _Debug = False,
    **flags: Any,
) -> None:
    """Check whether this machine can serve a configuration; exit status 1 if it cannot.

    Looks at packages, the device, the base model, memory, folders, ports and limits,
    and says what to do about each problem. Takes the flags of `serve`.
    """
    from veneer_server.operate.doctor import report

    def run() -> None:
        healthy = report(load_config(flags, os.environ, config), print, as_json=as_json)
        raise typer.Exit(0 if healthy else 1)

    _guarded(run, debug)


@cli.callback(invoke_without_command=True)
def top(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Serve many LoRA adapters from one resident NF4 base model, over gRPC."""
    if version:
        print(f"veneer {__version__}")
        raise typer.Exit


def _guarded(run: Callable[[], None], debug: bool) -> None:
    """An error is one line that says what to do; ``--debug`` adds the trace."""
    try:
        run()
    except typer.Exit:
        raise
    except VeneerError as error:
        if debug:
            traceback.print_exc()
        _fail(str(error), error)
    except OSError as error:
        if debug:
            traceback.print_exc()
        _fail(f"{error}; --debug shows where", error)
    except ModuleNotFoundError as error:
        if debug:
            traceback.print_exc()
        line = missing_extra(error, "server")
        _fail(line or f"a bug: {error}; please report it with what --debug shows", error)
    except Exception as error:
        if debug:
            traceback.print_exc()
        kind = type(error).__name__
        _fail(f"a bug: {kind}: {error}; please report it with what --debug shows", error)


def _fail(line: str, error: Exception) -> NoReturn:
    print(f"veneer-server: {line}", file=sys.stderr)
    raise typer.Exit(1) from error


def main() -> None:
    """Entry point."""
    cli()


if __name__ == "__main__":
    main()
