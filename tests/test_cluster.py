"""The cluster on AWS as Ray's own launcher reads it, offline; and the local head of `make demo`, for real."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "cluster.yaml").read_text()


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load(TEXT))
    validate_config(config)
    return config


def test_workers_cost_nothing_unless_a_job_runs(cluster: dict[str, Any]) -> None:
    workers = {k: v for k, v in cluster["available_node_types"].items() if k != cluster["head_node_type"]}
    assert workers
    for worker in workers.values():
        assert worker["min_workers"] == 0
        assert 0 < worker["max_workers"] <= cluster["max_workers"] <= 8
        assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert 0 < cluster["idle_timeout_minutes"] <= 10
    assert cluster["provider"]["cache_stopped_nodes"] is False


def test_only_ssh_is_open_and_roles_are_not_full_rights(cluster: dict[str, Any]) -> None:
    assert "IpPermissions" not in cluster["provider"]["security_group"]
    assert "0.0.0.0" not in TEXT
    (start,) = (each for each in cluster["head_start_ray_commands"] if "ray start" in each)
    assert "--dashboard-host=127.0.0.1" in start
    profiles = set()
    for node in cluster["available_node_types"].values():
        assert node["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
        assert all(disk["Ebs"]["Encrypted"] for disk in node["node_config"]["BlockDeviceMappings"])
        profiles.add(node["node_config"]["IamInstanceProfile"]["Name"])
    # Without a profile Ray makes one with full rights over EC2 and S3; workers must not have the head's.
    assert len(profiles) == len(cluster["available_node_types"])


def test_machines_get_a_ray_that_the_project_supports_and_files_that_exist(cluster: dict[str, Any]) -> None:
    (pinned,) = re.findall(r"ray\[[^]]*\]==([\d.]+)", " ".join(cluster["setup_commands"]))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (ray,) = (r for r in map(Requirement, project["dependencies"]) if r.name == "ray")
    assert pinned in ray.specifier
    assert all((ROOT / local).exists() for local in cluster["file_mounts"].values())


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

needs_proc = pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="looks at processes through /proc")


def start(folder: Path, job: str) -> subprocess.Popen[str]:
    (folder / "job.py").write_text(job)
    command = [sys.executable, str(ROOT / "jobs" / "local_cluster.py"), "--", "python", "job.py"]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


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
