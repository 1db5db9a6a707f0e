"""S3 by a real server: files there and back, checked, downloaded once a node; and every way in which it can fail."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from job_runs import RECIPE, assert_same_heads, called, command, displays, finished, run, succeed
from seaweed import BUCKET, KEY, SECRET, Proxy, SeaweedFS, node
from three_nodes import running
from tiny_training import BACKBONE, StubNetwork, make_store, stimuli

import acw
from acw.data import load_dataset
from acw.data.remote import reads
from acw.features.batch_size import Pace
from acw.features.extraction import write_shards
from acw.features.store import shard_path, untouched, verify
from acw.features.weights import read_weights
from acw.pipeline.job import parse
from acw.storage import addresses, s3, s3_settings
from acw.storage.addresses import local, shown
from acw.storage.errors import Damaged, UserError
from acw.storage.files import fetch, listing, present, remove, write_atomic, write_json
from acw.tracking import sqlite_in_s3


@pytest.fixture
def root(server: SeaweedFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """An address of its own for each test, with the environment to reach it and an empty cache."""
    server.used_by(monkeypatch, tmp_path / "node")
    return f"s3://{BUCKET}/{hashlib.sha256(request.node.name.encode()).hexdigest()[:12]}"


def overwrite(uri: str, content: bytes) -> None:
    """Other bytes with the checksum that was noted for the old ones."""
    bucket, key = addresses.parts(uri)
    noted = s3_settings.client().head_object(Bucket=bucket, Key=key)["Metadata"]
    s3_settings.client().put_object(Bucket=bucket, Key=key, Body=content, Metadata=noted)


# --- Files there and back ----------------------------------------------------------------------------------------


def test_what_one_node_writes_others_read(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = np.random.default_rng(0).bytes(20_000_000)  # goes in parts
    written = local(f"{root}/run/large")
    write_atomic(written, large)
    write_json(local(f"{root}/run/a.json"), {"a": 1})
    assert shown(f"see {written}") == f"see {root}/run/large"
    node(monkeypatch, tmp_path / "other")
    read = local(f"{root}/run/large")
    assert read != written
    assert not read.exists()
    assert present(read)
    assert fetch(read).read_bytes() == large
    write_json(local(f"{root}/run/a.json"), {"a": 2})
    node(monkeypatch, tmp_path / "node")
    paths = listing(local(f"{root}/run"))
    assert [shown(path) for path in paths] == [f"{root}/run/a.json", f"{root}/run/large"]
    assert json.loads(fetch(paths[0]).read_text(encoding="utf-8")) == {"a": 2}, "the newest version is read"
    paths[1].write_bytes(b"cut short")
    assert fetch(paths[1], immutable=True).read_bytes() == large, "a copy that is not whole is none"
    remove(read)
    remove(written)
    assert not present(written)
    assert not fetch(written).exists()


def test_an_address_cannot_lead_out_of_the_cache() -> None:
    for address in ("s3://", "s3:///key", f"s3://{BUCKET}/../up", f"s3://{BUCKET}/a//b"):
        with pytest.raises(UserError, match="is no S3 address"):
            local(address)


def test_a_damaged_object_is_noticed(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = local(f"{root}/file")
    write_atomic(path, b"as it was written")
    overwrite(f"{root}/file", b"as it was wrecked")
    node(monkeypatch, tmp_path / "other")
    with pytest.raises(Damaged, match=rf"^{root}/file: the object is damaged"):
        fetch(local(f"{root}/file"))
    assert not list(tmp_path.rglob("*.partial"))


def test_damaged_features_are_computed_again(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = local(f"{root}/features/stub")
    store = make_store(folder)
    there = store.load([0, 16])
    assert all(untouched(folder, shard) for shard in range(3))
    overwrite(f"{root}/features/stub/shard-00001.safetensors", b"wrecked")
    torch.testing.assert_close(store.load([16]).taps, [tap[1:] for tap in there.taps])  # from this node's copy
    assert not verify(folder, 1)
    node(monkeypatch, tmp_path / "other")
    folder = local(f"{root}/features/stub")
    elsewhere = dataclasses.replace(store, folder=folder)
    with pytest.raises(UserError, match=r"unreadable features .*damaged.*extract"):
        elsewhere.load([16])
    doubtful = [shard for shard in range(3) if not untouched(folder, shard)]
    assert doubtful == [1], "without one being downloaded"
    assert not shard_path(folder, 0).exists()
    write_shards(StubNetwork(), BACKBONE, stimuli(), doubtful, folder, Pace(torch.device("cpu")))  # type: ignore[arg-type]
    assert verify(folder, 1)
    torch.testing.assert_close(elsewhere.load([0, 16]).taps, there.taps)


def test_weights_come_from_s3(root: str) -> None:
    from safetensors.torch import save_file

    write_atomic(local(f"{root}/w.safetensors"), lambda path: save_file({"a": torch.arange(3)}, path))
    assert read_weights(f"{root}/w.safetensors")["a"].tolist() == [0, 1, 2]
    with pytest.raises(UserError, match=rf"^{root}/other.pth: no such file of weights"):
        read_weights(f"{root}/other.pth")


def test_two_processes_download_once(root: str, server: SeaweedFS, tmp_path: Path, monkeypatch: Any) -> None:
    content = os.urandom(5_000_000)
    write_atomic(local(f"{root}/shard"), content)
    node(monkeypatch, tmp_path / "other")
    proxy = Proxy(server.address)
    proxy.delay = 0.01  # so that the second one comes before the first has finished
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
    script = "import sys; from acw.storage.addresses import local; from acw.storage.checksums import sha256_file; "
    script += "from acw.storage.files import fetch; print(sha256_file(fetch(local(sys.argv[1]), immutable=True)))"
    started = [
        subprocess.Popen([sys.executable, "-c", script, f"{root}/shard"], stdout=subprocess.PIPE, encoding="utf-8")
        for _ in range(2)
    ]
    answers = [process.communicate()[0].strip() for process in started]
    assert answers == [hashlib.sha256(content).hexdigest()] * 2
    assert proxy.sent.count(b"GET /") == 1
    proxy.close()


def test_what_was_used_least_lately_goes_when_space_is_short(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACW_CACHE_GB", "0.0035")
    shards = [shard_path(local(f"{root}/features/stub"), number) for number in range(4)]
    for path in shards[:3]:
        write_atomic(path, os.urandom(1_000_000))
    write_atomic(local(f"{root}/run/model.pth"), bytes(1000))
    for age, name in enumerate(("features/stub/shard-00000", "features/stub/shard-00001", "features/stub/shard-00002")):
        note = next((tmp_path / "node").rglob(f"{name}.safetensors.json"))
        os.utime(note, (time.time() - 1000 + age,) * 2)
    note = next((tmp_path / "node").rglob("model.pth.json"))
    os.utime(note, (0, 0))
    fetch(shards[0], immutable=True)  # now the second is the one that was used least lately
    with shards[1].open("rb") as file:
        write_atomic(shards[3], os.urandom(1_000_000))
        assert [path.exists() for path in shards] == [True, False, True, True]
        assert len(file.read()) == 1_000_000, "who reads it can go on"
    assert local(f"{root}/run/model.pth").exists(), "a job may rely on what it has written"
    assert len(fetch(shards[1], immutable=True).read_bytes()) == 1_000_000
    node(monkeypatch, tmp_path / "other")
    monkeypatch.setenv("ACW_CACHE_GB", "much")
    with pytest.raises(UserError, match="ACW_CACHE_GB=much: is no size"):
        fetch(local(f"{root}/run/model.pth"))


# --- What can fail -----------------------------------------------------------------------------------------------

FAILURES = {
    "wrong key": ({"AWS_ACCESS_KEY_ID": "AKIAWRONG"}, r"refuses the key \(InvalidAccessKeyId\); set the right"),
    "wrong secret": ({"AWS_SECRET_ACCESS_KEY": "x"}, r"refuses the key \(SignatureDoesNotMatch\); set the right"),
    "no credentials": ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "no credentials .*; set AWS_ACCESS"),
    "no such profile": ({"AWS_PROFILE": "nobody"}, "AWS_PROFILE names a profile that this machine does not have"),
    "no server": ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, r"no S3 server answers at 127\.0\.0\.1:9 .*start it"),
    "no port": ({"AWS_ENDPOINT_URL": "http://127.0.0.1:99999"}, "AWS_ENDPOINT_URL is no address; write http://HOST"),
    "no region": ({"AWS_REGION": "eu-central-1 "}, "AWS_REGION 'eu-central-1 ' cannot be a region's name; correct it"),
    "no config": ({"AWS_CONFIG_FILE": __file__}, rf"{__file__} cannot be read as AWS's settings; correct it, or set"),
    "no mode": ({"AWS_DEFAULTS_MODE": "fast"}, r"boto3 does not take a setting \(InvalidDefaultsMode\); correct AWS's"),
    "no proxy": (
        {"http_proxy": "nonsense", "AWS_ENDPOINT_URL": "http://s3.invalid"},
        r"the proxy that HTTP_PROXY .* does not answer .*to NO_PROXY",
    ),
    "key with a line break": ({"AWS_ACCESS_KEY_ID": f"{KEY}\n{SECRET}"}, "AWS_ACCESS_KEY_ID, .* hold a line break"),
    "no address": ({"AWS_ENDPOINT_URL": "localhost"}, r"AWS_ENDPOINT_URL: is no address \(localhost\); write http://"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_errors_are_one_line_before_any_work(failure: str, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changed, message = FAILURES[failure]
    for name, value in changed.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    s3_settings._client.cache_clear()
    with pytest.raises(UserError, match=message) as caught:
        parse(["demo", "--root", root], "")
    assert "\n" not in str(caught.value)
    assert SECRET not in str(caught.value)
    s3_settings._client.cache_clear()


def test_a_bucket_must_be_there(root: str) -> None:
    with pytest.raises(UserError, match=r"^s3://no-such-bucket/x: there is no bucket no-such-bucket at .*; create it"):
        parse(["demo", "--root", "s3://no-such-bucket/x"], "")
    with pytest.raises(UserError, match=r"^dataset .*: there is nothing; .*python jobs/stage.py FOLDER"):
        load_dataset(f"{root}/none")


def test_slow_answers(root: str, server: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = Proxy(server.address)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
    monkeypatch.setattr(s3_settings, "READ_SECONDS", 1)
    monkeypatch.setattr(s3_settings, "ATTEMPTS", 2)
    path = local(f"{root}/file")
    proxy.delay = 0.2
    write_atomic(path, b"late")
    assert fetch(path).read_text(encoding="utf-8") == "late"
    proxy.delay = 1.5
    with pytest.raises(UserError, match=rf"^{root}/file: .* answers too slowly, 1 s several times over"):
        fetch(path)
    proxy.close()


def test_a_job_says_it_in_one_line_without_the_key(root: str) -> None:
    result = run("stage", "/tmp", f"s3://{BUCKET}/x", AWS_SECRET_ACCESS_KEY=f"{SECRET}x")
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: s3://{BUCKET}/x: ")
    assert len(result.stderr.splitlines()) == 1
    assert SECRET not in result.stderr + result.stdout


# --- Data sets ---------------------------------------------------------------------------------------------------


def test_a_staged_data_set_is_the_local_one(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from acw.pipeline.stage import files, stage

    _, folder, _, table = displays(tmp_path / "set", ("Colour", "Contour"), 3)
    here = load_dataset(folder, fixations=table)
    (tmp_path / "set" / "notes.txt").write_text("not read", encoding="utf-8")
    chosen = files(Path(folder), Path(table))
    assert sorted(chosen) == sorted([*(stimulus.name for stimulus in here.stimuli), "fixations.csv"])
    uri = f"{root}/set"
    assert stage(chosen, uri) == 7
    assert stage(chosen, uri) == 0
    overwrite(f"{uri}/Colour/000.png", b"cut short")
    assert stage(chosen, uri) == 1, "what is not as it should be is uploaded again"
    there = load_dataset(uri, fixations=f"{uri}/fixations.csv")
    assert (there.fingerprint, there.name, there.location) == (here.fingerprint, here.name, uri)
    node(monkeypatch, tmp_path / "other")
    assert not Path(there.stimuli[0].path).is_relative_to(tmp_path / "other")
    for copy in (tmp_path / "node").rglob("*.png"):
        copy.unlink()
    np.testing.assert_array_equal(there.stimuli[0].pixels(), here.stimuli[0].pixels())
    s3.delete(f"{uri}/Colour/000.png")
    with pytest.raises(UserError, match=r"the image Colour/000\.png is not in"):
        load_dataset(uri, fixations=f"{uri}/fixations.csv")


def test_readers_say_what_they_read() -> None:
    names = {
        "trainSet/Stimuli/Action/001.jpg": "cat2000 hdf5 csv",
        "trainSet/Stimuli/Action/Output/001_SaliencyMap.jpg": "",
        "trainSet/FIXATIONLOCS/Action/001.mat": "cat2000",
        "Stimuli/Action/.hidden.jpg": "",
        "FIXATIONLOCS/Action/.001.mat": "",
        "stimuli.hdf5": "hdf5",
        "testSet/Stimuli/Action/1.png": "hdf5 csv",
        "notes.txt": "",
    }
    for name, readers in names.items():
        assert [r for r in ("cat2000", "hdf5", "csv") if reads(r, name)] == readers.split(), name


# --- MLflow's database -------------------------------------------------------------------------------------------


def test_no_job_overwrites_what_another_has_logged(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = local(f"{root}/mlflow.db")
    mine = sqlite_in_s3.take(path)
    assert not mine.exists()
    mine.write_text("mine", encoding="utf-8")
    assert sqlite_in_s3.put_back(path)
    mine.write_text("mine, too", encoding="utf-8")
    write_atomic(path, "another's")
    assert not sqlite_in_s3.put_back(path)
    again = sqlite_in_s3.take(path)
    assert again.read_text(encoding="utf-8") == "another's"
    again.write_text("both", encoding="utf-8")
    assert sqlite_in_s3.put_back(path)
    node(monkeypatch, tmp_path / "other")
    assert fetch(local(f"{root}/mlflow.db")).read_text(encoding="utf-8") == "both"


# --- The whole pipeline ------------------------------------------------------------------------------------------


@pytest.mark.faults
def test_from_s3_to_s3_while_the_server_is_restarted(
    root: str,
    server: SeaweedFS,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Equal to the local run, with nothing of the key in what it leaves and says."""
    done = finished(tmp_path_factory.getbasetemp() / "jobs")
    folder, table = (done.arguments[done.arguments.index(name) + 1] for name in ("--dataset", "--fixations"))
    succeed("stage", folder, f"{root}/tiny", "--fixations", table)
    arguments = [*RECIPE, "--dataset", f"{root}/tiny", "--fixations", f"{root}/tiny/fixations.csv"]
    arguments += ["--root", f"{root}/runs"]
    here = local(f"{root}/runs/{called(done, 'tiny')}")
    with running(command("pipeline", *arguments), tmp_path / "log") as job:
        while not listing(here / "banks"):
            assert job.poll() is None, (tmp_path / "log").read_text(encoding="utf-8")
            time.sleep(0.2)
        server.kill()
        time.sleep(5)
        server.start()
        assert job.wait() == 0, (tmp_path / "log").read_text(encoding="utf-8")
    said = (tmp_path / "log").read_text(encoding="utf-8")
    assert said.splitlines()[-1] == f"{root}/runs/{here.name}/evaluation.json"
    assert succeed("pipeline", *arguments)[-1] == said.splitlines()[-1], "run again, it only shows what is there"

    node(monkeypatch, tmp_path / "other")
    here = local(f"{root}/runs/{called(done, 'tiny')}")
    for path in listing(here):
        fetch(path)
    assert_same_heads(here, done.job.folder)
    ours, theirs = (
        json.loads((place / "evaluation.json").read_text(encoding="utf-8")) for place in (here, done.job.folder)
    )
    assert ours["models"] == theirs["models"]
    image = done.job.dataset.stimuli[0].pixels()
    expected = acw.load(done.job.folder).predict(image).log_density
    np.testing.assert_array_equal(acw.load(f"{root}/runs/{here.name}").predict(image).log_density, expected)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{root}/runs/mlflow.db")
    np.testing.assert_array_equal(acw.load("models:/acw@champion").predict(image).log_density, expected)

    objects = {entry.key: entry for entry in s3.listing(root)}
    assert any("/runs/mlartifacts/" in key for key in objects)
    for key in objects:
        content = s3_settings.client().get_object(Bucket=BUCKET, Key=key)["Body"].read()
        assert KEY.encode() not in content, key
        assert SECRET.encode() not in content, key
    for text in (said, *(path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.json"))):
        assert KEY not in text
        assert SECRET not in text
