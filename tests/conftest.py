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

# No test may join a cluster, a tracking server or an account that the developer's shell happens to name.
for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "AWS_PROFILE"):
    os.environ.pop(name, None)
for name in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "AWS_ENDPOINT_URL_S3", "MLFLOW_S3_ENDPOINT_URL"):
    os.environ.pop(name, None)

os.environ |= {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on Linux this is what keeps Ray on the loopback interface
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TMPDIR": RAY_FOLDER,
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "AWS_EC2_METADATA_DISABLED": "true",
    "ACW_CACHE": CACHE_FOLDER,
    "MPLBACKEND": "Agg",
    "OMP_NUM_THREADS": "1",
}


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
