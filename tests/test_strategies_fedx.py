"""FedX: each of its terms by hand, all of them against a literal transcription, and what travels."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedssl.errors import ConfigError
from fedssl.federation.records import Upload
from fedssl.federation.setup import Setup
from fedssl.losses import relation_divergence
from fedssl.models import Model, TargetEncoder
from strategies.fedx import FedXClient
from tests.federation_helpers import FAMILIES, first_round, small


def client_half(contrastive: float = 0.5, relation: float = 0.25) -> FedXClient:
    return FedXClient(
        local_epochs=1, predictor_dim=8, contrastive_temperature=contrastive, relation_temperature=relation
    )


def images(*rows: list[float]) -> Tensor:
    """Rows of three numbers as images of one pixel."""
    return torch.tensor(rows)[:, :, None, None]


# --- the relational loss ---
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_views_that_see_opposite_anchors(temperature: float) -> None:
    """r1 = (s, 1 - s) and r2 = (1 - s, s) with s = sigmoid(1 / temperature): JS = log 2 - H(s)."""
    s = 1 / (1 + math.exp(-1 / temperature))
    expected = math.log(2) + s * math.log(s) + (1 - s) * math.log(1 - s)
    z = torch.eye(2)
    torch.testing.assert_close(relation_divergence(z, 3 * z.flip(0), z, temperature).item(), expected)
    assert relation_divergence(z, 2 * z, z, temperature).abs() < 1e-6


def test_the_relational_loss_is_its_formula_row_by_row() -> None:
    torch.manual_seed(0)
    z1, z2, anchors = torch.randn(3, 5, 4, dtype=torch.float64)
    anchors = anchors[:3]
    total = torch.tensor(0.0, dtype=torch.float64)
    for first, second in zip(z1, z2, strict=True):
        relations = []
        for z in (first, second):
            masses = [math.exp(F.cosine_similarity(z, anchor, dim=0).item() / 0.3) for anchor in anchors]
            relations.append([mass / sum(masses) for mass in masses])
        for r in relations:
            for j in range(3):
                mean = (relations[0][j] + relations[1][j]) / 2
                total += r[j] * math.log(r[j] / mean) / 2
    torch.testing.assert_close(relation_divergence(z1, z2, anchors, 0.3), total / 5)


def test_it_makes_no_difference_whether_the_mean_relation_is_detached() -> None:
    """What the module claims: d JS / d r = log(r / m) / 2 either way, but for a constant that no softmax sees."""
    torch.manual_seed(0)
    z1, z2, anchors = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    relation_divergence(z1, z2, anchors, 0.2).backward()
    ours = [z.grad.clone() for z in (z1, z2, anchors) if z.grad is not None]
    for z in (z1, z2, anchors):
        z.grad = None
    log_r = [F.log_softmax(F.normalize(z, dim=1) @ F.normalize(anchors, dim=1).T / 0.2, dim=1) for z in (z1, z2)]
    mean = ((log_r[0].exp() + log_r[1].exp()) / 2).detach()
    sum((r.exp() * (r - mean.log())).sum(dim=1).mean() / 2 for r in log_r).backward()  # type: ignore[union-attr]
    for own, z in zip(ours, (z1, z2, anchors), strict=True):
        torch.testing.assert_close(own, z.grad)


# --- the three terms ---
def test_the_terms_by_hand() -> None:
    """The predictor swaps two axes, the second views are the first ones swapped: h1 = g2, all else disagrees."""
    model = Model(nn.Flatten(), nn.Identity(), {"fedx_predictor": nn.Linear(3, 3, bias=False)})
    with torch.no_grad():
        model.heads["fedx_predictor"].weight.copy_(torch.eye(3)[[1, 0, 2]])  # type: ignore[operator, union-attr]
    x1 = images([1.0, 0, 0], [0, 1.0, 0])
    s = 1 / (1 + math.exp(-1 / 0.25))
    contrast = math.log(math.exp(1 / 0.5) + 2) - 1 / 0.5
    relation = math.log(2) + s * math.log(s) + (1 - s) * math.log(1 - s)
    terms = client_half().terms(model, TargetEncoder(model), x1, x1.flip(0), x1)
    torch.testing.assert_close(terms.item(), contrast + 2 * relation)


def test_the_terms_are_the_papers_formula() -> None:
    """Written out over images, with the client's, the predictor's and the teacher's networks all different."""
    torch.manual_seed(0)
    half = client_half()
    model = Model(nn.Flatten(), nn.Linear(12, 4), half.heads(4)).double()
    teacher = TargetEncoder(Model(nn.Flatten(), nn.Linear(12, 4)).double())
    x1, x2, xa = torch.randn(3, 5, 3, 2, 2, dtype=torch.float64)

    def cos(a: Tensor, b: Tensor) -> Tensor:
        return F.cosine_similarity(a, b, dim=0)

    def nt_xent(first: Tensor, second: Tensor) -> Tensor:
        views = [*first, *second]
        losses = []
        for i in range(10):
            others = sum(torch.exp(cos(views[i], views[k]) / 0.5) for k in range(10) if k != i)
            losses.append(-torch.log(torch.exp(cos(views[i], views[(i + 5) % 10]) / 0.5) / others))
        return torch.stack(losses).mean()

    def js(first: Tensor, second: Tensor, anchors: Tensor) -> Tensor:
        losses = []
        for a, b in zip(first, second, strict=True):
            r1, r2 = (torch.softmax(torch.stack([cos(z, anchor) for anchor in anchors]) / 0.25, 0) for z in (a, b))
            m = (r1 + r2) / 2
            losses.append(((r1 * (r1 / m).log()).sum() + (r2 * (r2 / m).log()).sum()) / 2)
        return torch.stack(losses).mean()

    z1, z2, z_a = model(x1), model(x2), model(xa)
    h1, h2 = model.heads["fedx_predictor"](z1), model.heads["fedx_predictor"](z2)
    expected = nt_xent(h1, teacher(x2)) + js(h1, h2, teacher(xa)) + js(z1, z2, z_a)
    torch.testing.assert_close(half.terms(model, teacher, x1, x2, xa), expected)


