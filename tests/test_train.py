"""The training loop: schedules by hand, batches, determinism, metrics, failures, and that it learns."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from jaxtyping import Float, UInt8
from omegaconf import OmegaConf
from torch import Tensor, nn

from fedssl.data.images import ImageSet
from fedssl.errors import ConfigError, FedSSLError
from fedssl.methods import Method
from fedssl.methods.byol import BYOL
from fedssl.methods.info_nce import InfoNCE
from fedssl.methods.simclr import SimCLR
from fedssl.models import Model, evaluating, feature_dim
from fedssl.models.backbones import Conv4
from fedssl.models.heads import MLP
from fedssl.seeding import seeded_init
from fedssl.train import Optimisation, train

CONF = Path(__file__).parent.parent / "conf"
CPU = torch.device("cpu")


@dataclass
class Jitter:
    """Views for tests: noise, and a record of the images seen (their first pixel names them)."""

    noise: float = 8.0
    seen: list[list[int]] = field(default_factory=list)

    def __call__(self, images: UInt8[Tensor, "b 3 h w"], generator: torch.Generator) -> Float[Tensor, "b 3 h w"]:
        self.seen.append(images[:, 0, 0, 0].tolist())
        noise = torch.randn(images.shape, generator=generator, device=generator.device)
        return self.plain(images) + self.noise / 255 * noise

    def plain(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        return images.float() / 255

    def describe(self) -> str:
        return "pixels / 255"


@dataclass
class Recorded(Method):
    """A method whose losses are given."""

    losses: list[float]

    def loss(
        self, model: Model, state: nn.Module, x1: Float[Tensor, "b 3 s s"], x2: Float[Tensor, "b 3 s s"]
    ) -> Float[Tensor, ""]:
        value: Tensor = model(torch.cat([x1, x2])).sum() * 0 + self.losses.pop(0)
        return value


def image_set(num: int, size: int = 8) -> ImageSet:
    pixels = np.random.default_rng(0).integers(0, 256, (num, 3, size, size), dtype=np.uint8)
    pixels[:, 0, 0, 0] = np.arange(num)
    return ImageSet(pixels=pixels, indices=np.arange(num), labels=None, classes=(), name="toy")


def optimisation(**changes: Any) -> Optimisation:
    settings = {"optimiser": "adam", "lr": 1e-3, "weight_decay": 0.0, "momentum": 0.0, "schedule": "constant"}
    return Optimisation(**(settings | {"warmup_steps": 0} | changes))


def new_model(dropout: float = 0.0) -> Model:
    with seeded_init(0, "test"):
        head = nn.Sequential(nn.Dropout(dropout), MLP(in_dim=32, hidden_dim=None, out_dim=8, batch_norm=False))
        return Model(Conv4(width=4), head)


def run(model: Model, images: ImageSet, **changes: Any) -> dict[str, float]:
    settings: dict[str, Any] = {
        "method": SimCLR(temperature=0.5),
        "views": Jitter(),
        "optimisation": optimisation(),
        "batch_size": 4,
        "seed": 5,
        "round_num": 1,
        "num_rounds": 4,
        "device": CPU,
    }
    if "steps" not in changes:
        settings["epochs"] = 2
    return train(model, images, **(settings | changes))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


# schedules and optimisers


def test_constant_and_warm_up_by_hand() -> None:
    rates = [
        optimisation(lr=0.8, warmup_steps=4).learning_rate(step, total_steps=6, round_num=3, num_rounds=9)
        for step in range(6)
    ]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])


def test_cosine_by_hand() -> None:
    cosine = optimisation(lr=2.0, schedule="cosine", warmup_steps=2)
    rates = [cosine.learning_rate(step, total_steps=6, round_num=1, num_rounds=1) for step in range(7)]
    assert rates == pytest.approx([1, 2, 2, 1 + math.sqrt(0.5), 1, 1 - math.sqrt(0.5), 0])


def test_cosine_over_rounds_by_hand() -> None:
    """.5 * lr * (1 + cos(pi r / R)) with r from 0; the same in every step of a round."""
    schedule = optimisation(lr=2.0, schedule="cosine_rounds")
    rates = [
        schedule.learning_rate(step, total_steps=9, round_num=r, num_rounds=4) for r in range(1, 5) for step in (0, 8)
    ]
    expected = [2, 1 + math.sqrt(0.5), 1, 1 - math.sqrt(0.5)]
    assert rates == pytest.approx(np.repeat(expected, 2).tolist())
    assert schedule.depends_on_num_rounds
    assert not optimisation(schedule="cosine").depends_on_num_rounds


def test_sgd_follows_its_formula_and_the_schedule() -> None:
    """A parameter with constant gradient 1: v <- m v + (1 + wd w), w <- w - lr_t v."""
    settings = optimisation(optimiser="sgd", lr=0.5, momentum=0.9, weight_decay=0.1, schedule="cosine")
    weight = nn.Parameter(torch.tensor([1.0]))
    optimiser, schedule = settings.build([weight], total_steps=3, round_num=1, num_rounds=1)
    w, v = 1.0, 0.0
    for step in range(3):
        weight.sum().backward()
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        v = 0.9 * v + (1 + 0.1 * w)
        w -= 0.25 * (1 + math.cos(math.pi * step / 3)) * v
    assert weight.item() == pytest.approx(w, rel=1e-6)


def test_adam_takes_first_steps_of_the_learning_rate() -> None:
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimiser, _ = optimisation(lr=0.1).build([weight], total_steps=1, round_num=1, num_rounds=1)
    (weight * torch.tensor([5.0, -0.01])).sum().backward()
    optimiser.step()
    torch.testing.assert_close(weight.data, torch.tensor([0.9, -1.9]), rtol=0, atol=1e-4)


def test_frozen_parameters_stay_as_they_are() -> None:
    model = new_model()
    model.backbone[0].weight.requires_grad_(False)  # type: ignore[index, union-attr]
    before = weights(model)
    run(model, image_set(8), optimisation=optimisation(weight_decay=0.1))
    after = weights(model)
    assert torch.equal(before["backbone.0.weight"], after["backbone.0.weight"])
    assert not torch.equal(before["backbone.4.weight"], after["backbone.4.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimiser": "lamb"}, r"optimiser must be one of \('adam', 'sgd'\), got 'lamb'"),
        ({"schedule": "step"}, r"schedule must be one of .*, got 'step'"),
        ({"lr": 0}, "lr must be greater than 0, got 0"),
        ({"lr": math.nan}, "lr must be greater than 0, got nan"),
        ({"weight_decay": -1e-4}, "weight_decay must be at least 0"),
        ({"momentum": 1}, "momentum must be at least 0 and below 1, got 1"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
    ],
)
def test_impossible_settings_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        optimisation(**changes)


# batches, steps and metrics


@pytest.mark.parametrize(
    ("num", "expected"),
    [(8, [4, 4]), (10, [4, 4, 2]), (9, [4, 4]), (3, [3]), (2, [2]), (5, [4])],
)
def test_batches_of_an_epoch(num: int, expected: list[int]) -> None:
    views = Jitter()
    metrics = run(new_model(), image_set(num), views=views, epochs=1)
    pairs = views.seen[1:]  # the first call calibrates batch norm
    assert pairs[::2] == pairs[1::2]  # both views of a step show the same images
    assert [len(images) for images in pairs[::2]] == expected
    images = [image for batch in pairs[::2] for image in batch]
    assert len(set(images)) == len(images) == sum(expected)  # each image once, at most one left out
    assert metrics["steps"] == len(expected)
    assert metrics["image_passes"] == 2 * sum(expected)


def test_each_epoch_has_its_own_order() -> None:
    views = Jitter()
    run(new_model(), image_set(8), views=views, epochs=2, batch_size=8)
    first, second = views.seen[1], views.seen[3]
    assert sorted(first) == sorted(second) == list(range(8))
    assert first != second


@pytest.mark.parametrize(("steps", "images"), [(1, 4), (2, 8), (3, 10), (5, 18), (6, 20)])
def test_steps_end_in_the_middle_of_an_epoch(steps: int, images: int) -> None:
    """10 images make batches of 4, 4 and 2."""
    metrics = run(new_model(), image_set(10), steps=steps)
    assert metrics["steps"] == steps
    assert metrics["image_passes"] == 2 * images


def test_losses_are_means_over_the_steps_of_an_epoch() -> None:
    metrics = run(new_model(), image_set(8), method=Recorded([1.0, 2.0, 5.0, 9.0, 4.0]), steps=5)
    assert metrics["loss_first"] == 1.5
    assert metrics["loss"] == 4.0  # a third epoch, cut short after one step


def test_a_loss_that_is_not_finite_is_named_with_its_step() -> None:
    with pytest.raises(
        FedSSLError, match=r"became nan in step 4 \(epoch 2\) of training on toy, with adam and lr=0.001"
    ):
        run(new_model(), image_set(8), method=Recorded([1.0, 2.0, 5.0, math.nan]))


@pytest.mark.parametrize(
    ("num", "changes", "message"),
    [
        (1, {}, r"cannot train on 1 image\(s\) of toy: .* partition\.min_size"),
        (0, {}, r"cannot train on 0 image\(s\) of toy"),
        (4, {"batch_size": 1}, "batch_size must be at least 2, got 1"),
        (4, {"epochs": 0}, r"local_epochs .* at least 1, got 0"),
        (4, {"epochs": None}, "either epochs or steps, got epochs=None and steps=None"),
        (4, {"epochs": 1, "steps": 1}, "either epochs or steps, got epochs=1 and steps=1"),
    ],
)
def test_impossible_trainings_are_named(num: int, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(new_model(), image_set(num), **changes)


def test_projection_std_is_zero_for_a_point_and_one_for_a_sphere() -> None:
    def spread(projector: nn.Module) -> float:
        model = Model(nn.Flatten(), projector)
        return run(model, image_set(64), batch_size=64, views=Jitter(noise=1e4), optimisation=optimisation(lr=1e-9))[
            "projection_std"
        ]

    class Point(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 1e-9 + 1

    torch.manual_seed(0)
    assert spread(Point(192, 16)) == pytest.approx(0, abs=1e-3)
    assert spread(nn.Linear(192, 16, bias=False)) == pytest.approx(1, abs=0.05)


# purity


@pytest.mark.parametrize("method", [SimCLR(temperature=0.5), InfoNCE(temperature=0.5)])
def test_same_seed_same_weights_bit_for_bit(method: SimCLR | InfoNCE) -> None:
    results = []
    for _ in range(2):
        model = new_model(dropout=0.5)
        torch.rand(3)  # the global generator is somewhere else each time
        metrics = run(model, image_set(10), method=method)
        metrics.pop("seconds")
        results.append((weights(model), metrics))
    assert equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


@pytest.mark.parametrize("changes", [{"seed": 6}, {"round_num": 2}])
def test_another_seed_or_round_draws_differently(changes: dict[str, int]) -> None:
    a, b = new_model(), new_model()
    run(a, image_set(10))
    run(b, image_set(10), **changes)
    assert not equal(weights(a), weights(b))


def test_training_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    run(new_model(dropout=0.5), image_set(8))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_model_ends_in_eval_mode_without_gradients_or_hooks() -> None:
    model = new_model()
    run(model, image_set(8))
    assert not any(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.projector._forward_hooks
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_the_loop_equals_a_plain_transcription() -> None:
    """Two epochs written out: same order, same views, gradient descent by hand."""
    images, views = image_set(8), Jitter(noise=0)
    model, reference = new_model(), new_model()
    run(model, images, views=views, batch_size=8, optimisation=optimisation(optimiser="sgd", lr=0.5))
    orders = views.seen[1::2]

    x = views.plain(images.take(np.arange(8)))
    for layer in (1, 5, 9, 13):  # batch norm starts from the first batch's averages
        reference.backbone[layer].momentum = 1.0  # type: ignore[index, union-attr]
    reference.train()(x[views.seen[0]])
    for layer in (1, 5, 9, 13):
        reference.backbone[layer].momentum = 0.1  # type: ignore[index, union-attr]
    for order in orders:
        z = reference(torch.cat([x[order], x[order]]))
        cosines = F.normalize(z) @ F.normalize(z).T / 0.5
        partners = torch.arange(16).roll(8)
        denominators = cosines.exp().sum(1) - cosines.diagonal().exp()
        loss = (denominators.log() - cosines[torch.arange(16), partners]).mean()
        parameters = list(reference.parameters())
        with torch.no_grad():
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter -= 0.5 * gradient
    assert not torch.allclose(model.backbone[0].weight, new_model().backbone[0].weight, atol=1e-4)  # type: ignore[index]
    torch.testing.assert_close(model.state_dict(), reference.state_dict(), rtol=1e-4, atol=2e-5)


def test_the_shipped_client_settings_compose() -> None:
    client = OmegaConf.load(CONF / "client" / "default.yaml")
    assert isinstance(instantiate(client.optimisation), Optimisation)


@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_mixed_precision_stays_near_full_precision(name: str) -> None:
    device = torch.device(name)
    losses = [run(new_model(), image_set(64), batch_size=32, device=device, amp=amp)["loss"] for amp in (False, True)]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[1] != losses[0]


# fast paths against the plain ones: one step, loss and gradients

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Contiguous(Conv4):
    """Takes channels-last images as contiguous ones."""

    channels_last = False  # of what it was given last

    def forward(self, input: Tensor) -> Tensor:
        Contiguous.channels_last = input.is_contiguous(memory_format=torch.channels_last)
        return super().forward(input.contiguous())


def one_step(backbone: type[Conv4], name: str, **changes: Any) -> tuple[float, dict[str, Tensor]]:
    """The loss of a step, and the gradients: what gradient descent at a rate of 1 takes off the weights."""
    with seeded_init(0, "test"):
        model = Model(backbone(width=16), MLP(in_dim=128, hidden_dim=64, out_dim=32, batch_norm=True))
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    settings = {"optimisation": optimisation(optimiser="sgd", lr=1.0), "batch_size": 32, "device": torch.device(name)}
    loss = run(model, image_set(32, size=16), steps=1, **(settings | changes))["loss"]
    return loss, {key: before[key] - value.detach().cpu() for key, value in model.named_parameters()}


def apart(gradients: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """Length of the difference of all gradients, by that of the reference."""
    assert gradients.keys() == reference.keys()
    difference = torch.cat([(gradients[key] - reference[key]).flatten() for key in reference])
    return float(difference.norm() / torch.cat([value.flatten() for value in reference.values()]).norm())


@pytest.mark.parametrize("name", DEVICES)
def test_channels_last_training_is_the_contiguous_one_within_rounding(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp32: 1e-5 of the loss, 1e-4 of the gradients."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    (loss, gradients), (expected, reference) = one_step(Conv4, name), one_step(Contiguous, name)
    assert Contiguous.channels_last
    assert loss == pytest.approx(expected, rel=1e-5)
    assert apart(gradients, reference) < 1e-4


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
def test_the_fused_optimiser_is_the_plain_one_within_rounding(
    optimiser: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same gradients, so the same weights to 1e-6 after three steps with decay and momentum."""
    settings = optimisation(optimiser=optimiser, lr=0.01, weight_decay=0.1, momentum=0.9, warmup_steps=2)
    kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[optimiser]
    seen: list[bool] = []

    def taken(fused: bool) -> list[Tensor]:
        def build(*args: Any, **given: Any) -> Any:
            seen.append(given["fused"])
            return kind(*args, **{**given, "fused": fused})

        monkeypatch.setattr(torch.optim, kind.__name__, build)
        weights = [nn.Parameter(torch.linspace(-1, 1, 50, device=name).reshape(shape)) for shape in ((50,), (5, 10))]
        steps, schedule = settings.build(weights, total_steps=3, round_num=1, num_rounds=1)
        for scale in (1.0, -0.3, 2.0):
            for weight in weights:
                weight.grad = scale * torch.cos(7 * weight.detach())
            steps.step()
            schedule.step()
        return [weight.detach() for weight in weights]

    torch.testing.assert_close(taken(True), taken(False), rtol=1e-6, atol=1e-6)
    assert seen == [True, True]  # what a training takes is the fused one


