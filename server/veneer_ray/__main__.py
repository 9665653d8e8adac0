"""Entry point of ``veneer-ray``; if its extra is not installed, the error says so."""

from __future__ import annotations

from collections.abc import Callable

from veneer_registry.extras import run_with_extra


def _find() -> Callable[[], None]:
    from veneer_ray.command import main as program

    return program


def main() -> None:
    """Entry point of the console script."""
    run_with_extra("veneer-ray", "ray", _find)


if __name__ == "__main__":
    main()
