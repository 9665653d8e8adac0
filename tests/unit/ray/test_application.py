"""What ``veneer-ray`` does to a cluster that others use: up, down, and an up that fails. Ray is
FAKE here; ``python -m tests.ray`` does the same with a real one."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from veneer_ray.settings import RayCluster
from veneer_registry.errors import FailedPrecondition, Unavailable

from tests.refused import refused

OURS = ("registry", "engines", "ingress")
TRACEBACK = """Replica scheduling failed. Error:
Traceback (most recent call last):
  File "ingress_server.py", line 1, in start
veneer_ray.ingress_server.PortTaken: port 8000 is taken: choose another with --http-port
"""


class Deployment:
    """FAKE: a deployment of Serve's."""

    def options(self, version: str = "", _internal: bool = False) -> Deployment:
        return self

    def bind(self, *_: Any) -> Deployment:
        return self


@dataclass
class Application:
    """FAKE: an application of Serve's, and its ingress."""

    deployments: tuple[str, ...]
    text: str = ""
    message: str = ""
    why: str = ""

    def __getattr__(self, name: str) -> Any:
        """A method of the ingress."""
        answers = {"settings": self.text, "not_ready": self.why, "machine": "10.0.0.1"}
        answer = SimpleNamespace(result=lambda timeout_s: answers[name])
        return SimpleNamespace(remote=lambda: answer)


@dataclass
class Cluster:
    """FAKE: Ray with Serve, where another team's application runs.

    Attributes:
        running: whether Serve runs.
        run: what deploying does to the new application; by default it starts.
        did: what was done to Serve as a whole.
    """

    applications: dict[str, Application] = field(default_factory=dict)
    running: bool = True
    run: Callable[[Application], None] = lambda made: None
    did: list[str] = field(default_factory=list)

    def deploy(self, target: Any, name: str, route_prefix: str | None) -> Application:
        assert route_prefix is None, "a route could be another team's"
        made = self.applications[name] = Application(OURS)
        self.run(made)
        return made

    def delete(self, name: str, _blocking: bool) -> None:
        del self.applications[name]

    def status(self) -> Any:
        found = {
            name: SimpleNamespace(
                message=each.message, deployments=dict.fromkeys(each.deployments, each)
            )
            for name, each in self.applications.items()
        }
        return SimpleNamespace(applications=found)

    def get_actor(self, name: str, namespace: str) -> None:
        if not self.running:
            raise ValueError(name)

    def modules(self) -> Iterator[ModuleType]:
        def module(name: str, **content: Any) -> ModuleType:
            made = ModuleType(name)
            vars(made).update(content)
            return made

        def kept(**_: Any) -> None:
            return None

        replica = SimpleNamespace(replica_id="", routing_stats={}, replica_metadata={})
        router = type("RequestRouter", (), {"update_replicas": 0, "choose_replicas": 0})
        serve = module(
            "ray.serve",
            Deployment=Deployment,
            deployment=lambda made, **_: Deployment(),
            run=self.deploy,
            delete=self.delete,
            status=self.status,
            start=lambda **_: self.did.append("started"),
            shutdown=lambda: self.did.append("shut down"),
            get_app_handle=self.applications.__getitem__,
        )
        util = module("ray.util", get_node_ip_address=lambda: "10.0.0.1")
        yield module(
            "ray", __version__="2.61.0", get_actor=self.get_actor, serve=serve, util=util
        )
        yield serve
        yield util
        configs = ("AutoscalingConfig", "AutoscalingPolicy", "RequestRouterConfig")
        yield module("ray.serve.config", **dict.fromkeys(configs, kept))
        yield module("ray.serve.handle", DeploymentHandle=object)
        yield module("ray.serve.request_router", RequestRouter=router, RunningReplica=replica)
        yield module("ray.exceptions", RayError=OSError)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    made = Cluster({"greets": Application(("Greets",))})
    for each in made.modules():
        monkeypatch.setitem(sys.modules, each.__name__, each)
    for name in ("ray_api", "deployments.engine", "deployments.ingress", "application"):
        monkeypatch.delitem(sys.modules, f"veneer_ray.{name}", raising=False)
        module = importlib.import_module(f"veneer_ray.{name}")
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return made