@pytest.mark.parametrize("name", DEVICES)
def test_mixed_precision_is_the_full_one_within_its_rounding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 keeps 8 bits, so each layer rounds by up to .4 %: 1 % of the loss; a quarter of the gradients' length.

    These are of noise, and of both views of it through batch norm; what they point at is the same to 15 degrees.
    """
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    (loss, gradients), (expected, reference) = one_step(Conv4, name, amp=True), one_step(Conv4, name)
    assert loss == pytest.approx(expected, rel=0.01)
    assert 0 < apart(gradients, reference) < 0.25


@pytest.mark.parametrize(("amp", "cpu_amp"), [(True, False), (False, True)])
def test_each_kind_of_device_has_its_own_switch_for_mixed_precision(amp: bool, cpu_amp: bool) -> None:
    node = OmegaConf.load(CONF / "client" / "default.yaml")
    del node["store"]  # the grid's
    settings = instantiate(node, amp=amp, cpu_amp=cpu_amp)
    assert settings.autocast(torch.device("cuda")) == amp
    assert settings.autocast(torch.device("cpu")) == cpu_amp


@pytest.mark.slow
def test_it_learns_digits_without_labels() -> None:
    """Nearest neighbours of frozen features beat the same network untrained, from one label per class."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = torch.from_numpy(digits.images / 16)[:, None].float()
    pixels = (F.interpolate(small, size=(16, 16), mode="bilinear") * 255).to(torch.uint8).expand(-1, 3, -1, -1).numpy()
    rows = np.random.default_rng(0).permutation(len(pixels))
    private = ImageSet(pixels=pixels, indices=rows[:800], labels=None, classes=(), name="digits")
    views = instantiate(OmegaConf.merge(OmegaConf.load(CONF / "views" / "geometric.yaml"), {"image_size": 16}))

    def accuracy(backbone: nn.Module) -> float:
        x, y = views.plain(torch.from_numpy(pixels[rows[800:]])), torch.from_numpy(digits.target[rows[800:]])
        with torch.no_grad(), evaluating(backbone):
            features = F.normalize(backbone(x), dim=1)
        draws = []
        for draw in range(20):
            rng = np.random.default_rng(draw)
            labelled = torch.tensor([rng.choice(torch.where(y == label)[0].numpy()) for label in range(10)])
            draws.append(float(((features @ features[labelled].T).argmax(1) == y).float().mean()))
        return float(np.mean(draws))

    with seeded_init(0, "test"):
        backbone = Conv4(width=16)
        head = MLP(in_dim=feature_dim(backbone, 16), hidden_dim=None, out_dim=64, batch_norm=False)
    untrained = accuracy(backbone)
    run(Model(backbone, head), private, views=views, batch_size=64, epochs=8)
    assert accuracy(backbone) > untrained + 0.1


