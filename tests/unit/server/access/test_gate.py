"""The gate that every call passes: who a refused call is noted as, and how a call ended."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import veneer_server
from veneer_registry.errors import (
    AdapterNotFound,
    InternalError,
    InvalidField,
    PermissionDenied,
    Unauthenticated,
    VeneerError,
)
from veneer_server.access.audit import Audit
from veneer_server.access.authenticate import Access, Credentials
from veneer_server.access.caller import MOST_LAG, Caller
from veneer_server.access.edit_keys import add_key
from veneer_server.access.identity_file import IdentityFile
from veneer_server.serving.gate import CallContext, Gate
from veneer_server.telemetry.metrics import Metrics

from tests.refused import refused

DELETE = "/veneer.v1.AdapterService/DeleteAdapter"
GENERATE = "/veneer.v1.InferenceService/Generate"


@contextmanager
def gate_of(folder: Path, **options: Any) -> Iterator[tuple[Gate, list[dict[str, Any]]]]:
    """A gate, and the lines of its audit log once the block has ended."""
    lines: list[dict[str, Any]] = []
    audit = Audit(folder / "audit.jsonl", keyed="access" in options)
    yield Gate(Metrics(), audit=audit, **options), lines
    audit.close()
    for file in sorted(folder.glob("audit*.jsonl")):
        lines += map(json.loads, file.read_text().splitlines())


def called(method: str = DELETE, **headers: str) -> CallContext:
    caller = Caller.arriving(method, "ipv4:192.0.2.7:1", "mine", headers)
    return CallContext(caller)


async def test_a_refused_caller_is_noted_as_who_it_was_known_to_be(tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    low = add_key(keys, name="low", tenant="t1", roles=["inference"], expires=None).key
    high = add_key(keys, name="high", tenant="t1", roles=["operator"], expires=None).key
    calls: list[tuple[Credentials, type[VeneerError], tuple[str | None, str]]] = [
        (Credentials(), Unauthenticated, (None, "default")),
        (Credentials("Bearer no"), Unauthenticated, (None, "default")),
        (Credentials(f"Bearer {low}"), PermissionDenied, ("low", "t1")),
        (Credentials(f"Bearer {low}", tenant="t2"), PermissionDenied, ("low", "t1")),
        (Credentials(f"Bearer {high}", tenant="a/b"), PermissionDenied, ("high", "t1")),
        (
            Credentials(f"Bearer {high}", tenant="t2", passed_on="t1"),
            PermissionDenied,
            ("high", "t2"),
        ),
    ]
    with gate_of(tmp_path, access=Access(IdentityFile(keys))) as (gate, lines):
        for credentials, kind, _ in calls:
            context = called()
            with pytest.raises(kind) as error:
                await gate.admit(context, credentials)
            await gate.refuse(context, error.value, method="DeleteAdapter")
    found = [(line.get("who"), line["tenant"]) for line in lines]
    assert sorted(map(str, found)) == sorted(str(known) for _, _, known in calls)


async def test_a_caller_that_may_is_known_to_what_answers_it(tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    key = add_key(keys, name="app", tenant="t1", roles=["inference"], expires=None).key
    with gate_of(tmp_path, access=Access(IdentityFile(keys))) as (gate, lines):
        context = called(GENERATE)
        with await gate.admit(context, Credentials(f"Bearer {key}")):
            gate.rename(context, "chosen")
        caller = context.caller
        assert (caller.tenant, caller.principal.name) == ("t1", "app")
        assert (caller.fairness.tenant, caller.request_id) == ("t1", "chosen")
        assert caller.sender.party == ("t1", "app", "")
    assert lines == []


async def test_a_malformed_age_is_refused_before_the_request_is_read(tmp_path: Path) -> None:
    with gate_of(tmp_path) as (gate, _), refused(InvalidField, field=MOST_LAG):
        await gate.admit(called(GENERATE, **{MOST_LAG: "soon"}), Credentials())


@pytest.mark.parametrize(
    ("raised", "left", "told", "noted"),
    [
        (None, False, None, "OK"),
        (AdapterNotFound("no"), False, AdapterNotFound, None),
        (AdapterNotFound("no"), True, AdapterNotFound, None),
        (RuntimeError("bug"), False, InternalError, None),
        (RuntimeError("gRPC's own"), True, asyncio.CancelledError, "CANCELLED"),
        (asyncio.CancelledError(), False, asyncio.CancelledError, "CANCELLED"),
    ],
)
async def test_how_a_call_ends_is_noted_once(
    tmp_path: Path,
    raised: BaseException | None,
    left: bool,
    told: type[BaseException] | None,
    noted: str | None,
) -> None:
    """A refusal is noted by `Gate.refuse`, not by the block that raises it."""
    ended: list[BaseException] = []
    with gate_of(tmp_path) as (gate, lines):
        context = called()
        try:
            with gate.answering(context, "call failed", left=lambda: left):
                if raised is not None:
                    raise raised
        except BaseException as error:
            ended.append(error)
    assert [type(error) for error in ended] == ([] if told is None else [told])
    assert [line["outcome"] for line in lines] == ([] if noted is None else [noted])


def test_nothing_else_is_ambient() -> None:
    """The log's two, and the sink of what a start tells. Others read neither."""
    root = Path(veneer_server.__file__).parent
    made, used = set(), set()
    for file in root.rglob("*.py"):
        text, name = file.read_text(), file.relative_to(root).as_posix()
        made |= {(name, var) for var in re.findall(r"^(\w+).* = ContextVar\(", text, re.M)}
        if re.search(r"from veneer_server\.logs import .*\b(REQUEST_ID|TENANT)\b", text):
            used.add(name)
    assert made == {("logs.py", "REQUEST_ID"), ("logs.py", "TENANT"), ("progress.py", "SINK")}
    assert used == {"serving/gate.py"}
