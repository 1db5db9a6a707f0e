"""What surrounds a job: Ray's and MLflow's variables, home and temporary folders, servers and databases of others."""

from __future__ import annotations

import http.server
import json
import os
import pwd
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import acw
from acw.cluster import joining
from acw.storage import addresses, files
from acw.storage.errors import UserError
from acw.tracking import mlflow_store

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "jobs"))
import local_cluster  # noqa: E402


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Connecting leaves traces in the process's environment, and MLflow in itself."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    if "mlflow" in sys.modules:
        import mlflow

        mlflow.set_tracking_uri(None)
        mlflow.set_registry_uri(None)
        os.environ.clear()
        os.environ.update(before)


# --- Ray ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, "", " ", "local", " local "])
def test_without_an_address_ray_is_our_own(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    if value is not None:
        monkeypatch.setenv("RAY_ADDRESS", value)
    assert not joining.on_cluster()
    assert joining.address() == "local"


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("http://127.0.0.1:8265", r"http://127.0.0.1:8265: a job cannot join .*ray job submit --address http"),
        ("https://me:secret@head", "https://head: a job cannot join"),
        ("ray://127.0.0.1:1", "ray://127.0.0.1:1: a job cannot join"),
        ("localhost", "localhost: is no address of a Ray cluster; give HOST:PORT"),
        ("head of the cluster:6379", "is no address"),
        ("127.0.0.1:99999", "is no address"),
        (":6379", "is no address"),
        (" 127.0.0.1:9 ", r"127.0.0.1:9: no Ray answers.*refused"),
        ("nosuch.invalid:6379", "nosuch.invalid:6379: no Ray answers"),
        ("a..b:6379", "a..b:6379: no Ray answers"),
    ],
)
def test_an_address_that_is_none_is_told_within_seconds(monkeypatch: pytest.MonkeyPatch, value: str, line: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", value)
    start = time.monotonic()
    with pytest.raises(UserError, match=line) as caught:
        joining.address()
    assert time.monotonic() - start < 20
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_what_is_no_ray_and_a_dead_head_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import ray

    def none_found(*_: object, **__: object) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    with Servant({}) as port:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        with pytest.raises(UserError, match=r"no Ray answers.*something else listens there"):
            joining.address()
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", none_found)  # which may find other tests' Rays on this machine
    with pytest.raises(UserError, match="auto: no Ray runs on this machine"):
        joining.connect()
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:9", encoding="utf-8")
    with pytest.raises(UserError, match="auto: no Ray answers at"):
        joining.address()


OWN = """
import os, pathlib
from acw.cluster.joining import connect
connect()
import ray
assert ray.get(ray.remote(lambda: 6 * 7).remote()) == 42
session = ray._private.worker._global_node.get_session_dir_path().encode()
inodes = set()
for process in pathlib.Path("/proc").glob("[0-9]*"):
    try:
        if session in (process / "cmdline").read_bytes():
            inodes |= {os.readlink(fd) for fd in (process / "fd").iterdir()}
    except OSError:
        pass
listening = set()
for table in ("tcp", "tcp6"):
    for row in pathlib.Path("/proc/net", table).read_text(encoding="utf-8").splitlines()[1:]:
        fields = row.split()
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
            listening.add(fields[1].rpartition(":")[0])
print("REPORT", *sorted(listening))
"""
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="looks at processes through /proc")
def test_a_ray_of_our_own_keeps_to_itself(tmp_path: Path) -> None:
    """With an empty RAY_ADDRESS, a stale file of a dead head, a long temporary folder, a home that nobody may write."""
    folder = tmp_path / ("long" * 30)
    (folder / "ray").mkdir(parents=True)
    (folder / "ray" / "ray_current_cluster").write_text("127.0.0.1:9", encoding="utf-8")
    removed = ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
    environment = {name: value for name, value in os.environ.items() if name not in removed}
    environment |= {"RAY_ADDRESS": "", "RAY_TMPDIR": str(folder), "HOME": "/proc/nobody", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", OWN], env=environment, cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=120
    )
    assert done.returncode == 0, done.stderr
    report = done.stdout.split()
    assert report[0] == "REPORT"
    assert len(report) > 1
    assert set(report[1:]) <= LOOPBACK
    assert list(folder.glob("ray/session_*")), "its files are where they were asked to be"
    assert not [link for link in Path("/tmp").glob("acw-ray-*/ray") if link.resolve() == (folder / "ray").resolve()]


