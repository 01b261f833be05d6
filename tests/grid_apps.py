"""Client apps for the tests of the grids, in a module of their own so that workers can import it."""

import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedssl.errors import BrokenProcessError
from fedssl.federation.records import Header, Upload

NUM_STEPS = 5


def local_weights(weights: np.ndarray, partition_id: int) -> tuple[np.ndarray, int]:
    """Some gradient steps of least squares on data that the partition id alone determines; and the number of rows."""
    rng = np.random.default_rng(partition_id)
    rows = 20 + partition_id
    x = rng.normal(size=(rows, len(weights)))
    y = x @ np.arange(1.0, len(weights) + 1) + rng.normal(size=rows)
    for _ in range(NUM_STEPS):
        weights = weights - 0.1 * x.T @ (x @ weights - y) / rows
    return weights, rows


def least_squares() -> ClientApp:
    """A plain Flower app for stock FedAvg."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        weights, rows = local_weights(message.content["arrays"]["w"].numpy(), int(context.node_config["partition-id"]))
        records = {"arrays": ArrayRecord({"w": Array(weights)}), "metrics": MetricRecord({"num-examples": rows})}
        return Message(RecordDict(records), reply_to=message)

    return app


def uploaded(partition_id: int, received: ArrayRecord, round_num: int) -> Upload:
    """What a client of family `tiny` makes of the weights that it received: a function of these and its partition."""
    rng = np.random.default_rng(partition_id)
    changed = {name: array.numpy() + 0.1 * rng.normal(size=array.shape) for name, array in received.items()}
    arrays = {name: value.astype(np.float32) for name, value in changed.items()}
    header = Header(
        round_num=round_num, partition_id=partition_id, family="tiny", codec="weights", public_fingerprint="f"
    )
    return Upload(
        header=header, arrays=arrays, metrics={"num-examples": 10 + partition_id, "loss": 0.5, "seconds": 0.1}
    )


class Uploads:
    """A client app whose weights are to be averaged."""

    def __call__(self, message: Message, context: Context) -> Message:
        partition_id = int(context.node_config["partition-id"])
        if message.metadata.message_type == "query.info":
            said = {"partition_id": partition_id, "family": "tiny", "num_images": 10 + partition_id, "trains": True}
            return Message(RecordDict({"info": ConfigRecord(said)}), reply_to=message)
        sent = uploaded(partition_id, message.content["arrays"], int(message.content["config"]["server-round"]))
        return Message(sent.to_content(), reply_to=message)


class Behaviour:
    """Does what the message's header asks for; `folder` counts attempts across processes."""

    def __call__(self, message: Message, context: Context) -> Message:
        started = time.time()
        header = message.content["header"]
        partition_id = int(context.node_config["partition-id"])
        action = str(header.get("action", "echo"))
        if action == "raise":
            raise ValueError(f"during local training: no images in partition {partition_id}")
        if action == "break":
            raise BrokenProcessError("no recording")
        if action == "exit":
            sys.exit(3)
        if action == "wrong":
            return None  # type: ignore[return-value]
        if action == "sleep":
            time.sleep(float(header["seconds"]))
        if action in ("die", "die_once"):
            marker = Path(str(header["folder"])) / f"died-{partition_id}"
            if action == "die" or not marker.exists():
                with marker.open("a") as file:
                    file.write("x")
                os.kill(os.getpid(), signal.SIGKILL)
        if action == "mutate":
            message.content["header"]["action"] = "mutated"
            message.content["arrays"]["extra"] = Array(np.zeros(1))
        count = int(context.state["count"]["n"]) + 1 if "count" in context.state else 1
        if action == "count":
            context.state["count"] = MetricRecord({"n": count})
        facts = {
            "page_faults": page_faults() if action == "allocate" else 0,
            "partition": partition_id,
            "partitions": int(context.node_config["num-partitions"]),
            "pid": os.getpid(),
            "threads": torch.get_num_threads(),
            "count": count,
            "private_bytes": private_bytes(),
            "started": started,
            "cwd": str(Path.cwd()),
            "cuda": os.environ.get("CUDA_VISIBLE_DEVICES", "unset"),
            "path": list(sys.path),
        }
        records: dict[str, ArrayRecord | ConfigRecord] = {"facts": ConfigRecord(facts)}
        if "arrays" in message.content:
            arrays = message.content["arrays"]
            records["arrays"] = ArrayRecord({k: Array(a.numpy() + partition_id) for k, a in arrays.items()})
        return Message(RecordDict(records), reply_to=message)


def page_faults() -> int:
    """Pages that the system gave for a step that needs as much memory as the ones before it."""
    for _ in range(3):
        _step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    _step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def _step() -> list[np.ndarray]:
    return [np.ones(size, np.uint8) for _ in range(64) for size in (1 << 20, 3 << 20)]  # no huge pages: 256 MiB


def private_bytes() -> int:
    """Memory that belongs to this process alone, without files and shared memory."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def refuses_to_load() -> Callable[[Message, Context], Message]:
    """An app whose loading fails."""
    raise RuntimeError("no such data set")


def takes_gpu_memory() -> ClientApp:
    """An app that says what it takes of a GPU, which need not be there."""
    app = ClientApp()

    @app.query("gpu_memory")
    def gpu_memory(message: Message, context: Context) -> Message:
        record = MetricRecord({"free": int(10e9), "small": int(1e9), "large": int(3e9)})
        return Message(RecordDict({"gpu_memory": record}), reply_to=message)

    return app
