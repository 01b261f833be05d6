"""FedMKD: the attention, the student's loss and one step of it by hand; what clients and server keep."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flwr.app import ConfigRecord, Message
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from fedssl.data.images import ImageSet
from fedssl.errors import ConfigError, FedSSLError
from fedssl.federation import simulation
from fedssl.federation.arrays import to_record
from fedssl.federation.client import Broadcast, own_model
from fedssl.federation.records import family_arrays, model_state
from fedssl.federation.setup import Setup
from fedssl.federation.simulation import build_strategy
from fedssl.losses import momentum_contrast, nt_xent
from fedssl.methods.simclr import SimCLR
from fedssl.models import Model
from fedssl.train import Optimisation, train
from strategies.fedmkd import Alignment, Attention, FedMKD, FedMKDClient, Integration
from tests.federation_helpers import (
    FAMILIES,
    assert_same,
    final_arrays,
    first_round,
    numpy_of,
    open_in_process,
    rows,
    run_interrupted,
    small,
    without_clock,
)

WIDE = (
    "+models.wide={_target_: fedssl.models.backbones.Conv4, width: 6}",
    "federation.server_families=[wide]",
)
BYOL = ("method=byol", "method.predictor_dim=8")


class Chooses(nn.Module):
    """Attention that gives fixed weights to the clients."""

    def __init__(self, *weights: float) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(weights))

    def forward(self, s: Tensor, z: Tensor) -> Tensor:
        return self.weights.expand(len(s), -1)


class Plain:
    """Views that are the images."""

    def __call__(self, images: UInt8[Tensor, "b 3 h w"], generator: torch.Generator) -> Float[Tensor, "b 3 h w"]:
        return self.plain(images)

    def plain(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        return images.float() / 255

    def describe(self) -> str:
        return "pixels / 255"


def linear(weight: Float[Tensor, "d f"]) -> Model:
    """Projections W x of flattened images."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return Model(nn.Flatten(), layer)


def integration(*teachers: Model, **changes: Any) -> Integration:
    settings = {"method_weight": 0.1, "distill_weight": 0.9, "temperature": 0.5, "queue_size": 4} | changes
    return Integration(method=SimCLR(temperature=0.3), teachers=teachers, **settings)


# --- attention ---
def test_attention_by_hand() -> None:
    """With P, W_q and W_k the identity, K = 2: softmax over the clients of s . z_k / 2, image by image."""
    attention = Attention(in_dim=2, dim=2)
    attention.embed = nn.Identity()  # type: ignore[assignment]
    with torch.no_grad():
        attention.query.weight.copy_(torch.eye(2))
        attention.key.weight.copy_(torch.eye(2))
    s = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    z = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]])
    first = torch.tensor([0.5, 0.0, -0.5]).exp()
    second = torch.tensor([0.0, 1.0, 1.0]).exp()
    torch.testing.assert_close(attention(s, z), torch.stack([first / first.sum(), second / second.sum()]))


def test_attention_written_out() -> None:
    attention = Attention(in_dim=5, dim=3).eval()
    s, z = torch.randn(4, 5), torch.randn(4, 2, 5)
    with torch.no_grad():
        a = attention(s, z)
        for i in range(4):
            query = attention.query.weight @ attention.embed(s[i : i + 1])[0]
            scores = [query @ (attention.key.weight @ attention.embed(z[i, k : k + 1])[0]) / 3 for k in range(2)]
            torch.testing.assert_close(a[i], torch.softmax(torch.stack(scores), dim=0))


# --- the loss ---
@pytest.mark.parametrize("k", [1, 7])
def test_the_queues_loss_in_closed_form(k: int) -> None:
    """A teacher that the student meets, a queue at right angles: log(1 + k e^(-1/T)). All alike: log(1 + k)."""
    t, away = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 1.0]]).expand(k, 2)
    assert momentum_contrast(t, 2 * t, away, 0.1).item() == pytest.approx(math.log1p(k * math.exp(-10)), abs=1e-6)
    assert momentum_contrast(t, t, F.normalize(t).expand(k, 2), 0.1).item() == pytest.approx(math.log1p(k))


