"""Orchestra: the local loss by hand and written out, what an upload holds, and the clusterings."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flwr.app import ConfigRecord, Message, RecordDict
from torch import Tensor, nn

from fedssl.errors import ConfigError, PayloadError
from fedssl.federation import simulation
from fedssl.federation.flower_compat import stamp
from fedssl.federation.records import Upload, model_state
from fedssl.federation.setup import Setup
from fedssl.federation.store import ClientStore
from fedssl.models import Model
from strategies.orchestra import (
    GLOBAL,
    LOCAL,
    Centroids,
    ClusterAndRotate,
    Orchestra,
    OrchestraClient,
    TargetAndMemory,
    rotate,
)
from tests.federation_helpers import FAMILIES, assert_same, first_round, lie, numpy_of, open_in_process, rows, small

NUMBERS: dict[str, Any] = {
    "local_epochs": 1,
    "temperature": 0.1,
    "ema_decay": 0.99,
    "num_global": 2,
    "num_local": 4,
    "memory_size": 8,
    "cluster_iterations": 2,
    "sinkhorn_temperature": 0.04,
    "sinkhorn_iterations": 10,
}
SHORT = ("strategy=orchestra", "strategy.server.steps=5")


def method(temperature: float = 0.5, seed: int = 0) -> ClusterAndRotate:
    rotations = torch.Generator().manual_seed(seed)
    return ClusterAndRotate(temperature=temperature, ema_decay=0.75, memory_size=6, rotations=rotations)


def flat_model(centroids: Tensor, backbone: nn.Module | None = None) -> Model:
    """Images are flattened; without a backbone they are the projections."""
    dim = centroids.shape[1]
    head = Centroids(*centroids.shape)
    head.weight.copy_(centroids)
    heads = {"orchestra_centroids": head, "orchestra_rotation": nn.Linear(dim, 4)}
    return Model(backbone or nn.Flatten(), nn.Identity(), heads)


# --- the local loss ---
def test_the_loss_by_hand() -> None:
    """x1 lies on one centroid and x2 on the other; a classifier of zeros adds log 4."""
    model = flat_model(torch.eye(3)[:2])
    nn.init.zeros_(model.heads["orchestra_rotation"].weight)  # type: ignore[arg-type, union-attr]
    nn.init.zeros_(model.heads["orchestra_rotation"].bias)  # type: ignore[arg-type, union-attr]
    x1, x2 = torch.tensor([5.0, 0, 0]).view(1, 3, 1, 1), torch.tensor([0, 2.0, 0]).view(1, 3, 1, 1)
    own = method()
    p = 1 / (1 + math.exp(-2))
    clustering = -(p * math.log(1 - p) + (1 - p) * math.log(p))
    loss = own.loss(model, own.new_state(model), x1, x2)
    torch.testing.assert_close(loss.item(), clustering + math.log(4))


def test_the_loss_is_the_papers_formula() -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    model = flat_model(F.normalize(torch.randn(5, 4), dim=1), backbone)
    own, again = method(), torch.Generator().manual_seed(0)
    state = own.new_state(model)
    with torch.no_grad():
        backbone[1].weight.add_(1)  # type: ignore[operator, union-attr]  # so that the target is another network
    x1, x2 = torch.randn(2, 6, 3, 2, 2)
    turns = torch.randint(4, (6,), generator=again).tolist()
    centroids = model.heads["orchestra_centroids"].weight
    total = torch.tensor(0.0)
    for i in range(6):
        target, online = (
            torch.stack([F.cosine_similarity(network(x[i : i + 1])[0], c, dim=0) for c in centroids])  # type: ignore[union-attr]
            for network, x in ((state.target, x1), (model, x2))
        )
        total -= (torch.softmax(target / 0.5, 0) * torch.log_softmax(online / 0.5, 0)).sum()
        turned = x1[i]
        for _ in range(turns[i]):
            turned = turned.transpose(1, 2).flip(1)  # a quarter turn to the left
        logits = model.heads["orchestra_rotation"](model(turned[None]))[0]
        total -= torch.log_softmax(logits, 0)[turns[i]]
    assert len(set(turns)) > 1
    torch.testing.assert_close(own.loss(model, state, x1, x2), total / 6)


def test_a_quarter_turn_to_the_left() -> None:
    x = torch.arange(4.0).view(1, 1, 2, 2).expand(4, 3, 2, 2)
    turned = rotate(x, torch.arange(4))
    assert turned[:, 0].flatten(1).tolist() == [[0, 1, 2, 3], [1, 3, 0, 2], [3, 2, 1, 0], [2, 0, 3, 1]]


def test_only_the_online_network_and_the_classifier_learn() -> None:
    torch.manual_seed(0)
    model = flat_model(F.normalize(torch.randn(5, 4), dim=1), nn.Sequential(nn.Flatten(), nn.Linear(12, 4)))
    own = method()
    state = own.new_state(model)
    own.loss(model, state, *torch.randn(2, 6, 3, 2, 2)).backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is None for parameter in state.parameters())
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert "heads.orchestra_centroids.weight" not in dict(model.named_parameters())
    assert GLOBAL in model_state(model)
    start = state.target.backbone[1].weight.clone()  # type: ignore[operator, union-attr, index]
    with torch.no_grad():
        model.backbone[1].weight.add_(1)  # type: ignore[operator, union-attr, index]
    own.after_step(model, state)
    torch.testing.assert_close(state.target.backbone[1].weight, start + 0.25)  # type: ignore[union-attr, index]


def test_the_memory_holds_the_targets_last_projections() -> None:
    """First in, first out; a batch that is larger leaves its end; what is kept is not filled again."""
    model = flat_model(torch.eye(3)[:2])
    own = method()
    state = own.new_state(model)
    batches = [torch.randn(4, 3, 1, 1, generator=torch.Generator().manual_seed(i)) for i in range(9)]
    own.prepare(model, state, iter(batches))
    unit = [F.normalize(batch.flatten(1), dim=1) for batch in batches]
    torch.testing.assert_close(state.memory, torch.cat(unit[:2])[-6:])
    own.loss(model, state, batches[2], batches[3])
    torch.testing.assert_close(state.memory, torch.cat(unit[1:3])[-6:])
    own.prepare(model, state, iter([]))
    large = torch.cat(batches)
    own.loss(model, state, large, large)
    torch.testing.assert_close(state.memory, torch.cat(unit)[-6:])


# --- what travels ---
def second_round(tmp_path: Path, *overrides: str) -> tuple[Setup, Orchestra, list[Message], list[Message]]:
    """Strategy, messages and replies of round 2; round 1 has only clustered."""
    config = small(None, *SHORT, *overrides)
    setup, strategy, _, replies = first_round(config, tmp_path)
    assert isinstance(strategy, Orchestra)
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    grid = open_in_process(config, tmp_path)
    messages = list(strategy.configure_train(2, arrays, ConfigRecord(), grid))
    return setup, strategy, messages, list(grid.send_and_receive(messages))


def test_an_upload_is_weights_and_local_centroids_and_nothing_else(tmp_path: Path) -> None:
    """No target network, no projection of a single view, and the global centroids come down only."""
    setup, _, messages, replies = second_round(tmp_path)
    for partition, (message, reply) in enumerate(zip(messages, replies, strict=True)):
        family = FAMILIES[partition % 3]
        upload = Upload.from_message(reply)
        names = set(model_state(setup.build_model(family)))
        assert set(message.content["arrays"]) == {f"{family}/{name}" for name in names}
        assert upload.arrays.keys() == {*(f"{family}/{name}" for name in names - {GLOBAL}), LOCAL}
        assert upload.arrays[LOCAL].shape == (16, 8)
        memory = ClientStore(tmp_path / "clients").read(partition, before=3)[f"method/{family}/memory"]
        assert memory.shape == (128, 8)
        np.testing.assert_allclose(memory.norm(dim=1), 1, rtol=1e-5)
        nearest = memory.numpy() @ upload.arrays[LOCAL].T
        assert nearest.max() < 1 - 1e-7
        for centroid in upload.arrays[LOCAL]:
            assert not any(np.array_equal(centroid, row) for row in memory.numpy())


def test_the_first_round_clusters_and_trains_nothing(tmp_path: Path) -> None:
    setup, strategy, messages, replies = first_round(small(None, *SHORT), tmp_path)
    for message, reply in zip(messages, replies, strict=True):
        upload, sent = Upload.from_message(reply), numpy_of(message.content["arrays"])
        assert "loss" not in upload.metrics
        assert_same(
            {n: a for n, a in upload.arrays.items() if n != LOCAL}, {n: sent[n] for n in upload.arrays if n in sent}
        )
        np.testing.assert_allclose(np.linalg.norm(upload.arrays[LOCAL], axis=1), 1, rtol=1e-5)
    assert not any(array.any() for name, array in sent.items() if name.endswith(GLOBAL))
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    for family in FAMILIES:
        centroids = arrays[f"{family}/{GLOBAL}"].numpy()
        np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, rtol=1e-5)
        assert len(np.unique(centroids, axis=0)) == setup.client_half.num_global


def test_training_begins_with_centroids_and_the_target_is_kept(tmp_path: Path) -> None:
    simulation.run(small(tmp_path / "run", *SHORT, "federation.num_rounds=3", "evaluate.every=9"))
    losses = [row["metrics"].get("loss") for row in rows(tmp_path / "run", "client")]
    assert losses[:4] == [None] * 4
    assert all(loss is not None and np.isfinite(loss) for loss in losses[4:])
    store = ClientStore(tmp_path / "run" / "clients")
    targets = [store.read(2, before=r)["method/tiny/target.backbone.conv.weight"] for r in (3, 4)]
    assert not torch.equal(*targets)


def test_the_rotations_do_not_depend_on_anything_but_the_seed(tmp_path: Path) -> None:
    first, again = (second_round(tmp_path / name)[3] for name in ("a", "b"))
    for reply, other in zip(first, again, strict=True):
        assert_same(dict(Upload.from_message(reply).arrays), dict(Upload.from_message(other).arrays))


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        ("no centroids", r"'local_centroids' must be float32\(16, 8\), got float64\(0,\)"),
        ("too many", r"must be float32\(16, 8\), got float32\(32, 8\)"),
        ("nan", "must be unit vectors, got lengths nan"),
        ("too long", "must be unit vectors, got lengths 2 to 2"),
        ("global", "its weights are not those of tiny"),
        ("target", "its weights are not those of tiny"),
        ("wrong round", "it is for round 3"),
    ],
)
def test_a_lie_is_refused(action: str, reason: str, tmp_path: Path) -> None:
    _, strategy, _, replies = second_round(tmp_path)
    upload = Upload.from_message(replies[2])
    arrays = {name: array.copy() for name, array in upload.arrays.items()}
    if action == "no centroids":
        del arrays[LOCAL]
    elif action == "too many":
        arrays[LOCAL] = np.concatenate([arrays[LOCAL]] * 2)
    elif action == "nan":
        arrays[LOCAL][3, 1] = np.nan
    elif action == "too long":
        arrays[LOCAL] *= 2
    elif action in ("global", "target"):
        arrays[f"tiny/{GLOBAL}" if action == "global" else "tiny/target.memory"] = np.zeros((16, 8), np.float32)
    liar = Upload(header=upload.header, arrays=arrays, metrics=upload.metrics)
    question = Message(RecordDict(), 1002, "train")
    stamp(question, "2")
    if action == "wrong round":
        liar = lie(liar, action)
    with pytest.raises(PayloadError, match=reason):
        strategy.check(Message(liar.to_content(), reply_to=question))


# --- the server ---
def server_half(**numbers: Any) -> Orchestra:
    setup = Setup(small(None, *SHORT))
    settings: dict[str, Any] = {
        "num_local": 4,
        "temperature": 0.1,
        "sinkhorn_temperature": 0.04,
        "sinkhorn_iterations": 20,
        "lr": 0.01,
        "momentum": 0.9,
        "steps": 500,
    }
    return Orchestra(server=setup.server(), **{**settings, **numbers})


def test_global_centroids_find_the_groups_of_local_ones() -> None:
    rng = torch.Generator().manual_seed(0)
    directions = torch.eye(6)[:3]
    local = F.normalize(directions.repeat_interleave(4, dim=0) + 0.1 * torch.randn(12, 6, generator=rng), dim=1)
    start = F.normalize(local[[0, 4, 8]] + 0.3 * torch.randn(3, 6, generator=rng), dim=1)
    found = server_half().global_centroids(local, start)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    groups = (local @ found.T).argmax(dim=1)
    assert groups.tolist() == [0] * 4 + [1] * 4 + [2] * 4

    def loss(centroids: Tensor) -> float:
        wanted = torch.eye(3)[groups]
        return -F.cosine_similarity(wanted, F.softmax(local @ centroids.T / 0.1, dim=1), dim=1).mean().item()

    assert loss(found) < loss(start)


def test_one_step_of_global_clustering_is_gradient_descent_on_its_formula() -> None:
    """By finite differences, with the balanced assignment held fixed."""
    rng = torch.Generator().manual_seed(0)
    local, start = (F.normalize(torch.randn(n, 3, generator=rng, dtype=torch.float64), dim=1) for n in (5, 2))
    p = (local @ start.T / 0.04).exp()
    for _ in range(20):
        p = p / p.sum(dim=0)
        p = p / p.sum(dim=1, keepdim=True)

    def loss(centroids: Tensor) -> float:
        total = 0.0
        for wanted, z in zip(p, local, strict=True):
            q = torch.softmax(centroids @ z / 0.1, 0)
            total -= float(wanted @ q / (wanted.norm() * q.norm()))
        return total / len(local)

    expected = start.clone()
    for i in range(2):
        for j in range(3):
            shift = torch.zeros_like(start)
            shift[i, j] = 1e-6
            expected[i, j] -= 0.5 * (loss(start + shift) - loss(start - shift)) / 2e-6
    found = server_half(lr=0.5, steps=1).global_centroids(local, start)
    torch.testing.assert_close(found, F.normalize(expected, dim=1), atol=1e-6, rtol=1e-6)


def test_weights_are_averaged_by_images_and_centroids_are_not(tmp_path: Path) -> None:
    setup, strategy, _, replies = second_round(tmp_path, "partition=dirichlet", "partition.min_size=2")
    arrays, _ = strategy.aggregate_train(2, replies)
    assert arrays is not None
    first, last = Upload.from_message(replies[0]), Upload.from_message(replies[3])
    a, b = first.num_images, last.num_images
    assert a != b
    name = "conv4_4/projector.out.weight"
    expected = (a * first.arrays[name].astype(np.float64) + b * last.arrays[name]) / (a + b)
    np.testing.assert_allclose(arrays[name].numpy(), expected, rtol=1e-5)
    assert set(arrays) == {f"{f}/{n}" for f in FAMILIES for n in model_state(setup.build_model(f))}
    assert any("Orchestra's own loss" in note for note in strategy.notes())


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"memory_size": 10}, "memory_size must be a multiple of num_local=4 and at least twice as large, got 10"),
        ({"memory_size": 4}, "memory_size must be a multiple of num_local=4 and at least twice as large, got 4"),
        ({"temperature": 0}, r"strategy\.client\.temperature must be greater than 0, got 0"),
        ({"ema_decay": 1.5}, r"strategy\.client\.ema_decay must be between 0 .* got 1\.5"),
        ({"num_global": 0}, r"strategy\.client\.num_global must be at least 1, got 0"),
    ],
)
def test_orchestras_numbers_are_checked(numbers: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OrchestraClient(**{**NUMBERS, **numbers})
    with pytest.raises(ConfigError, match=r"strategy\.server: lr must be greater than 0"):
        server_half(steps=0)


def test_the_state_is_a_target_and_a_memory_only() -> None:
    model = flat_model(torch.eye(3)[:2], nn.Sequential(nn.Flatten(), nn.Linear(12, 3)))
    names = {name.split(".")[0] for name in TargetAndMemory(model, 6).state_dict()}
    assert names == {"target", "memory"}
