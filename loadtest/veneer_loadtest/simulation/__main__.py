"""Entry point of ``veneer-sim``; names the extra to install if it is missing."""

from __future__ import annotations

from collections.abc import Callable

from veneer_registry.extras import run_with_extra


def _find() -> Callable[[], None]:
    from veneer_loadtest.simulation.command import main as program

    return program


def main() -> None:
    """Entry point of the console script."""
    run_with_extra("veneer-sim", "loadtest", _find)


if __name__ == "__main__":
    main()
