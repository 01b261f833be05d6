"""Compiled backbones: the same training to the last digits, once a family, full batches only, or no compiler."""

import copy
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedssl.config import compose, instantiate
from fedssl.data.images import ImageSet
from fedssl.errors import ConfigError
from fedssl.models import Model, compiled
from fedssl.models.backbones import Conv4
from fedssl.models.heads import MLP
from fedssl.seeding import seeded_init
from fedssl.train import train

CPU = torch.device("cpu")
BATCH = 8


def new_model() -> Model:
    with seeded_init(0, "test"):
        return Model(Conv4(width=4), MLP(in_dim=32, hidden_dim=None, out_dim=8, batch_norm=False))


def images(number: int) -> ImageSet:
    pixels = np.random.default_rng(0).integers(0, 256, (number, 3, 8, 8), dtype=np.uint8)
    return ImageSet(pixels=pixels, indices=np.arange(number), labels=None, classes=(), name="noise")


def run(model: Model, number: int = 2 * BATCH, **changes: Any) -> dict[str, float]:
    """An epoch by plain SGD, so that weights differ by as much as gradients do."""
    config = compose(["client.optimisation.optimiser=sgd", "client.optimisation.lr=0.1"])
    settings: dict[str, Any] = {
        "method": instantiate(config["method"]),
        "views": instantiate(config["views"]),
        "optimisation": instantiate(config["client"]["optimisation"]),
        "batch_size": BATCH,
        "epochs": 1,
        "seed": 3,
        "round_num": 1,
        "num_rounds": 1,
        "device": CPU,
    }
    return train(model, images(number), **(settings | changes))


@pytest.fixture
def graphs() -> Iterator[Any]:
    """How many graphs torch has compiled since the test began."""
    torch.compiler.reset()
    assert compiled._possible("cpu"), "the tests need a C++ compiler"  # its trial is a graph, too
    counters = torch._dynamo.utils.counters
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch.compiler.reset()


def test_training_is_the_same_to_the_last_digits(graphs: Any) -> None:
    plain, fast = new_model(), new_model()
    expected, measured = run(plain), run(fast, compile_mode="default")
    assert graphs() == 1
    assert measured["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    for (name, value), other in zip(plain.state_dict().items(), fast.state_dict().values(), strict=True):
        torch.testing.assert_close(other, value, rtol=1e-4, atol=1e-6, msg=name)


def test_a_worker_compiles_a_family_once_and_batches_of_another_size_not_at_all(graphs: Any) -> None:
    for number in (2 * BATCH, 2 * BATCH + 3, BATCH + 5, 6):  # 6: less than a batch
        run(new_model(), number, compile_mode="default")
    assert graphs() == 1


def test_what_follows_the_model_is_compiled_too(graphs: Any) -> None:
    method = instantiate(compose(["method=byol"])["method"])
    model = new_model()
    with_heads = Model(model.backbone, model.projector, method.heads(8))
    run(with_heads, method=method, compile_mode="default")
    assert graphs() == 2  # with and without gradients


def test_networks_are_afterwards_as_they_were_and_copies_are_plain() -> None:
    model = new_model()
    before = set(vars(model.backbone))
    with compiled.compiled("default", CPU, model):
        assert set(vars(model.backbone)) != before
        assert set(vars(copy.deepcopy(model).backbone)) == before
    assert set(vars(model.backbone)) == before
    with pytest.raises(RuntimeError, match="stop"), compiled.compiled("default", CPU, model):
        raise RuntimeError("stop")
    assert set(vars(model.backbone)) == before


def test_where_torch_cannot_compile_training_is_the_plain_one_and_the_log_says_why_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no C++ compiler found")

    compiled._possible.cache_clear()
    monkeypatch.setattr(torch, "compile", fails)
    plain, same = new_model(), new_model()
    with caplog.at_level(logging.WARNING):
        assert run(same, compile_mode="default")["loss"] == run(plain)["loss"]
        run(new_model(), compile_mode="default")
    compiled._possible.cache_clear()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), same.parameters(), strict=True))
    assert caplog.text.count("no C++ compiler found") == 1


class Untraceable(nn.Module):
    """A backbone that torch's compiler fails on."""

    def forward(self, x: Tensor) -> Tensor:
        """The mean of each channel, by way of something no graph can hold."""
        return _opaque(x).mean(dim=(2, 3))


def _opaque(x: Tensor) -> Tensor:
    return torch.from_numpy(x.detach().numpy().copy()) * 0 + x


def test_a_backbone_that_no_graph_can_hold_trains_all_the_same(graphs: Any) -> None:
    def model() -> Model:
        with seeded_init(0, "test"):
            return Model(Untraceable(), MLP(in_dim=3, hidden_dim=None, out_dim=8, batch_norm=False))

    assert run(model(), compile_mode="default")["loss"] == pytest.approx(run(model())["loss"], rel=1e-5)


def test_a_mode_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"client\.compile must be null or one of default, reduce-overhead"):
        compiled.check_mode("max-autotune")
