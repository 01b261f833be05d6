"""One optimiser step of the server's distillation: targets computed from clients' factors, against ready targets."""

import os
import time
from dataclasses import dataclass

import numpy as np
import torch
from bench.measure import Result, judge, median_interval
from torch import Tensor

from fedssl.config import compose, instantiate
from fedssl.data.images import ImageSet
from fedssl.distill import Distiller
from fedssl.ensemble import EnsembleTarget, Target
from fedssl.models import Model, feature_dim

CLIENTS = 10
PUBLIC = 50_000  # images of 32 x 32
DIMENSION = 128  # of a client's embeddings
BATCH = 128
QUEUE = 2048
SETTINGS = ["data=cifar10", "codec=factor", f"distill.batch_size={BATCH}", f"distill.queue_size={QUEUE}"]
CASES = (("resnet8", "row"), ("resnet8", "none"), ("conv4_16", "row"))  # student, ensemble; the bar is on the first
PAIRS = 31
UNTIMED = 3  # pairs before them
LIMIT = 1.15


@dataclass(frozen=True, kw_only=True)
class ReadyTarget:
    """A target that is there already, and so costs nothing."""

    p: Tensor
    num_samples: int = PUBLIC
    num_anchors: int = PUBLIC
    kernel: bool = False

    def __call__(self, rows: Tensor, anchors: Tensor) -> Tensor:
        """See `Target`."""
        return self.p

    def at(self, temperature: float) -> "ReadyTarget":
        """See `Target`."""
        return self

    def to(self, device: torch.device) -> "ReadyTarget":
        """See `Target`."""
        return self


def public_images() -> ImageSet:
    """Noise: what the pixels are costs nothing."""
    pixels = np.random.default_rng(0).integers(0, 256, (PUBLIC, 3, 32, 32), dtype=np.uint8)
    return ImageSet(pixels=pixels, indices=np.arange(PUBLIC), labels=None, classes=(), name="noise")


def distiller(family: str, target: Target, images: ImageSet) -> Distiller:
    """The server's student of `family`, with a full queue."""
    config = compose([*SETTINGS, "ensemble=row"])  # any rule that has a queue
    backbone = instantiate(config["models"][family])
    student = Model(backbone, instantiate(config["projector"], in_dim=feature_dim(backbone, 32)))
    return Distiller(
        student,
        target,
        images,
        distillation=instantiate(config["distill"]),
        views=instantiate(config["views"]),
        seed=0,
        round_num=1,
        num_rounds=1,
        device=torch.device("cpu"),
    )


def timed(one: Distiller, rows: Tensor) -> float:
    """Seconds of one step."""
    started = time.perf_counter()
    one.step(rows)["loss"].item()
    return time.perf_counter() - started


def step_times(family: str, target: Target, images: ImageSet) -> dict[str, list[float]]:
    """Seconds of steps with ready targets and with computed ones, in turn, on the same images."""
    rng = torch.Generator().manual_seed(0)
    rows, anchors = torch.randperm(PUBLIC, generator=rng)[: BATCH + QUEUE].split([BATCH, QUEUE])
    ready = distiller(family, ReadyTarget(p=target(rows, anchors)), images)
    computed = distiller(family, target, images)
    times: dict[str, list[float]] = {"ready": [], "computed": []}
    for _ in range(UNTIMED + PAIRS):
        rows = torch.randperm(PUBLIC, generator=rng)[:BATCH]
        times["ready"].append(timed(ready, rows))
        times["computed"].append(timed(computed, rows))
    return {name: values[UNTIMED:] for name, values in times.items()}


def distill() -> Result:
    """Every case with all cores as threads, as a server has them."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    config = compose(SETTINGS)
    codec, temperature = instantiate(config["codec"]), config["distill"]["target_temperature"]
    rng = torch.Generator().manual_seed(0)
    uploads = [codec.encode(torch.randn(PUBLIC, DIMENSION, generator=rng), rng) for _ in range(CLIENTS)]
    similarities = [codec.decode(arrays, PUBLIC) for arrays in uploads]
    images = public_images()
    times, ratios = {}, {}
    for family, ensemble in CASES:
        rule = instantiate(compose([*SETTINGS, f"ensemble={ensemble}"])["ensemble"])
        case = times[f"{family}/{ensemble}"] = step_times(
            family, EnsembleTarget(similarities, rule, temperature), images
        )
        ratios[f"{family}/{ensemble}"] = [b / a for a, b in zip(case["ready"], case["computed"], strict=True)]
    figures = {
        "unit": "seconds per step",
        "pairs": PAIRS,
        "threads": torch.get_num_threads(),
        "times": times,
        "medians": {name: {kind: median_interval(t)[0] for kind, t in case.items()} for name, case in times.items()},
        "ratios": {name: median_interval(values) for name, values in ratios.items()},
    }
    return figures, [judge("distill.step", next(iter(ratios.values())), LIMIT, "lower")]