def test_a_temporary_folder_that_cannot_be_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/proc/nowhere")
    with pytest.raises(UserError, match="RAY_TMPDIR /proc/nowhere: Ray cannot keep its files there"):
        joining._temporary_folder()


# --- No home ------------------------------------------------------------------------------------------------------


def test_only_s3_needs_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(_: int) -> None:
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for name in ("HOME", "ACW_CACHE"):
        monkeypatch.delenv(name, raising=False)
    assert addresses.shown("/data/runs") == "/data/runs"
    with pytest.raises(UserError, match="set ACW_CACHE"):
        addresses.local("s3://bucket/key")
    with pytest.raises(UserError, match="~/data: there is no such home directory"):
        addresses.expanded("~/data")
    files.give_home()
    assert Path.home() == Path("/nonexistent"), "MLflow asks for it when it is imported"
    monkeypatch.setenv("ACW_CACHE", "/cache")
    assert addresses.local("s3://bucket/key") == Path("/cache/acw-s3-mirror/bucket/key")


# --- MLflow's variables -------------------------------------------------------------------------------------------


def test_the_store_is_the_option_s_or_the_environment_s(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = f"sqlite:///{tmp_path}/mlflow.db"
    assert mlflow_store.tracking_uri(tmp_path, None) == own
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000/")
    assert mlflow_store.tracking_uri(tmp_path, None) == "http://server:5000"
    assert mlflow_store.tracking_uri(tmp_path, own) == own
    for nowhere in ("databricks", "mlruns", "http://", "http://[", "postgresql://server/db"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", nowhere)
        with pytest.raises(UserError, match=r"MLFLOW_TRACKING_URI .*: is no store of acw's"):
            mlflow_store.tracking_uri(tmp_path, None)


def test_a_registry_elsewhere_is_refused_by_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "http://127.0.0.1:9")
    for ask in (lambda: mlflow_store.ready(tmp_path, None), lambda: acw.load("models:/acw@champion")):
        with pytest.raises(UserError, match=r"MLFLOW_REGISTRY_URI http://127.0.0.1:9: .*unset it"):
            ask()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", f"sqlite:///{tmp_path}/mlflow.db")
    assert mlflow_store.tracking_uri(tmp_path, None) == f"sqlite:///{tmp_path}/mlflow.db"


def test_strays_in_the_environment_divert_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in mlflow_store.STRAY:
        monkeypatch.setenv(name, "m-0123456789")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/theirs.db")
    uri = mlflow_store.ready(tmp_path / "runs", None)
    assert uri == f"sqlite:///{tmp_path}/theirs.db"
    assert f"MLflow: {uri} (MLFLOW_TRACKING_URI)" in capsys.readouterr().out
    import mlflow

    client, experiment = mlflow_store.connect(uri)
    with mlflow.start_run(experiment_id=experiment) as run:
        mlflow.log_metric("ig", 1.0)
    assert client.get_run(run.info.run_id).data.metrics == {"ig": 1.0}
    # Nothing of an earlier store is left to the next command.
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    mlflow_store.quiet_mlflow(uri)
    assert "MLFLOW_TRACKING_URI" not in os.environ
    assert mlflow_store.tracking_uri(tmp_path, None) == f"sqlite:///{tmp_path}/mlflow.db"


# --- Stores of others ---------------------------------------------------------------------------------------------


def test_databases_that_are_none_are_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_store, "ANSWER_SECONDS", 0.5)
    (tmp_path / "folder.db").mkdir()
    (tmp_path / "page.db").write_text("<html>no database, whatever its name</html>", encoding="utf-8")
    held = sqlite3.connect(tmp_path / "held.db", isolation_level=None)
    held.execute("BEGIN EXCLUSIVE")
    for name, line in (
        ("folder", "is a folder"),
        ("page", "file is not a database"),
        ("held", "locked: wait for it or end it"),
    ):
        uri = f"sqlite:///{tmp_path}/{name}.db"
        start = time.monotonic()
        with pytest.raises(UserError, match=line):
            mlflow_store.ready(tmp_path, uri)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(UserError, match=line):
            acw.load("models:/acw@champion")
        assert time.monotonic() - start < 30
    held.close()


