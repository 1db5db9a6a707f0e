"""S3 servers as institutes run them: behind a certificate authority of their own, or older than S3's checksums."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import certificates
import pytest
from seaweed import BUCKET, Proxy, SeaweedFS

from acw.cluster.joining import SHARED
from acw.pipeline.job import parse
from acw.storage import s3, s3_errors, s3_settings
from acw.storage.addresses import local
from acw.storage.errors import UserError
from acw.storage.files import fetch, write_atomic

NAMES = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", s3_errors.CALCULATION, s3_errors.VALIDATION)
ROOT = f"s3://{BUCKET}/here"
UNKNOWN = "is of an authority that this machine does not know .*; set AWS_CA_BUNDLE to the PEM file"
REFUSED = r"refuses an upload \({}\), .* set AWS_REQUEST_CHECKSUM_CALCULATION=when_required"


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    folder = tmp_path_factory.mktemp("secure")
    server = SeaweedFS(folder / "server", certificates.make(folder))
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        server.used_by(patch, folder / "cache")
        patch.setenv("AWS_CA_BUNDLE", str(folder / "authority.pem"))
        s3_settings.client().create_bucket(Bucket=BUCKET)
    yield server
    server.kill()


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setattr("boto3.DEFAULT_SESSION", None)
    s3_settings._client.cache_clear()
    yield
    s3_settings._client.cache_clear()


def use_all_clients(tmp_path: Path) -> None:
    """Ours and MLflow's each write a file there, and ours reads one back."""
    from mlflow.store.artifact.s3_artifact_repo import S3ArtifactRepository, _cached_get_s3_client

    from acw.tracking.mlflow_store import quiet_mlflow

    path = local(f"{ROOT}/a")
    write_atomic(path, b"content")
    path.unlink()
    assert fetch(path).read_bytes() == b"content"
    quiet_mlflow(f"sqlite:///{tmp_path / 'mlflow.db'}")
    _cached_get_s3_client.cache_clear()
    (tmp_path / "c").write_bytes(b"content")
    S3ArtifactRepository(ROOT).log_artifact(str(tmp_path / "c"))
    assert {entry.key for entry in s3.listing(ROOT)} == {"here/a", "here/c"}


@pytest.mark.parametrize("given", ["AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "ca_bundle"])
def test_an_authority_of_ones_own_holds_for_all_clients(
    given: str, secure: SeaweedFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secure.used_by(monkeypatch, tmp_path / "node")
    with pytest.raises(UserError, match=f"^{ROOT}: .*{UNKNOWN}"):
        parse(["demo", "--root", ROOT], "")
    for path, problem in ((tmp_path / "none", "No such file"), (tmp_path / "empty", "no certificate is in it")):
        (tmp_path / "empty").touch()
        _give(given, path, monkeypatch)
        with pytest.raises(UserError, match=rf"^{given}.* \({path}\): cannot be used on .*{problem}.*; name a PEM"):
            s3.reach(ROOT)
    assert secure.certificates
    _give(given, secure.certificates.authority, monkeypatch)
    use_all_clients(tmp_path)


def _give(name: str, value: Path | str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in NAMES:
        monkeypatch.setenv(name, str(value))
    else:
        Path(os.environ["AWS_CONFIG_FILE"]).write_text(f"[default]\n{name} = {value}\n", encoding="utf-8")
    s3_settings._client.cache_clear()


def test_an_endpoint_of_the_profile_holds_for_all_clients(
    server: SeaweedFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.used_by(monkeypatch, tmp_path / "node")
    for entry in s3.listing(ROOT):
        s3.delete(f"s3://{BUCKET}/{entry.key}")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    _give("endpoint_url", server.address, monkeypatch)
    use_all_clients(tmp_path)
    assert s3_settings.shown() == server.address.removeprefix("http://")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(UserError, match=f"^{ROOT}: AWS_PROFILE names a profile"):
        s3.reach(ROOT)


@pytest.mark.parametrize("code", ["NotImplemented", "XAmzContentSHA256Mismatch", "MissingContentLength"])
def test_a_server_older_than_checksums(
    code: str, server: SeaweedFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.used_by(monkeypatch, tmp_path / "node")
    for entry in s3.listing(ROOT):
        s3.delete(f"s3://{BUCKET}/{entry.key}")
    proxy = Proxy(server.address)
    proxy.refusal = code
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
    with pytest.raises(UserError, match=REFUSED.format(code)):
        parse(["demo", "--root", ROOT], "")
    monkeypatch.setenv(s3_errors.CALCULATION, "when_required")
    s3_settings._client.cache_clear()
    use_all_clients(tmp_path)
    proxy.close()


def test_workers_on_other_nodes_get_all_of_it() -> None:
    assert set(NAMES) <= set(SHARED)
