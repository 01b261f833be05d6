"""Replayed steps: the ordinary training in less time, or, where a step cannot be recorded, the ordinary training."""

import gc
import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedssl.config import compose, instantiate
from fedssl.cuda_graph import ORDINARY, WORTH, Recording, Replayed, TakeStep, _warn_of_reading
from fedssl.data.images import ImageSet
from fedssl.distill import Distiller
from fedssl.ensemble import EnsembleTarget, MeanKernel, RowMean
from fedssl.errors import BrokenProcessError
from fedssl.methods import Method
from fedssl.models import Model
from fedssl.models.backbones import Conv4
from fedssl.models.heads import MLP
from fedssl.seeding import seeded_init
from fedssl.train import train
from tests import test_distill

CUDA = torch.device("cuda")
BATCH = 8
EPOCHS = 4  # of five batches and a smaller one, of which there are too few


# -- which batches are replayed, by recordings that only remember what is called with what -----------------------------
class Remembering(Replayed):
    """A replay takes the step again on the rows that were recorded, as a GPU would."""

    replays = 0

    def _watched(self, step: TakeStep, rows: Tensor) -> dict[str, Tensor]:
        return step(rows)

    def _record(self, step: TakeStep, rows: Tensor) -> Recording:
        recording = Recording(rows=rows.clone(), measures={"loss": torch.zeros(())}, replay=lambda: replay())

        def replay() -> None:
            recording.measures["loss"].copy_(step(recording.rows)["loss"])
            self.replays += 1

        return recording


def test_every_size_of_batches_is_replayed_after_some_ordinary_steps() -> None:
    taken: list[list[int]] = []

    def step(rows: Tensor) -> dict[str, Tensor]:
        taken.append(rows.tolist())
        return {"loss": rows.sum().float()}

    replayed = Remembering(steps={2: 24, 1: 12}, networks=(), generators=())
    batches = [torch.tensor(rows) for epoch in range(12) for rows in ([epoch, 1], [2, epoch], [epoch])]
    measured = [replayed(step, rows)["loss"] for rows in batches]
    assert taken == [rows.tolist() for rows in batches]  # every image once, in order
    assert [int(loss) for loss in measured] == [int(rows.sum()) for rows in batches]  # none overwrites another
    assert replayed.replays == 36 - 2 * ORDINARY


@pytest.mark.parametrize("steps", [{}, {2: WORTH - 1}, {3: WORTH}])
def test_without_enough_steps_of_a_size_each_is_an_ordinary_one(steps: dict[int, int]) -> None:
    replayed = Remembering(steps=steps, networks=(), generators=())
    measured = [replayed(lambda rows: {"loss": rows.sum().float()}, torch.tensor([i, i]))["loss"] for i in range(WORTH)]
    assert [int(loss) for loss in measured] == [2 * i for i in range(WORTH)]
    assert replayed.replays == 0


@pytest.mark.parametrize("out_of_memory", [False, True])
def test_a_recording_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, out_of_memory: bool) -> None:
    """What ends a recording that failed is an error of its own."""

    class Ending:
        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None:
            raise RuntimeError("the capture was invalidated")

    def step(rows: Tensor) -> dict[str, Tensor]:
        if replayed._taken[1] > ORDINARY:
            raise (torch.cuda.OutOfMemoryError if out_of_memory else RuntimeError)("the cause")
        return {}

    monkeypatch.setattr(torch.cuda, "CUDAGraph", MagicMock())
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: Ending())
    monkeypatch.setattr(Replayed, "_watched", lambda self, step, rows: step(rows))
    replayed = Replayed(steps={1: WORTH}, networks=(), generators=())
    for _ in range(ORDINARY):
        replayed(step, torch.tensor([0]))
    said = r"recorded as a CUDA graph: the cause. Set client\.cuda_graphs=false"
    with pytest.raises(BrokenProcessError, match=said):
        replayed(step, torch.tensor([0]))


def test_nothing_of_a_distillation_outlives_it() -> None:
    """Neither images nor recordings wait for Python to collect garbage."""
    seen: list[weakref.ref[Distiller]] = []
    original = Distiller.end

    def end(distiller: Distiller) -> None:
        seen.append(weakref.ref(distiller))
        original(distiller)

    target = EnsembleTarget(test_distill.clients(32), RowMean(), 0.1)
    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Distiller, "end", end)
            test_distill.run(
                test_distill.conv_student(), target, test_distill.image_set(32, size=8), test_distill.NUMBERS
            )
        assert [there() for there in seen] == [None]
    finally:
        gc.enable()