def test_the_teacher_learns_nothing_and_all_of_the_client_does() -> None:
    torch.manual_seed(0)
    half = client_half()
    model = Model(nn.Flatten(), nn.Linear(12, 4), half.heads(4))
    teacher = TargetEncoder(model)
    x = torch.randn(3, 5, 3, 2, 2)
    half.terms(model, teacher, x[0], x[1], x[2]).backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is None for parameter in teacher.parameters())
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None and gradient.norm() > 1e-4 for gradient in gradients.values())


# --- the round ---
def test_the_predictor_travels_beside_byols(tmp_path: Path) -> None:
    """An addition to any method: the heads of both are in the weights, and the penalty is part of the loss."""
    setup, _, messages, replies = first_round(small(None, "strategy=fedx", "method=byol"), tmp_path)
    for partition, (message, reply) in enumerate(zip(messages, replies, strict=True)):
        upload = Upload.from_message(reply)
        prefix = f"{FAMILIES[partition % 3]}/heads."
        heads = {name.removeprefix(prefix).split(".")[0] for name in upload.arrays if name.startswith(prefix)}
        assert heads == {"predictor", "fedx_predictor"}
        assert upload.arrays.keys() == set(message.content["arrays"])
        assert 0 < upload.metrics["penalty"] < upload.metrics["loss"]
    assert set(setup.build_model("tiny").heads) == {"predictor", "fedx_predictor"}


def test_the_method_alone_is_fedavg(tmp_path: Path) -> None:
    """The first term is the run's method: without the penalty the loss would be FedAvg's."""
    losses = {}
    for strategy in ("fedx", "fedavg"):
        _, _, _, replies = first_round(small(None, f"strategy={strategy}", "client.optimisation.lr=1e-12"), tmp_path)
        metrics = Upload.from_message(replies[0]).metrics
        losses[strategy] = metrics["loss"] - metrics.get("penalty", 0.0)
    assert losses["fedx"] == pytest.approx(losses["fedavg"], rel=1e-5)


def test_the_teacher_is_the_model_that_was_broadcast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the client learns meanwhile; and batch norm's averages are those of images, not of nothing."""
    seen: list[tuple[Tensor, Tensor, bool]] = []
    terms = FedXClient.terms

    def watch(self: FedXClient, model: Model, teacher: nn.Module, *views: Tensor) -> Tensor:
        conv, norm = teacher.backbone.conv, teacher.backbone.norm  # type: ignore[union-attr]
        seen.append((conv.weight.clone(), norm.running_mean.clone(), teacher.training))  # type: ignore[operator, union-attr]
        return terms(self, model, teacher, *views)

    monkeypatch.setattr(FedXClient, "terms", watch)
    families = "federation.families=[tiny]"
    config = small(None, "strategy=fedx", families, "federation.num_clients=1", "client.local_epochs=2")
    setup = Setup(config)
    first_round(config, tmp_path)
    initial = setup.build_model("tiny").backbone.conv.weight
    assert len(seen) > 2
    for weight, mean, training in seen:
        assert torch.equal(weight, initial)  # type: ignore[arg-type]
        assert mean.abs().max() > 1e-3
        assert not training


@pytest.mark.parametrize("name", ["contrastive_temperature", "relation_temperature", "predictor_dim"])
def test_fedxs_numbers_are_checked(name: str) -> None:
    numbers = {"predictor_dim": None, "contrastive_temperature": 0.1, "relation_temperature": 0.1, name: 0}
    with pytest.raises(ConfigError, match=rf"strategy\.client\.{name} must be .* got 0"):
        FedXClient(local_epochs=1, **numbers)
