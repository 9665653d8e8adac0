import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Limit(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LIMIT_UNSPECIFIED: _ClassVar[Limit]
    LIMIT_DEVICE_ADAPTERS: _ClassVar[Limit]
    LIMIT_HOST_ADAPTERS: _ClassVar[Limit]
    LIMIT_KV_CACHE: _ClassVar[Limit]
    LIMIT_MAX_RUNNING: _ClassVar[Limit]
LIMIT_UNSPECIFIED: Limit
LIMIT_DEVICE_ADAPTERS: Limit
LIMIT_HOST_ADAPTERS: Limit
LIMIT_KV_CACHE: Limit
LIMIT_MAX_RUNNING: Limit

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("version", "base_model", "device", "backend", "budgets", "context_length", "uptime", "adapters_registered", "adapters_on_device", "engine_starts", "memory", "why_not_native", "longest_step", "defaults", "threads", "why_threads", "admin_port", "role", "replication")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    BUDGETS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    UPTIME_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_REGISTERED_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_ON_DEVICE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_STARTS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    WHY_NOT_NATIVE_FIELD_NUMBER: _ClassVar[int]
    LONGEST_STEP_FIELD_NUMBER: _ClassVar[int]
    DEFAULTS_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    WHY_THREADS_FIELD_NUMBER: _ClassVar[int]
    ADMIN_PORT_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    REPLICATION_FIELD_NUMBER: _ClassVar[int]
    version: str
    base_model: BaseModel
    device: str
    backend: str
    budgets: Budgets
    context_length: int
    uptime: _duration_pb2.Duration
    adapters_registered: int
    adapters_on_device: int
    engine_starts: int
    memory: Memory
    why_not_native: str
    longest_step: _duration_pb2.Duration
    defaults: RequestDefaults
    threads: int
    why_threads: str
    admin_port: bool
    role: str
    replication: Replication
    def __init__(self, version: _Optional[str] = ..., base_model: _Optional[_Union[BaseModel, _Mapping]] = ..., device: _Optional[str] = ..., backend: _Optional[str] = ..., budgets: _Optional[_Union[Budgets, _Mapping]] = ..., context_length: _Optional[int] = ..., uptime: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., adapters_registered: _Optional[int] = ..., adapters_on_device: _Optional[int] = ..., engine_starts: _Optional[int] = ..., memory: _Optional[_Union[Memory, _Mapping]] = ..., why_not_native: _Optional[str] = ..., longest_step: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., defaults: _Optional[_Union[RequestDefaults, _Mapping]] = ..., threads: _Optional[int] = ..., why_threads: _Optional[str] = ..., admin_port: _Optional[bool] = ..., role: _Optional[str] = ..., replication: _Optional[_Union[Replication, _Mapping]] = ...) -> None: ...

class Replication(_message.Message):
    __slots__ = ("registry", "connected", "lag", "sequence", "followers")
    REGISTRY_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    LAG_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    FOLLOWERS_FIELD_NUMBER: _ClassVar[int]
    registry: str
    connected: bool
    lag: _duration_pb2.Duration
    sequence: int
    followers: int
    def __init__(self, registry: _Optional[str] = ..., connected: _Optional[bool] = ..., lag: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., sequence: _Optional[int] = ..., followers: _Optional[int] = ...) -> None: ...

class RequestDefaults(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    max_tokens: int
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., max_tokens: _Optional[int] = ...) -> None: ...

class Memory(_message.Message):
    __slots__ = ("pools", "front_peak_bytes", "engine_peak_bytes")
    POOLS_FIELD_NUMBER: _ClassVar[int]
    FRONT_PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    ENGINE_PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    pools: _containers.RepeatedCompositeFieldContainer[MemoryPool]
    front_peak_bytes: int
    engine_peak_bytes: int
    def __init__(self, pools: _Optional[_Iterable[_Union[MemoryPool, _Mapping]]] = ..., front_peak_bytes: _Optional[int] = ..., engine_peak_bytes: _Optional[int] = ...) -> None: ...

class MemoryPool(_message.Message):
    __slots__ = ("name", "uses", "total_bytes", "limit_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    USES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    uses: _containers.RepeatedCompositeFieldContainer[MemoryUse]
    total_bytes: int
    limit_bytes: int
    def __init__(self, name: _Optional[str] = ..., uses: _Optional[_Iterable[_Union[MemoryUse, _Mapping]]] = ..., total_bytes: _Optional[int] = ..., limit_bytes: _Optional[int] = ...) -> None: ...

class MemoryUse(_message.Message):
    __slots__ = ("name", "bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    bytes: int
    def __init__(self, name: _Optional[str] = ..., bytes: _Optional[int] = ...) -> None: ...

class BaseModel(_message.Message):
    __slots__ = ("name", "architecture", "quantization", "dtype", "parameters", "bytes", "fingerprint", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    architecture: str
    quantization: str
    dtype: str
    parameters: int
    bytes: int
    fingerprint: BaseFingerprint
    shape: BaseShape
    def __init__(self, name: _Optional[str] = ..., architecture: _Optional[str] = ..., quantization: _Optional[str] = ..., dtype: _Optional[str] = ..., parameters: _Optional[int] = ..., bytes: _Optional[int] = ..., fingerprint: _Optional[_Union[BaseFingerprint, _Mapping]] = ..., shape: _Optional[_Union[BaseShape, _Mapping]] = ...) -> None: ...

class BaseShape(_message.Message):
    __slots__ = ("layers", "vocabulary", "projections")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_FIELD_NUMBER: _ClassVar[int]
    PROJECTIONS_FIELD_NUMBER: _ClassVar[int]
    layers: int
    vocabulary: int
    projections: _containers.RepeatedCompositeFieldContainer[ProjectionShape]
    def __init__(self, layers: _Optional[int] = ..., vocabulary: _Optional[int] = ..., projections: _Optional[_Iterable[_Union[ProjectionShape, _Mapping]]] = ...) -> None: ...

class ProjectionShape(_message.Message):
    __slots__ = ("name", "in_features", "out_features")
    NAME_FIELD_NUMBER: _ClassVar[int]
    IN_FEATURES_FIELD_NUMBER: _ClassVar[int]
    OUT_FEATURES_FIELD_NUMBER: _ClassVar[int]
    name: str
    in_features: int
    out_features: int
    def __init__(self, name: _Optional[str] = ..., in_features: _Optional[int] = ..., out_features: _Optional[int] = ...) -> None: ...

class BaseFingerprint(_message.Message):
    __slots__ = ("weights", "tokenizer", "quantization", "template")
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    weights: str
    tokenizer: str
    quantization: str
    template: str
    def __init__(self, weights: _Optional[str] = ..., tokenizer: _Optional[str] = ..., quantization: _Optional[str] = ..., template: _Optional[str] = ...) -> None: ...

class Budgets(_message.Message):
    __slots__ = ("host_adapter_bytes", "device_adapter_bytes", "kv_cache_bytes", "kv_cache_tokens", "max_batch_tokens", "max_running", "max_queue", "max_prefill_tokens")
    HOST_ADAPTER_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_ADAPTER_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_RUNNING_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUE_FIELD_NUMBER: _ClassVar[int]
    MAX_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    host_adapter_bytes: int
    device_adapter_bytes: int
    kv_cache_bytes: int
    kv_cache_tokens: int
    max_batch_tokens: int
    max_running: int
    max_queue: int
    max_prefill_tokens: int
    def __init__(self, host_adapter_bytes: _Optional[int] = ..., device_adapter_bytes: _Optional[int] = ..., kv_cache_bytes: _Optional[int] = ..., kv_cache_tokens: _Optional[int] = ..., max_batch_tokens: _Optional[int] = ..., max_running: _Optional[int] = ..., max_queue: _Optional[int] = ..., max_prefill_tokens: _Optional[int] = ...) -> None: ...

class PlanCapacityRequest(_message.Message):
    __slots__ = ("shape", "like", "adapters", "context_length", "concurrency")
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    LIKE_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    CONCURRENCY_FIELD_NUMBER: _ClassVar[int]
    shape: AdapterShape
    like: str
    adapters: int
    context_length: int
    concurrency: int
    def __init__(self, shape: _Optional[_Union[AdapterShape, _Mapping]] = ..., like: _Optional[str] = ..., adapters: _Optional[int] = ..., context_length: _Optional[int] = ..., concurrency: _Optional[int] = ...) -> None: ...

class AdapterShape(_message.Message):
    __slots__ = ("rank", "modules")
    RANK_FIELD_NUMBER: _ClassVar[int]
    MODULES_FIELD_NUMBER: _ClassVar[int]
    rank: int
    modules: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, rank: _Optional[int] = ..., modules: _Optional[_Iterable[str]] = ...) -> None: ...

class PlanCapacityResponse(_message.Message):
    __slots__ = ("adapters", "sequences", "fits", "shortfalls")
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    FITS_FIELD_NUMBER: _ClassVar[int]
    SHORTFALLS_FIELD_NUMBER: _ClassVar[int]
    adapters: AdapterCapacity
    sequences: SequenceCapacity
    fits: bool
    shortfalls: _containers.RepeatedCompositeFieldContainer[Shortfall]
    def __init__(self, adapters: _Optional[_Union[AdapterCapacity, _Mapping]] = ..., sequences: _Optional[_Union[SequenceCapacity, _Mapping]] = ..., fits: _Optional[bool] = ..., shortfalls: _Optional[_Iterable[_Union[Shortfall, _Mapping]]] = ...) -> None: ...

class AdapterCapacity(_message.Message):
    __slots__ = ("parameters", "bytes", "on_device", "on_host")
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    ON_DEVICE_FIELD_NUMBER: _ClassVar[int]
    ON_HOST_FIELD_NUMBER: _ClassVar[int]
    parameters: int
    bytes: int
    on_device: int
    on_host: int
    def __init__(self, parameters: _Optional[int] = ..., bytes: _Optional[int] = ..., on_device: _Optional[int] = ..., on_host: _Optional[int] = ...) -> None: ...

class SequenceCapacity(_message.Message):
    __slots__ = ("context_length", "bytes", "running", "limited_by")
    CONTEXT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    LIMITED_BY_FIELD_NUMBER: _ClassVar[int]
    context_length: int
    bytes: int
    running: int
    limited_by: Limit
    def __init__(self, context_length: _Optional[int] = ..., bytes: _Optional[int] = ..., running: _Optional[int] = ..., limited_by: _Optional[_Union[Limit, str]] = ...) -> None: ...

class Shortfall(_message.Message):
    __slots__ = ("limit", "flag", "needed", "available", "message")
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    FLAG_FIELD_NUMBER: _ClassVar[int]
    NEEDED_FIELD_NUMBER: _ClassVar[int]
    AVAILABLE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    limit: Limit
    flag: str
    needed: int
    available: int
    message: str
    def __init__(self, limit: _Optional[_Union[Limit, str]] = ..., flag: _Optional[str] = ..., needed: _Optional[int] = ..., available: _Optional[int] = ..., message: _Optional[str] = ...) -> None: ...

class GetUsageRequest(_message.Message):
    __slots__ = ("tenant", "start", "end")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    start: _timestamp_pb2.Timestamp
    end: _timestamp_pb2.Timestamp
    def __init__(self, tenant: _Optional[str] = ..., start: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., end: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class GetUsageResponse(_message.Message):
    __slots__ = ("tenants", "start", "end")
    TENANTS_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    tenants: _containers.RepeatedCompositeFieldContainer[TenantUsage]
    start: _timestamp_pb2.Timestamp
    end: _timestamp_pb2.Timestamp
    def __init__(self, tenants: _Optional[_Iterable[_Union[TenantUsage, _Mapping]]] = ..., start: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., end: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class TenantUsage(_message.Message):
    __slots__ = ("tenant", "requests", "prompt_tokens", "cached_prompt_tokens", "generated_tokens", "adapter_byte_hours")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_BYTE_HOURS_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    requests: int
    prompt_tokens: int
    cached_prompt_tokens: int
    generated_tokens: int
    adapter_byte_hours: float
    def __init__(self, tenant: _Optional[str] = ..., requests: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., cached_prompt_tokens: _Optional[int] = ..., generated_tokens: _Optional[int] = ..., adapter_byte_hours: _Optional[float] = ...) -> None: ...
