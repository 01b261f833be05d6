"""What a process of ours is told before its work: torch, Flower and Ray read the environment once, when imported.

Only defaults: what the user's own environment says stays.
"""

import ctypes
import os
import sys

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


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
OWN_MALLOC = ("MALLOC_", "GLIBC_TUNABLES")  # names of variables that begin so are the user's choice
KEPT_BYTES = 1 << 30


def keep_memory() -> bool:
    """Let this process keep up to 1 GiB that it frees for what it allocates next, instead of giving it back at once.

    A training step frees its activations and needs them again in the next one. glibc gives blocks of that size back to
    the system, which then has to clear every page anew. An epoch of 16 steps of 64 images on one core took .80 of the
    time (mobilenet_v3_small), .87 (resnet8), .93 (conv4_16).

    Returns:
        Whether it does: False without glibc, or where the user's environment has settings of malloc.
    """
    if sys.platform != "linux" or any(name.startswith(OWN_MALLOC) for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(name, KEPT_BYTES) for name in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD))
