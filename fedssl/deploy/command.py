"""The `fedssl-deploy` command: the clients and the server of a simulation, on real machines, under Flower.

Thin: `server` starts `flower-superlink` and `flwr run`, follows the run and ends with its exit code; `client` keeps a
`flower-supernode` running; `bundle` writes what Flower's own commands need to do the same.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from fedssl.config import check_values, compose, compose_node
from fedssl.deploy.processes import (
    CONNECTION,
    NODE_FILE,
    Certificates,
    SuperLink,
    check_protection,
    copy_bundle,
    end,
    end_with_parent,
    ending_on_signals,
    environment,
    last_chunk,
    own_commands,
    run_config,
    supernode_command,
)  # fmt: skip
from fedssl.errors import ConfigError, FedSSLError
from fedssl.outcome import BAD_INPUT, BUG, INTERRUPTED, OK, STOPPED, finish, outcome_of, print_summary
from fedssl.resuming import DEPLOYMENT, resumed
from fedssl.tracking import write_json

POLL_SECONDS = 0.2
ASK_SECONDS = 20.0  # between two questions to Flower how the run is, in case that it can no longer say so itself
RESTART_SECONDS = 10.0  # a node that ended is started again after this; its SuperLink first has to notice that it went
MAX_RESTART_SECONDS = 60.0
SHORT_SECONDS = 15.0  # a node that did not live longer is one that cannot start


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    sys.path.append(str(Path.cwd()))  # a user's own modules, as for `fedssl`
    for name in ("RAY_USAGE_STATS_ENABLED", "FLWR_TELEMETRY_ENABLED"):
        os.environ.setdefault(name, "0")
    parser = _parser()
    try:
        options, overrides = parser.parse_known_args(argv)
        if unknown := [override for override in overrides if override.startswith("-")]:
            parser.error(f"there is no option {' '.join(unknown)}")
    except SystemExit as ended:  # argparse has said why
        return OK if ended.code in (None, 0) else BAD_INPUT
    options.overrides = overrides
    with ending_on_signals(signal.SIGTERM):
        return outcome_of(lambda: options.work(options))[0]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedssl-deploy",
        description="Run a federation on real machines, under Flower. Overrides (key=value) are those of `fedssl` for "
        "server and bundle, and those of conf/node.yaml for client.",
        epilog="Exit codes: 0 completed, 2 bad input, 3 too few replies or nodes, 4 stopped by max_seconds, 130 "
        "interrupted, 1 a bug.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="server|client|bundle")

    server = commands.add_parser(
        "server", help="start a SuperLink, run over the nodes that come, end with its exit code"
    )
    server.set_defaults(work=_server)
    server.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default %(default)s: this machine alone)"
    )
    server.add_argument("--port", type=_port, default=8000, help="of everything Flower serves (default %(default)s)")
    server.add_argument("--keys", type=Path, metavar="DIR", help="admit only nodes with a key of DIR/*.pub (needs TLS)")

    client = commands.add_parser("client", help="keep a node running: a SuperNode with this machine's data")
    client.set_defaults(work=_client)
    client.add_argument("superlink", metavar="SERVER:PORT", help="where the server is")
    client.add_argument("--key", type=Path, metavar="FILE", help="this node's private key (needs TLS)")
    client.add_argument(
        "--restarts", type=_count, default=None, metavar="N", help="give up after N restarts (default: never)"
    )

    for command in (server, client):
        command.add_argument("--certificates", type=Path, metavar="DIR", help="TLS; a client needs only ca.crt in it")
        command.add_argument("--insecure", action="store_true", help="plain text, for trials on one machine")

    bundle = commands.add_parser("bundle", help="write the Flower app and run.toml, for flwr run by hand")
    bundle.set_defaults(work=_bundle)
    bundle.add_argument("folder", type=Path, metavar="DIR")
    for command in (server, bundle):
        command.add_argument(
            "--wait", type=float, default=600, metavar="SECONDS", help="for the nodes to come (default %(default)s)"
        )
    for command in (server, client, bundle):
        command.add_argument("--config-dir", type=Path, metavar="DIR", help="YAML files of your own, as for fedssl")
        command.allow_abbrev = False
    return parser


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"a port is a number from 1 to 65535, got {text!r}")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a whole number of at least 0, got {text!r}")
    return int(text)


# --- server ------------------------------------------------------------------------------------------------------
def _server(options: argparse.Namespace) -> int:
    certificates = _certificates(options)
    keys = _public_keys(options.keys)
    told, complete = _told(options)
    run_dir = Path(told["config"]["run_dir"])
    if complete is not None:
        print_summary(complete, run_dir)
        return OK
    told["authenticated"] = options.keys is not None
    with tempfile.TemporaryDirectory(prefix="fedssl-deploy-") as folder:
        home = Path(folder)
        told |= {"outcome": str(home / "outcome.json"), "screen": str(home / "screen")}
        with SuperLink(
            home, host=options.host, port=options.port, certificates=certificates, authenticated=bool(keys)
        ) as link:
            link.wait_until_ready()
            for key in keys:
                link.register(key)
            print(f"SuperLink at {options.host}:{options.port}, run in {run_dir}", flush=True)
            try:
                flower_run = link.submit(copy_bundle(home / "app"), run_config(home / "run.toml", told))
                code, message = _follow(link, home, flower_run)
            except KeyboardInterrupt:
                link.interrupt()
                print(
                    f"interrupted; the last checkpoint is kept, fedssl-deploy server resume={run_dir} goes on",
                    file=sys.stderr,
                    flush=True,
                )
                return INTERRUPTED
    if code not in (OK, STOPPED):
        raise _RunEndedError(code, message)
    summary = json.loads((run_dir / "summary.json").read_text())
    return finish(summary, run_dir, [])


class _RunEndedError(FedSSLError):
    """The run ended so; the exit code is its own."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = code


