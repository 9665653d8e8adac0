import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WaitReplicas(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WAIT_REPLICAS_UNSPECIFIED: _ClassVar[WaitReplicas]
    WAIT_REPLICAS_NONE: _ClassVar[WaitReplicas]
    WAIT_REPLICAS_QUORUM: _ClassVar[WaitReplicas]
    WAIT_REPLICAS_ALL: _ClassVar[WaitReplicas]
WAIT_REPLICAS_UNSPECIFIED: WaitReplicas
WAIT_REPLICAS_NONE: WaitReplicas
WAIT_REPLICAS_QUORUM: WaitReplicas
WAIT_REPLICAS_ALL: WaitReplicas

class FollowRequest(_message.Message):
    __slots__ = ("start", "applied")
    START_FIELD_NUMBER: _ClassVar[int]
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    start: FollowStart
    applied: Applied
    def __init__(self, start: _Optional[_Union[FollowStart, _Mapping]] = ..., applied: _Optional[_Union[Applied, _Mapping]] = ...) -> None: ...

class FollowStart(_message.Message):
    __slots__ = ("follower", "run", "sequence", "catalogs")
    class CatalogsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    FOLLOWER_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    CATALOGS_FIELD_NUMBER: _ClassVar[int]
    follower: str
    run: str
    sequence: int
    catalogs: _containers.ScalarMap[str, int]
    def __init__(self, follower: _Optional[str] = ..., run: _Optional[str] = ..., sequence: _Optional[int] = ..., catalogs: _Optional[_Mapping[str, int]] = ...) -> None: ...

class Applied(_message.Message):
    __slots__ = ("sequence", "leaving", "stamp")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    STAMP_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    leaving: bool
    stamp: int
    def __init__(self, sequence: _Optional[int] = ..., leaving: _Optional[bool] = ..., stamp: _Optional[int] = ...) -> None: ...

class FollowResponse(_message.Message):
    __slots__ = ("begin", "state", "snapshot_end", "heartbeat")
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_END_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    begin: FollowBegin
    state: NameState
    snapshot_end: SnapshotEnd
    heartbeat: Heartbeat
    def __init__(self, begin: _Optional[_Union[FollowBegin, _Mapping]] = ..., state: _Optional[_Union[NameState, _Mapping]] = ..., snapshot_end: _Optional[_Union[SnapshotEnd, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ...) -> None: ...

class FollowBegin(_message.Message):
    __slots__ = ("run", "store", "catalog_change", "snapshot", "sequence", "base", "heartbeat", "lease", "asks_callers", "echoes", "catalogs", "lag")
    class CatalogsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    RUN_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    CATALOG_CHANGE_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    ASKS_CALLERS_FIELD_NUMBER: _ClassVar[int]
    ECHOES_FIELD_NUMBER: _ClassVar[int]
    CATALOGS_FIELD_NUMBER: _ClassVar[int]
    LAG_FIELD_NUMBER: _ClassVar[int]
    run: str
    store: str
    catalog_change: int
    snapshot: bool
    sequence: int
    base: str
    heartbeat: _duration_pb2.Duration
    lease: _duration_pb2.Duration
    asks_callers: bool
    echoes: bool
    catalogs: _containers.ScalarMap[str, int]
    lag: float
    def __init__(self, run: _Optional[str] = ..., store: _Optional[str] = ..., catalog_change: _Optional[int] = ..., snapshot: _Optional[bool] = ..., sequence: _Optional[int] = ..., base: _Optional[str] = ..., heartbeat: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., lease: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., asks_callers: _Optional[bool] = ..., echoes: _Optional[bool] = ..., catalogs: _Optional[_Mapping[str, int]] = ..., lag: _Optional[float] = ...) -> None: ...

class NameState(_message.Message):
    __slots__ = ("tenant", "name", "sequence", "previous", "gone", "current", "generation", "retain", "shared", "revisions", "aliases", "catalog")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    GONE_FIELD_NUMBER: _ClassVar[int]
    CURRENT_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    RETAIN_FIELD_NUMBER: _ClassVar[int]
    SHARED_FIELD_NUMBER: _ClassVar[int]
    REVISIONS_FIELD_NUMBER: _ClassVar[int]
    ALIASES_FIELD_NUMBER: _ClassVar[int]
    CATALOG_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    name: str
    sequence: int
    previous: int
    gone: bool
    current: str
    generation: int
    retain: int
    shared: bool
    revisions: _containers.RepeatedCompositeFieldContainer[RevisionState]
    aliases: _containers.RepeatedCompositeFieldContainer[AliasState]
    catalog: int
    def __init__(self, tenant: _Optional[str] = ..., name: _Optional[str] = ..., sequence: _Optional[int] = ..., previous: _Optional[int] = ..., gone: _Optional[bool] = ..., current: _Optional[str] = ..., generation: _Optional[int] = ..., retain: _Optional[int] = ..., shared: _Optional[bool] = ..., revisions: _Optional[_Iterable[_Union[RevisionState, _Mapping]]] = ..., aliases: _Optional[_Iterable[_Union[AliasState, _Mapping]]] = ..., catalog: _Optional[int] = ...) -> None: ...

class RevisionState(_message.Message):
    __slots__ = ("revision", "weights_digest", "base", "manifest", "created", "labels", "bytes")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    REVISION_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    revision: str
    weights_digest: str
    base: str
    manifest: str
    created: float
    labels: _containers.ScalarMap[str, str]
    bytes: int
    def __init__(self, revision: _Optional[str] = ..., weights_digest: _Optional[str] = ..., base: _Optional[str] = ..., manifest: _Optional[str] = ..., created: _Optional[float] = ..., labels: _Optional[_Mapping[str, str]] = ..., bytes: _Optional[int] = ...) -> None: ...

class AliasState(_message.Message):
    __slots__ = ("alias", "targets", "previous", "generation", "updated")
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    UPDATED_FIELD_NUMBER: _ClassVar[int]
    alias: str
    targets: _containers.RepeatedCompositeFieldContainer[RevisionShare]
    previous: _containers.RepeatedCompositeFieldContainer[RevisionShare]
    generation: int
    updated: float
    def __init__(self, alias: _Optional[str] = ..., targets: _Optional[_Iterable[_Union[RevisionShare, _Mapping]]] = ..., previous: _Optional[_Iterable[_Union[RevisionShare, _Mapping]]] = ..., generation: _Optional[int] = ..., updated: _Optional[float] = ...) -> None: ...

class RevisionShare(_message.Message):
    __slots__ = ("revision", "weight")
    REVISION_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    revision: str
    weight: int
    def __init__(self, revision: _Optional[str] = ..., weight: _Optional[int] = ...) -> None: ...

class SnapshotEnd(_message.Message):
    __slots__ = ("sequence", "checksum")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    checksum: bytes
    def __init__(self, sequence: _Optional[int] = ..., checksum: _Optional[bytes] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("sequence", "checksum", "echo", "lag")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    ECHO_FIELD_NUMBER: _ClassVar[int]
    LAG_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    checksum: bytes
    echo: int
    lag: float
    def __init__(self, sequence: _Optional[int] = ..., checksum: _Optional[bytes] = ..., echo: _Optional[int] = ..., lag: _Optional[float] = ...) -> None: ...

class FetchWeightsRequest(_message.Message):
    __slots__ = ("tenant", "weights_digest", "file", "offset")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    weights_digest: str
    file: str
    offset: int
    def __init__(self, tenant: _Optional[str] = ..., weights_digest: _Optional[str] = ..., file: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class FetchWeightsResponse(_message.Message):
    __slots__ = ("size", "offset", "data", "crc32")
    SIZE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    size: int
    offset: int
    data: bytes
    crc32: int
    def __init__(self, size: _Optional[int] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ..., crc32: _Optional[int] = ...) -> None: ...

class WaitForReplicas(_message.Message):
    __slots__ = ("replicas", "at_most")
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    AT_MOST_FIELD_NUMBER: _ClassVar[int]
    replicas: WaitReplicas
    at_most: _duration_pb2.Duration
    def __init__(self, replicas: _Optional[_Union[WaitReplicas, str]] = ..., at_most: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class ReplicasReached(_message.Message):
    __slots__ = ("live", "applied", "enough")
    LIVE_FIELD_NUMBER: _ClassVar[int]
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    ENOUGH_FIELD_NUMBER: _ClassVar[int]
    live: int
    applied: int
    enough: bool
    def __init__(self, live: _Optional[int] = ..., applied: _Optional[int] = ..., enough: _Optional[bool] = ...) -> None: ...
