"""A process that computes keeps its tensors' memory, and gives it back when its task is over."""

import json
import platform
import subprocess
import sys

import pytest

# In a process of its own, as the setting is the process's for good.
MEMORY = """
import json, resource, torch
from pathlib import Path
from acw.process import compute_with, give_back_memory

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
give_back_memory()
print(json.dumps({"before": before, "kept": kept, "full": full, "empty": resident()}))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's memory is kept")
def test_memory_is_kept_while_computing_and_given_back_afterwards():
    result = subprocess.run([sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True)
    pages = json.loads(result.stdout)
    assert pages["kept"] < 100 < pages["before"], pages
    # 160 MB were free, in pages of at least 4 KiB.
    assert pages["full"] - pages["empty"] > 100_000_000 / 65536, pages


ARENAS = """
import ctypes, ray, tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from acw.cluster import connect, disconnect

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
    result = subprocess.run([sys.executable, "-c", ARENAS], check=True, capture_output=True, text=True)
    assert result.stdout.split()[-1] == "1"