def test_databases_of_another_mlflow_are_told(tmp_path: Path) -> None:
    import mlflow.store.db_migrations

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    mlflow_store.ready(tmp_path, uri)
    versions = Path(next(iter(mlflow.store.db_migrations.__path__))) / "versions"
    old = min(versions.glob("*_*.py")).name.partition("_")[0]
    for number, (revision, line) in enumerate((("f" * 12, "a newer MLflow's"), (old, "an older MLflow's.*db upgrade"))):
        copy = tmp_path / f"{number}.db"
        shutil.copyfile(tmp_path / "mlflow.db", copy)
        with sqlite3.connect(copy) as database:
            database.execute("UPDATE alembic_version SET version_num = ?", (revision,))
        database.close()
        with pytest.raises(UserError, match=line):
            mlflow_store.ready(tmp_path, f"sqlite:///{copy}")


class Servant:
    """An HTTP server on 127.0.0.1 that gives the same (status, text) to a path each time, 404 to others; its port."""

    def __init__(self, answers: dict[str, tuple[int, str]], otherwise: tuple[int, str] = (404, "Not Found")) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, text = answers.get(self.path.partition("?")[0], otherwise)
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            do_POST = do_GET

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self) -> int:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self._server.server_port

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


EXPERIMENT = {"experiment": {"experiment_id": "1", "name": "acw", "lifecycle_stage": "active"}}
OLD = {"/health": (200, "OK"), "/api/2.0/mlflow/experiments/get-by-name": (200, json.dumps(EXPERIMENT))}


@pytest.mark.parametrize(
    ("answers", "otherwise", "line"),
    [
        (OLD, (404, "Not Found"), "no logged models, as servers before MLflow 3.0"),
        ({}, (401, "who are you?"), "asks for an account .*MLFLOW_TRACKING_USERNAME"),
        ({}, (403, "not you"), "asks for an account"),
        ({}, (503, "later"), "no MLflow server answers here .status 503."),
        ({}, (200, "<html>log in</html>"), "does not answer as an MLflow server does"),
        ({}, (200, "{}"), "does not answer as an MLflow server does"),
        ({}, (404, "Not Found"), "does not answer as an MLflow server does"),
    ],
)
def test_servers_that_will_not_do_are_told_before_any_work(
    tmp_path: Path, answers: dict[str, tuple[int, str]], otherwise: tuple[int, str], line: str
) -> None:
    with Servant(answers, otherwise) as port, pytest.raises(UserError, match=line) as caught:
        mlflow_store.ready(tmp_path, f"http://127.0.0.1:{port}")
    assert "\n" not in str(caught.value)


# --- What is sent with a job --------------------------------------------------------------------------------------


def test_data_and_weights_in_the_checkout_are_not_sent_with_a_job(tmp_path: Path) -> None:
    """By Ray's own packing; what it packs is enough for a job."""
    from ray._private.runtime_env import packaging

    checkout = tmp_path / "checkout"
    for name in ("acw", "jobs", "tune_spaces"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".rayignore", ".gitignore", "README.md", "pyproject.toml"):
        shutil.copyfile(ROOT / name, checkout / name)
    for name in (
        "deepgaze2e.pth",
        "CAT2000/trainSet/Stimuli/Action/001.jpg",
        "my data/film.dat",
        "x/y",
        "acw/weights.pth",
        "core",
    ):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        with (checkout / name).open("wb") as file:
            file.truncate(101 * 2**20)
    local_cluster.refuse_what_is_too_large(checkout)
    package = tmp_path / "package.zip"
    packaging.create_package(str(checkout), package, include_gitignore=True)
    assert package.stat().st_size < 10e6
    with zipfile.ZipFile(package) as packed:
        packed.extractall(tmp_path / "job")
    done = subprocess.run(
        [sys.executable, "jobs/pipeline.py", "gaze", "--help"],
        cwd=tmp_path / "job",
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    for name in ("acw/report/page.css", "acw/report/templates/run.html", "tune_spaces/sigma_lr.py"):
        assert (tmp_path / "job" / name).exists()


def test_a_folder_too_large_to_send_names_its_files() -> None:
    with tempfile.TemporaryDirectory() as folder:
        with (Path(folder) / "film.dat").open("wb") as file:
            file.truncate(101 * 2**20)
        with pytest.raises(SystemExit, match=re.escape("film.dat (106 MB)")):
            local_cluster.refuse_what_is_too_large(Path(folder))
