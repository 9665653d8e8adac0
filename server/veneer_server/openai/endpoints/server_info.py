"""``GET /server_info``: what vLLM's configuration would say of this server.

TRL's clients read it to learn whether adapters can be loaded. It holds the members that they
read, not all that vLLM has, and nothing of the machine.
"""

from __future__ import annotations

from typing import Final

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.routing import Route

from veneer_server.openai.endpoints.core import Core

__all__ = ["server_info_routes"]

MAX_LORA_RANK: Final = 512
"""vLLM's largest. Here no rank is too large in itself; larger ones are for uploads."""


def server_info_routes(core: Core) -> list[Route]:
    """The route."""

    async def server_info(request: Request) -> Response:
        with core.calls.running():
            info = core.engine.info
            lora = None
            if core.local.roots:
                # As many adapters run at once as sequences.
                most = core.engine.places.capacity
                lora = {"max_lora_rank": MAX_LORA_RANK, "max_loras": most}
            config = {
                "model_config": {
                    "model": core.base.name,
                    "max_model_len": info.longest_sequence,
                    # Before temperature and the like.
                    "logprobs_mode": "raw_logprobs",
                },
                "parallel_config": {"data_parallel_size": 1, "tensor_parallel_size": 1},
                "lora_config": lora,
                "weight_transfer_config": None,
            }
            return JSONResponse({"vllm_config": config})

    return [Route("/server_info", server_info, methods=["GET"])]
