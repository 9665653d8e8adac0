"""Entry point of ``veneer-loadtest``; names the extra to install if it is missing."""

from __future__ import annotations

from collections.abc import Callable

from veneer_registry.extras import run_with_extra


def _find() -> Callable[[], None]:
    from veneer_loadtest.cli import main as program

    return program


def main() -> None:
    """Entry point of the console script."""
    run_with_extra("veneer-loadtest", "loadtest", _find)


if __name__ == "__main__":
    main()
