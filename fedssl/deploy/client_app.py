"""The `ClientApp` of a deployment: what a SuperNode, or Flower's own simulation engine, calls with a message.

The run's configuration comes with Flower's run configuration, as one JSON value; the node's own comes from a file that
its owner named. A SuperNode starts a process for every message, so nothing here outlives one except the client store.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedssl.deploy.node import NodeSetup, node_of
from fedssl.deploy.processes import NODE_FILE, RUN_CONFIG
from fedssl.errors import ConfigError, FedSSLError
from fedssl.federation import flower_compat
from fedssl.federation.client_app import make_client_app
from fedssl.federation.grids.in_process import torch_threads
from fedssl.federation.roster import Introduction
from fedssl.targets import OURS, allow_only, check_targets

AWAKE_SECONDS = 0.2  # Flower's signal that its parent has died reaches a thread that waits only when it looks up
ALLOWED = "FEDSSL_ALLOW_TARGETS"  # of a node without such a file: more names, separated by commas


class DeployedApp(ClientApp):
    """Answers every message; what goes wrong is the answer, too."""

    def __call__(self, message: Message, context: Context) -> Message:
        """Flower's way to call it."""
        return within(message.metadata.ttl, _answer, message, context)


app = DeployedApp()


def _answer(message: Message, context: Context) -> Message:
    if message.metadata.message_type == "query.refused":
        reason = str(message.content.config_records["config"]["reason"])
        print(f"the server refuses this node: {reason}", file=sys.stderr)
        return Message(RecordDict(), reply_to=message)
    told = str(context.run_config.get(RUN_CONFIG, ""))
    own = context.node_config.get(NODE_FILE)
    try:
        node = _owners_word(Path(str(own))) if own else _rehearsal(context.node_config, told)
        context.node_config["partition-id"] = node["partition_id"]
        client = _client_app(told, json.dumps(node, sort_keys=True))
    except Exception as error:  # whatever a server's configuration holds
        what = str(error) if isinstance(error, FedSSLError) else f"its configuration cannot be used: {error!r}"
        return Message(Error(flower_compat.CLIENT_RAISED, f"{type(error).__name__}: {what}"), reply_to=message)
    reply: Message = client(message, context)
    return reply


def within(seconds: float, client: Any, message: Message, context: Context) -> Message:
    """Call `client` and return its reply, or after `seconds` an error, so that the node is free for the next message.

    What hangs is left to the end of this process, which a SuperNode starts for one message.
    """
    outcome: list[Message | BaseException] = []

    def work() -> None:
        try:
            outcome.append(client(message, context))
        except BaseException as error:
            outcome.append(error)

    worker = threading.Thread(target=work, name="client", daemon=True)
    worker.start()
    deadline = time.monotonic() + seconds
    while worker.is_alive() and time.monotonic() < deadline:
        worker.join(min(seconds, AWAKE_SECONDS))
    if not outcome:
        reason = f"still at work after {seconds:.0f} s, when nobody waits any more (federation.round_timeout)"
        return Message(Error(flower_compat.CLIENT_RAISED, reason), reply_to=message)
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def _owners_word(path: Path) -> dict[str, Any]:
    try:
        node: dict[str, Any] = yaml.safe_load(path.read_text())
        _ = node["partition_id"]
    except (OSError, TypeError, KeyError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} (node config {NODE_FILE}) is no node of fedssl-deploy: {error}") from error
    return node


def _rehearsal(node_config: Mapping[str, Any], told: str) -> dict[str, Any]:
    """A node that Flower started with nothing but its number: it rehearses with that partition of the run's data."""
    if "partition-id" not in node_config:
        raise ConfigError(
            f"the node config has neither {NODE_FILE} nor partition-id: start nodes with fedssl-deploy client, or with "
            f"--node-config 'partition-id=0 num-partitions=3' to rehearse"
        )
    return {
        "partition_id": int(node_config["partition-id"]),
        "data": None,
        "rehearsal_root": None,
        "public": {"data": None, "root": None},
        "evaluate": {"data": None, "root": None},
        "method": None,
        "family": None,
        "device": "auto",
        "store": str(Path(_told(told)["config"]["run_dir"]) / "nodes"),
        "allow_targets": [*OURS, *(entry for entry in os.environ.get(ALLOWED, "").split(",") if entry)],
    }


def _told(text: str) -> dict[str, Any]:
    try:
        told: dict[str, Any] = json.loads(text)
        _ = told["config"]["run_dir"], told["config"]["strategy"]["client"], told["run_id"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"the run configuration has no {RUN_CONFIG} of fedssl ({error!r}): start runs with fedssl-deploy server, "
            f"or as fedssl-deploy bundle says"
        ) from error
    return told


@lru_cache(maxsize=1024)  # Flower's engine keeps a process for many messages; a SuperNode does not
def _client_app(told_text: str, node_text: str) -> Any:
    """The app of this node in this run."""
    told, node = _told(told_text), node_of(json.loads(node_text))
    config = told["config"]
    here = {**config, "strategy": config["strategy"]["client"]}  # the server's half is not built here
    check_targets(here, node.allow_targets)
    allow_only(node.allow_targets)
    setup = NodeSetup(config, node)
    setup.check_here()
    store = node.store_of(str(told["run_id"]))
    inner = make_client_app(setup, setup.client_half, store)

    @inner.query("join")
    def join(message: Message, context: Context) -> Message:
        return Message(RecordDict({"join": introduction(setup).to_record()}), reply_to=message)

    def answer(message: Message, context: Context) -> Message:
        with torch_threads(setup.local.threads):  # part of the result
            reply: Message = inner(message, context)
        if versions := store.versions(node.partition_id):
            newest = versions[-1]  # of a round that the server may not have kept yet
            store.prune(range(newest - setup.federation.keep_checkpoints, newest), [node.partition_id])
        return reply

    return answer


def introduction(setup: NodeSetup) -> Introduction:
    """What this node says of itself before the first round."""
    partition_id = setup.node.partition_id
    return Introduction(
        partition_id=partition_id,
        family=setup.family(partition_id),
        num_images=len(setup.data.partitions[partition_id]),
        trains=partition_id != setup.data.public_partition,
        public_fingerprint=setup.public_set.fingerprint,
        rehearsal=setup.rehearses,
        version=version("fedssl"),
    )
