"""What a process of ours is told before torch, Flower and Ray are imported: they read it once, then.

Only defaults: what the user's own environment says stays.
"""

import os

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
