"""How a process that computes uses its machine: the cores it takes, and memory that it keeps."""

from __future__ import annotations

import ctypes
import functools
import platform
import threading

import torch

# glibc's mallopt: numbers of its settings, and the most that one can be set to.
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8
ALWAYS = 2**31 - 1
# Between two tasks of one kind, a process waits for less than this.
IDLE_SECONDS = 2.0
_idle: threading.Timer | None = None


def compute_with(threads: int) -> None:
    """Has this process compute with that many threads, and keep the memory that its tensors leave for the next ones.

    A step makes and drops hundreds of megabytes of tensors. glibc gives them back to the system, which then clears
    each page again: an eighth of a training step, a sixth of a backbone's pass (docs/log.md).
    """
    if _idle:
        _idle.cancel()
    torch.set_num_threads(threads)
    if libc := _glibc():
        # From one arena, which all threads share: what one leaves, another takes.
        for setting, value in ((TRIM_THRESHOLD, ALWAYS), (MMAP_MAX, 0), (ARENA_MAX, 1)):
            libc.mallopt(setting, value)


def give_back() -> None:
    """Gives the system what is kept, for a process that meets many sizes of images: of each it keeps other pieces, some
    ten megabytes an image under the starter model, between which larger ones do not fit."""
    if libc := _glibc():
        libc.malloc_trim(0)


def give_back_when_idle() -> None:
    """Gives the system what is kept, unless this process soon computes again: Ray may keep it for other tasks."""
    global _idle
    _idle = threading.Timer(IDLE_SECONDS, give_back)
    _idle.daemon = True
    _idle.start()


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