def test_the_loss_written_out_and_the_queue_after_it() -> None:
    """Two teachers weighed 3 to 1; both views are distilled; the newest projections are the queue's first."""
    torch.manual_seed(0)
    student, one, two = (linear(torch.randn(2, 12)) for _ in range(3))
    student.heads["attention"] = Chooses(0.75, 0.25)
    method = integration(one, two, queue_size=5)
    state = method.new_state(student)
    queue = F.normalize(torch.randn(5, 2), dim=1)
    state.queue = queue.clone()
    x1, x2 = torch.rand(2, 3, 2, 2), torch.rand(2, 3, 2, 2)
    loss = method.loss(student, state, x1, x2)

    distilled = 0.0
    for x in (*x1, *x2):
        s, z1, z2 = (F.normalize(model(x[None])[0].detach(), dim=0) for model in (student, one, two))
        t = F.normalize(0.75 * z1 + 0.25 * z2, dim=0)
        others = sum(math.exp(float(t @ key) / 0.5) for key in queue)
        hit = math.exp(float(t @ s) / 0.5)
        distilled -= math.log(hit / (hit + others)) / 4
    own = nt_xent(student(x1), student(x2), 0.3)
    assert loss.item() == pytest.approx(0.1 * own.item() + 0.9 * distilled, rel=1e-5)
    expected = torch.cat([F.normalize(student(torch.cat([x1, x2])), dim=1), queue])[:5]
    torch.testing.assert_close(state.queue, expected)
    assert not state.queue.requires_grad


def test_student_and_attention_learn_and_teachers_do_not() -> None:
    """Also without the method's loss: the InfoNCE's gradient reaches the student."""
    torch.manual_seed(0)
    student = linear(torch.randn(2, 12))
    teachers = [linear(torch.randn(2, 12)).requires_grad_(False) for _ in range(2)]
    student.heads["attention"] = Attention(in_dim=2, dim=3)
    method = integration(*teachers, method_weight=0.0)
    state = method.new_state(student)
    method.prepare(student, state, iter([torch.rand(1, 3, 2, 2), torch.rand(3, 3, 2, 2), torch.rand(3, 3, 2, 2)]))
    assert state.queue.shape == (4, 2)  # of 6, without the batch of one
    method.loss(student, state, torch.rand(4, 3, 2, 2), torch.rand(4, 3, 2, 2)).backward()
    for part in (student.projector.weight, *student.heads["attention"].parameters()):
        assert part.grad is not None  # type: ignore[union-attr]
    assert student.projector.weight.grad.norm() > 1e-3  # type: ignore[operator, union-attr]
    assert student.heads["attention"].query.weight.grad.norm() > 0  # type: ignore[operator, union-attr]


