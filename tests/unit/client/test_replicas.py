"""--wait-replicas: what is asked for, and what an answer says of it."""

from __future__ import annotations

from veneer_client import ReplicasReached, WaitReplicas, calls_admin
from veneer_client.cli.waiting import replicas_shown
from veneer_client.convert_admin import alias_move
from veneer_client.replicas import wait_for
from veneer_proto.v1 import adapters_pb2, replication_pb2


def test_changes_ask_to_wait_only_if_they_are_told_to() -> None:
    assert wait_for(WaitReplicas.NONE) is None
    call = calls_admin.update("name", current=True, wait_replicas=WaitReplicas.QUORUM)
    assert call.request.wait.replicas == replication_pb2.WAIT_REPLICAS_QUORUM
    assert not calls_admin.update("name", current=True).request.HasField("wait")


def test_an_answer_says_how_many_have_it() -> None:
    answer = adapters_pb2.SetAliasResponse()
    assert alias_move(answer).replicas is None
    answer.replicas.live, answer.replicas.applied, answer.replicas.enough = 3, 2, True
    assert alias_move(answer).replicas == ReplicasReached(3, 2, True)


def test_a_person_is_told_whether_it_was_enough() -> None:
    assert replicas_shown(None) == ""
    assert replicas_shown(ReplicasReached(2, 2, True)) == "; applied on 2 of 2 followers"
    late = "; applied on 1 of 2 followers (timed out; the others catch up later)"
    assert replicas_shown(ReplicasReached(2, 1, False)) == late
