"""SimCLR views of a batch, against torchvision's per image and against PIL's in a DataLoader with two workers.

On a GPU, too, where there is one: there against torchvision's of the whole batch.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from bench.measure import Result, judge, median_interval, wait
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from fedssl.config import compose, instantiate
from fedssl.cuda_graph import WORTH, Replayed, can_record
from fedssl.data.views import ColourViews
from fedssl.data.views.colour import can_fuse_on

BATCH, SIZE = 256, 32
SETTINGS = ["data=cifar10", "views=colour"]
LIMITS = {"exact": 6, "linear": 12}  # times torchvision's views per second, on one thread
PAIRS = 15
UNTIMED = 2  # pairs before them
AT_LEAST_S = 0.1  # a repetition: a batch of ours ends within milliseconds, so some are timed together
WORKERS = 2
EPOCH = 8  # batches a repetition of a DataLoader
ON_A_GPU = (256, 1024)  # images a batch
CPU = torch.device("cpu")

Batch = Callable[[], Tensor]


def pixels(count: int = BATCH) -> Tensor:
    """Noise: what the pixels are costs nothing, here and in torchvision."""
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, SIZE, SIZE), dtype=np.uint8))


def ours(colour: str, count: int = BATCH, device: torch.device = CPU) -> Batch:
    """What `views.colour=<colour>` names."""
    views = instantiate(compose([*SETTINGS, f"views.colour={colour}"])["views"])
    images, rng = pixels(count).to(device), torch.Generator(device).manual_seed(0)
    return lambda: cast(Tensor, views(images, rng))


def replayed(colour: str, count: int, device: torch.device, kernel: str = "fused") -> Batch:
    """The same as a training takes them on a GPU by default: picked by position, recorded once and replayed."""
    views = instantiate(compose([*SETTINGS, f"views.colour={colour}", f"views.kernel={kernel}"])["views"])
    images, rng = pixels(count).to(device), torch.Generator(device).manual_seed(0)
    rows = torch.arange(count, device=device)
    steps = Replayed(steps={count: WORTH} if can_record(device) else {}, networks=(), generators=(rng,))

    def take(rows: Tensor) -> dict[str, Tensor]:
        return {"first": views(images[rows], rng)[:1]}  # what is returned is copied, and a training copies no views

    return lambda: steps(take, rows)["first"]


def torchvision_views(*, floats_first: bool) -> v2.Compose:
    """The same recipe, as torchvision's documentation composes it, of uint8 tensors, float tensors or PIL images."""
    views = instantiate(compose(SETTINGS)["views"])
    assert isinstance(views, ColourViews)
    assert views.blur_probability == 0
    to_float: list[Any] = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    jitter = v2.ColorJitter(views.brightness, views.contrast, views.saturation, views.hue)
    recipe = [
        v2.RandomResizedCrop(SIZE, scale=tuple(views.crop_scale), ratio=tuple(views.crop_ratio), antialias=True),
        v2.RandomHorizontalFlip(views.flip_probability),
        v2.RandomApply([jitter], views.jitter_probability),
        v2.RandomGrayscale(views.grayscale_probability),
    ]
    steps = [*to_float, *recipe] if floats_first else [*recipe, *to_float]
    return v2.Compose([*steps, v2.Normalize(list(views.mean), list(views.std))])


def torchvision_batch(*, floats_first: bool) -> Batch:
    """One image after the other."""
    transform, images = torchvision_views(floats_first=floats_first), pixels()
    return lambda: torch.stack([transform(image) for image in images])


def torchvision_one_draw(count: int, device: torch.device) -> Batch:
    """The whole batch at once: the same box and colours for all its images, so less than a training needs."""
    transform, images = torchvision_views(floats_first=True), pixels(count).to(device)
    return lambda: cast(Tensor, transform(images))


class Images(Dataset[Tensor]):
    """An epoch of views, one at a time."""

    def __init__(self, *, pil: bool) -> None:
        self.transform = torchvision_views(floats_first=False)
        arrays = pixels()
        self.images = [Image.fromarray(a.permute(1, 2, 0).numpy()) for a in arrays] if pil else list(arrays)

    def __len__(self) -> int:
        return EPOCH * BATCH

    def __getitem__(self, index: int) -> Tensor:
        return cast(Tensor, self.transform(self.images[index % BATCH]))