# -- on a GPU ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One entry a replay; and convolutions that are the same each time."""
    counted: list[None] = []
    original = torch.cuda.CUDAGraph.replay

    def replay(graph: torch.cuda.CUDAGraph) -> None:
        counted.append(None)
        original(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", replay)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    return counted


class Dropping(nn.Sequential):
    """A backbone that draws from torch's own generator."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(768, 32), nn.Dropout(0.5), nn.ReLU())


def both(
    backbone: Callable[[], nn.Module],
    overrides: list[str],
    method: Method | None = None,
    epochs: int = EPOCHS,
    **changes: Any,
) -> Any:
    """The same training without and with replays: metrics, state and model of each."""
    config = compose(overrides)
    results = []
    for cuda_graphs in (False, True):
        used = method or instantiate(config["method"])
        with seeded_init(0, "test"):
            model = Model(backbone(), MLP(in_dim=32, hidden_dim=None, out_dim=8, batch_norm=False), used.heads(8))
        memory: dict[str, Tensor] = {}
        pixels = np.random.default_rng(0).integers(0, 256, (5 * BATCH + 3, 3, 8, 8), dtype=np.uint8)
        metrics = train(
            model,
            ImageSet(pixels=pixels, indices=np.arange(len(pixels)), labels=None, classes=(), name="noise"),
            method=used,
            memory=memory,
            views=instantiate(config["views"]),
            optimisation=instantiate(config["client"]["optimisation"]),
            batch_size=BATCH,
            epochs=epochs,
            seed=3,
            round_num=1,
            num_rounds=2,
            device=CUDA,
            cuda_graphs=cuda_graphs,
            **changes,
        )
        results.append((metrics, model.state_dict() | memory))
    return results


def assert_alike(results: Any) -> None:
    """To the last digits: the learning rate is float32 where it lies on the device."""
    (expected, plain), (measured, replayed) = results
    for name in expected.keys() - {"seconds"}:
        assert measured[name] == pytest.approx(expected[name], rel=1e-4), name
    assert plain.keys() == replayed.keys()
    for name, value in plain.items():
        torch.testing.assert_close(replayed[name], value, rtol=1e-3, atol=1e-4, msg=name)


SPECIAL = {
    "moco": [f"method.queue_size={2 * BATCH}"],
    "swav": [f"method.queue_size={2 * BATCH}"],
    "vicreg": ["client.optimisation.lr=0.001"],
    "barlow_twins": ["client.optimisation.lr=0.001"],
    "simsiam": ["client.optimisation.lr=0.001"],
}
SGD = [
    "client.optimisation.optimiser=sgd", "client.optimisation.lr=0.05", "client.optimisation.schedule=cosine",
    "client.optimisation.warmup_steps=5",
]  # fmt: skip
METHODS = ["simclr", "info_nce", "byol", "simsiam", "moco", "swav", "vicreg", "barlow_twins"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", METHODS)
def test_replayed_training_is_the_ordinary_one(replays: list[None], name: str) -> None:
    """The learning rate changes with every step, and the last batch of an epoch is a smaller one."""
    assert_alike(both(lambda: Conv4(width=4), [f"method={name}", *SGD, *SPECIAL.get(name, [])]))
    assert len(replays) == 5 * EPOCHS - ORDINARY


@pytest.mark.gpu
def test_adam_dropout_and_a_penalty_are_replayed_too(replays: list[None]) -> None:
    def penalty(model: Model, x1: Tensor, x2: Tensor) -> Tensor:
        return 0.01 * model(x1).square().mean() + 0.01 * model(x2).square().mean()

    assert_alike(both(Dropping, ["client.optimisation.schedule=cosine"], penalty=penalty, epochs=WORTH))
    assert len(replays) == 6 * WORTH - 2 * ORDINARY  # the smaller batches, too


@pytest.mark.gpu
def test_half_precision_is_replayed_too(replays: list[None]) -> None:
    (expected, _), (measured, _) = both(lambda: Conv4(width=4), SGD, amp=True)
    assert measured["loss"] == pytest.approx(expected["loss"], rel=1e-2)
    assert len(replays) == 5 * EPOCHS - ORDINARY


@dataclass(frozen=True)
class Reading(Method):
    """A loss of the user's that looks at a value."""

    def loss(self, model: Model, state: nn.Module, x1: Tensor, x2: Tensor) -> Tensor:
        loss = (model(x1) - model(x2)).square().mean()
        return loss * 2 if loss.item() > 0.1 else loss


@dataclass(frozen=True)
class Growing(Method):
    """Its state gets a new tensor in every step."""

    def new_state(self, model: Model) -> nn.Module:
        state = nn.Module()
        state.register_buffer("steps", torch.zeros(1))
        return state

    def loss(self, model: Model, state: nn.Module, x1: Tensor, x2: Tensor) -> Tensor:
        assert isinstance(state.steps, Tensor)
        state.steps = state.steps + 1
        return (model(x1) - model(x2)).square().mean() / state.steps.mean()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("method", "why"), [(Reading(), "steps that read from the device"), (Growing(), "replaces tensors")]
)
def test_a_step_that_cannot_be_recorded_is_an_ordinary_one_and_the_log_says_why(
    replays: list[None], caplog: pytest.LogCaptureFixture, method: Method, why: str
) -> None:
    _warn_of_reading.cache_clear()
    with caplog.at_level(logging.DEBUG, logger="fedssl.cuda_graph"):
        assert_alike(both(lambda: Conv4(width=4), SGD, method))
    assert not replays
    assert why in caplog.text


TARGETS = {"ce": RowMean(), "cka": MeanKernel(), "coordinates": MeanKernel()}


@pytest.mark.gpu
@pytest.mark.parametrize("warmup", ["once", "every_epoch"])
@pytest.mark.parametrize("loss", TARGETS)
def test_replayed_distillation_is_the_ordinary_one(replays: list[None], loss: str, warmup: str) -> None:
    """Batches of 16, a low rate: rounded differently it moves losses by 5e-7 (.05: by 5 %), off by 1 % by 1e-3."""
    if loss != "ce" and warmup != "once":
        pytest.skip("no queue")
    images, results = test_distill.image_set(64, size=8), []
    numbers = replace(
        test_distill.NUMBERS, epochs=8, batch_size=16, queue_size=32, loss=loss, warmup=warmup, num_coordinates=4,
        optimisation=replace(test_distill.SGD, lr=0.005, schedule="cosine"),
    )  # fmt: skip
    for cuda_graphs in (False, True):
        student = test_distill.conv_student()
        target = EnsembleTarget(test_distill.clients(64), TARGETS[loss], 0.1)
        views = instantiate(compose(["views=shift"])["views"])
        changes = {"device": CUDA, "cuda_graphs": cuda_graphs, "views": views}
        metrics = test_distill.run(student, target, images, numbers, **changes)
        results.append((metrics, student.state_dict()))
    assert_alike(results)
    assert len(replays) == numbers.num_steps(64) - ORDINARY