def test_one_step_from_hand_made_weights() -> None:
    """SGD on three images of one pixel: W - lr * gradient, the gradient by central differences of the loss written out
    in numpy."""
    pixels = np.array([[255, 0, 0], [0, 255, 0], [51, 51, 255]], np.uint8)[:, :, None, None]
    images = ImageSet(pixels=pixels, indices=np.arange(3), labels=None, classes=(), name="three")
    x = pixels[:, :, 0, 0] / 255
    start = np.array([[1.0, 0.0, 0.5], [0.0, 1.0, 0.25]])
    teachers = [np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]), np.array([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])]
    a = (0.75, 0.25)

    def unit(z: np.ndarray) -> np.ndarray:
        return z / np.linalg.norm(z, axis=1, keepdims=True).clip(1e-12)

    queue = unit(x @ start.T)  # of the three images before the step

    def loss(weight: np.ndarray) -> float:
        s = unit(x @ weight.T)
        t = unit(sum(share * unit(x @ teacher.T) for share, teacher in zip(a, teachers, strict=True)))
        hit = np.exp((t * s).sum(axis=1) / 0.5)
        distilled = -np.log(hit / (hit + np.exp(t @ queue.T / 0.5).sum(axis=1))).mean()
        cosines = np.exp(np.concatenate([s, s]) @ np.concatenate([s, s]).T / 0.3)  # NT-Xent of two equal views
        np.fill_diagonal(cosines, 0)
        own = -np.mean([np.log(cosines[i, (i + 3) % 6] / cosines[i].sum()) for i in range(6)])
        return float(0.1 * own + 0.9 * distilled)

    gradient = np.zeros_like(start)
    for row in range(2):
        for column in range(3):
            step = np.zeros_like(start)
            step[row, column] = 1e-5
            gradient[row, column] = (loss(start + step) - loss(start - step)) / 2e-5
    assert np.abs(gradient).min() > 0.01

    student = linear(torch.from_numpy(start).float())
    student.heads["attention"] = Chooses(*a)
    method = integration(*(linear(torch.from_numpy(teacher).float()) for teacher in teachers), queue_size=3)
    sgd = Optimisation(optimiser="sgd", lr=0.5, weight_decay=0.0, momentum=0.0, schedule="constant", warmup_steps=0)
    train(
        student, images, method=method, views=Plain(), optimisation=sgd, batch_size=3, steps=1,
        seed=0, round_num=1, num_rounds=1, device=torch.device("cpu"),
    )  # fmt: skip
    learned = student.projector.weight.detach().double().numpy()
    np.testing.assert_allclose(learned, start - 0.5 * gradient, atol=1e-5)


# --- the server ---
def first(*overrides: str, tmp_path: Path) -> tuple[Setup, FedMKD, list[Message]]:
    setup, strategy, _, replies = first_round(small(None, "strategy=fedmkd", *overrides), tmp_path)
    assert isinstance(strategy, FedMKD)
    return setup, strategy, replies


def test_every_student_learns_from_all_clients_and_sees_what_it_says(tmp_path: Path) -> None:
    """Without conv4_2's client, of another family, tiny's student is another; and passes are counted: 2 epochs of
    24 images, 2 views each, twice through the student and once through each of 4 teachers, and 16 keys."""
    more = ("strategy.server.epochs=2", "strategy.server.queue_size=16")
    _, strategy, replies = first(*more, tmp_path=tmp_path)
    arrays, metrics = strategy.aggregate_train(1, replies)
    others, _ = strategy.aggregate_train(1, [replies[0], replies[2], replies[3]])
    assert arrays is not None
    assert others is not None
    assert metrics is not None
    weight = "tiny/backbone.conv.weight"
    assert not np.array_equal(arrays[weight].numpy(), others[weight].numpy())
    assert metrics["tiny/image_passes"] == 2 * 24 * 2 * (2 + 4) + 16
    assert 0 < metrics["tiny/attention_min"] <= 0.25 <= metrics["tiny/attention_max"] < 1
    assert not [name for name in arrays if "attention" in name]  # it is the server's alone


def test_attention_goes_on_from_round_to_round_and_not_within_one(tmp_path: Path) -> None:
    """What the server keeps of a round is where the next starts, however often the round is computed."""
    setup, strategy, replies = first(*BYOL, tmp_path=tmp_path)
    assert strategy.state_dict() == {}
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    one = {name: value.clone() for name, value in strategy.state_dict().items()}
    strategy.aggregate_train(1, replies)
    assert_same(numpies(strategy.state_dict()), numpies(one))
    targets = {f"{family}/method/method.backbone" for family in FAMILIES}
    assert all(any(name.startswith(target) for name in one) for target in targets)
    grid = open_in_process(setup.config, tmp_path)
    again = list(grid.send_and_receive(strategy.configure_train(2, arrays, ConfigRecord(), grid)))
    strategy.aggregate_train(2, again)
    two = strategy.state_dict()
    assert two.keys() == one.keys()
    assert not torch.equal(two["tiny/attention/query.weight"], one["tiny/attention/query.weight"])

    fresh = build_strategy(setup)
    assert isinstance(fresh, FedMKD)
    fresh.load_state_dict(one)
    list(fresh.configure_train(2, arrays, ConfigRecord(), grid))
    fresh.aggregate_train(2, again)
    assert_same(numpies(fresh.state_dict()), numpies(two))
    forgetful = build_strategy(setup)
    assert isinstance(forgetful, FedMKD)
    list(forgetful.configure_train(2, arrays, ConfigRecord(), grid))
    forgetful.aggregate_train(2, again)
    assert not torch.equal(forgetful.state_dict()["tiny/attention/query.weight"], two["tiny/attention/query.weight"])


