import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("version", "base_model", "device", "backend", "budgets", "context_length", "uptime", "adapters_registered", "adapters_on_device", "engine_starts")
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
    def __init__(self, version: _Optional[str] = ..., base_model: _Optional[_Union[BaseModel, _Mapping]] = ..., device: _Optional[str] = ..., backend: _Optional[str] = ..., budgets: _Optional[_Union[Budgets, _Mapping]] = ..., context_length: _Optional[int] = ..., uptime: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., adapters_registered: _Optional[int] = ..., adapters_on_device: _Optional[int] = ..., engine_starts: _Optional[int] = ...) -> None: ...

class BaseModel(_message.Message):
    __slots__ = ("name", "architecture", "quantization", "dtype", "parameters", "bytes", "fingerprint")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    name: str
    architecture: str
    quantization: str
    dtype: str
    parameters: int
    bytes: int
    fingerprint: BaseFingerprint
    def __init__(self, name: _Optional[str] = ..., architecture: _Optional[str] = ..., quantization: _Optional[str] = ..., dtype: _Optional[str] = ..., parameters: _Optional[int] = ..., bytes: _Optional[int] = ..., fingerprint: _Optional[_Union[BaseFingerprint, _Mapping]] = ...) -> None: ...

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
    __slots__ = ("host_adapter_bytes", "device_adapter_bytes", "kv_cache_bytes", "kv_cache_tokens", "max_batch_tokens", "max_running", "max_queue")
    HOST_ADAPTER_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_ADAPTER_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_RUNNING_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUE_FIELD_NUMBER: _ClassVar[int]
    host_adapter_bytes: int
    device_adapter_bytes: int
    kv_cache_bytes: int
    kv_cache_tokens: int
    max_batch_tokens: int
    max_running: int
    max_queue: int
    def __init__(self, host_adapter_bytes: _Optional[int] = ..., device_adapter_bytes: _Optional[int] = ..., kv_cache_bytes: _Optional[int] = ..., kv_cache_tokens: _Optional[int] = ..., max_batch_tokens: _Optional[int] = ..., max_running: _Optional[int] = ..., max_queue: _Optional[int] = ...) -> None: ...

class PlanCapacityRequest(_message.Message):
    __slots__ = ("rank", "adapters")
    RANK_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    rank: int
    adapters: int
    def __init__(self, rank: _Optional[int] = ..., adapters: _Optional[int] = ...) -> None: ...

class PlanCapacityResponse(_message.Message):
    __slots__ = ("fitting",)
    FITTING_FIELD_NUMBER: _ClassVar[int]
    fitting: int
    def __init__(self, fitting: _Optional[int] = ...) -> None: ...
