"""The command ``veneer``: talk to a Veneer server."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

from veneer_client.cli.adapter import adapter_cli, print_rows
from veneer_client.cli.context import (
    DebugFlag,
    JsonFlag,
    Place,
    ServerOption,
    errors_shown,
    find_server,
)
from veneer_client.cli.show import as_json, info_rows, summary
from veneer_client.client import Client
from veneer_client.records import ServingStatus
from veneer_client.reflection import ReflectionClient
from veneer_client.types import Chat, GenerateOptions, Prompt, Text

__all__ = ["cli", "main"]

_EXAMPLES = """
Examples:

  veneer generate "Why is the sky blue?"                     the base model

  veneer generate -a chat "Why is the sky blue?"             with an adapter

  veneer adapter push runs/sql/adapter --name sql            publish one

  veneer --server gpu1:50051 adapter ls                      another server
"""

cli = typer.Typer(
    help="Talk to a Veneer server: generate, and manage adapters.",
    epilog=_EXAMPLES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
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
            help="The server's address; also after the subcommand.",
            show_default=False,
        ),
    ] = None,
    debug: DebugFlag = False,
) -> None:
    """Talk to a Veneer server: generate, and manage adapters."""
    context.obj = Place(server, debug)


_GENERATE_EXAMPLES = """
Examples:

  veneer generate "Name three rivers."

  veneer generate -a code --temperature 0 "Reverse a string."

  veneer generate --raw --max-tokens 20 "The capital of France is"

  veneer generate -a chat - < question.txt
"""


@cli.command(epilog=_GENERATE_EXAMPLES)
def generate(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="What to answer; - reads standard input.")],
    adapter: Annotated[
        str, typer.Option("-a", "--adapter", help="NAME or NAME@REVISION; else the base.")
    ] = "",
    chat: Annotated[
        bool,
        typer.Option("--chat/--raw", help="A chat message, or text to continue as it stands."),
    ] = True,
    max_tokens: Annotated[
        int | None, typer.Option(help="Most new tokens; else up to the context's end.", min=1)
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy; else the model's own.", min=0.0)
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Above 0, at most 1.")] = None,
    top_k: Annotated[int | None, typer.Option(help="0 means all tokens.", min=0)] = None,
    seed: Annotated[
        int | None, typer.Option(help="Same seed, same tokens; else random.", min=0)
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this string; repeatable.")
    ] = None,
    logprobs: Annotated[
        bool, typer.Option("--logprobs", help="Also each token's log-probability.")
    ] = False,
    json_: JsonFlag = False,
    server: ServerOption = None,
    debug: DebugFlag = False,
) -> None:
    """Generate text, shown as it comes."""
    options: GenerateOptions = {"adapter": adapter, "stop": stop or (), "logprobs": logprobs}
    if max_tokens is not None:
        options["max_tokens"] = max_tokens
    if temperature is not None:
        options["temperature"] = temperature
    if top_p is not None:
        options["top_p"] = top_p
    if top_k is not None:
        options["top_k"] = top_k
    if seed is not None:
        options["seed"] = seed
    with errors_shown(context, debug), Client(find_server(context, server)) as client:
        text = sys.stdin.read() if prompt == "-" else prompt
        asked: Prompt = Chat.user(text) if chat else Text(text)
        if json_:
            print(as_json(client.generate(asked, **options)))
        else:
            _stream(client, asked, options)


def _stream(client: Client, prompt: Prompt, options: GenerateOptions) -> None:
    notes = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    scores: list[str] = []
    ended_line = True
    with client.generate_stream(prompt, **options) as stream:
        for chunk in stream:
            if chunk.text:
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
                ended_line = chunk.text.endswith("\n")
            scores += [f"{item.token_id}:{item.logprob:.3f}" for item in chunk.logprobs]
        if not ended_line:
            sys.stdout.write("\n")
            sys.stdout.flush()
        if scores:
            notes.print("token:logprob  " + " ".join(scores), style="dim")
        notes.print(summary(stream.final), style="dim")


@cli.command(epilog="Examples:\n\n  veneer info\n\n  veneer info --json | jq .budgets")
def info(
    context: typer.Context,
    json_: JsonFlag = False,
    server: ServerOption = None,
    debug: DebugFlag = False,
) -> None:
    """Show the server's base model, device and budgets."""
    with errors_shown(context, debug), Client(find_server(context, server)) as client:
        answer = client.info()
        if json_:
            print(as_json(answer))
        else:
            print_rows({"server": client.address, **info_rows(answer)})


@cli.command(epilog="Examples:\n\n  veneer health && echo ready")
def health(
    context: typer.Context,
    server: ServerOption = None,
    debug: DebugFlag = False,
) -> None:
    """Say whether the server answers generate calls now; exit status 0 if so."""
    with errors_shown(context, debug), Client(find_server(context, server)) as client:
        status = client.health()
    print(status.value)
    if status is not ServingStatus.SERVING:
        raise typer.Exit(1)


_CALL_EXAMPLES = """
Examples:

  veneer call                                                lists all methods

  veneer call GetServerInfo

  veneer call GetAdapter '{"name": "sql"}'

  veneer call GenerateStream '{"prompt": "Once", "stopping": {"max_tokens": 8}}'
"""


@cli.command(epilog=_CALL_EXAMPLES)
def call(
    context: typer.Context,
    method: Annotated[
        str, typer.Argument(help="Method, or package.Service/Method.", show_default=False)
    ] = "",
    request: Annotated[
        str, typer.Argument(help="The request as JSON; - reads it.", show_default=False)
    ] = "",
    timeout: Annotated[float | None, typer.Option(help="Seconds.")] = None,
    server: ServerOption = None,
    debug: DebugFlag = False,
) -> None:
    """Call any method with JSON, as the server describes it (gRPC reflection)."""
    address = find_server(context, server)
    with errors_shown(context, debug), ReflectionClient(address) as client:
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
    """Entry of the console script."""
    cli()


if __name__ == "__main__":
    main()
