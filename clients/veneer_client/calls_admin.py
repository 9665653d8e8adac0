"""The calls of the adapter service as data; see `calls`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from veneer_proto.v1 import adapters_pb2, inference_pb2
from veneer_registry.adapter import Tier
from veneer_registry.errors import InvalidField

from veneer_client import convert, convert_admin, convert_server
from veneer_client.calls import Call
from veneer_client.records import (
    AdapterDetails,
    AdapterInfo,
    Alias,
    AliasMove,
    AliasTarget,
    Eviction,
    EvictMode,
    HistoryEntry,
    Pushed,
)
from veneer_client.replicas import WaitReplicas, wait_for
from veneer_client.server_records import BudgetUse, SelfTest

__all__ = [
    "DOWNLOAD",
    "UPLOAD",
    "WATCH",
    "Page",
    "activate",
    "alias_page",
    "committed",
    "delete",
    "evict",
    "get",
    "history_page",
    "page",
    "register",
    "self_test",
    "set_alias",
    "update",
    "update_budgets",
]

_ADAPTERS: Final = "veneer.v1.AdapterService"
DOWNLOAD: Final = f"/{_ADAPTERS}/DownloadAdapter"
UPLOAD: Final = f"/{_ADAPTERS}/UploadAdapter"
WATCH: Final = f"/{_ADAPTERS}/WatchAdapters"

Item = TypeVar("Item")
Request = TypeVar("Request")


@dataclass(frozen=True, slots=True)
class Page(Generic[Item]):
    """One page of a listing, and the token of the next page ("" on the last)."""

    items: tuple[Item, ...]
    next_token: str


def get(name: str) -> Call[adapters_pb2.GetAdapterResponse, AdapterDetails]:
    """One adapter by ``name``, ``name@revision`` or ``name/alias``."""
    return Call(
        f"/{_ADAPTERS}/GetAdapter",
        adapters_pb2.GetAdapterRequest(name=name),
        adapters_pb2.GetAdapterResponse.FromString,
        convert_admin.adapter_details,
    )


def page(
    token: str,
    *,
    page_size: int,
    name_prefix: str,
    tier: Tier | None,
    labels: Mapping[str, str],
) -> Call[adapters_pb2.ListAdaptersResponse, Page[AdapterInfo]]:
    """One page of the list."""
    return Call(
        f"/{_ADAPTERS}/ListAdapters",
        adapters_pb2.ListAdaptersRequest(
            page_size=page_size,
            page_token=token,
            name_prefix=name_prefix,
            tier=convert.TIERS[tier] if tier else inference_pb2.TIER_UNSPECIFIED,
            labels=labels,
        ),
        adapters_pb2.ListAdaptersResponse.FromString,
        lambda answer: Page(
            tuple(convert_admin.adapter_info(adapter) for adapter in answer.adapters),
            answer.next_page_token,
        ),
    )


def committed(
    spec: adapters_pb2.UploadSpec,
) -> Call[adapters_pb2.GetUploadResponse, Mapping[str, int]]:
    """Ask how many bytes of each file of an upload the server already has."""
    return Call(
        f"/{_ADAPTERS}/GetUpload",
        adapters_pb2.GetUploadRequest(spec=spec),
        adapters_pb2.GetUploadResponse.FromString,
        lambda answer: dict(answer.committed),
    )


def register(
    uri: str,
    name: str,
    *,
    labels: Mapping[str, str],
    validate_only: bool,
    activate: bool,
    allow_replace: bool,
    same_base: bool,
    etag: str,
    wait_replicas: WaitReplicas,
) -> Call[adapters_pb2.RegisterAdapterResponse, Pushed]:
    """Have the server fetch an adapter from a URI and publish it. A repetition publishes
    nothing new. With an etag it is not retried, as the first attempt would have changed it."""
    request = _made(
        lambda: adapters_pb2.RegisterAdapterRequest(
            name=name,
            uri=uri,
            labels=labels,
            validate_only=validate_only,
            activate=activate,
            allow_replace=allow_replace,
            same_base=same_base,
            etag=etag,
            wait=wait_for(wait_replicas),
        )
    )
    return Call(
        f"/{_ADAPTERS}/RegisterAdapter",
        request,
        adapters_pb2.RegisterAdapterResponse.FromString,
        convert_admin.registered,
        repeatable=not etag,
    )


def activate(
    name: str, *, tier: Tier, pin: bool
) -> Call[adapters_pb2.ActivateAdapterResponse, AdapterInfo]:
    """Load an adapter into HOST or DEVICE."""
    return Call(
        f"/{_ADAPTERS}/ActivateAdapter",
        adapters_pb2.ActivateAdapterRequest(name=name, tier=convert.TIERS[tier], pin=pin),
        adapters_pb2.ActivateAdapterResponse.FromString,
        lambda answer: convert_admin.adapter_info(answer.adapter),
    )


def update(
    name: str,
    *,
    pinned: bool | None = None,
    labels: Mapping[str, str] | None = None,
    remove_labels: Iterable[str] = (),
    retain: int | None = None,
    current: bool | None = None,
    shared: bool | None = None,
    etag: str = "",
    wait_replicas: WaitReplicas = WaitReplicas.NONE,
) -> Call[adapters_pb2.UpdateAdapterResponse, AdapterInfo]:
    """Change an adapter's settings. Not retried with an etag: if the first attempt had
    succeeded, the second would fail with ETAG_MISMATCH."""
    request = _made(
        lambda: adapters_pb2.UpdateAdapterRequest(
            name=name,
            pinned=pinned,
            labels=labels,
            remove_labels=remove_labels,
            retain=retain,
            current=current,
            shared=shared,
            etag=etag,
            wait=wait_for(wait_replicas),
        )
    )
    return Call(
        f"/{_ADAPTERS}/UpdateAdapter",
        request,
        adapters_pb2.UpdateAdapterResponse.FromString,
        lambda answer: convert_admin.adapter_info(answer.adapter),
        repeatable=not etag,
    )


def evict(
    name: str, *, mode: EvictMode, unpin: bool
) -> Call[adapters_pb2.EvictAdapterResponse, Eviction]:
    """Free an adapter's memory."""
    return Call(
        f"/{_ADAPTERS}/EvictAdapter",
        adapters_pb2.EvictAdapterRequest(
            name=name, mode=convert_admin.EVICT_MODES[mode], unpin=unpin
        ),
        adapters_pb2.EvictAdapterResponse.FromString,
        convert_admin.eviction,
    )


