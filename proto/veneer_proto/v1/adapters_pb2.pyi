import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from veneer_proto.v1 import inference_pb2 as _inference_pb2
from veneer_proto.v1 import replication_pb2 as _replication_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AdapterState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ADAPTER_STATE_UNSPECIFIED: _ClassVar[AdapterState]
    ADAPTER_STATE_READY: _ClassVar[AdapterState]
    ADAPTER_STATE_QUARANTINED: _ClassVar[AdapterState]
    ADAPTER_STATE_OTHER_BASE: _ClassVar[AdapterState]

class EvictMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EVICT_MODE_UNSPECIFIED: _ClassVar[EvictMode]
    EVICT_MODE_DRAIN: _ClassVar[EvictMode]
    EVICT_MODE_FAIL_IF_BUSY: _ClassVar[EvictMode]
    EVICT_MODE_ABORT: _ClassVar[EvictMode]

class AdapterEvent(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ADAPTER_EVENT_UNSPECIFIED: _ClassVar[AdapterEvent]
    ADAPTER_EVENT_RESET: _ClassVar[AdapterEvent]
    ADAPTER_EVENT_PRESENT: _ClassVar[AdapterEvent]
    ADAPTER_EVENT_SYNCED: _ClassVar[AdapterEvent]
    ADAPTER_EVENT_PUBLISHED: _ClassVar[AdapterEvent]
    ADAPTER_EVENT_REPLACED: _ClassVar[AdapterEvent]
    ADAPTER_EVENT_DELETED: _ClassVar[AdapterEvent]
    ADAPTER_EVENT_LOADED: _ClassVar[AdapterEvent]
    ADAPTER_EVENT_ACTIVATED: _ClassVar[AdapterEvent]
    ADAPTER_EVENT_EVICTED: _ClassVar[AdapterEvent]
    ADAPTER_EVENT_FAILED: _ClassVar[AdapterEvent]
    ADAPTER_EVENT_PINNED: _ClassVar[AdapterEvent]
    ADAPTER_EVENT_UNPINNED: _ClassVar[AdapterEvent]
    ADAPTER_EVENT_QUARANTINED: _ClassVar[AdapterEvent]
    ADAPTER_EVENT_ALIAS_CHANGED: _ClassVar[AdapterEvent]
    ADAPTER_EVENT_UPDATED: _ClassVar[AdapterEvent]
ADAPTER_STATE_UNSPECIFIED: AdapterState
ADAPTER_STATE_READY: AdapterState
ADAPTER_STATE_QUARANTINED: AdapterState
ADAPTER_STATE_OTHER_BASE: AdapterState
EVICT_MODE_UNSPECIFIED: EvictMode
EVICT_MODE_DRAIN: EvictMode
EVICT_MODE_FAIL_IF_BUSY: EvictMode
EVICT_MODE_ABORT: EvictMode
ADAPTER_EVENT_UNSPECIFIED: AdapterEvent
ADAPTER_EVENT_RESET: AdapterEvent
ADAPTER_EVENT_PRESENT: AdapterEvent
ADAPTER_EVENT_SYNCED: AdapterEvent
ADAPTER_EVENT_PUBLISHED: AdapterEvent
ADAPTER_EVENT_REPLACED: AdapterEvent
ADAPTER_EVENT_DELETED: AdapterEvent
ADAPTER_EVENT_LOADED: AdapterEvent
ADAPTER_EVENT_ACTIVATED: AdapterEvent
ADAPTER_EVENT_EVICTED: AdapterEvent
ADAPTER_EVENT_FAILED: AdapterEvent
ADAPTER_EVENT_PINNED: AdapterEvent
ADAPTER_EVENT_UNPINNED: AdapterEvent
ADAPTER_EVENT_QUARANTINED: AdapterEvent
ADAPTER_EVENT_ALIAS_CHANGED: AdapterEvent
ADAPTER_EVENT_UPDATED: AdapterEvent

class UploadAdapterRequest(_message.Message):
    __slots__ = ("spec", "chunk")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    spec: UploadSpec
    chunk: UploadChunk
    def __init__(self, spec: _Optional[_Union[UploadSpec, _Mapping]] = ..., chunk: _Optional[_Union[UploadChunk, _Mapping]] = ...) -> None: ...

class UploadSpec(_message.Message):
    __slots__ = ("name", "files", "labels", "validate_only", "activate", "allow_replace", "resume", "etag", "wait", "same_base", "vocabulary")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    VALIDATE_ONLY_FIELD_NUMBER: _ClassVar[int]
    ACTIVATE_FIELD_NUMBER: _ClassVar[int]
    ALLOW_REPLACE_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    ETAG_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    SAME_BASE_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_FIELD_NUMBER: _ClassVar[int]
    name: str
    files: _containers.RepeatedCompositeFieldContainer[UploadFile]
    labels: _containers.ScalarMap[str, str]
    validate_only: bool
    activate: bool
    allow_replace: bool
    resume: bool
    etag: str
    wait: _replication_pb2.WaitForReplicas
    same_base: bool
    vocabulary: str
    def __init__(self, name: _Optional[str] = ..., files: _Optional[_Iterable[_Union[UploadFile, _Mapping]]] = ..., labels: _Optional[_Mapping[str, str]] = ..., validate_only: _Optional[bool] = ..., activate: _Optional[bool] = ..., allow_replace: _Optional[bool] = ..., resume: _Optional[bool] = ..., etag: _Optional[str] = ..., wait: _Optional[_Union[_replication_pb2.WaitForReplicas, _Mapping]] = ..., same_base: _Optional[bool] = ..., vocabulary: _Optional[str] = ...) -> None: ...

class UploadFile(_message.Message):
    __slots__ = ("name", "size", "sha256")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    name: str
    size: int
    sha256: str
    def __init__(self, name: _Optional[str] = ..., size: _Optional[int] = ..., sha256: _Optional[str] = ...) -> None: ...

class UploadChunk(_message.Message):
    __slots__ = ("file", "offset", "data")
    FILE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    file: str
    offset: int
    data: bytes
    def __init__(self, file: _Optional[str] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class UploadAdapterResponse(_message.Message):
    __slots__ = ("adapter", "published", "replaced", "warnings", "replicas")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_FIELD_NUMBER: _ClassVar[int]
    REPLACED_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    adapter: Adapter
    published: bool
    replaced: bool
    warnings: _containers.RepeatedScalarFieldContainer[str]
    replicas: _replication_pb2.ReplicasReached
    def __init__(self, adapter: _Optional[_Union[Adapter, _Mapping]] = ..., published: _Optional[bool] = ..., replaced: _Optional[bool] = ..., warnings: _Optional[_Iterable[str]] = ..., replicas: _Optional[_Union[_replication_pb2.ReplicasReached, _Mapping]] = ...) -> None: ...

class Adapter(_message.Message):
    __slots__ = ("name", "revision", "weights_digest", "base_model", "rank", "targets", "parameters", "bytes", "tier", "pinned", "leases", "created", "last_used", "labels", "training", "current", "etag", "has_chat_template", "state", "aliases", "disk_bytes", "retain", "shared", "tenant", "base_word")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class TrainingEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    LAST_USED_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    TRAINING_FIELD_NUMBER: _ClassVar[int]
    CURRENT_FIELD_NUMBER: _ClassVar[int]
    ETAG_FIELD_NUMBER: _ClassVar[int]
    HAS_CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ALIASES_FIELD_NUMBER: _ClassVar[int]
    DISK_BYTES_FIELD_NUMBER: _ClassVar[int]
    RETAIN_FIELD_NUMBER: _ClassVar[int]
    SHARED_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    BASE_WORD_FIELD_NUMBER: _ClassVar[int]
    name: str
    revision: str
    weights_digest: str
    base_model: str
    rank: int
    targets: _containers.RepeatedScalarFieldContainer[str]
    parameters: int
    bytes: int
    tier: _inference_pb2.Tier
    pinned: bool
    leases: int
    created: _timestamp_pb2.Timestamp
    last_used: _timestamp_pb2.Timestamp
    labels: _containers.ScalarMap[str, str]
    training: _containers.ScalarMap[str, str]
    current: bool
    etag: str
    has_chat_template: bool
    state: AdapterState
    aliases: _containers.RepeatedScalarFieldContainer[str]
    disk_bytes: int
    retain: int
    shared: bool
    tenant: str
    base_word: str
    def __init__(self, name: _Optional[str] = ..., revision: _Optional[str] = ..., weights_digest: _Optional[str] = ..., base_model: _Optional[str] = ..., rank: _Optional[int] = ..., targets: _Optional[_Iterable[str]] = ..., parameters: _Optional[int] = ..., bytes: _Optional[int] = ..., tier: _Optional[_Union[_inference_pb2.Tier, str]] = ..., pinned: _Optional[bool] = ..., leases: _Optional[int] = ..., created: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., last_used: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., labels: _Optional[_Mapping[str, str]] = ..., training: _Optional[_Mapping[str, str]] = ..., current: _Optional[bool] = ..., etag: _Optional[str] = ..., has_chat_template: _Optional[bool] = ..., state: _Optional[_Union[AdapterState, str]] = ..., aliases: _Optional[_Iterable[str]] = ..., disk_bytes: _Optional[int] = ..., retain: _Optional[int] = ..., shared: _Optional[bool] = ..., tenant: _Optional[str] = ..., base_word: _Optional[str] = ...) -> None: ...

class GetUploadRequest(_message.Message):
    __slots__ = ("spec",)
    SPEC_FIELD_NUMBER: _ClassVar[int]
    spec: UploadSpec
    def __init__(self, spec: _Optional[_Union[UploadSpec, _Mapping]] = ...) -> None: ...

class GetUploadResponse(_message.Message):
    __slots__ = ("committed",)
    class CommittedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    committed: _containers.ScalarMap[str, int]
    def __init__(self, committed: _Optional[_Mapping[str, int]] = ...) -> None: ...

class RegisterAdapterRequest(_message.Message):
    __slots__ = ("name", "uri", "labels", "validate_only", "activate", "allow_replace", "etag", "wait", "same_base")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    URI_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    VALIDATE_ONLY_FIELD_NUMBER: _ClassVar[int]
    ACTIVATE_FIELD_NUMBER: _ClassVar[int]
    ALLOW_REPLACE_FIELD_NUMBER: _ClassVar[int]
    ETAG_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    SAME_BASE_FIELD_NUMBER: _ClassVar[int]
    name: str
    uri: str
    labels: _containers.ScalarMap[str, str]
    validate_only: bool
    activate: bool
    allow_replace: bool
    etag: str
    wait: _replication_pb2.WaitForReplicas
    same_base: bool
    def __init__(self, name: _Optional[str] = ..., uri: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ..., validate_only: _Optional[bool] = ..., activate: _Optional[bool] = ..., allow_replace: _Optional[bool] = ..., etag: _Optional[str] = ..., wait: _Optional[_Union[_replication_pb2.WaitForReplicas, _Mapping]] = ..., same_base: _Optional[bool] = ...) -> None: ...

class RegisterAdapterResponse(_message.Message):
    __slots__ = ("adapter", "published", "replaced", "warnings", "replicas")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_FIELD_NUMBER: _ClassVar[int]
    REPLACED_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    adapter: Adapter
    published: bool
    replaced: bool
    warnings: _containers.RepeatedScalarFieldContainer[str]
    replicas: _replication_pb2.ReplicasReached
    def __init__(self, adapter: _Optional[_Union[Adapter, _Mapping]] = ..., published: _Optional[bool] = ..., replaced: _Optional[bool] = ..., warnings: _Optional[_Iterable[str]] = ..., replicas: _Optional[_Union[_replication_pb2.ReplicasReached, _Mapping]] = ...) -> None: ...

class DownloadAdapterRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class DownloadAdapterResponse(_message.Message):
    __slots__ = ("start", "chunk")
    START_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    start: DownloadStart
    chunk: UploadChunk
    def __init__(self, start: _Optional[_Union[DownloadStart, _Mapping]] = ..., chunk: _Optional[_Union[UploadChunk, _Mapping]] = ...) -> None: ...

class DownloadStart(_message.Message):
    __slots__ = ("adapter", "files")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    adapter: Adapter
    files: _containers.RepeatedCompositeFieldContainer[UploadFile]
    def __init__(self, adapter: _Optional[_Union[Adapter, _Mapping]] = ..., files: _Optional[_Iterable[_Union[UploadFile, _Mapping]]] = ...) -> None: ...

class GetAdapterRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class GetAdapterResponse(_message.Message):
    __slots__ = ("adapter", "revisions", "revisions_left_out")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    REVISIONS_FIELD_NUMBER: _ClassVar[int]
    REVISIONS_LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    adapter: Adapter
    revisions: _containers.RepeatedCompositeFieldContainer[Adapter]
    revisions_left_out: int
    def __init__(self, adapter: _Optional[_Union[Adapter, _Mapping]] = ..., revisions: _Optional[_Iterable[_Union[Adapter, _Mapping]]] = ..., revisions_left_out: _Optional[int] = ...) -> None: ...

class ListAdaptersRequest(_message.Message):
    __slots__ = ("page_size", "page_token", "name_prefix", "tier", "labels")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    NAME_PREFIX_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    name_prefix: str
    tier: _inference_pb2.Tier
    labels: _containers.ScalarMap[str, str]
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., name_prefix: _Optional[str] = ..., tier: _Optional[_Union[_inference_pb2.Tier, str]] = ..., labels: _Optional[_Mapping[str, str]] = ...) -> None: ...

class ListAdaptersResponse(_message.Message):
    __slots__ = ("adapters", "next_page_token")
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    adapters: _containers.RepeatedCompositeFieldContainer[Adapter]
    next_page_token: str
    def __init__(self, adapters: _Optional[_Iterable[_Union[Adapter, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class ActivateAdapterRequest(_message.Message):
    __slots__ = ("name", "tier", "pin")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    PIN_FIELD_NUMBER: _ClassVar[int]
    name: str
    tier: _inference_pb2.Tier
    pin: bool
    def __init__(self, name: _Optional[str] = ..., tier: _Optional[_Union[_inference_pb2.Tier, str]] = ..., pin: _Optional[bool] = ...) -> None: ...

class ActivateAdapterResponse(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: Adapter
    def __init__(self, adapter: _Optional[_Union[Adapter, _Mapping]] = ...) -> None: ...

class EvictAdapterRequest(_message.Message):
    __slots__ = ("name", "mode", "unpin")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    UNPIN_FIELD_NUMBER: _ClassVar[int]
    name: str
    mode: EvictMode
    unpin: bool
    def __init__(self, name: _Optional[str] = ..., mode: _Optional[_Union[EvictMode, str]] = ..., unpin: _Optional[bool] = ...) -> None: ...

class EvictAdapterResponse(_message.Message):
    __slots__ = ("evicted", "freed_bytes")
    EVICTED_FIELD_NUMBER: _ClassVar[int]
    FREED_BYTES_FIELD_NUMBER: _ClassVar[int]
    evicted: bool
    freed_bytes: int
    def __init__(self, evicted: _Optional[bool] = ..., freed_bytes: _Optional[int] = ...) -> None: ...

class DeleteAdapterRequest(_message.Message):
    __slots__ = ("name", "etag", "mode", "wait")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ETAG_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    name: str
    etag: str
    mode: EvictMode
    wait: _replication_pb2.WaitForReplicas
    def __init__(self, name: _Optional[str] = ..., etag: _Optional[str] = ..., mode: _Optional[_Union[EvictMode, str]] = ..., wait: _Optional[_Union[_replication_pb2.WaitForReplicas, _Mapping]] = ...) -> None: ...

class DeleteAdapterResponse(_message.Message):
    __slots__ = ("revisions", "replicas")
    REVISIONS_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    revisions: _containers.RepeatedScalarFieldContainer[str]
    replicas: _replication_pb2.ReplicasReached
    def __init__(self, revisions: _Optional[_Iterable[str]] = ..., replicas: _Optional[_Union[_replication_pb2.ReplicasReached, _Mapping]] = ...) -> None: ...

class SetAliasRequest(_message.Message):
    __slots__ = ("alias", "revision", "targets", "rollback", "remove", "etag", "wait")
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    ROLLBACK_FIELD_NUMBER: _ClassVar[int]
    REMOVE_FIELD_NUMBER: _ClassVar[int]
    ETAG_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    alias: str
    revision: str
    targets: _containers.RepeatedCompositeFieldContainer[AliasTarget]
    rollback: bool
    remove: bool
    etag: str
    wait: _replication_pb2.WaitForReplicas
    def __init__(self, alias: _Optional[str] = ..., revision: _Optional[str] = ..., targets: _Optional[_Iterable[_Union[AliasTarget, _Mapping]]] = ..., rollback: _Optional[bool] = ..., remove: _Optional[bool] = ..., etag: _Optional[str] = ..., wait: _Optional[_Union[_replication_pb2.WaitForReplicas, _Mapping]] = ...) -> None: ...

class AliasTarget(_message.Message):
    __slots__ = ("revision", "weight")
    REVISION_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    revision: str
    weight: int
    def __init__(self, revision: _Optional[str] = ..., weight: _Optional[int] = ...) -> None: ...

class Alias(_message.Message):
    __slots__ = ("alias", "targets", "etag", "updated")
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    ETAG_FIELD_NUMBER: _ClassVar[int]
    UPDATED_FIELD_NUMBER: _ClassVar[int]
    alias: str
    targets: _containers.RepeatedCompositeFieldContainer[AliasTarget]
    etag: str
    updated: _timestamp_pb2.Timestamp
    def __init__(self, alias: _Optional[str] = ..., targets: _Optional[_Iterable[_Union[AliasTarget, _Mapping]]] = ..., etag: _Optional[str] = ..., updated: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class SetAliasResponse(_message.Message):
    __slots__ = ("alias", "previous", "replicas")
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    alias: Alias
    previous: _containers.RepeatedCompositeFieldContainer[AliasTarget]
    replicas: _replication_pb2.ReplicasReached
    def __init__(self, alias: _Optional[_Union[Alias, _Mapping]] = ..., previous: _Optional[_Iterable[_Union[AliasTarget, _Mapping]]] = ..., replicas: _Optional[_Union[_replication_pb2.ReplicasReached, _Mapping]] = ...) -> None: ...

class ListAliasesRequest(_message.Message):
    __slots__ = ("name", "page_size", "page_token")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    name: str
    page_size: int
    page_token: str
    def __init__(self, name: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListAliasesResponse(_message.Message):
    __slots__ = ("aliases", "next_page_token")
    ALIASES_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    aliases: _containers.RepeatedCompositeFieldContainer[Alias]
    next_page_token: str
    def __init__(self, aliases: _Optional[_Iterable[_Union[Alias, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class WatchAdaptersRequest(_message.Message):
    __slots__ = ("since_sequence",)
    SINCE_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    since_sequence: int
    def __init__(self, since_sequence: _Optional[int] = ...) -> None: ...

class WatchAdaptersResponse(_message.Message):
    __slots__ = ("sequence", "event", "adapter", "time", "detail")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    event: AdapterEvent
    adapter: Adapter
    time: _timestamp_pb2.Timestamp
    detail: str
    def __init__(self, sequence: _Optional[int] = ..., event: _Optional[_Union[AdapterEvent, str]] = ..., adapter: _Optional[_Union[Adapter, _Mapping]] = ..., time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., detail: _Optional[str] = ...) -> None: ...

class UpdateAdapterRequest(_message.Message):
    __slots__ = ("name", "pinned", "labels", "remove_labels", "retain", "current", "etag", "shared", "wait")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    REMOVE_LABELS_FIELD_NUMBER: _ClassVar[int]
    RETAIN_FIELD_NUMBER: _ClassVar[int]
    CURRENT_FIELD_NUMBER: _ClassVar[int]
    ETAG_FIELD_NUMBER: _ClassVar[int]
    SHARED_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    name: str
    pinned: bool
    labels: _containers.ScalarMap[str, str]
    remove_labels: _containers.RepeatedScalarFieldContainer[str]
    retain: int
    current: bool
    etag: str
    shared: bool
    wait: _replication_pb2.WaitForReplicas
    def __init__(self, name: _Optional[str] = ..., pinned: _Optional[bool] = ..., labels: _Optional[_Mapping[str, str]] = ..., remove_labels: _Optional[_Iterable[str]] = ..., retain: _Optional[int] = ..., current: _Optional[bool] = ..., etag: _Optional[str] = ..., shared: _Optional[bool] = ..., wait: _Optional[_Union[_replication_pb2.WaitForReplicas, _Mapping]] = ...) -> None: ...

class UpdateAdapterResponse(_message.Message):
    __slots__ = ("adapter", "replicas")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    adapter: Adapter
    replicas: _replication_pb2.ReplicasReached
    def __init__(self, adapter: _Optional[_Union[Adapter, _Mapping]] = ..., replicas: _Optional[_Union[_replication_pb2.ReplicasReached, _Mapping]] = ...) -> None: ...

class GetHistoryRequest(_message.Message):
    __slots__ = ("name", "page_size", "page_token")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    name: str
    page_size: int
    page_token: str
    def __init__(self, name: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class GetHistoryResponse(_message.Message):
    __slots__ = ("entries", "next_page_token")
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[HistoryEntry]
    next_page_token: str
    def __init__(self, entries: _Optional[_Iterable[_Union[HistoryEntry, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class HistoryEntry(_message.Message):
    __slots__ = ("time", "event", "revision", "name", "actor", "peer", "detail")
    TIME_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    time: _timestamp_pb2.Timestamp
    event: str
    revision: str
    name: str
    actor: str
    peer: str
    detail: str
    def __init__(self, time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., event: _Optional[str] = ..., revision: _Optional[str] = ..., name: _Optional[str] = ..., actor: _Optional[str] = ..., peer: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...

class UpdateBudgetsRequest(_message.Message):
    __slots__ = ("host_cache_bytes", "device_adapter_bytes")
    HOST_CACHE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_ADAPTER_BYTES_FIELD_NUMBER: _ClassVar[int]
    host_cache_bytes: int
    device_adapter_bytes: int
    def __init__(self, host_cache_bytes: _Optional[int] = ..., device_adapter_bytes: _Optional[int] = ...) -> None: ...

class UpdateBudgetsResponse(_message.Message):
    __slots__ = ("host_cache_bytes", "device_adapter_bytes", "host_bytes", "device_bytes")
    HOST_CACHE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_ADAPTER_BYTES_FIELD_NUMBER: _ClassVar[int]
    HOST_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BYTES_FIELD_NUMBER: _ClassVar[int]
    host_cache_bytes: int
    device_adapter_bytes: int
    host_bytes: int
    device_bytes: int
    def __init__(self, host_cache_bytes: _Optional[int] = ..., device_adapter_bytes: _Optional[int] = ..., host_bytes: _Optional[int] = ..., device_bytes: _Optional[int] = ...) -> None: ...

class SelfTestRequest(_message.Message):
    __slots__ = ("adapters",)
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    adapters: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, adapters: _Optional[_Iterable[str]] = ...) -> None: ...

class SelfTestResponse(_message.Message):
    __slots__ = ("passed", "results", "adapters_mixed", "note")
    PASSED_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_MIXED_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    passed: bool
    results: _containers.RepeatedCompositeFieldContainer[SelfTestResult]
    adapters_mixed: int
    note: str
    def __init__(self, passed: _Optional[bool] = ..., results: _Optional[_Iterable[_Union[SelfTestResult, _Mapping]]] = ..., adapters_mixed: _Optional[int] = ..., note: _Optional[str] = ...) -> None: ...

class SelfTestResult(_message.Message):
    __slots__ = ("adapter", "passed", "max_difference", "bound", "nearest_other", "detail")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    PASSED_FIELD_NUMBER: _ClassVar[int]
    MAX_DIFFERENCE_FIELD_NUMBER: _ClassVar[int]
    BOUND_FIELD_NUMBER: _ClassVar[int]
    NEAREST_OTHER_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    passed: bool
    max_difference: float
    bound: float
    nearest_other: float
    detail: str
    def __init__(self, adapter: _Optional[str] = ..., passed: _Optional[bool] = ..., max_difference: _Optional[float] = ..., bound: _Optional[float] = ..., nearest_other: _Optional[float] = ..., detail: _Optional[str] = ...) -> None: ...
