"""Entry point of ``veneer-train``, which also works if its dependencies are not installed."""

from __future__ import annotations

from collections.abc import Callable

from veneer_registry.extras import run_with_extra


def _find() -> Callable[[], None]:
    from veneer_train.cli import main as program

    return program


def main() -> None:
    """Entry point of the console script."""
    run_with_extra("veneer-train", "train", _find)


if __name__ == "__main__":
    main()
