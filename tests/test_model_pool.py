"""Models that are handed out again, against new ones."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from fedssl.config import compose
from fedssl.federation.model_pool import ModelPool
from fedssl.federation.setup import Setup
from fedssl.models import Model

FAMILIES = tuple(compose([])["models"])


class Counting(nn.Module):
    """Keeps more than weights."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.calls = 0
        self.seen: list[float] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.seen.append(float(x.sum()))
        features: torch.Tensor = self.linear(x)
        return features


class Builder:
    """Counts how many models were built."""

    def __init__(self, backbone: Callable[[], nn.Module]) -> None:
        self.initial = Model(backbone(), nn.Linear(4, 2))
        self.built = 0

    def __call__(self, family: str) -> Model:
        self.built += 1
        return copy.deepcopy(self.initial)


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


def train_a_step(model: Model) -> None:
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
    model.projector(model.backbone(torch.randn(8, 4))).sum().backward()
    optimiser.step()
    model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_used_model_of_every_family_comes_back_as_new(family: str) -> None:
    setup = Setup(compose(["data=cifar10"]))
    pool = ModelPool(setup.build_model)
    model = pool(family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
            parameter.grad = torch.ones_like(parameter)
        for buffer in model.buffers():
            buffer.add_(1)
    model.eval().requires_grad_(False)
    pool.take_back()
    again, new = pool(family), setup.build_model(family)
    assert again is model
    torch.testing.assert_close(again.state_dict(), new.state_dict(), rtol=0, atol=0)
    assert [part.training for part in again.modules()] == [part.training for part in new.modules()]
    assert all(parameter.grad is None and parameter.requires_grad for parameter in again.parameters())


def test_models_of_one_task_are_distinct_and_are_built_once() -> None:
    build = Builder(plain)
    pool = ModelPool(build)
    for _ in range(3):
        first, second = pool("f"), pool("f")
        assert first is not second
        train_a_step(first)
        torch.testing.assert_close(second.state_dict(), build.initial.state_dict())
        pool.take_back()
    assert build.built == 3  # the pool's own, and two


def test_what_a_task_holds_is_not_lent_again_before_its_end() -> None:
    pool = ModelPool(Builder(plain))
    model = pool("f")
    train_a_step(model)
    kept = copy.deepcopy(model.state_dict())
    pool("f")
    torch.testing.assert_close(model.state_dict(), kept)


def hook(model: Model) -> None:
    model.projector.register_forward_hook(lambda *_: None)


def replace(model: Model) -> None:
    model.projector = nn.Linear(4, 3)


def widen(model: Model) -> None:
    model.projector.bias = nn.Parameter(torch.zeros(3))


def remember(model: Model) -> None:
    model.backbone.note = [1]  # type: ignore[assignment]


def momentum(model: Model) -> None:
    model.backbone[1].momentum = 0.5  # type: ignore[index, union-attr]


@pytest.mark.parametrize("change", [hook, replace, widen, remember, momentum])
def test_a_model_that_was_rebuilt_is_not_lent_again(change: Callable[[Model], None]) -> None:
    build = Builder(plain)
    pool = ModelPool(build)
    model = pool("f")
    change(model)
    pool.take_back()
    again = pool("f")
    assert again is not model
    torch.testing.assert_close(again.state_dict(), build.initial.state_dict())
    assert not again.projector._forward_hooks


def test_a_backbone_that_keeps_more_than_weights_is_built_anew() -> None:
    build = Builder(Counting)
    pool = ModelPool(build)
    for _ in range(2):
        model = pool("f")
        assert isinstance(model.backbone, Counting)
        assert (model.backbone.calls, model.backbone.seen) == (0, [])
        train_a_step(model)
        pool.take_back()
