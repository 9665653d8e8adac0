"""Conversion of `states` and `replicas` values to protobuf messages and back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Final

from google.protobuf.duration_pb2 import Duration
from veneer_proto.v1 import replication_pb2
from veneer_registry.adapter import AdapterRef
from veneer_registry.entry import Entry
from veneer_registry.errors import InvalidField
from veneer_registry.rows import AliasRow, RevisionRow

from veneer_server.access.keys import TENANT
from veneer_server.replication.replicas import Reached, Wait, WaitMode
from veneer_server.replication.states import (
    BeginFeed,
    Heartbeat,
    Message,
    NameState,
    SnapshotEnd,
    Told,
)

_CHECKSUM: Final = 16

_MODES: Final[Mapping[int, WaitMode]] = {
    replication_pb2.WAIT_REPLICAS_UNSPECIFIED: "none",
    replication_pb2.WAIT_REPLICAS_NONE: "none",
    replication_pb2.WAIT_REPLICAS_QUORUM: "quorum",
    replication_pb2.WAIT_REPLICAS_ALL: "all",
}
_LONGEST_WAIT_S: Final = 300.0


def to_wire(message: Message) -> replication_pb2.FollowResponse:
    """Convert a message for a follower."""
    match message:
        case BeginFeed():
            begin = replication_pb2.FollowBegin(
                run=message.run,
                store=message.store,
                catalog_change=sum(message.catalogs.values()),
                catalogs=message.catalogs,
                lag=message.lag_s,
                snapshot=message.snapshot,
                sequence=message.sequence,
                base=message.base,
                heartbeat=_duration(message.heartbeat_s),
                lease=_duration(message.lease_s),
                asks_callers=message.asks_callers,
                echoes=message.echoes,
            )
            return replication_pb2.FollowResponse(begin=begin)
        case Told():
            state = state_to_wire(message.state)
            state.sequence, state.previous = message.sequence, message.previous
            state.catalog = message.catalog
            return replication_pb2.FollowResponse(state=state)
        case SnapshotEnd():
            end = replication_pb2.SnapshotEnd(
                sequence=message.sequence, checksum=_checksum(message.checksum)
            )
            return replication_pb2.FollowResponse(snapshot_end=end)
        case Heartbeat():
            beat = replication_pb2.Heartbeat(
                sequence=message.sequence,
                checksum=_checksum(message.checksum),
                echo=message.echo,
                lag=message.lag_s,
            )
            return replication_pb2.FollowResponse(heartbeat=beat)


def from_wire(message: replication_pb2.FollowResponse, base: str) -> Message:
    """Inverse of `to_wire`.

    Args:
        base: identity of this server's base; revisions for another base are marked foreign.

    Raises:
        ValueError: the message is of an unknown kind, or a value is out of range.
    """
    match message.WhichOneof("message"):
        case "begin":
            begin = message.begin
            return BeginFeed(
                run=begin.run,
                store=begin.store,
                catalogs=dict(begin.catalogs),
                lag_s=_lag(begin.lag),
                snapshot=begin.snapshot,
                sequence=begin.sequence,
                base=begin.base,
                heartbeat_s=_seconds(begin.heartbeat),
                lease_s=_seconds(begin.lease),
                asks_callers=begin.asks_callers if begin.HasField("asks_callers") else None,
                echoes=begin.echoes,
            )
        case "state":
            state = message.state
            return Told(
                state_from_wire(state, base), state.sequence, state.previous, state.catalog
            )
        case "snapshot_end":
            end = message.snapshot_end
            return SnapshotEnd(end.sequence, int.from_bytes(end.checksum, "big"))
        case "heartbeat":
            beat = message.heartbeat
            checksum = int.from_bytes(beat.checksum, "big")
            return Heartbeat(beat.sequence, checksum, beat.echo, _lag(beat.lag))
        case _:
            raise ValueError("the registry sent a message that this version does not know")


def state_to_wire(state: NameState) -> replication_pb2.NameState:
    """Convert a name's state, without its sequence numbers."""
    message = replication_pb2.NameState(tenant=state.tenant, name=state.name)
    entry = state.entry
    if entry is None:
        message.gone = True
        return message
    message.current = "" if entry.current is None else entry.current.revision
    message.generation = entry.generation
    message.shared = entry.shared
    if entry.retain is not None:
        message.retain = entry.retain
    rows = {row.revision: row for row in state.rows}
    for ref in entry.revisions:
        revision = message.revisions.add(
            revision=ref.revision, weights_digest=ref.weights_digest
        )
        if (row := rows.get(ref.revision)) is not None:
            revision.base, revision.manifest = row.base, row.manifest
            revision.created, revision.bytes = row.created, row.bytes
            revision.labels.update(row.labels)
    for alias in entry.aliases:
        message.aliases.add(
            alias=alias.alias,
            targets=_shares(alias.targets),
            previous=_shares(alias.previous),
            generation=alias.generation,
            updated=alias.updated,
        )
    return message


