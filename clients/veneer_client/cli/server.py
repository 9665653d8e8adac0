"""``veneer budgets`` and ``veneer self-test``: a running server's memory and correctness."""

from __future__ import annotations

from typing import Annotated

import typer

from veneer_client.cli.complete import adapter_names
from veneer_client.cli.context import (
    DebugFlag,
    JsonFlag,
    ServerOption,
    connect,
    errors_shown,
)
from veneer_client.cli.show import (
    as_json,
    byte_size,
    count,
    print_rows,
    print_table,
    self_test_table,
)
from veneer_client.cli.values import parse_bytes
from veneer_client.cli.words import in_cli_words
from veneer_client.server_records import SelfTest

__all__ = ["BUDGETS_EXAMPLES", "SELF_TEST_EXAMPLES", "budgets", "self_test"]

BUDGETS_EXAMPLES = """
Examples:

  veneer budgets                                             show budgets and use

  veneer budgets --device 2GiB

  veneer budgets --host 4GiB --device 512MiB --json
"""

SELF_TEST_EXAMPLES = """
Examples:

  veneer self-test                              the base and the two adapters used last

  veneer self-test chat sql@1a2b3c4d5e6f

  veneer self-test --json || echo "do not use this server"
"""


def _in_words_of_budgets(message: str) -> str:
    """A server's message, with this command's flags in place of the server's own."""
    words = {"--device-adapter-bytes": "--device", "--host-cache-bytes": "--host"}
    for flag, own in words.items():
        message = message.replace(flag, own)
    return in_cli_words(message)


def budgets(
    context: typer.Context,
    host: Annotated[
        str,
        typer.Option("--host", metavar="BYTES", help="Budget for adapters in the host tier."),
    ] = "",
    device: Annotated[
        str,
        typer.Option(
            "--device", metavar="BYTES", help="Budget for adapters in the device tier."
        ),
    ] = "",
    json_: JsonFlag = False,
    server: ServerOption = None,
    debug: DebugFlag = False,
) -> None:
    """Show the memory budgets of adapters, or change them while the server runs."""
    shown = errors_shown(context, debug, _in_words_of_budgets)
    with shown, connect(context, server) as client:
        use = client.update_budgets(
            host_cache_bytes=parse_bytes(host, "--host") if host else None,
            device_adapter_bytes=parse_bytes(device, "--device") if device else None,
        )
    if json_:
        print(as_json(use))
        return
    tiers = {
        "device": (use.device_bytes, use.device_adapter_bytes),
        "host": (use.host_bytes, use.host_cache_bytes),
    }
    print_rows(
        {
            tier: f"{byte_size(used)} of {byte_size(budget)}"
            + (" (over budget until running requests end)" if used > budget else "")
            for tier, (used, budget) in tiers.items()
        }
    )


def self_test(
    context: typer.Context,
    adapters: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ADAPTER]...",
            help="NAME, NAME@REVISION or NAME/ALIAS; default: the two adapters used last.",
            show_default=False,
            autocompletion=adapter_names,
        ),
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Timeout in seconds; default: none.", min=0.001)
    ] = None,
    json_: JsonFlag = False,
    server: ServerOption = None,
    debug: DebugFlag = False,
) -> None:
    """Verify that base and adapters answer as their files say; exit status 1 if not."""
    with errors_shown(context, debug), connect(context, server) as client:
        test = client.self_test(adapters or (), timeout_s=timeout)
    if json_:
        print(as_json(test))
    else:
        print_table(self_test_table(test))
        print(_verdict(test))
    if not test.passed:
        raise typer.Exit(1)


def _verdict(test: SelfTest) -> str:
    if not test.adapters_tested and all(result.passed for result in test.results):
        # That the base answers correctly says nothing about the adapters.
        why = test.note or "no adapter was tested: name one to test it"
        return f"{'passed' if test.passed else 'INCONCLUSIVE'}: {why}"
    verdict = "passed" if test.passed else "FAILED: do not trust this server's answers"
    return f"{verdict} ({count(test.adapters_mixed, 'adapter')} mixed with others in a batch)"