# what a method keeps, and what a strategy adds


def test_two_trainings_with_one_memory_are_not_two_that_forget() -> None:
    """The target network goes on where it was; without memory it starts as a copy each time."""
    method = BYOL(ema_decay=0.9, predictor_dim=8)
    ended = []
    for memory in ({}, None):
        with seeded_init(0, "test"):
            head = MLP(in_dim=32, hidden_dim=None, out_dim=8, batch_norm=False)
            model = Model(Conv4(width=4), head, method.heads(8))
        for round_num in (1, 2):
            run(model, image_set(8), method=method, memory=memory, round_num=round_num)
            if memory is not None:
                assert set(memory) == set(method.new_state(model).state_dict())
                assert not torch.equal(memory["projector.out.weight"], model.projector.out.weight)  # type: ignore[union-attr]
        ended.append(weights(model))
    assert not equal(*ended)


def test_a_penalty_is_added_to_the_loss() -> None:
    """A constant moves no weight; one with a gradient does."""
    plain, constant, pulled = new_model(), new_model(), new_model()
    without = run(plain, image_set(8))
    shifted = run(constant, image_set(8), penalty=lambda model, x1, x2: torch.tensor(3.0))
    assert equal(weights(plain), weights(constant))
    assert shifted["loss"] == pytest.approx(without["loss"] + 3)
    assert shifted["penalty"] == 3
    run(pulled, image_set(8), penalty=lambda model, x1, x2: model.projector[1].out.weight.square().sum())
    assert not equal(weights(plain), weights(pulled))