def ours() -> Any:
    return sys.modules["veneer_ray.application"]


def settings(path: Path) -> RayCluster:
    return RayCluster(path)


def test_down_removes_only_ours_and_leaves_serve(cluster: Cluster, tmp_path: Path) -> None:
    assert ours().deploy(settings(tmp_path), "veneer") == "10.0.0.1"
    assert set(cluster.applications) == {"greets", "veneer"}
    assert ours().remove("veneer")
    assert set(cluster.applications) == {"greets"}
    assert not ours().remove("veneer"), "there is nothing to remove"
    with refused(FailedPrecondition):
        ours().remove("greets")
    with refused(FailedPrecondition):
        ours().deploy(settings(tmp_path), "greets")
    assert set(cluster.applications) == {"greets"}
    assert cluster.did == []


def port_is_taken(made: Application) -> None:
    made.message = "The deployments ['ingress'] are UNHEALTHY.\n" + TRACEBACK
    raise RuntimeError("Deploying application veneer failed")


def nobody_listens(made: Application) -> None:
    made.why = "port 8000 does not answer"


@pytest.mark.parametrize("serve_ran", [True, False])
@pytest.mark.parametrize(
    ("run", "said"),
    [
        (port_is_taken, "choose another with --http-port"),
        (nobody_listens, "port 8000 does not"),
    ],
)
def test_an_up_that_fails_says_why_and_leaves_nothing(
    cluster: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    serve_ran: bool,
    run: Callable[[Application], None],
    said: str,
) -> None:
    monkeypatch.setattr(ours(), "_READY_S", 0.0)
    cluster.run, cluster.running = run, serve_ran
    if not serve_ran:
        cluster.applications.clear()
    before = set(cluster.applications)
    with refused(Unavailable) as caught:
        ours().deploy(settings(tmp_path), "veneer")
    assert said in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert set(cluster.applications) == before
    assert cluster.did == ([] if serve_ran else ["started", "shut down"])


def test_serve_stays_for_an_application_that_came_meanwhile(
    cluster: Cluster, tmp_path: Path
) -> None:
    def interrupted(made: Application) -> None:
        raise KeyboardInterrupt

    cluster.run, cluster.running = interrupted, False
    with pytest.raises(KeyboardInterrupt):
        ours().deploy(settings(tmp_path), "veneer")
    assert set(cluster.applications) == {"greets"}
    assert cluster.did == ["started"]


def test_a_deployment_with_other_data_is_not_replaced_and_a_failed_change_removes_none(
    cluster: Cluster, tmp_path: Path
) -> None:
    there = Application(OURS, text=settings(tmp_path).as_text())
    cluster.applications["veneer"] = there
    with refused(FailedPrecondition) as caught:
        ours().deploy(settings(tmp_path / "other"), "veneer")
    assert "--name" in str(caught.value)
    assert cluster.applications["veneer"] is there
    cluster.run = port_is_taken
    with refused(Unavailable):
        ours().deploy(settings(tmp_path), "veneer")
    assert set(cluster.applications) == {"greets", "veneer"}


def test_a_ray_that_lacks_what_is_needed_is_refused_before_anything_is_started(
    cluster: Cluster, tmp_path: Path
) -> None:
    api: Any = sys.modules["veneer_ray.ray_api"]
    api.check()
    del api.RunningReplica.replica_metadata
    api.Deployment.options = lambda self, version: self
    try:
        with refused(FailedPrecondition) as caught:
            ours().deploy(settings(tmp_path), "veneer")
    finally:
        api.Deployment.options = OPTIONS
    for part in ("Ray 2.61.0", "replica_metadata", "_internal", "ray[serve]==2.60."):
        assert part in str(caught.value)
    assert set(cluster.applications) == {"greets"}


OPTIONS = Deployment.options
