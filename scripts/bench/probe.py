"""The probes of one evaluation at CIFAR-10's full size: kNN and the linear probe on ready features."""

import os
import time
from collections.abc import Callable

import torch
from bench.measure import Result, judge, median_interval

from fedssl.config import compose, instantiate
from fedssl.evaluate.features import standardise

TRAIN, TEST, DIMENSION, CLASSES = 50_000, 10_000, 512, 10
REPETITIONS = 15
LIMIT = 15.0  # seconds, either probe


def features(count: int, generator: torch.Generator, axes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes that overlap, on axes of decaying strength, no feature below 0: like those of a ResNet-18."""
    labels = torch.randint(CLASSES, (count,), generator=generator)
    latent = torch.randn(count, DIMENSION, generator=generator)
    latent[:, :CLASSES] += 2 * torch.eye(CLASSES)[labels]
    strengths = torch.arange(1, DIMENSION + 1) ** -0.5
    return ((latent * strengths) @ axes).relu(), labels


def probe() -> Result:
    """Both probes, with the numbers of conf/evaluate/default.yaml, all cores as threads."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(DIMENSION, DIMENSION, generator=generator))[0]
    (train, labels), (test, test_labels) = (features(count, generator, axes) for count in (TRAIN, TEST))
    evaluation = instantiate(compose([])["evaluate"])
    split = evaluation.linear.split(labels.numpy())
    train, labels, test, test_labels = (tensor.to(device) for tensor in (train, labels, test, test_labels))

    def nearest() -> torch.Tensor:
        return evaluation.knn.predict(train, labels, test, CLASSES)

    def linear() -> torch.Tensor:
        ours, theirs = standardise(train, test)
        classifier, _ = evaluation.linear.fit(
            ours, labels, num_classes=CLASSES, split=split, logistic=evaluation.logistic
        )
        return classifier.predict(theirs)

    probes: dict[str, Callable[[], torch.Tensor]] = {"knn": nearest, "linear": linear}
    seconds: dict[str, list[float]] = {name: [] for name in probes}
    top1 = {}
    for name, predict in probes.items():
        top1[name] = (predict() == test_labels).float().mean().item()  # untimed
    for _ in range(REPETITIONS):
        for name, predict in probes.items():
            started = time.perf_counter()
            predict().sum().item()  # waits for a GPU
            seconds[name].append(time.perf_counter() - started)
    figures = {
        "unit": "seconds",
        "repetitions": REPETITIONS,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "medians": {name: median_interval(values)[0] for name, values in seconds.items()},
        "top1": top1,
    }
    return figures, [judge(f"probe.{name}_s", values, LIMIT, "lower") for name, values in seconds.items()]
