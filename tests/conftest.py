"""What every test needs before Ray, MLflow or torch is imported, and fixtures for more than one file."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from seaweed import BUCKET, KEY, SECRET, SeaweedFS

# Ray's Unix sockets lie below this folder, and their paths may not exceed 107 bytes: hence not below $TMPDIR.
RAY_FOLDER = tempfile.mkdtemp(prefix="acw-test-", dir="/tmp")
atexit.register(shutil.rmtree, RAY_FOLDER, ignore_errors=True)

# Copies of what is in S3.
CACHE_FOLDER = tempfile.mkdtemp(prefix="acw-test-cache-")
atexit.register(shutil.rmtree, CACHE_FOLDER, ignore_errors=True)

# No test may join a cluster, a tracking server or an account that the developer's shell happens to name, nor lean on
# what else it sets for them, for git or for a terminal.
AMBIENT = ("RAY_", "TUNE_", "MLFLOW_", "DATABRICKS_", "AWS_", "ACW_", "GIT_", "REQUESTS_CA_BUNDLE", "COLUMNS", "LINES")
for name in [name for name in os.environ if name.startswith(AMBIENT)]:
    del os.environ[name]
# Tests' own servers are asked directly, whatever proxy leads to the registries of packages.
for name in ("no_proxy", "NO_PROXY"):
    os.environ[name] = ",".join([*filter(None, [os.environ.get(name)]), "127.0.0.1", "localhost"])

os.environ |= {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on Linux this is what keeps Ray on the loopback interface
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TMPDIR": RAY_FOLDER,
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,  # the developer's own, with regions and endpoints
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,  # and keys
    "ACW_CACHE": CACHE_FOLDER,
    "MPLBACKEND": "Agg",
    "OMP_NUM_THREADS": "1",
}


# Whole pipelines: begun last, they would leave one of `make test`'s two processes without work.
LONG = ("test_reproduce.py", "test_jobs.py", "test_faults.py", "test_views.py", "test_security.py", "test_promote.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="session")
def gaze() -> Path:
    """The folder of real human fixations (pysaliency's HDF5 pair), which lies beside the repository where it exists."""
    folder = Path(__file__).parents[2] / "shared" / "gaze"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    return folder


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A Ray of two CPUs in this process, on the loopback interface, without a dashboard."""
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=200 * 2**20)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    """An S3 server with an empty bucket."""
    import boto3

    weed = SeaweedFS(tmp_path_factory.mktemp("weed") / "server")
    weed.start()
    client = boto3.client(
        "s3",
        endpoint_url=weed.address,
        region_name="us-east-1",
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
    )
    client.create_bucket(Bucket=BUCKET)
    yield weed
    weed.kill()
