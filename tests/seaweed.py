"""A real S3 server for tests, SeaweedFS, and a proxy that makes it slow."""

from __future__ import annotations

import json
import random
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from certificates import Certificates

PATIENCE = 90.0
# SeaweedFS's gRPC ports lie so far above the others.
GRPC = 10_000
BUCKET = "data-and-runs"
KEY, SECRET = "AKIAMARKEDKEYOFTESTS", "marked/secret+of/tests0123456789abcdefgh"


def _free_ports(count: int) -> list[int]:
    """Ports that are free with those GRPC above them, below those that the system gives to others' connections."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(10_500, 22_000)
        try:
            for one in (port, port + GRPC):
                with socket.socket() as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(("127.0.0.1", one))
        except OSError:
            continue
        if port not in found:
            found.append(port)
    return found


def node(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """From here on, this process is on the node that has this cache."""
    from acw.features.store import open_shard  # brings torch, for which conftest.py has not set the environment yet

    monkeypatch.setenv("ACW_CACHE", str(cache))
    open_shard.cache_clear()


class SeaweedFS:
    """`weed` on 127.0.0.1 with its files in a folder; killed and started again, it has what it had.

    certificates: by which it speaks TLS.
    """

    def __init__(self, folder: Path, certificates: Certificates | None = None) -> None:
        self.folder, self.ports, self.certificates = folder, _free_ports(4), certificates
        self.address = f"http{'s' if certificates else ''}://127.0.0.1:{self.ports[3]}"
        folder.mkdir(parents=True)
        (folder / "data").mkdir()
        identity = {"name": "tests", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}), encoding="utf-8")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.address,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
        }

    def used_by(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        """Has this process, and all that it starts, know how to reach it, on a node that has this cache."""
        for name, value in self.environment.items():
            monkeypatch.setenv(name, value)
        node(monkeypatch, cache)

    def start(self) -> None:
        master, volume, filer, s3 = self.ports
        command = [str(Path(sys.executable).with_name("weed")), "server", f"-dir={self.folder / 'data'}"]
        command += [
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            "-filer=true",
            "-s3",
            f"-s3.config={self.folder / 's3.json'}",
        ]
        command += [f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}", f"-s3.port={s3}"]
        command += ["-master.telemetry=false", "-master.volumeSizeLimitMB=64", "-volume.max=20"]
        command += [f"-s3.config={self.folder / 's3.json'}", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        if self.certificates:
            command += [f"-s3.cert.file={self.certificates.server}", f"-s3.key.file={self.certificates.key}"]
        log = (self.folder / "log").open("ab")
        self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder)
        end = time.monotonic() + PATIENCE
        while not self._answers():
            assert self._process.poll() is None, (self.folder / "log").read_text(errors="replace", encoding="utf-8")
            assert time.monotonic() < end, "SeaweedFS does not answer"
            time.sleep(0.2)

    def _answers(self) -> bool:
        """Whether it serves requests: anonymous ones are denied by then."""
        context = ssl.create_default_context(cafile=self.certificates.authority) if self.certificates else None
        try:
            urllib.request.urlopen(self.address, timeout=5, context=context).close()
        except urllib.error.HTTPError as error:
            return error.code == 403
        except OSError:
            return False
        return True

    def kill(self) -> None:
        """kill -9"""
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None


# By what a request shows that it brings a checksum as S3 has known them since 2024.
CHECKSUM = re.compile(rb"x-amz-sdk-checksum-algorithm|x-amz-checksum-(crc|sha)|x-amz-trailer|aws-chunked", re.I)


class Proxy:
    """Passes connections on to a server, each answer `delay` seconds late; `sent` is what clients have asked.

    refusal: the code of the error that it answers instead of requests with a checksum, as older servers do.
    """

    def __init__(self, address: str) -> None:
        self._host, self._port = address.removeprefix("http://").split(":")
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self.delay = 0.0
        self.sent = b""
        self.refusal = ""
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listening.close()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            server = socket.create_connection((self._host, int(self._port)))
            threading.Thread(target=self._pass, args=(client, server, True), daemon=True).start()
            threading.Thread(target=self._pass, args=(server, client, False), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, asks: bool) -> None:
        try:
            while content := source.recv(1 << 16):
                if asks:
                    self.sent += content
                    if self.refusal and CHECKSUM.search(content):
                        source.sendall(_refusal(self.refusal))
                        return
                else:
                    time.sleep(self.delay)
                target.sendall(content)
        except OSError:
            pass
        finally:
            for one in (source, target):
                one.close()


def _refusal(code: str) -> bytes:
    body = f"<Error><Code>{code}</Code><Message>A header that you provided is not known here</Message></Error>".encode()
    head = f"HTTP/1.1 400 Bad Request\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Connection: close\r\n\r\n".encode() + body
