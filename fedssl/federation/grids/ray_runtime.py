"""Ray itself: started on this machine or joined, once a process."""

import logging
import os
import sys
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fedssl.errors import ConfigError

ANSWER_SECONDS = 5.0  # a cluster that has not answered by then is not there

# Nobody asks our own Ray for its tasks' histories or its metrics, and workers and daemons spend the cores on them.
QUIET = {"RAY_task_events_report_interval_ms": "0", "RAY_enable_metrics_collection": "false"}

_started: tuple[str | None, int | None] | None = None  # the Ray that this module started: address and gpus
open_grids: weakref.WeakSet[Any] = weakref.WeakSet()


def start_ray(address: str | None, gpus: int | None) -> Any:
    """The module `ray`, initialised. One Ray serves all grids of the process; it ends with the process.

    A Ray that the caller initialised before is used as it is.
    """
    global _started
    import ray

    if ray.is_initialized():
        if _started is None or _started == (address, gpus):
            return ray
        if open_grids:
            raise ConfigError(
                f"this process already runs a Ray with grid.address={_started[0]}, grid.gpus={_started[1]}; "
                f"close its grids before opening one with grid.address={address}, grid.gpus={gpus}."
            )
        ray.shutdown()
    with _environment(
        PYTHONPATH=os.pathsep.join(path or str(os.getcwd()) for path in sys.path),  # noqa: PTH109
        RAY_USAGE_STATS_ENABLED="0",
        RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",  # the coming default; `ray_worker` hides GPUs from CPU workers itself
        **QUIET,
    ):
        if address is None:
            ray.init(
                address="local",  # never join a Ray that happens to run on this machine
                num_gpus=gpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
            node: Any = ray._private.worker._global_node
            node.kill_log_monitor(check_alive=False)  # it serves `log_to_driver` alone
        else:
            _join(ray, address)
    ray._private.worker._worker_logs_enabled = False  # a worker's death is an event of the grid, not a print
    _started = (address, gpus)
    return ray


def _join(ray: Any, address: str) -> None:
    """Connect to a running cluster.

    Left alone with an address where nobody answers, Ray tries for 70 s and then ends the process.

    Raises:
        ConfigError: there is none, or this process cannot join it.
    """
    import grpc
    from ray._private.grpc_utils import init_grpc_channel
    from ray._private.services import canonicalize_bootstrap_address_or_die

    advice = (
        "Start one with `ray start --head`, which prints its address, join this machine to it with `ray start "
        "--address=...`, or leave grid.address null for a fresh Ray on this machine."
    )
    try:
        found = canonicalize_bootstrap_address_or_die(address)
        channel = init_grpc_channel(found, [("grpc.enable_http_proxy", 0)])
        try:
            grpc.channel_ready_future(channel).result(timeout=ANSWER_SECONDS)
        finally:
            channel.close()
    except (OSError, grpc.FutureTimeoutError) as error:
        why = f" within {ANSWER_SECONDS:g} s" if isinstance(error, grpc.FutureTimeoutError) else ""
        raise ConfigError(f"grid.address={address}, but no Ray cluster answers there{why}. {advice}") from error
    try:
        ray.init(address=found, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError) as error:  # not a cluster, another version of Ray or Python, a machine outside it
        why = str(error.__cause__ or error).partition(" Last connection error")[0].strip().removesuffix(".")
        raise ConfigError(
            f"grid.address={address} answers, but this process cannot join it: {why}. {advice}"
        ) from error


def start_own_ray(gpus: int | None) -> Any:
    """The module `ray`, initialised on this machine for somebody who will shut it down."""
    import ray

    if open_grids or (ray.is_initialized() and _started is None):
        raise ConfigError(
            "grid=flower_sim ends the Ray that it ran on, and this process uses one already: close its grids (or call "
            "ray.shutdown()) first, or use grid=ray."
        )
    return start_ray(None, gpus)


@contextmanager
def _environment(**values: str | None) -> Iterator[None]:
    """Environment variables for the processes that are started inside."""
    before = {name: os.environ.get(name) for name in values}
    _set_environment(values)
    try:
        yield
    finally:
        _set_environment(before)


def _set_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