def delete(
    name: str,
    *,
    etag: str,
    mode: EvictMode,
    wait_replicas: WaitReplicas = WaitReplicas.NONE,
) -> Call[adapters_pb2.DeleteAdapterResponse, tuple[str, ...]]:
    """Remove a name or a revision. Not retried: a second attempt would get NOT_FOUND."""
    return Call(
        f"/{_ADAPTERS}/DeleteAdapter",
        adapters_pb2.DeleteAdapterRequest(
            name=name,
            etag=etag,
            mode=convert_admin.EVICT_MODES[mode],
            wait=wait_for(wait_replicas),
        ),
        adapters_pb2.DeleteAdapterResponse.FromString,
        lambda answer: tuple(answer.revisions),
        repeatable=False,
    )


def set_alias(
    alias: str,
    revision: str,
    *,
    targets: Mapping[str, int] | Sequence[AliasTarget],
    rollback: bool,
    remove: bool,
    etag: str,
    wait_replicas: WaitReplicas = WaitReplicas.NONE,
) -> Call[adapters_pb2.SetAliasResponse, AliasMove]:
    """Move, roll back or remove an alias. Not retried: a repeated rollback would undo the
    first one."""
    if [bool(revision), bool(targets), rollback, remove].count(True) != 1:
        raise InvalidField(
            f"alias {alias!r} needs exactly one of revision, targets, rollback and remove",
            metadata={"field": "revision", "one_of": "revision targets rollback remove"},
        )
    pairs = targets.items() if isinstance(targets, Mapping) else _pairs(targets)
    request = _made(
        lambda: adapters_pb2.SetAliasRequest(
            alias=alias,
            revision=revision,
            targets=[
                adapters_pb2.AliasTarget(revision=target, weight=weight)
                for target, weight in pairs
            ],
            rollback=rollback,
            remove=remove,
            etag=etag,
            wait=wait_for(wait_replicas),
        )
    )
    return Call(
        f"/{_ADAPTERS}/SetAlias",
        request,
        adapters_pb2.SetAliasResponse.FromString,
        convert_admin.alias_move,
        repeatable=False,
    )


def alias_page(token: str, *, name: str) -> Call[adapters_pb2.ListAliasesResponse, Page[Alias]]:
    """One page of the aliases of a name, or of all names if it is ""."""
    return Call(
        f"/{_ADAPTERS}/ListAliases",
        adapters_pb2.ListAliasesRequest(name=name, page_token=token),
        adapters_pb2.ListAliasesResponse.FromString,
        lambda answer: Page(
            tuple(map(convert_admin.alias, answer.aliases)), answer.next_page_token
        ),
    )


def history_page(
    token: str, *, name: str, page_size: int
) -> Call[adapters_pb2.GetHistoryResponse, Page[HistoryEntry]]:
    """One page of the history, newest first."""
    return Call(
        f"/{_ADAPTERS}/GetHistory",
        adapters_pb2.GetHistoryRequest(name=name, page_size=page_size, page_token=token),
        adapters_pb2.GetHistoryResponse.FromString,
        lambda answer: Page(
            tuple(map(convert_admin.history_entry, answer.entries)), answer.next_page_token
        ),
    )


def update_budgets(
    *, host_cache_bytes: int | None, device_adapter_bytes: int | None
) -> Call[adapters_pb2.UpdateBudgetsResponse, BudgetUse]:
    """Change the memory budgets, or read them if nothing is given."""
    request = _made(
        lambda: adapters_pb2.UpdateBudgetsRequest(
            host_cache_bytes=host_cache_bytes, device_adapter_bytes=device_adapter_bytes
        )
    )
    return Call(
        f"/{_ADAPTERS}/UpdateBudgets",
        request,
        adapters_pb2.UpdateBudgetsResponse.FromString,
        convert_server.budget_use,
    )


def self_test(
    adapters: Iterable[str],
) -> Call[adapters_pb2.SelfTestResponse, SelfTest]:
    """Check that base and adapters answer as computed from their files."""
    return Call(
        f"/{_ADAPTERS}/SelfTest",
        adapters_pb2.SelfTestRequest(adapters=adapters),
        adapters_pb2.SelfTestResponse.FromString,
        convert_server.self_test,
    )


def _pairs(targets: Iterable[AliasTarget]) -> list[tuple[str, int]]:
    return [(target.revision, target.weight) for target in targets]


def _made(make: Callable[[], Request]) -> Request:
    """Make a request. Raises InvalidField if a value has the wrong type or range."""
    try:
        return make()
    except (TypeError, ValueError) as error:
        raise InvalidField(
            f"a value has the wrong type or range ({error}): sizes, counts and weights must "
            "be non-negative integers, names and labels strings",
            metadata={"field": "request"},
        ) from error
