"""What a process of ours is told before its work: torch, Flower and Ray read the environment once, when imported.

Only defaults: what the user's own environment says stays.
"""

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

DEFAULTS = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Threads of one process that wait for each other sleep, after some microseconds of looking (libgomp counts looks).
    # On the cores this was measured on, idle and with one of two busy, the server's distillation took 5.7 and 11.6 s
    # where they sleep at once, 5.0 and 12.6 s so, 4.9 and 19.8 s with ten times the looks.
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "1000",
}


def set_defaults() -> None:
    """For this process and those it starts."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of malloc.h
KEPT_BYTES = 1 << 30
GLIBC_LIMIT = 1 << 25  # of the mmap threshold, before glibc 2.35
OWN_MALLOC = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")


def keep_memory(*, of_threads: bool = False) -> bool:
    """Let this process keep what it frees for what it allocates next, instead of giving it back at once.

    A training step frees its activations and needs them again in the next one. glibc gives blocks of that size back to
    the system, which then has to clear every page anew. What keeping them saves: `scripts/benchmark.py choices`.

    What is kept: up to 1 GiB at the end of the heap, and what lies below blocks that are in use.

    Args:
        of_threads: also where a thread trains: glibc gives each a heap of its own, which these settings do not reach,
            so all threads share one. Before there are any.

    Returns:
        Whether it does: False without glibc, or where the user's environment sets these thresholds.
    """
    tuned = any(name in os.environ for name in OWN_MALLOC) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform != "linux" or tuned:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not any(mallopt(M_MMAP_THRESHOLD, size) for size in (KEPT_BYTES, GLIBC_LIMIT)):
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)) and (not of_threads or bool(mallopt(M_ARENA_MAX, 1)))


_start_is_kept = False


@contextmanager
def keep_start() -> Iterator[None]:
    """Inside, Python's collector does not look at what is there now: modules, data, models.

    Else it looks at all of it, again and again, in a round of many messages: one of 10,000 cost 1.4 times as much a
    message as one of 1,000, and 1.1 times so. Inside another `keep_start` it does nothing. At its end nothing
    is frozen, what others had frozen neither.
    """
    global _start_is_kept  # not gc.get_freeze_count() > 0: that counts them one by one, 60 ms a million
    if _start_is_kept:
        yield
        return
    _start_is_kept = True
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        _start_is_kept = False
