"""A whole FLESD round on Ray, against its arithmetic alone, as parallel as the cores allow.

Beside them, without a bar, a straightforward implementation: PIL views in a DataLoader, a process per client, dense
similarity matrices.
"""

import io
import json
import os
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from bench.measure import Result, judge, with_this_checkout
from bench.sitting import Sitting, ratios, rounds_in_turn
from bench.turns import Turns
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from fedssl import run
from fedssl.config import compose, instantiate
from fedssl.environment import keep_memory
from fedssl.evaluate.features import CPU_BATCH
from fedssl.federation.rounds import Rounds, State
from fedssl.losses import cosine_distance, nt_xent
from fedssl.models import Model, feature_dim

CLIENTS, PRIVATE, PUBLIC = 5, 1_000, 2_000  # images: of each client, in the public set
FAMILIES = ("conv4_16", "conv4_32", "resnet8")  # partition p has families[p % 3]
LOCAL_EPOCHS, DISTILL_EPOCHS, BATCH = 2, 3, 128
COORDINATES = 128
# Of each engine, in both orders equally often; the first round, which starts workers, does not count.
SITTINGS, ROUNDS = 6, 4
LIMIT = 1.15
CORES = len(os.sched_getaffinity(0))
Wait = Callable[[], None]  # between two rounds, for this engine's turn
SETTINGS = [
    "experiment=cifar10_small", "partition=iid", f"public.size={PUBLIC}", f"federation.num_clients={CLIENTS}",
    f"federation.families=[{','.join(FAMILIES)}]", f"federation.server_threads={CORES}",
    f"federation.num_rounds={ROUNDS}", f"client.local_epochs={LOCAL_EPOCHS}", f"client.batch_size={BATCH}",
    f"distill.epochs={DISTILL_EPOCHS}", f"distill.batch_size={BATCH}", "evaluate.every=1000",
]  # fmt: skip


def images(count: int, seed: int) -> np.ndarray:
    """Noise, (count, 32, 32, 3): what the pixels are costs nothing."""
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


# --- ours -----------------------------------------------------------------------------------------------------------
def ours(num_rounds: int, wait: Wait) -> list[float]:
    """Seconds of the rounds of a run, its checkpoints and logs included and its evaluation, at the end, left out."""
    one_round = Rounds.one_round

    def in_turn(self: Rounds, state: State, round_num: int) -> State:
        if round_num > 1:
            wait()
        return one_round(self, state, round_num)

    with tempfile.TemporaryDirectory() as folder, patch.object(Rounds, "one_round", in_turn):
        root = Path(folder)
        for split, count in (("train", CLIENTS * PRIVATE + PUBLIC), ("test", 100)):
            write_parquet(root / "cifar10" / f"{split}-0.parquet", images(count, 0))
        size = f"data.num_images={CLIENTS * PRIVATE + PUBLIC}"
        config = compose(
            [*SETTINGS, size, f"data.root={root}", f"run_dir={root}/run", f"federation.num_rounds={num_rounds}"]
        )
        run(config)
        rows = map(json.loads, (root / "run" / "metrics.jsonl").read_text().splitlines())
        servers = [row["metrics"] for row in rows if row["scope"] == "server"]
    return [row["seconds"] - row["seconds_evaluation"] for row in servers]


