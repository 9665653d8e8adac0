"""Talk to a Veneer server.

    from veneer_client import Chat, Client

    with Client("127.0.0.1:50051") as client:
        client.push(Path("adapters/sql"), "sql")
        for chunk in client.generate_stream(Chat.user("Count users."), adapter="sql"):
            print(chunk.text, end="")

`AsyncClient` has the same methods for asyncio. Errors are exceptions of
`veneer_registry.errors`, rebuilt from the server's response.
"""

from veneer_registry.adapter import Tier
from veneer_registry.errors import ServerUnreachable, VeneerError

from veneer_client.aio import AsyncClient
from veneer_client.aio_handle import AsyncAdapterHandle
from veneer_client.aio_streams import AsyncAdapterWatch, AsyncGenerationStream
from veneer_client.client import Client
from veneer_client.failures import RetryPolicy
from veneer_client.handle import AdapterHandle
from veneer_client.records import (
    AdapterDetails,
    AdapterEvent,
    AdapterEventKind,
    AdapterInfo,
    AdapterState,
    Alias,
    AliasMove,
    AliasTarget,
    Eviction,
    EvictMode,
    HistoryEntry,
    Pulled,
    Pushed,
    Resumed,
)
from veneer_client.replicas import ReplicasReached, WaitReplicas
from veneer_client.server_records import (
    AdapterCapacity,
    BaseModel,
    BaseShape,
    Budgets,
    BudgetUse,
    Capacity,
    Limit,
    Memory,
    MemoryPool,
    SelfTest,
    SelfTestResult,
    SequenceCapacity,
    ServerInfo,
    ServingStatus,
    Shortfall,
    TenantUsage,
    UsageReport,
)
from veneer_client.streams import AdapterWatch, GenerationStream
from veneer_client.tool_types import Tool, ToolCall, ToolCallDelta, ToolMode
from veneer_client.types import (
    BoundOptions,
    Chat,
    ChatMessage,
    Chunk,
    FinishReason,
    GenerateOptions,
    Generation,
    GenerationEnd,
    MessageLike,
    Prompt,
    Provenance,
    RequestDefaults,
    Sample,
    Text,
    Timings,
    TokenLogprob,
    Tokens,
    TopLogprob,
    Usage,
)

__all__ = [
    "AdapterCapacity",
    "AdapterDetails",
    "AdapterEvent",
    "AdapterEventKind",
    "AdapterHandle",
    "AdapterInfo",
    "AdapterState",
    "AdapterWatch",
    "Alias",
    "AliasMove",
    "AliasTarget",
    "AsyncAdapterHandle",
    "AsyncAdapterWatch",
    "AsyncClient",
    "AsyncGenerationStream",
    "BaseModel",
    "BaseShape",
    "BoundOptions",
    "BudgetUse",
    "Budgets",
    "Capacity",
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
    "HistoryEntry",
    "Limit",
    "Memory",
    "MemoryPool",
    "MessageLike",
    "Prompt",
    "Provenance",
    "Pulled",
    "Pushed",
    "ReplicasReached",
    "RequestDefaults",
    "Resumed",
    "RetryPolicy",
    "Sample",
    "SelfTest",
    "SelfTestResult",
    "SequenceCapacity",
    "ServerInfo",
    "ServerUnreachable",
    "ServingStatus",
    "Shortfall",
    "TenantUsage",
    "Text",
    "Tier",
    "Timings",
    "TokenLogprob",
    "Tokens",
    "Tool",
    "ToolCall",
    "ToolCallDelta",
    "ToolMode",
    "TopLogprob",
    "Usage",
    "UsageReport",
    "VeneerError",
    "WaitReplicas",
]
