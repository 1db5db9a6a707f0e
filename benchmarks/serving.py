"""Does a service stay up? Malformed uploads of every kind, then clients that all ask at once, against one `acw serve`.

    python benchmarks/serving.py --model RUN --images FOLDER       # 1,000 uploads, 20 clients for two minutes
    python benchmarks/serving.py --model RUN --images FOLDER --uploads 50 --clients 4 --seconds 10

Uploads are those of `tests/uploads.py`: cut short, overwritten, of other types, bombs, huge headers, animated, CMYK, 16
bits, zero bytes, random bytes. Clients send the folder's images in turn, each as soon as it has the answer to its last.
Prints what was answered, how long it took, and the memory of the server's processes (resident, all of them summed)
before, between and after. Exit status 1 if any upload got an answer that it should not have, or any request was lost.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import harness
import numpy as np
import requests
from harness import Figures

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from servers import acw_serve, processes_of
from uploads import KINDS, malformed

MIB = 2**20
ACCEPTED = ("application/json", "image/png", "application/x-npy", "image/svg+xml")


def megabytes(pid: int) -> int:
    return sum(one.memory_info().rss for one in processes_of(pid)) // MIB


def replica_megabytes(pid: int) -> int:
    replicas = [one for one in processes_of(pid) if "replica" in " ".join(one.cmdline()).lower()]
    return max(one.memory_info().rss for one in replicas) // MIB


def uploads(address: str, count: int) -> tuple[Counter[str], list[str]]:
    """How many got which status, and what was wrong with answers."""
    numbers = random.Random(0)
    statuses: Counter[str] = Counter()
    wrong = []
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        content, expected = malformed(kind, numbers)
        answer = requests.post(f"{address}predict", data=content, headers={"Accept": "application/json"}, timeout=300)
        statuses[f"{kind}: {answer.status_code}"] += 1
        if answer.status_code not in expected or (answer.status_code != 200 and not answer.json().get("detail")):
            wrong.append(f"{kind}: {answer.status_code} {answer.text[:200]}")
    return statuses, wrong


def clients(address: str, contents: list[bytes], count: int, seconds: float) -> tuple[list[float], list[str]]:
    """The latencies of requests that were answered well, and what became of the others."""
    end = time.monotonic() + seconds
    taken: list[float] = []
    lost: list[str] = []

    def ask(client: int) -> None:
        with requests.Session() as session:
            for number in range(client, 10**9, count):
                if (start := time.monotonic()) > end:
                    return
                accept = ACCEPTED[number % len(ACCEPTED)]
                content = contents[number % len(contents)]
                try:
                    answer = session.post(f"{address}predict", data=content, headers={"Accept": accept}, timeout=300)
                    if answer.status_code == 200 and answer.headers["content-type"].startswith(accept):
                        taken.append(time.monotonic() - start)
                    else:
                        lost.append(f"{answer.status_code} {answer.text[:200]}")
                except requests.RequestException as error:
                    lost.append(str(error)[:200])

    threads = [threading.Thread(target=ask, args=(client,)) for client in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return taken, lost


def benchmark(arguments: argparse.Namespace) -> Figures:
    paths = sorted(path for path in Path(arguments.images).rglob("*") if path.suffix in (".jpg", ".png"))[:40]
    contents = [path.read_bytes() for path in paths]
    started = time.monotonic()
    with acw_serve(arguments.model, "--replicas", arguments.replicas) as (address, server):
        figures: Figures = {"start, s": time.monotonic() - started}
        clients(address, contents, 4, 5)
        figures["MiB when warm"] = megabytes(server.pid)
        figures["MiB of the replica when warm"] = replica_megabytes(server.pid)
        statuses, wrong = uploads(address, arguments.uploads)
        figures |= dict(sorted(statuses.items()))
        figures["MiB after uploads"] = megabytes(server.pid)
        figures["MiB of the replica after uploads"] = replica_megabytes(server.pid)
        lost: list[str] = []
        for part in ("first half", "second half"):
            taken, missed = clients(address, contents, arguments.clients, arguments.seconds / 2)
            lost += missed
            figures[f"{part}: requests answered"] = len(taken)
            figures[f"{part}: requests lost"] = len(missed)
            figures[f"{part}: images/s"] = 2 * len(taken) / arguments.seconds
            for name, share in (("median", 0.5), ("99 %", 0.99), ("longest", 1.0)):
                figures[f"{part}: latency, s, {name}"] = float(np.quantile(taken, share)) if taken else float("nan")
            figures[f"{part}: MiB"] = megabytes(server.pid)
            figures[f"{part}: MiB of the replica"] = replica_megabytes(server.pid)
        figures["still answers"] = requests.get(f"{address}healthz", timeout=60).json()["status"]
    figures["exit status"] = server.returncode
    figures["wrong answers"] = len(wrong)
    for line in [*wrong, *lost][:20]:
        print(line, file=sys.stderr)
    if wrong or lost or server.returncode:
        raise SystemExit(
            f"{len(wrong)} wrong answers, {len(lost)} requests lost, status {server.returncode}: {figures}"
        )
    return figures


if __name__ == "__main__":
    harness.run(
        __doc__ or "",
        benchmark,
        model="",
        images="../shared/gaze/trainSet/Stimuli",
        uploads=1000,
        clients=20,
        seconds=120,
        replicas=1,
    )