def seconds(batch: Batch, device: torch.device = CPU, num_views: int = BATCH) -> float:
    """Per batch, which returns `num_views`."""
    wait(device)
    started = time.perf_counter()
    count = 0
    while time.perf_counter() - started < AT_LEAST_S:
        assert batch().shape == (num_views, 3, SIZE, SIZE)
        count += 1
    wait(device)
    return (time.perf_counter() - started) / count


def loader_seconds(loader: DataLoader[Tensor]) -> float:
    """Per batch of an epoch; its workers are there already and idle before and after it."""
    started = time.perf_counter()
    for batch in loader:
        assert batch.shape == (BATCH, 3, SIZE, SIZE)
    return (time.perf_counter() - started) / EPOCH


def interleaved(ways: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Seconds per batch of every way, in turn."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(UNTIMED + PAIRS):
        for name, way in ways.items():
            times[name].append(way())
    return {name: values[UNTIMED:] for name, values in times.items()}


def ratios(times: Mapping[str, list[float]], peer: str) -> dict[str, list[float]]:
    """How many times as many views per second as the peer, by pair."""
    return {name: [b / a for a, b in zip(times[name], times[peer], strict=True)] for name in LIMITS}


def on_device(device: torch.device, counts: Sequence[int] = ON_A_GPU) -> dict[str, Any]:
    """Million views per second, by images a batch."""
    rates = {}
    for count in counts:
        ways = {"torchvision_one_draw": partial(seconds, torchvision_one_draw(count, device), device, count)}
        for colour in LIMITS:
            ways[colour] = partial(seconds, ours(colour, count, device), device, count)
            for kernel, name in (("fused", "replayed"), ("torch", "operations")):
                batch = replayed(colour, count, device, kernel)
                ways[f"{colour}_{name}"] = partial(seconds, batch, device, 1)  # hands out one
        times = interleaved(ways)
        rates[str(count)] = {
            name: median_interval([count / second / 1e6 for second in values]) for name, values in times.items()
        }
    views = instantiate(compose(SETTINGS)["views"])
    fused = can_fuse_on(pixels(1).to(device).device, views, (SIZE, SIZE))
    return {"unit": "million views per second", "fused": fused, "rates": rates}


def views() -> Result:
    """In this process on one thread; then on two, against two workers; then on the GPU, without a bar."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    batches = {name: ours(name) for name in LIMITS}
    for batch in batches.values():
        batch()
    first = time.perf_counter() - started
    mine = {name: partial(seconds, batch) for name, batch in batches.items()}
    peers = {
        "torchvision_uint8": partial(seconds, torchvision_batch(floats_first=False)),
        "torchvision_float": partial(seconds, torchvision_batch(floats_first=True)),
    }
    times = {"1_thread": interleaved({**mine, **peers})}
    peer = min(peers, key=lambda name: float(np.median(times["1_thread"][name])))
    times_faster = {"torchvision": ratios(times["1_thread"], peer)}

    torch.set_num_threads(WORKERS)
    loaders = {
        name: DataLoader(Images(pil=name == "pil"), BATCH, num_workers=WORKERS, persistent_workers=True)
        for name in ("pil", "torchvision")
    }
    two = times[f"{WORKERS}_threads"] = interleaved(
        {**mine, **{f"{name}_workers": partial(loader_seconds, loader) for name, loader in loaders.items()}}
    )
    times_faster |= {f"{name}_workers": ratios(two, f"{name}_workers") for name in loaders}
    figures = {
        "unit": f"seconds per batch of {BATCH} views",
        "pairs": PAIRS,
        "first_batches_s": first,
        "torchvision_is_faster_on": peer.removeprefix("torchvision_"),
        "times": times,
        "medians": {at: {name: median_interval(t)[0] for name, t in ways.items()} for at, ways in times.items()},
        "times_faster": {
            peer: {name: median_interval(values) for name, values in r.items()} for peer, r in times_faster.items()
        },
    }
    if torch.cuda.is_available():  # the DataLoaders' workers have been forked
        figures["gpu"] = on_device(torch.device("cuda"))
    bars = [
        judge(f"views.{name}", times_faster["torchvision"][name], limit, "higher") for name, limit in LIMITS.items()
    ]
    return figures, bars
