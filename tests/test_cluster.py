"""The clusters on AWS and Kubernetes, offline, by the descriptions of those who run them; and heads on this machine."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from rayjob_schema import RAYJOB

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "jobs"))
import local_cluster  # noqa: E402

needs_proc = pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="looks at processes through /proc")
TEXT = (ROOT / "cluster.yaml").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load(TEXT))
    validate_config(config)
    return config


def workers_of(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {k: v for k, v in cluster["available_node_types"].items() if k != cluster["head_node_type"]}


def test_workers_cost_nothing_unless_a_job_runs(cluster: dict[str, Any]) -> None:
    workers = workers_of(cluster)
    assert set(workers) == {"gpu", "gpu_on_demand"}
    for worker in workers.values():
        assert worker["min_workers"] == 0
        assert worker["max_workers"] <= cluster["max_workers"] <= 8
    spot = {"InstanceMarketOptions": {"MarketType": "spot"}}
    assert workers["gpu"]["node_config"] == workers["gpu_on_demand"]["node_config"] | spot
    assert workers["gpu_on_demand"]["max_workers"] == 0
    assert 0 < cluster["idle_timeout_minutes"] <= 10
    assert cluster["provider"]["cache_stopped_nodes"] is False


def test_the_autoscaler_starts_what_the_work_needs_and_on_demand_when_told_to(cluster: dict[str, Any]) -> None:
    from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer, get_nodes_for

    head = cluster["head_node_type"]
    types = copy.deepcopy(cluster["available_node_types"])
    for name, node in types.items():  # as `ray up` reads them off the machines' types
        node["resources"] = {"CPU": 0 if name == head else 4, "GPU": 0 if name == head else 1}

    def started(demand: list[dict[str, float]], existing: dict[str, int]) -> dict[str, int]:
        def score(*arguments: Any) -> Any:
            return _default_utilization_scorer(*arguments, node_availability_summary=None)

        return dict(get_nodes_for(types, existing, head, cluster["max_workers"], demand, score)[0])

    bank = {"CPU": 1.0, "GPU": 1.0}
    assert started([], {head: 1}) == {}
    assert started([bank] * 4, {head: 1}) == {"gpu": 4}
    assert started([{"CPU": 1.0, "GPU": 0.5}] * 4, {head: 1}) == {"gpu": 2}
    assert started([bank] * 40, {head: 1}) == {"gpu": 8}
    types["gpu_on_demand"]["max_workers"] = 8
    assert started([bank] * 3, {head: 1, "gpu": 2}) == {"gpu_on_demand": 3}


def test_ec2_takes_the_machines_as_they_are_described(cluster: dict[str, Any]) -> None:
    """Against the request's shape in AWS's own description of its API."""
    from botocore.session import Session
    from botocore.validate import ParamValidator

    shape = Session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for name, node in cluster["available_node_types"].items():
        request = node["node_config"] | {"MinCount": 1, "MaxCount": 1}
        report = ParamValidator().validate(request, shape)
        assert not report.has_errors(), f"{name}: {report.generate_report()}"


def test_only_ssh_is_open_and_roles_are_not_full_rights(cluster: dict[str, Any]) -> None:
    assert "IpPermissions" not in cluster["provider"]["security_group"]
    assert "0.0.0.0" not in TEXT
    (start,) = (each for each in cluster["head_start_ray_commands"] if "ray start" in each)
    assert "--dashboard-host=127.0.0.1" in start
    profiles = {}
    for name, node in cluster["available_node_types"].items():
        assert node["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
        assert all(disk["Ebs"]["Encrypted"] for disk in node["node_config"]["BlockDeviceMappings"])
        profiles[name] = node["node_config"]["IamInstanceProfile"]["Name"]
    # Without a profile Ray makes one with full rights over EC2 and S3; workers must not have the head's.
    assert profiles["gpu"] == profiles["gpu_on_demand"] != profiles["head"]


def test_every_node_wants_the_token_and_gets_it(cluster: dict[str, Any]) -> None:
    for where in ("head", "worker"):
        (start,) = (each for each in cluster[f"{where}_start_ray_commands"] if "ray start" in each)
        assert f"export AWS_REGION={cluster['provider']['region']} " in start
        assert re.search(r"export [^;]*RAY_AUTH_MODE=token[^;]*;.*ray start", start)
    assert cluster["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
    assert "chmod 600 ~/.ray/auth_token" in cluster["setup_commands"]


def by_action(policy: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """A policy's statements by each action that they allow."""
    found: dict[str, list[dict[str, Any]]] = {}
    for statement in policy["Statement"]:
        assert statement["Effect"] == "Allow"
        named = statement["Action"]
        for action in [named] if isinstance(named, str) else named:
            found.setdefault(action, []).append(statement)
    return found