def state_from_wire(message: replication_pb2.NameState, base: str) -> NameState:
    """Inverse of `state_to_wire`; ``base`` as in `from_wire`."""
    tenant, name = message.tenant, message.name
    if not TENANT.fullmatch(tenant):  # it becomes the name of a folder
        raise ValueError(f"the registry sent the tenant {tenant[:80]!r}, which cannot be one")
    if message.gone:
        return NameState(tenant, name, None)
    refs, rows, current = [], [], None
    for each in message.revisions:
        ref = AdapterRef(name, each.revision, each.weights_digest)
        refs.append(ref)
        is_current = each.revision == message.current
        if is_current:
            current = ref
        if each.manifest:
            rows.append(
                RevisionRow(
                    name=name,
                    revision=each.revision,
                    weights=each.weights_digest,
                    base=each.base,
                    manifest=each.manifest,
                    created=each.created,
                    labels=dict(each.labels),
                    bytes=each.bytes,
                    current=is_current,
                    generation=message.generation,
                )
            )
    aliases = tuple(
        AliasRow(
            name=name,
            alias=each.alias,
            targets=_pairs(each.targets),
            previous=_pairs(each.previous),
            generation=each.generation,
            updated=each.updated,
        )
        for each in message.aliases
    )
    entry = Entry(
        current=current,
        revisions=tuple(refs),
        generation=message.generation,
        foreign=frozenset(row.revision for row in rows if row.base != base),
        retain=message.retain if message.HasField("retain") else None,
        aliases=aliases,
        shared=message.shared,
    )
    return NameState(tenant, name, entry, tuple(rows))


def _shares(
    pairs: Iterable[tuple[str, int]],
) -> list[replication_pb2.RevisionShare]:
    return [replication_pb2.RevisionShare(revision=r, weight=w) for r, w in pairs]


def _pairs(
    shares: Iterable[replication_pb2.RevisionShare],
) -> tuple[tuple[str, int], ...]:
    return tuple((share.revision, share.weight) for share in shares)


def _checksum(value: int) -> bytes:
    return value.to_bytes(_CHECKSUM, "big")


def _lag(seconds: float) -> float:
    if not 0 <= seconds < math.inf:
        raise ValueError(f"the registry says that its view is {seconds:g} s old")
    return seconds


def _seconds(duration: Duration) -> float:
    seconds = duration.seconds + duration.nanos / 1e9
    if not 0 < seconds <= _LONGEST_WAIT_S:
        raise ValueError(f"the registry's heartbeat or lease is {seconds:g} s")
    return seconds


def _duration(seconds: float) -> Duration:
    found = Duration()
    found.FromNanoseconds(int(seconds * 1e9))
    return found


def wait_for(message: replication_pb2.WaitForReplicas, field: str) -> Wait:
    """Convert a request to wait for followers. Raises InvalidField."""
    mode = _MODES.get(message.replicas)
    if mode is None:
        raise InvalidField(
            f"{field}.replicas is {message.replicas}: use WAIT_REPLICAS_NONE, _QUORUM or _ALL",
            metadata={"field": f"{field}.replicas"},
        )
    if not message.HasField("at_most"):
        return Wait(mode)
    seconds = message.at_most.seconds + message.at_most.nanos / 1e9
    if not 0 < seconds <= _LONGEST_WAIT_S:
        raise InvalidField(
            f"{field}.at_most is {seconds:g} s: use more than 0 and at most "
            f"{_LONGEST_WAIT_S:g}",
            metadata={"field": f"{field}.at_most"},
        )
    return Wait(mode, seconds)


def reached_to_wire(reached: Reached | None) -> replication_pb2.ReplicasReached | None:
    """Convert the result of a wait; None stays None."""
    if reached is None:
        return None
    return replication_pb2.ReplicasReached(
        live=reached.live, applied=reached.applied, enough=reached.enough
    )
