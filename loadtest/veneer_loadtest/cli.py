"""The command ``veneer-loadtest``."""

from __future__ import annotations

import signal
import sys

from veneer_client.cli.context import VersionFlag
from veneer_client.cli.login_flags import CaFlag, CertFlag, KeyFlag, ProfileFlag, keep_login
from veneer_registry.command_line import Program

from veneer_loadtest.commands import compare, find_max, prefix, report, run, swap

_EXAMPLES = """
Examples:

  veneer-loadtest run --spawn --streams 8 --html run.html     a load and its page

  veneer-loadtest find-max --spawn --slo ttft=1s              the highest rate

  veneer-loadtest swap --spawn                                cost of an adapter swap

  veneer-loadtest report before.json after.json               side by side

  veneer-loadtest --install-completion                        Tab completes
"""

cli = Program(
    help="Load-test a Veneer server and compare it with others.",
    epilog=_EXAMPLES,
    guesses={
        "bench": "veneer-loadtest run",
        "load": "veneer-loadtest run",
        "start": "veneer-loadtest run",
        "max": "veneer-loadtest find-max",
        "page": "veneer-loadtest report",
        "html": "veneer-loadtest report",
        "version": "veneer-loadtest --version",
    },
)


@cli.callback()
def top(
    profile: ProfileFlag = None,
    ca: CaFlag = None,
    cert: CertFlag = None,
    key: KeyFlag = None,
    version: VersionFlag = False,
) -> None:
    """Load-test a Veneer server and compare it with others. The server's API key is read
    from VENEER_API_KEY, or from the profile saved by `veneer login`."""
    keep_login(profile=profile, ca=ca, cert=cert, key=key)


cli.command(epilog=run.EXAMPLES)(run.run)
cli.command("find-max", epilog=find_max.EXAMPLES)(find_max.find_max)
cli.command(epilog=report.EXAMPLES)(report.report)
cli.command(epilog=swap.EXAMPLES)(swap.swap)
cli.command(epilog=compare.EXAMPLES)(compare.compare)
cli.command(epilog=prefix.EXAMPLES)(prefix.prefix)


def main() -> None:
    """Entry point of the console script."""
    # As with Ctrl-C, everything that this run started is stopped on exit.
    for kind in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(kind, lambda number, _: sys.exit(128 + number))
    cli()


if __name__ == "__main__":
    main()