def _follow(link: SuperLink, home: Path, flower_run: int) -> tuple[int, str]:
    """Show what the run says until it is over; its exit code and message."""
    offset, asked = 0, time.monotonic()
    outcome = home / "outcome.json"
    while True:
        over = outcome.is_file()
        text, offset = last_chunk(home / "screen", offset)
        sys.stdout.write(text)
        sys.stdout.flush()
        if over:
            ended = json.loads(outcome.read_text())
            return ended["exit_code"], ended["message"]
        if link.process.poll() is not None:
            return BUG, f"the SuperLink ended by itself; its last lines:\n{link.last_lines()}"
        if time.monotonic() - asked > ASK_SECONDS:
            asked = time.monotonic()
            try:
                status, details = link.status(flower_run)
            except (FedSSLError, ValueError, KeyError, IndexError):  # busy: it is asked again
                continue
            if status.startswith("finished") and not outcome.is_file():
                return BUG, f"the run ended without a word: {status}: {details}\n{link.last_lines()}"
        time.sleep(POLL_SECONDS)


def _told(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What the ServerApp and the nodes are told, and the summary of a run that is complete already."""
    going_on = [override for override in options.overrides if override.startswith("resume=")]
    complete = None
    if going_on:
        run_dir = Path(going_on[-1].removeprefix("resume=")).absolute()
        config, complete = resumed(run_dir, [o for o in options.overrides if not o.startswith("resume=")])
        named = run_dir / DEPLOYMENT
        if not named.is_file():
            raise ConfigError(
                f"the run in {run_dir} was no deployment (no {named.name}): fedssl resume={run_dir} goes on"
            )
        run_id = json.loads(named.read_text())["run_id"]
    else:
        config = compose(options.overrides, config_dir=options.config_dir)
        check_values(config)
        run_id = uuid4().hex
    config["run_dir"] = str(Path(config["run_dir"]).absolute())
    told = {
        "config": config,
        "resume": bool(going_on),
        "run_id": run_id,
        "wait": options.wait,
        "authenticated": False,
        "outcome": None,
        "screen": None,
    }
    return told, complete


def _certificates(options: argparse.Namespace) -> Certificates | None:
    if options.insecure == (options.certificates is not None):
        raise ConfigError(
            "say how the connection is protected: --certificates DIR (TLS; scripts/make_keys DIR makes a development "
            "CA and keys), or --insecure (plain text, for trials on one machine)"
        )
    return None if options.insecure else Certificates(folder=options.certificates)


def _public_keys(folder: Path | None) -> list[Path]:
    if folder is None:
        return []
    keys = sorted(folder.glob("*.pub"))
    if not keys:
        raise ConfigError(f"--keys {folder}: there is no *.pub in it, so no node could take part")
    return keys


# --- client ------------------------------------------------------------------------------------------------------
def _client(options: argparse.Namespace) -> int:
    certificates = _certificates(options)
    node = compose_node(options.overrides, config_dir=options.config_dir)
    _check_node(node)
    if options.key is not None and not options.key.is_file():
        raise ConfigError(f"--key {options.key}: there is no such file; scripts/make_keys makes some")
    store = Path(node["store"]).expanduser().absolute()
    node["store"] = str(store)
    home = store / f"node-{node['partition_id']}"
    try:
        home.mkdir(parents=True, exist_ok=True)
        write_json(home / "node.json", node)
    except OSError as error:
        raise ConfigError(f"store={store} cannot be written: {error.strerror}") from error
    check_protection(options.superlink, certificates)
    print(f"node of partition {node['partition_id']}, memory in {store}", flush=True)
    try:
        return _keep_running(options, certificates, home, int(node["partition_id"]))
    except KeyboardInterrupt:
        print(f"the node has ended; its memory stays in {store}", file=sys.stderr, flush=True)
        return INTERRUPTED


def _check_node(node: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for what this node cannot bring, before it tries."""
    from fedssl.deploy.node import node_of  # torch: not for the server

    node_of(node).check_files()


def _keep_running(options: argparse.Namespace, certificates: Certificates | None, home: Path, partition_id: int) -> int:
    """A warm process for its messages, a SuperNode, and after that ended another."""
    with tempfile.TemporaryDirectory(prefix="fedssl-") as private:  # a socket's path must be short
        socket = Path(private) / "warm"
        seen = environment(home / "flower", own_commands(home / "bin", socket))
        warm = subprocess.Popen(
            [sys.executable, "-m", "fedssl.deploy.warm", str(socket)],
            env=seen,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
        try:
            return _restart(
                options, certificates, seen, {NODE_FILE: str(home / "node.json"), "partition-id": partition_id}
            )
        finally:
            end(warm)


def _restart(
    options: argparse.Namespace,
    certificates: Certificates | None,
    seen: Mapping[str, str],
    node_config: Mapping[str, str | int],
) -> int:
    restarts, pause = 0, RESTART_SECONDS
    while True:
        command = supernode_command(
            options.superlink,
            certificates=certificates,
            key=options.key,
            node_config=node_config,
        )
        started = time.monotonic()
        process = subprocess.Popen(
            command, env=seen, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=end_with_parent
        )
        try:
            process.wait()
        finally:
            end(process)
        if options.restarts is not None and restarts >= options.restarts:
            hint = ". The server admits keys whose .pub is in its --keys" if options.key else ""
            raise FedSSLError(f"the node ended (its last lines are above) and was restarted {restarts} times{hint}")
        lived = time.monotonic() - started  # it ends with every SuperLink, so after every run
        pause = RESTART_SECONDS if lived > SHORT_SECONDS else min(pause * 1.5, MAX_RESTART_SECONDS)
        restarts += 1
        print(f"the node ended; it starts again in {pause:.0f} s", flush=True)
        time.sleep(pause)


# --- bundle ------------------------------------------------------------------------------------------------------
def _bundle(options: argparse.Namespace) -> int:
    told, _ = _told(options)
    folder = copy_bundle(options.folder)
    run_config(folder.with_name(f"{folder.name}-run.toml"), told)
    config = told["config"]
    num_clients = config["federation"]["num_clients"]
    print(
        f"""{folder}: the Flower app; {folder}-run.toml: this run, with its results in {config["run_dir"]}

On the server:  flower-superlink --insecure --host 127.0.0.1 --port 8000 --disable-runtime-dependency-installation
On each node:   flower-supernode --insecure --superlink 127.0.0.1:8000 --port 9094 \\
                    --node-config 'partition-id=0 num-partitions={num_clients}'
Then:           flwr run {folder} {CONNECTION} --stream --run-config {folder}-run.toml
with [superlink.{CONNECTION}] address = "127.0.0.1:8000" and insecure = true in $FLWR_HOME/config.toml.
In Flower's simulation, on this machine alone:
                flwr run {folder} local --stream --run-config {folder}-run.toml \\
                    --federation-config 'num-supernodes={num_clients} client-resources-num-cpus=1'"""
    )
    return OK


if __name__ == "__main__":
    sys.exit(main())