def numpies(state: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in state.items()}


def test_resume_with_a_method_that_keeps_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ("strategy=fedmkd", *BYOL, "federation.num_rounds=3")
    straight = simulation.run(small(tmp_path / "straight", *overrides))
    config = small(tmp_path / "run", *overrides)
    run_interrupted(config, monkeypatch, before_round=3)
    resumed = simulation.resume(config, tmp_path / "run")
    assert_same(final_arrays(tmp_path / "run"), final_arrays(tmp_path / "straight"))
    assert rows(tmp_path / "run") == rows(tmp_path / "straight")
    assert without_clock(resumed) == without_clock(json.loads(json.dumps(straight)))


def test_a_student_without_clients_is_one_like_the_others(tmp_path: Path) -> None:
    overrides = (*WIDE, "federation.report_family=wide")
    summary = simulation.run(small(tmp_path / "run", "strategy=fedmkd", *overrides))
    assert summary["families"]["wide"]["num_clients"] == 0
    weight = "backbone.0.weight"
    initial = model_state(Setup(small(None, *overrides)).build_model("wide"))[weight].numpy()
    assert not np.array_equal(final_arrays(tmp_path / "run")[f"wide/{weight}"], initial)


def test_without_a_usable_upload_nothing_changes(tmp_path: Path) -> None:
    setup, strategy, _ = first(tmp_path=tmp_path)
    arrays, metrics = strategy.aggregate_train(1, [])
    assert arrays is not None
    assert metrics is None
    assert_same(numpy_of(arrays), numpy_of(setup.server().initial_arrays()))


# --- the client ---
def test_alignment_by_hand() -> None:
    """Projections at right angles to the anchor's for the first view, opposite for the second: 2 + 4."""
    x1, x2 = torch.zeros(2, 1, 3, 2, 2)
    x1[..., 0, 0] = x2[..., 0, 1] = 1

    def of(*rows: tuple[float, float]) -> Model:
        """Weights for these two pixels, the same for all channels."""
        return linear(F.pad(torch.tensor(rows), (0, 2)).repeat(1, 3))

    anchor = of((1.0, 0.0), (0.0, 1.0))
    turned = of((0.0, -1.0), (0.0, -1.0))  # x1 -> 0, x2 -> (-3, -3)
    model = of((-1.0, -1.0), (0.0, 0.0))  # both -> (-3, 0)
    assert Alignment(anchor=anchor).loss(model, nn.Module(), x1, x2).item() == pytest.approx(2 + 4)
    assert Alignment(anchor=turned).loss(model, nn.Module(), x2, x2).item() == pytest.approx(2 * (2 - math.sqrt(2)))


