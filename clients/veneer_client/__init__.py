"""Talk to a Veneer server.

    from veneer_client import Chat, Client

    with Client("127.0.0.1:50051") as client:
        client.push(Path("adapters/sql"), "sql")
        for chunk in client.generate_stream(Chat.user("Count users."), adapter="sql"):
            print(chunk.text, end="")

`AsyncClient` has the same methods for asyncio. Errors are the tree in
`veneer_registry.errors`, rebuilt from what the server sent.
"""

from veneer_registry.adapter import Tier
from veneer_registry.errors import ServerUnreachable, VeneerError

from veneer_client.aio import AsyncClient, AsyncGenerationStream
from veneer_client.client import Client, GenerationStream
from veneer_client.failures import RetryPolicy
from veneer_client.types import (
    AdapterDetails,
    AdapterInfo,
    BaseModel,
    Budgets,
    Chat,
    ChatMessage,
    Chunk,
    Eviction,
    EvictMode,
    FinishReason,
    GenerateOptions,
    Generation,
    GenerationEnd,
    Prompt,
    Provenance,
    Pushed,
    ServerInfo,
    ServingStatus,
    Text,
    Timings,
    TokenLogprob,
    Tokens,
    Usage,
)

__all__ = [
    "AdapterDetails",
    "AdapterInfo",
    "AsyncClient",
    "AsyncGenerationStream",
    "BaseModel",
    "Budgets",
    "Chat",
    "ChatMessage",
    "Chunk",
    "Client",
    "EvictMode",
    "Eviction",
    "FinishReason",
    "GenerateOptions",
    "Generation",
    "GenerationEnd",
    "GenerationStream",
    "Prompt",
    "Provenance",
    "Pushed",
    "RetryPolicy",
    "ServerInfo",
    "ServerUnreachable",
    "ServingStatus",
    "Text",
    "Tier",
    "Timings",
    "TokenLogprob",
    "Tokens",
    "Usage",
    "VeneerError",
]