def test_the_bucket_s_policy_allows_what_is_asked_of_s3_and_no_more() -> None:
    """What the code asks, by boto3's names, and MLflow and Ray for their files."""
    policy = json.loads((ROOT / "cluster" / "s3-policy.json").read_text(encoding="utf-8"))
    needs = {
        "list_objects_v2": {"s3:ListBucket"},
        "get_paginator": {"s3:ListBucket"},
        "head_object": {"s3:GetObject"},
        "download_file": {"s3:GetObject"},
        "put_object": {"s3:PutObject"},
        "upload_file": {"s3:PutObject", "s3:AbortMultipartUpload"},
        "delete_object": {"s3:DeleteObject"},
    }
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "acw").rglob("*.py"))
    asked = set(re.findall(r"client\(\)\.(\w+)\(", code))
    assert asked <= set(needs)
    assert set(by_action(policy)) == {action for name in asked for action in needs[name]}
    for statement in policy["Statement"]:
        assert re.fullmatch(r"arn:aws:s3:::CHANGE-ME-bucket(/\*)?", statement["Resource"])


def test_the_head_s_policy_starts_and_ends_its_own_workers_only(cluster: dict[str, Any]) -> None:
    policy = json.loads((ROOT / "cluster" / "head-policy.json").read_text(encoding="utf-8"))
    allowed, start, end = by_action(policy), "ec2:RunInstances", "ec2:TerminateInstances"
    assert set(allowed) == {start, end, "ec2:CreateTags", "ec2:Describe*", "ssm:GetParameters", "iam:PassRole"}
    tag = {"aws:ResourceTag/ray-cluster-name": cluster["cluster_name"]}
    assert [statement["Condition"] for statement in allowed[end]] == [{"StringEquals": tag}]
    (condition,) = (each["Condition"]["StringEquals"] for each in allowed[start] if "instance/*" in each["Resource"])
    assert condition["ec2:MetadataHttpTokens"] == "required"
    types = {worker["node_config"]["InstanceType"] for worker in workers_of(cluster).values()}
    assert types <= set(condition["ec2:InstanceType"])
    region = cluster["provider"]["region"]
    assert all(region in json.dumps(s) for s in policy["Statement"] if s["Action"] != "iam:PassRole")
    images = {node["node_config"]["ImageId"] for node in cluster["available_node_types"].values()}
    (parameters,) = (each["Resource"] for each in allowed["ssm:GetParameters"])
    assert {image.removeprefix("resolve:ssm:") for image in images} == {
        one.partition("parameter")[2] for one in parameters
    }


# --- Kubernetes ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kubernetes() -> dict[str, Any]:
    return {each["kind"]: each for each in yaml.safe_load_all((ROOT / "rayjob.yaml").read_text(encoding="utf-8"))}


