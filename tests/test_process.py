"""A process that computes keeps its tensors' memory, in large pages, and gives it back when it has nothing to do."""

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

# In a process of its own, as the setting is the process's for good.
MEMORY = """
import json, resource, time, torch
from pathlib import Path
from acw.cluster import process
from acw.cluster.process import compute_with, give_back_when_idle

process.IDLE_SECONDS = 0.2

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(5_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1])

torch.set_num_threads(1)
# More than glibc ever keeps of itself.
large = [torch.ones(20_000_000) for _ in range(2)]
del large
before = faults()
compute_with(1)
faults()
kept = faults()
large = [torch.ones(20_000_000) for _ in range(2)]
del large
full = resident()
give_back_when_idle()
compute_with(1)
time.sleep(1)
busy = resident()
give_back_when_idle()
end = time.monotonic() + 30
while resident() > 0.9 * full and time.monotonic() < end:
    time.sleep(0.1)
print(json.dumps({"before": before, "kept": kept, "full": full, "busy": busy, "empty": resident()}))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's memory is kept")
def test_memory_is_kept_while_computing_and_given_back_afterwards():
    result = subprocess.run([sys.executable, "-c", MEMORY], check=True, capture_output=True, encoding="utf-8")
    pages = json.loads(result.stdout)
    assert pages["kept"] < 100 < pages["before"], pages
    # 160 MB were free, in pages of at least 4 KiB.
    assert pages["full"] - pages["empty"] > 100_000_000 / 65536, pages
    assert pages["full"] - pages["busy"] < 10_000_000 / 65536, "the next task had begun"


ARENAS = """
import ctypes, ray, tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from acw.cluster.joining import connect, disconnect

connect()

@ray.remote(num_cpus=0)
def arenas():
    libc = ctypes.CDLL(None)
    libc.fopen.restype = ctypes.c_void_p
    with ThreadPoolExecutor(8) as pool, tempfile.TemporaryDirectory() as folder:
        list(pool.map(lambda size: len(bytearray(size)), range(1000, 100_000, 1000)))
        path = Path(folder) / "malloc.xml"
        file = ctypes.c_void_p(libc.fopen(str(path).encode(), b"w"))
        libc.malloc_info(0, file)
        libc.fclose(file)
        return path.read_text().count("<heap nr=")

print(ray.get(arenas.remote()))
disconnect()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has arenas")
def test_all_threads_of_a_worker_allocate_from_one_arena() -> None:
    """Or each thread that reads features would keep memory of its own: it doubled a worker's."""
    result = subprocess.run([sys.executable, "-c", ARENAS], check=True, capture_output=True, encoding="utf-8")
    assert result.stdout.split()[-1] == "1"


LARGE_PAGES = """
import ray, re, torch
from pathlib import Path
from acw.cluster.joining import connect, disconnect

connect()

@ray.remote(num_cpus=0)
def large():
    from acw.cluster.process import compute_with
    compute_with(1)
    tensor = torch.ones(50_000_000)
    return sum(map(int, re.findall(r"AnonHugePages: +([0-9]+) kB", Path("/proc/self/smaps").read_text())))

print(ray.get(large.remote()))
disconnect()
"""
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc asks for large pages")
@pytest.mark.skipif(
    not SETTING.exists() or "[never]" in SETTING.read_text(encoding="utf-8"),
    reason="this system has no large pages for the asking",
)
def test_a_workers_tensors_are_in_large_pages() -> None:
    result = subprocess.run([sys.executable, "-c", LARGE_PAGES], check=True, capture_output=True, encoding="utf-8")
    assert int(result.stdout.split()[-1]) > 150_000, "kB, of a tensor of 200 MB"
