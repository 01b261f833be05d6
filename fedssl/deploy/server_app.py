"""The `ServerApp` of a deployment: the loop of every run, with real nodes under it.

The run's configuration comes as one JSON value (`cfg-json` in Flower's run configuration), made by
`fedssl-deploy server` or `fedssl-deploy bundle`:

    config: the resolved configuration, as `config.yaml` of the run directory will hold it
    resume: whether the run directory has a run to go on with
    run_id: 32 hex digits; nodes keep their memory under it
    wait: seconds to wait for the nodes
    authenticated: whether nodes have keys
    outcome: a file to write the exit code to, or null: Flower's own commands end with 0 whatever happens
    screen: a file for what a person should see, or null: then it goes with Flower's own log
"""

import contextlib
import json
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedssl.deploy.processes import RUN_CONFIG, ending_on_signals
from fedssl.errors import ConfigError, FedSSLError
from fedssl.federation import simulation
from fedssl.federation.grids.deployed import DeployedGrid
from fedssl.outcome import BUG, INTERRUPTED, OK, STOPPED
from fedssl.tracking import write_json

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run or resume, and say how it ended; what goes wrong is raised, so that Flower counts the run as failed."""
    try:
        told: dict[str, Any] = json.loads(str(context.run_config.get(RUN_CONFIG, "")))
    except ValueError as error:
        raise ConfigError(
            f"the run configuration has no {RUN_CONFIG} of fedssl: start it with fedssl-deploy server, or with the "
            f"command that fedssl-deploy bundle prints"
        ) from error
    try:
        # Flower's own handlers of both would end the process at once, without a summary.
        with _screen(told["screen"]), ending_on_signals(signal.SIGINT, signal.SIGTERM):
            summary = serve(grid, told)
    except FedSSLError as error:
        _say_outcome(told, error.exit_code, str(error))
        raise
    except KeyboardInterrupt:
        _say_outcome(told, INTERRUPTED, "interrupted")
        sys.exit(INTERRUPTED)
    except Exception as error:
        _say_outcome(told, BUG, "".join(traceback.format_exception(error)))
        raise
    _say_outcome(told, STOPPED if summary["status"] == "stopped" else OK, "")


def serve(grid: Grid, told: dict[str, Any]) -> dict[str, Any]:
    """The run over `grid`, from its start or its newest checkpoint.

    Returns:
        What `summary.json` holds.

    Raises:
        FedSSLError: as `fedssl.federation.simulation.run`, and where the nodes that the run needs do not come.
    """
    config = told["config"]
    run_dir = Path(config["run_dir"])
    federation = config["federation"]
    deployed = DeployedGrid(
        grid,
        num_clients=federation["num_clients"],
        run_id=told["run_id"],
        timeout=federation["round_timeout"],
        wait=told["wait"],
        authenticated=told["authenticated"],
    )
    with deployed:
        if told["resume"]:
            return simulation.resume(config, run_dir, deployed=deployed)
        return simulation.run(config, deployed=deployed)


@contextlib.contextmanager
def _screen(path: str | None) -> Iterator[None]:
    """Inside, what is printed goes to the file `path`."""
    if path is None:
        yield
        return
    with Path(path).open("a", buffering=1) as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        yield


def _say_outcome(told: dict[str, Any], exit_code: int, message: str) -> None:
    if told["outcome"]:
        write_json(Path(told["outcome"]), {"exit_code": exit_code, "message": message})
