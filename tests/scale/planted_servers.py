"""Bugs planted in real servers, and the faults with which each must be noticed.

A `Bug` is put into every server of a cluster: `program` writes a command that is run in place
of ``veneer-server``, and that patches the product before it starts it.
"""

from __future__ import annotations

import sqlite3
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.scale.nemesis import Step

_ROOT: Final = Path(__file__).resolve().parents[2]
_FORGETS_S: Final = 3.0


def _answers_at_once() -> None:
    from veneer_server.replication.replicas import Reached
    from veneer_server.roles import OwnerRole

    async def reached(*_: object) -> Reached:
        return Reached(4, 4, True)

    OwnerRole._reached = reached  # type: ignore[method-assign]


def _counts_own_alone() -> None:
    from veneer_registry.shared.peers import Others, RegistryPeers

    RegistryPeers.others = lambda *_: Others(0, 0)  # type: ignore[method-assign]


def _serves_any_age() -> None:
    from veneer_registry.freshness import CopyAge

    CopyAge.check = lambda *_: None  # type: ignore[method-assign]


def _registry_is_always_current() -> None:
    from veneer_server.replication.feed import Feed

    Feed.lag_s = property(lambda _: 0.0)  # type: ignore[assignment]


def _waits_for_no_catalog() -> None:
    from veneer_server.roles import OwnerRole

    async def caught_up(*_: object) -> None:
        pass

    OwnerRole._caught_up = caught_up  # type: ignore[method-assign]


def _keeps_deleted_names() -> None:
    from veneer_registry.registry_copy import Changed, RegistryCopy

    apply = RegistryCopy.apply

    def kept(self: RegistryCopy, states: Mapping[str, Any], place: Mapping[str, Any]) -> Any:
        left = {name: state for name, state in states.items() if state.entry is not None}
        gone = {name: Changed(None, ()) for name in states.keys() - left.keys()}
        return {**gone, **apply(self, left, place)}

    RegistryCopy.apply = kept  # type: ignore[method-assign]


def _forgets_when_killed() -> None:
    """The names on a follower's disk are those of some seconds ago when it is started again."""
    from veneer_server.follower.follower import Follower

    restore = Follower._restore

    def restored(self: Follower) -> None:
        files = list((self._folder / "names").glob("*/*.sqlite"))
        for file in files:
            old = file.with_suffix(".old")
            if old.exists():
                for stale in file.parent.glob(f"{file.name}-*"):
                    stale.unlink()
                old.replace(file)
        restore(self)
        threading.Thread(
            target=_copy_later, args=(self._folder / "names",), daemon=True
        ).start()

    Follower._restore = restored  # type: ignore[method-assign]


def _copy_later(names: Path) -> None:
    pause = threading.Event()
    while not pause.wait(_FORGETS_S):
        for file in names.glob("*/*.sqlite"):
            with (
                sqlite3.connect(file) as there,
                sqlite3.connect(file.with_suffix(".copying")) as copy,
            ):
                there.backup(copy)
            copy.close()
            there.close()
            file.with_suffix(".copying").replace(file.with_suffix(".old"))


def _shows_the_digest_before() -> None:
    from veneer_server.rpc.adapter_service import AdapterView

    adapter = AdapterView.adapter
    before: dict[str, list[str]] = {}

    def shown(self: AdapterView, record: Any) -> Any:
        message = adapter(self, record)
        seen = before.setdefault(message.name, [message.weights_digest])
        if seen[-1] != message.weights_digest:
            seen.append(message.weights_digest)
            message.weights_digest = seen[-2]
        return message

    AdapterView.adapter = shown  # type: ignore[method-assign]


def _answers_as_before() -> None:
    """A name's first answer is given for its later revisions, too."""
    from veneer_server.rpc.inference_service import InferenceService

    generate = InferenceService.Generate
    first: dict[str, str] = {}

    async def kept(self: InferenceService, request: Any, context: Any) -> Any:
        response = await generate(self, request, context)
        response.text = first.setdefault(request.adapter, response.text)
        return response

    InferenceService.Generate = kept  # type: ignore[method-assign]