def write_parquet(path: Path, pixels: np.ndarray) -> None:
    """Images, (n, h, w, 3), with ten classes in turn, as a data set of parquet files has them."""
    encoded = []
    for image in pixels:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "png", compress_level=1)
        encoded.append({"bytes": file.getvalue(), "path": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = [i % 10 for i in range(len(pixels))]
    pq.write_table(pa.table({"img": encoded, "label": labels}), path)


# --- the arithmetic -------------------------------------------------------------------------------------------------
@cache
def ready(batch: int) -> Tensor:
    """Random views that are there already, in the layout that convolutions like best."""
    return torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)


def new_model(family: str) -> Model:
    """A network of the run's."""
    config = compose(SETTINGS)
    backbone = instantiate(config["models"][family])
    return Model(backbone, instantiate(config["projector"], in_dim=feature_dim(backbone, 32)))


@cache
def kept_model(family: str) -> Model:
    """One that a worker reuses."""
    return new_model(family)


def bare_client(family: str) -> None:
    """The steps of a client's local training, and one pass of the public set."""
    model = kept_model(family).train()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    for size in LOCAL_EPOCHS * _batches(PRIVATE):
        z1, z2 = model(ready(2 * size)).chunk(2)
        _step(nt_xent(z1, z2, 0.1), optimiser)
    model.eval()
    with torch.no_grad():
        for size in _batches(PUBLIC, CPU_BATCH):
            model.backbone(ready(size))


def bare_server(family: str) -> None:
    """The steps of one student's distillation, towards random coordinates."""
    model = kept_model(family).train()
    head = nn.Linear(feature_dim(model.backbone, 32), COORDINATES)
    model.train()
    optimiser = torch.optim.Adam([*model.backbone.parameters(), *head.parameters()], lr=1e-3, fused=True)
    coordinates = torch.randn(BATCH, COORDINATES)
    for _ in range(DISTILL_EPOCHS * (PUBLIC // BATCH)):
        _step(cosine_distance(head(model.backbone(ready(BATCH))), coordinates), optimiser)


def _batches(count: int, size: int = BATCH) -> tuple[int, ...]:
    full, rest = divmod(count, size)
    return (size,) * full + ((rest,) if rest >= 2 else ())


def _step(loss: Tensor, optimiser: torch.optim.Optimizer) -> None:
    loss.backward()  # type: ignore[no-untyped-call]
    optimiser.step()
    optimiser.zero_grad()


def parts(num_rounds: int, wait: Wait) -> list[float]:
    """Seconds of rounds that are nothing but those steps: clients at once on the cores, then students at once."""
    families = [FAMILIES[p % len(FAMILIES)] for p in range(CLIENTS)]
    done = []
    with ProcessPoolExecutor(CORES, initializer=_one_core) as pool:
        for round_num in range(1, num_rounds + 1):
            if round_num > 1:
                wait()
            started = time.perf_counter()
            for task, names in ((bare_client, families), (bare_server, list(FAMILIES))):
                longest_first = sorted(names, key=FAMILIES.index, reverse=True)
                list(pool.map(task, longest_first))
            done.append(time.perf_counter() - started)
    return done


def _one_core() -> None:
    """What a worker of ours is told, too."""
    keep_memory()
    torch.set_num_threads(1)


# --- a straightforward implementation -------------------------------------------------------------------------------
class Pictures(Dataset[tuple[Tensor, Tensor, int]]):
    """Two PIL views of each image."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.images = [Image.fromarray(image) for image in pixels]
        self.view = v2.Compose([
            v2.RandomResizedCrop(32, (0.2, 1.0)),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.5] * 3),
        ])  # fmt: skip

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, int]:
        return self.view(self.images[i]), self.view(self.images[i]), i


def plain_client(seed: int, family: str, state: Mapping[str, Tensor]) -> np.ndarray:
    """Train on PIL views, then the dense matrix of the public set's cosines."""
    torch.set_num_threads(1)
    model = new_model(family)
    model.load_state_dict(state)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(LOCAL_EPOCHS):
        for x1, x2, _ in DataLoader(Pictures(images(PRIVATE, seed)), BATCH, shuffle=True):
            z1, z2 = model(torch.cat([x1, x2])).chunk(2)
            _step(nt_xent(z1, z2, 0.1), optimiser)
    model.eval()
    public = torch.from_numpy(images(PUBLIC, 99)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        z = F.normalize(torch.cat([model(x) for x in public.split(256)]), dim=1)
    return (z @ z.T).numpy()


def plain(num_rounds: int, wait: Wait) -> list[float]:
    """Seconds of its rounds."""
    torch.set_num_threads(CORES)
    models = {family: new_model(family) for family in FAMILIES}
    done = []
    with ProcessPoolExecutor(CLIENTS) as pool:
        for _ in range(num_rounds):
            started = time.perf_counter()
            families = [FAMILIES[p % len(FAMILIES)] for p in range(CLIENTS)]
            states = [models[family].state_dict() for family in families]
            target = torch.from_numpy(np.mean(list(pool.map(plain_client, range(CLIENTS), families, states)), axis=0))
            for model in models.values():
                optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
                for _ in range(DISTILL_EPOCHS):
                    for x, _, rows in DataLoader(Pictures(images(PUBLIC, 99)), BATCH, shuffle=True, drop_last=True):
                        z = F.normalize(model.train()(x), dim=1)
                        p = (target[rows][:, rows] / 0.1).softmax(dim=1)
                        _step(F.cross_entropy(z @ z.T / 0.1, p), optimiser)
            done.append(time.perf_counter() - started)
    return done


# --- together -------------------------------------------------------------------------------------------------------
ENGINES: dict[str, Callable[[int, Wait], list[float]]] = {"parts": parts, "ours": ours, "plain": plain}


def start(engine: str, folder: Path) -> Sitting:
    """One start of an engine."""
    return Sitting(engine, [sys.executable, "-m", "bench.flesd", engine], folder, with_this_checkout())


def flesd() -> Result:
    """Sittings of ours and the parts, forwards and backwards in turn, and their rounds in turn."""
    done: dict[str, list[list[float]]] = {"parts": [], "ours": []}
    with tempfile.TemporaryDirectory(prefix="fedssl-flesd-") as name:
        for i in range(SITTINGS):
            starts = [partial(start, engine, Path(name)) for engine in (done if i % 2 == 0 else reversed(done))]
            for engine, report in rounds_in_turn(starts, ROUNDS - 1).items():
                done[engine].append(report["seconds"][1:])
        [report] = rounds_in_turn([partial(start, "plain", Path(name))], 0).values()
        done["plain"] = [report["seconds"][1:]]
    figures: dict[str, Any] = {
        "unit": "seconds per round",
        "cores": CORES,
        "sittings": SITTINGS,
        "rounds": done,
        "medians": {engine: float(np.median(seconds)) for engine, seconds in done.items()},
    }
    return figures, [judge("flesd.round", ratios(done["ours"], done["parts"]), LIMIT, "lower")]


def main() -> None:
    parser = ArgumentParser()
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("--turns", type=Path)
    given = parser.parse_args()
    seconds = ENGINES[given.engine](ROUNDS, Turns(given.turns).wait)
    print("RESULT", json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    from bench.flesd import main as importable  # processes import what they run by this module's name, not `__main__`

    importable()
