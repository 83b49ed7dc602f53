"""Whose telemetry it is (D17): what describes the agent only, and what a workload is called.

Excluded: reading cgroup paths (test_cgroup.py); what else the agent's variables do (test_metrics.py).
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from exporter.emit.instrumented import own_cgroup
from exporter.emit.resource import Resources
from exporter.enrich import Workloads, environ
from exporter.events import Workload
from tests.unit.samples import SSHD, WEB

CANARY = "s3cr3t-canary-4711"


def of(workload: Workload, **variables: str) -> dict[str, str | int]:
    return dict(Resources("h", "n1", "1.0", variables).of(workload).attributes)


def test_d17_the_agents_service_pod_and_process_keys_are_its_own() -> None:
    text = (
        "service.name=a,service.namespace=b,service.instance.id=c,k8s.pod.name=p,k8s.pod.uid=u,k8s.namespace.name=n,"
        "k8s.deployment.name=d,container.id=i,process.pid=1,deployment.environment.name=prod,k8s.cluster.name=blue"
    )
    resources = Resources("h", "n1", "1.0", {"OTEL_RESOURCE_ATTRIBUTES": text, "OTEL_SERVICE_NAME": "mine"})
    agent, workload = dict(resources.agent.attributes), dict(resources.of(SSHD).attributes)
    assert (agent["service.name"], agent["k8s.pod.uid"], agent["process.pid"]) == ("mine", "u", "1")
    assert workload["service.name"] == "ssh.service"
    assert not {"k8s.pod.uid", "k8s.pod.name", "k8s.namespace.name", "container.id", "process.pid"} & workload.keys()
    for both in (agent, workload):
        assert (both["deployment.environment.name"], both["k8s.cluster.name"]) == ("prod", "blue")


@pytest.mark.parametrize(
    ("pod", "service"),
    [
        ("web-7d4b9c6f5d-x2x8z", "web"),
        ("my-app-7d4b9c6f5-qrstv", "my-app"),
        ("node-agent-x2x8z", "node-agent"),
        ("backup-28391040-x2x8z", "backup"),
        ("db-0", "db-0"),
        ("kube-apiserver-master", "kube-apiserver-master"),
        ("static", "static"),
        ("web-hello", "web-hello"),
    ],
)
def test_d17_service_name_is_the_pods_name_without_what_changes_with_every_start(pod: str, service: str) -> None:
    found = of(WEB._replace(pod_name=pod))
    assert (found["service.name"], found["k8s.pod.name"]) == (service, pod)
    assert found["service.instance.id"] == f"shop.{pod}.nginx"


def test_d17_on_a_plain_host_it_is_the_container_or_the_unit() -> None:
    container = Workload(3, "/docker/x", "container", "db", "", "f" * 64, "docker", container_name="db")
    assert of(container)["service.name"] == "db"
    assert of(container)["service.instance.id"] == "n1.db"
    assert of(SSHD)["service.name"] == "ssh.service"
    nameless = of(container._replace(name="f" * 12, container_name=""))
    assert (nameless["service.name"], nameless["service.instance.id"]) == ("unknown_service", "f" * 64)


def test_d17_a_static_pods_uid_is_a_hash_and_not_told_as_one() -> None:
    static = WEB._replace(pod_uid="8a" * 16, pod_name="etcd-master")
    assert "k8s.pod.uid" not in of(static)
    assert of(static)["service.name"] == "etcd-master"
    assert of(WEB._replace(pod_uid="8f1e2d3c-0000-4000-8000-123456789abc"))["k8s.pod.uid"].startswith("8f1e")  # type: ignore[union-attr]


def test_d17_a_workloads_own_two_variables_win_for_it() -> None:
    given = environ.attributes(
        "checkout",
        "service.version=1.2,team=a%20b,deployment.environment.name=dev,k8s.pod.uid=forged,container.id=forged,"
        "host.name=forged,ebfw.role=forged,broken,=x,UPPER=1,empty=",
    )
    found = of(WEB._replace(given=given), OTEL_RESOURCE_ATTRIBUTES="deployment.environment.name=prod")
    assert (found["service.name"], found["service.version"], found["team"]) == ("checkout", "1.2", "a b")
    assert found["deployment.environment.name"] == "dev"
    assert "forged" not in found.values()
    assert (found["k8s.pod.uid"], found["container.id"]) == ("uid-1", "c" * 64)
    anonymous = Resources("h").of(Workload(3, "/p", "pod", "", "uid", "e" * 64, given=given))
    assert (dict(anonymous.identity)["service.name"], anonymous.workload_id) == ("checkout", "")


def test_d17_d8_of_an_environment_only_two_keys_are_read(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    secret = f"AWS_SECRET_ACCESS_KEY={CANARY}\0OTEL_EXPORTER_OTLP_HEADERS=a={CANARY}\0MY_OTEL_SERVICE_NAME={CANARY}"
    text = f"{secret}\0OTEL_SERVICE_NAME=shop\x1b[2J\0OTEL_RESOURCE_ATTRIBUTES=service.name=other,a=b\0{secret}"
    (tmp_path / "7" / "environ").write_bytes(text.encode())
    assert environ.read(7, str(tmp_path)) == (("a", "b"), ("service.name", "shop[2J"))
    assert environ.read(8, str(tmp_path)) == ()
    many = ",".join(f"k{n}={'v' * 9999}" for n in range(1000))
    found = environ.attributes("", many)
    assert len(found) == environ.MAX_PAIRS
    assert max(len(value) for _, value in found) == environ.MAX_LENGTH


def test_d17_what_a_process_says_makes_its_workload_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tree that stands for cgroup2, and a real process whose environment is read."""
    (tmp_path / "system.slice" / "shop.service").mkdir(parents=True)
    workloads = Workloads(tmp_path, watch=False)
    workloads.scan()
    (shop,) = [found for found in workloads.live() if found.unit == "shop.service"]
    monkeypatch.setattr(environ, "cgroup_path", lambda pid: "/system.slice/shop.service")
    for variables in ({"A": CANARY}, {"OTEL_SERVICE_NAME": "shop", "A": CANARY}, {"OTEL_SERVICE_NAME": "late"}):
        with subprocess.Popen(["sleep", "60"], env=os.environ | variables) as process:
            while not Path(f"/proc/{process.pid}/environ").read_bytes():
                time.sleep(0.001)  # exec() is not over yet
            workloads.look_at(process.pid)
            process.kill()
    found = workloads.lookup(shop.cgroup_id)
    assert found.given == (("service.name", "shop"),)
    assert of(found)["service.name"] == "shop"
    assert CANARY not in repr(found)
    assert workloads.poll() == [shop.cgroup_id]
    workloads.close()


def test_cgroup_path_of_a_process() -> None:
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    own = next(line for line in lines if line.startswith("0::"))
    assert environ.cgroup_path(os.getpid()) == own.removeprefix("0::").rstrip("/")
    assert environ.cgroup_path(0) == ""


def test_d12_a_cgroup_is_ours_only_if_nobody_else_is_in_it(tmp_path: Path) -> None:
    proc, folder = tmp_path / "proc", tmp_path / "root" / "system.slice" / "ebfw.service"
    proc.mkdir()
    folder.mkdir(parents=True)
    (proc / "cgroup").write_text("1:cpu:/x\n0::/system.slice/ebfw.service\n")
    (folder / "cgroup.procs").write_text("42\n")
    assert own_cgroup(tmp_path / "root", proc, 42) == folder.stat().st_ino
    (folder / "cgroup.procs").write_text("42\n43\n")
    assert own_cgroup(tmp_path / "root", proc, 42) == 0
    (proc / "cgroup").write_text("0::/\n")
    assert own_cgroup(tmp_path / "root", proc, 42) == 0
    assert own_cgroup(tmp_path / "nowhere", proc, 42) == 0