def test_a_client_goes_on_with_its_own_model_aligned_to_the_student(tmp_path: Path) -> None:
    """Round 1 starts from the broadcast, unaligned; round 2 from what the client had, after an epoch on the public set;
    BYOL's target, frozen here, starts as the aligned model."""
    config = small(None, "strategy=fedmkd", *BYOL, "method.ema_decay=1.0", "client.local_epochs=2")
    setup = Setup(config)
    half = FedMKDClient(local_epochs=2, align_epochs=1)
    arrays = setup.server().initial_arrays()

    def broadcast(round_num: int) -> Broadcast:
        return Broadcast(round_num=round_num, num_rounds=2, family="tiny", arrays=family_arrays(arrays, "tiny"))

    client = setup.client(2, 1)
    one = half(client, broadcast(1))
    assert "align_loss" not in one.metrics
    kept = {name: value.clone() for name, value in client.memory.items()}
    own = own_model(kept, "tiny")
    assert_same(dict(one.arrays), numpies({f"tiny/{name}": value for name, value in own.items()}))

    client = setup.client(2, 2)
    client.memory = dict(kept)
    two = half(client, broadcast(2))
    assert two.metrics["align_image_passes"] == 2 * 24

    again = setup.client(2, 2)
    again.memory = dict(kept)
    aligned, student = again.remembered("tiny"), again.load(broadcast(2))

    def distance() -> float:
        x = setup.views.plain(setup.public_set.images.take(np.arange(24)))
        with torch.no_grad():
            return float(1 - F.cosine_similarity(aligned.eval()(x), student.eval()(x)).mean())

    before = distance()
    half.align(again, aligned, student)
    assert distance() < before
    assert again.memory.keys() == kept.keys()  # the alignment keeps nothing of its own
    for name, value in model_state(aligned).items():
        if not name.startswith("heads") and "running" not in name:
            assert torch.equal(client.memory[f"method/tiny/{name}"], value), name
            assert not torch.equal(own_model(client.memory, "tiny")[name], value), name


def test_a_failure_while_aligning_says_so() -> None:
    setup = Setup(small(None, "strategy=fedmkd"))
    client = setup.client(2, 2)
    client.local = dataclasses.replace(
        client.local, optimisation=dataclasses.replace(client.local.optimisation, lr=1e30)
    )
    arrays = family_arrays(setup.server().initial_arrays(), "tiny")
    with pytest.raises(FedSSLError, match=r"training on .*public"):
        setup.client_half(client, Broadcast(round_num=2, num_rounds=2, family="tiny", arrays=arrays))
    assert client.phase == "alignment"


def test_without_alignment_the_student_never_reaches_a_client(tmp_path: Path) -> None:
    setup = Setup(small(None, "strategy=fedmkd"))
    arrays = setup.server().initial_arrays()
    for align_epochs, equal in ((0, True), (1, False)):
        sent = []
        for factor in (1.0, 2.0):
            half = FedMKDClient(local_epochs=1, align_epochs=align_epochs)
            other = {
                name: np.asarray(np.float32(factor) * array.numpy())
                for name, array in family_arrays(arrays, "tiny").items()
            }
            upload = half(
                setup.client(2, 2),
                Broadcast(round_num=2, num_rounds=2, family="tiny", arrays=to_record(other)),
            )
            sent.append(upload.arrays["tiny/backbone.conv.weight"])
        assert np.array_equal(*sent) == equal


# --- settings ---
def no_projector(in_dim: int) -> nn.Module:
    return nn.Identity()


def test_projections_of_different_widths_cannot_be_added() -> None:
    config = small(None, "strategy=fedmkd")
    config["projector"] = {"_target_": "tests.test_strategies_fedmkd.no_projector"}
    with pytest.raises(ConfigError, match=r"their widths differ: \{'conv4_4': 32, 'conv4_2': 16, .*projector\.out_dim"):
        build_strategy(Setup(config))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("epochs", "0", r"epochs, queue_size and attention_dim must be at least 1, got 0, 32 and 10"),
        ("attention_dim", "0", r"at least 1, got 5, 32 and 0; set it under strategy\.server"),
        ("temperature", "0", r"temperature greater than 0, got 0\.1, 0\.9 and 0"),
        ("distill_weight", "0", r"distill_weight and temperature greater than 0"),
        ("method_weight", "-1", r"method_weight must be at least 0"),
    ],
)
def test_settings_out_of_range(name: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_strategy(Setup(small(None, "strategy=fedmkd", f"strategy.server.{name}={value}")))
