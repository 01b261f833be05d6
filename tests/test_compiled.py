"""Compiled backbones: the same training to the last digits, once a family, full batches only, or no compiler."""

import copy
import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from fedssl.config import compose, instantiate
from fedssl.cuda_graph import WORTH
from fedssl.data.images import ImageSet
from fedssl.errors import ConfigError
from fedssl.federation.model_pool import ModelPool
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
    if not compiled._possible("cpu"):  # its trial is a graph, too
        pytest.skip("no C++ compiler")
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


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # an error while torch compiles would only leave the network as it is
@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("name", ["simclr", "byol", "moco"])
def test_on_a_gpu_it_is_the_same_training_with_and_without_replays(name: str, cuda_graphs: bool) -> None:
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    method = instantiate(compose([f"method={name}"])["method"])
    results = []
    for compile_mode in (None, "default"):
        plain = new_model()
        with seeded_init(0, "heads"):
            model = Model(plain.backbone, plain.projector, method.heads(8))
        cuda = {"method": method, "device": torch.device("cuda"), "compile_mode": compile_mode}
        results.append((run(model, WORTH * BATCH, cuda_graphs=cuda_graphs, **cuda), model))
    (expected, plain), (measured, fast) = results
    assert measured["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    for (key, value), other in zip(plain.state_dict().items(), fast.state_dict().values(), strict=True):
        torch.testing.assert_close(other, value, rtol=1e-2, atol=1e-3, msg=key)
    assert counters["stats"]["unique_graphs"] == (1 if name == "simclr" else 2)


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
    try:
        with caplog.at_level(logging.WARNING):
            assert run(same, compile_mode="default")["loss"] == run(plain)["loss"]
            run(new_model(), compile_mode="default")
    finally:
        compiled._possible.cache_clear()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), same.parameters(), strict=True))
    assert caplog.text.count("no C++ compiler found") == 1


FAILING = """
from typing import Any
import torch
from torch._inductor.graph import GraphLowering
from tests.test_compiled import new_model, run

compile_to_module = GraphLowering.compile_to_module

def fails(lowering: Any) -> Any:
    if lowering.is_backward:
        print("failed")
        raise RuntimeError("the compiler crashed")
    return compile_to_module(lowering)

GraphLowering.compile_to_module = fails
with torch._inductor.config.patch(force_disable_caches=True):
    measured = run(new_model(), compile_mode="default")
assert measured["loss"] == run(new_model())["loss"]
"""


@pytest.mark.slow
def test_a_network_whose_backward_pass_the_compiler_fails_on_trains_all_the_same(graphs: Any) -> None:
    """In a process of its own: torch does not try again what has failed there."""
    done = subprocess.run([sys.executable, "-c", FAILING], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "failed" in done.stdout


def test_a_compiled_model_is_as_new_after_its_reset(graphs: Any) -> None:
    pool = ModelPool(lambda family: new_model())
    model = pool("conv4")
    run(model, compile_mode="default")
    pool.take_back()
    assert pool("conv4") is model


def test_a_mode_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"client\.compile must be null or default"):
        compiled.check_mode("max-autotune")
