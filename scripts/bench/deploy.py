"""What a message to a real node costs beside its work: Flower's polling, a new process, its imports and its data."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.measure import Result, median_interval, with_this_checkout

from fedssl.deploy.processes import environment, free_port

NUM_ROUNDS = 15  # after one that is not counted
NUM_NODES = 2
IMPORTS = {
    "python": "pass",
    "torch": "import torch",
    "flower": "import flwr.supernode.cli.flwr_clientapp",
    "node": "import fedssl.deploy.clientapp",
}
RUN = (
    f"federation.num_clients={NUM_NODES}", "federation.families=[conv4_16]", "data.num_images=140", "public.size=24",
    "partition=iid", "client.local_epochs=1", "distill.epochs=1", "distill.batch_size=8", "distill.queue_size=16",
    "evaluate.every=1000", f"federation.num_rounds={NUM_ROUNDS + 1}", "device=cpu",
)  # fmt: skip
COMMAND = (sys.executable, "-m", "fedssl.deploy.command")


def deploy() -> Result:
    """Rounds of next to no work, and the imports of a node one by one."""
    imports = {name: [] for name in IMPORTS}  # type: dict[str, list[float]]
    for _ in range(5):
        for name, statement in IMPORTS.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", statement], env=with_this_checkout(), check=True)
            imports[name].append(time.perf_counter() - started)
    with tempfile.TemporaryDirectory() as folder:
        rows = _rounds(Path(folder))
    waited = [row["seconds_clients"] for row in rows["server"][1:]]
    worked = [
        max(own["seconds"] for own in rows["client"] if own["round"] == row["round"]) for row in rows["server"][1:]
    ]
    beside = [w - own for w, own in zip(waited, worked, strict=True)]
    figures = {
        "unit": "seconds",
        "nodes": NUM_NODES,
        "rounds": NUM_ROUNDS,
        "seconds_clients": waited,
        "own_work": worked,
        "beside_the_work": beside,
        "beside_the_work_median": median_interval(beside),
        "imports": imports,
        "imports_medians": {name: median_interval(values)[0] for name, values in imports.items()},
        "job_of_which_it_is_5_percent": 19 * median_interval(beside)[0],
    }
    return figures, []


def _rounds(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of metrics.jsonl of a run over real nodes on loopback, by scope."""
    port = free_port()
    seen = {**environment(folder / "flower"), **with_this_checkout()}
    nodes = []
    try:
        for partition in range(NUM_NODES):
            own = [f"partition_id={partition}", f"store={folder / f'node{partition}'}", "device=cpu"]
            command = [*COMMAND, "client", f"127.0.0.1:{port}", "--insecure", *own]
            nodes.append(subprocess.Popen(command, env=seen, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        server = [*COMMAND, "server", "--insecure", "--port", str(port), *RUN, f"run_dir={folder / 'run'}"]
        subprocess.run(server, env=seen, check=True, stdout=sys.stderr)
    finally:
        for node in nodes:
            node.terminate()
        for node in nodes:
            node.wait()
    rows: dict[str, list[dict[str, Any]]] = {"server": [], "client": []}
    for line in (folder / "run" / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["scope"] in rows:
            rows[row["scope"]].append({"round": row["round"], **row["metrics"]})
    return rows