def _has_local_weights_alone() -> None:
    from veneer_registry.registry_copy import RegistryCopy
    from veneer_registry.replicating import Replicating

    present = Replicating.present

    async def here(self: Any, ref: Any) -> bool:
        return await present(self, ref) if isinstance(self, RegistryCopy) else False

    Replicating.present = here  # type: ignore[method-assign]


def _has_local_tenants_alone() -> None:
    from veneer_server.serving.tenants import Tenants

    async def nothing(*_: object) -> None:
        pass

    Tenants._look_elsewhere = nothing  # type: ignore[method-assign]
    Tenants.elsewhere = nothing  # type: ignore[assignment,method-assign]


def _holds_the_lock_for_ever() -> None:
    from veneer_registry.shared.catalog import PostgresCatalog

    PostgresCatalog._may_idle = lambda *_: None  # type: ignore[method-assign]


def _acknowledges_before_the_commit() -> None:
    from veneer_registry.shared import mirror

    mirror.touched = lambda *_: {}


@dataclass(frozen=True, slots=True)
class Bug:
    """Attributes:
    plant: patches the product in this process.
    steps: faults that bring it out; none if only row 25 of the torture rows looks for it.
    rule: the rule that must notice it; another may, too.
    """

    plant: Callable[[], None]
    steps: tuple[Step, ...] = ()
    rule: str = ""


_CALM: Final = (Step(8, "moved", "1", 1),)
_KILLED: Final = tuple(Step(5, "kill -9 while partitioned", e, 4) for e in ("1", "2", "3"))

BUGS: Final[Mapping[str, Bug]] = {
    "answered before the followers have it": Bug(
        _answers_at_once,
        (Step(2, "link late", "1", 1.2), Step(1, "link late", "2", 1.2)),
        "older",
    ),
    "followers of other registries are not counted": Bug(
        _counts_own_alone,
        tuple(Step(2, "link to PostgreSQL late", r, 8) for r in "abab"),
        "older",
    ),
    "a view of any age answers strict callers": Bug(
        _serves_any_age, (Step(2, "partition from the registry", "1", 8, 1),), "strict"
    ),
    "a registry that is cut off believes itself current": Bug(
        _registry_is_always_current,
        (Step(2, "partition from PostgreSQL", "b", 8, 1),),
        "strict",
    ),
    "a registry that lags takes an engine that knows more": Bug(
        _waits_for_no_catalog,
        (
            Step(2, "moved to a registry that lags", "1", 6),
            Step(8, "moved to a registry that lags", "2", 6),
        ),
        "backwards",
    ),
    "deleted names stay": Bug(_keeps_deleted_names, _CALM, "resurrected"),
    "what was acknowledged is not on the disk": Bug(_forgets_when_killed, _KILLED, "older"),
    "the digest of the revision before": Bug(_shows_the_digest_before, _CALM, "digest"),
    "the answer of the revision before": Bug(_answers_as_before, _CALM, "digest"),
    "weights are looked for on the registry's own disk": Bug(_has_local_weights_alone),
    "tenants are looked for in the registry's own folder": Bug(_has_local_tenants_alone),
    "a paused registry keeps the lock": Bug(
        _holds_the_lock_for_ever, (Step(3, "SIGSTOP in a transaction", "a", 40),), "blocked"
    ),
    "acknowledged before the database has it": Bug(
        _acknowledges_before_the_commit, _CALM, "lost"
    ),
}
"""By what is wrong."""


def program(bug: str, folder: Path) -> Path:
    """Write a command that runs ``veneer-server`` with a bug of `BUGS`; return its path."""
    command = folder / "planted-veneer-server"
    command.write_text(
        f"#!{sys.executable}\n"
        "import sys\n"
        f"sys.path.insert(0, {str(_ROOT)!r})\n"
        "from tests.scale.planted_servers import front\n"
        f"front({bug!r})\n"
    )
    command.chmod(0o755)
    return command


def front(bug: str) -> None:
    """Run a server with the bug."""
    from veneer_server.__main__ import main

    BUGS[bug].plant()
    main()