def pods_of(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [job["spec"]["submitterPodTemplate"], *(group["template"] for group in groups)]


def test_the_rayjob_is_as_kuberay_defines_it(kubernetes: dict[str, Any]) -> None:
    from jsonschema import Draft202012Validator

    check = Draft202012Validator(RAYJOB)
    assert [error.message for error in check.iter_errors(kubernetes["RayJob"])] == []
    wrong = copy.deepcopy(kubernetes["RayJob"])
    wrong["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["minReplica"] = 0
    assert [error.message for error in check.iter_errors(wrong)], "a misspelt field is noticed"


def test_the_rayjob_comes_and_goes_with_its_work(kubernetes: dict[str, Any]) -> None:
    spec = kubernetes["RayJob"]["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert 0 < spec["ttlSecondsAfterFinished"] <= 600
    assert spec["activeDeadlineSeconds"]
    cluster = spec["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["idleTimeoutSeconds"] <= 600
    (workers,) = cluster["workerGroupSpecs"]
    assert (workers["replicas"], workers["minReplicas"], workers["maxReplicas"]) == (0, 0, 8)
    assert workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_no_pod_is_open_or_privileged(kubernetes: dict[str, Any]) -> None:
    job = kubernetes["RayJob"]
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    containers = [one for pod in pods_of(job) for one in pod["spec"]["containers"]]
    for container in [*containers, cluster["autoscalerOptions"]]:
        security = container["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert "privileged" not in security
        assert {"cpu", "memory"} <= set(container["resources"]["limits"])
        assert "env" not in container, "a place for keys, which a role makes unnecessary"
    policy = kubernetes["NetworkPolicy"]["spec"]
    assert policy["policyTypes"] == ["Ingress"]
    for pod in pods_of(job):
        assert policy["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()


# --- Versions -----------------------------------------------------------------------------------------------------


def test_every_machine_has_the_project_s_ray(cluster: dict[str, Any], kubernetes: dict[str, Any]) -> None:
    """One version in pyproject.toml's extra, and so here and on AWS; the image and KubeRay name the same."""
    import ray

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (pin,) = (r for r in map(Requirement, project["optional-dependencies"]["cluster"]) if r.name == "ray")
    (pinned,) = (each.version for each in pin.specifier if each.operator == "==")
    assert pinned == ray.__version__
    (supported,) = (r for r in map(Requirement, project["dependencies"]) if r.name == "ray")
    assert pinned in supported.specifier
    assert "2.51" not in supported.specifier, "it had no token authentication"
    assert any("acw[lite,cluster]" in each for each in cluster["setup_commands"])
    assert "ray==" not in TEXT
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert re.findall(r"^FROM rayproject/ray:([\d.]+)-py311$", dockerfile, re.M) == [pinned]
    assert kubernetes["RayJob"]["spec"]["rayClusterSpec"]["rayVersion"] == pinned
    images = {one["image"] for pod in pods_of(kubernetes["RayJob"]) for one in pod["spec"]["containers"]}
    assert {image.partition(":ray-")[2] for image in images} == {pinned}


def test_what_is_sent_to_machines_exists(cluster: dict[str, Any]) -> None:
    locals_ = [local for local in cluster["file_mounts"].values() if not local.startswith("~")]
    assert len(locals_) == 3
    assert all((ROOT / local).exists() for local in locals_)
    sent = re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.M)
    assert {"acw", "jobs", "pyproject.toml", "README.md"} <= set(sent)
    assert all((ROOT / local).exists() for local in sent)


# --- cluster.yaml's head, on this machine: its own command, less what only AWS has -----------------------------------


@contextlib.contextmanager
def its_head(cluster: dict[str, Any], home: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The job server's URL and the environment of who holds the token."""
    folder = Path(tempfile.mkdtemp(prefix="acw-head-", dir="/tmp"))
    port, objects, dashboard, agent, client = local_cluster.free_ports(5)
    (start,) = (each for each in cluster["head_start_ray_commands"] if "ray start" in each)
    for old, new in {
        "ulimit -n 65536;": "",
        "--port=6379": f"--port={port}",
        "--object-manager-port=8076": f"--object-manager-port={objects}",
        "--autoscaling-config=~/ray_bootstrap_config.yaml": f"--dashboard-port={dashboard} --block",
    }.items():
        assert old in start
        start = start.replace(old, new)
    start += f" --temp-dir={folder} --dashboard-agent-listen-port={agent} --ray-client-server-port={client}"
    token = home / ".ray" / "auth_token"
    token.parent.mkdir(parents=True)
    token.write_text(secrets.token_hex(32), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    environment |= {"HOME": str(home), "RAY_TMPDIR": str(folder)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    log = (folder / "head.log").open("wb")
    head = subprocess.Popen(["bash", "-c", start], env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and head.poll() is None:
            if status(f"http://127.0.0.1:{dashboard}/api/version", token.read_text(encoding="utf-8")) == 200:
                break
            time.sleep(0.5)
        else:
            pytest.fail((folder / "head.log").read_text(encoding="utf-8"))
        yield f"http://127.0.0.1:{dashboard}", environment | {"RAY_AUTH_MODE": "token"}
    finally:
        local_cluster.stop(head, folder)
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def status(url: str, token: str | None) -> int:
    """Of the answer; 0 for none."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@needs_proc
@pytest.mark.faults
def test_nobody_gets_in_without_the_token(cluster: dict[str, Any], tmp_path: Path) -> None:
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    with its_head(cluster, tmp_path / "home") as (url, insider):
        outsider = insider | {"HOME": str(stranger)}
        assert (
            status(f"{url}/api/jobs/", (tmp_path / "home" / ".ray" / "auth_token").read_text(encoding="utf-8")) == 200
        )
        for token in (None, "wrong"):
            assert status(f"{url}/api/jobs/", token) in (401, 403)

        marker = tmp_path / "it-ran"
        submit = [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "job",
            "submit",
            "--address",
            url,
            "--",
            "mkdir",
            str(marker),
        ]
        refused = subprocess.run(submit, env=outsider, capture_output=True, encoding="utf-8", timeout=120)
        assert refused.returncode != 0
        assert not marker.exists()
        accepted = subprocess.run(submit, env=insider, capture_output=True, encoding="utf-8", timeout=120)
        assert accepted.returncode == 0, accepted.stdout + accepted.stderr
        assert marker.is_dir()


# --- The local head. Its job reports from inside, since everything is gone afterwards. ------------------------------

REPORT = """
import os, pathlib, sys, ray
ray.init()
assert ray.get(ray.remote(lambda: 6 * 7).remote()) == 42
pid = os.getppid()
while os.getsid(pid) == os.getsid(0):
    pid = int(pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
session = os.getsid(pid)
inodes = set()
for process in pathlib.Path("/proc").glob("[0-9]*"):
    try:
        if os.getsid(int(process.name)) == session:
            inodes |= {os.readlink(fd) for fd in (process / "fd").iterdir()}
    except OSError:
        pass
listening = set()
for table in ("tcp", "tcp6"):
    for row in pathlib.Path("/proc/net", table).read_text().splitlines()[1:]:
        fields = row.split()
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
            listening.add(fields[1].rpartition(":")[0])
print("REPORT", session, os.environ["RAY_TMPDIR"], *sorted(listening), flush=True)
"""
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def start(folder: Path, job: str) -> subprocess.Popen[str]:
    (folder / "job.py").write_text(job, encoding="utf-8")
    command = [sys.executable, str(ROOT / "jobs" / "local_cluster.py"), "--", "python", "job.py"]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")


def assert_nothing_is_left(report: str) -> None:
    session, folder = report.split()[1:3]
    assert not Path(folder).exists()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            assert not ((process / "environ").read_bytes() and os.getsid(int(process.name)) == int(session))
        except OSError:
            continue


@needs_proc
def test_local_head_keeps_to_loopback_and_returns_the_jobs_status(tmp_path: Path) -> None:
    with start(tmp_path, REPORT + "sys.exit(3)") as process:
        output, _ = process.communicate()
    assert process.returncode == 3, output
    report = next(line for line in output.splitlines() if line.startswith("REPORT"))
    assert set(report.split()[3:]) <= LOOPBACK
    assert len(report.split()) > 3
    assert_nothing_is_left(report)


@needs_proc
@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_local_head_is_gone_after_a_signal_even_if_its_job_ignores_it(tmp_path: Path, number: signal.Signals) -> None:
    job = f"import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n{REPORT}\ntime.sleep(600)"
    with start(tmp_path, job) as process:
        assert process.stdout is not None
        report = next((line for line in process.stdout if line.startswith("REPORT")), "")
        process.send_signal(number)
        assert process.wait() == 128 + number
    assert_nothing_is_left(report)
