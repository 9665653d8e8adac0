"""The OpenAI-compatible HTTP gateway, in front of the same core as gRPC.

Start reading at `gateway` (the server's life) and `generate` (a request's life). Its
dependencies are an optional extra, so no other package may import it at module level.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Final

from veneer_registry.errors import VeneerError
from veneer_registry.extras import install_extra

_NEEDED: Final = ("fastapi", "uvicorn")


class GatewayMissing(VeneerError):
    """``--openai-listen`` is given, but the gateway's packages are not installed."""

    code = "FAILED_PRECONDITION"
    reason = "GATEWAY_MISSING"


def require_gateway() -> None:
    """Check that the gateway can be started.

    Raises:
        GatewayMissing: the extra's packages are not installed.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise GatewayMissing(
            f"--openai-listen needs {' and '.join(missing)}: {install_extra('gateway')}; "
            "or leave the flag out",
            metadata={"missing": " ".join(missing)},
        )
