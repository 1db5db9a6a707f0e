"""Folders, images and categories may be called anything: nothing is pasted into an address, a filter or a path."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from job_runs import NAME
from seaweed import BUCKET, SeaweedFS

from acw.report import comparison
from acw.storage.addresses import local, shown
from acw.storage.errors import UserError
from acw.storage.files import fetch, is_model_uri, listing, plain_name, write_atomic
from acw.tracking import mlflow_store

NAMES = [NAME, "50%", "a_b", "a%b", "it's", '"', "`", "\\", "", "Grüße 日本", "x" * 5000]


def test_a_root_may_be_called_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its database is in it, and nothing beside it; runs are found by what they are called."""
    root = tmp_path / NAME / "runs%20"
    uri = mlflow_store.tracking_uri(root, None)
    client, experiment = mlflow_store.connect(uri)
    for name in NAMES:
        client.create_run(experiment, tags={"acw.folder": name})
    for name in NAMES:
        assert [
            run.data.tags["acw.folder"] for run in mlflow_store.runs_of(client, experiment, "acw.folder", name)
        ] == [name]
    (tmp_path / "file").write_text("content", encoding="utf-8")
    run = client.create_run(experiment).info
    client.log_artifact(run.run_id, str(tmp_path / "file"))
    assert (root / "mlflow.db").is_file()
    assert [path.read_text(encoding="utf-8") for path in (root / "mlartifacts").rglob("file")] == ["content"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([NAME, "file"])
    assert [path.name for path in (tmp_path / NAME).iterdir()] == ["runs%20"]
    assert mlflow_store.tracking_uri(tmp_path, uri) == uri, "as MLFLOW_TRACKING_URI or --tracking-uri"


def test_a_database_takes_no_options(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sqlite:///.*mlflow\.db\?timeout=30: takes no options; give sqlite:///FILE"):
        mlflow_store.tracking_uri(tmp_path, f"sqlite:///{tmp_path}/mlflow.db?timeout=30")


def test_a_runs_folder_has_a_plain_name() -> None:
    assert plain_name("CAT2000") == "CAT2000"
    assert plain_name("my images") == "my images"
    assert plain_name(NAME) == "Anna_s _5 inch_ images__50_2F _b_é"
    assert plain_name("../a\nb\udce9") == ".._a_b_"
    assert plain_name("e\N{COMBINING ACUTE ACCENT}") == "é"
    assert len(plain_name("é" * 127).encode()) <= 100


def test_an_object_in_s3_may_be_called_anything(
    server: SeaweedFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.used_by(monkeypatch, tmp_path / "node")
    root = f"s3://{BUCKET}/{NAME}/a+b=c&d :"  # SeaweedFS makes / of a backslash
    path = local(f"{root}/50%2F? #1.json")
    write_atomic(path, b"content")
    path.unlink()
    assert fetch(path).read_bytes() == b"content"
    assert listing(local(root)) == [path]
    assert shown(path) == f"{root}/50%2F? #1.json"
    with pytest.raises(UserError, match=r"xx: its name is too long for copies of it; give it one of at most 250 bytes"):
        write_atomic(local(f"{root}/{'x' * 253}"), b"content")


def test_a_report_links_to_runs_below_any_folder(tmp_path: Path) -> None:
    runs = tmp_path / "runs?"
    of = comparison.Comparison({}, tmp_path, {"a": runs / "#1 100%25"})
    [(_, link, _)] = comparison.runs(of)["links"]
    assert unquote(urlsplit(link).path) == "runs?/#1 100%25/report.html"


def test_a_name_may_be_as_long_as_disks_allow(tmp_path: Path) -> None:
    write_atomic(tmp_path / ("é" * 127), b"content")
    with pytest.raises(UserError, match=r"xx: cannot be written \(File name too long\); shorten its name"):
        write_atomic(tmp_path / ("x" * 256), b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["é" * 127]


def test_what_is_a_models_address() -> None:
    for uri in ("models:/acw@champion", "runs:/0123/model", "mlflow-artifacts:/x", "http://host/x"):
        assert is_model_uri(uri)
    for path in ("/data/a:/b", "runs/models:/x", "s3://bucket/x", Path("/data/at 10:/x"), "./a:/b"):
        assert not is_model_uri(path)
