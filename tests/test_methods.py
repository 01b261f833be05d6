"""The methods: which loss, which images share a batch's normalisation, what is kept, and what travels."""

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fedssl
from fedssl.anchors import EmbeddingQueue
from fedssl.clustering import balanced_assignment
from fedssl.config import compose, instantiate
from fedssl.errors import ConfigError
from fedssl.federation import simulation
from fedssl.federation.setup import Setup
from fedssl.federation.store import ClientStore
from fedssl.losses import barlow_twins, cosine_scores, info_nce, momentum_contrast, nt_xent, vicreg
from fedssl.methods import Method
from fedssl.methods.barlow_twins import BarlowTwins
from fedssl.methods.byol import BYOL
from fedssl.methods.info_nce import InfoNCE
from fedssl.methods.moco import MoCo
from fedssl.methods.simclr import SimCLR
from fedssl.methods.simsiam import SimSiam
from fedssl.methods.swav import SwAV
from fedssl.methods.vicreg import VICReg
from fedssl.models import Model, TargetEncoder
from fedssl.models.heads import MLP
from tests.federation_helpers import SMALL, assert_same, final_arrays, rows, run_interrupted, small
from tests.test_train import image_set, run

CONF = Path(__file__).parent.parent / "conf" / "method"
METHODS = sorted(path.stem for path in CONF.glob("*.yaml"))


def normalised(x: Tensor) -> Tensor:
    """What a batch-norm layer without history makes of a batch."""
    return (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()


@pytest.fixture
def model() -> Model:
    return Model(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12)), nn.Identity()).train()


@pytest.fixture
def views() -> tuple[Tensor, Tensor]:
    x = torch.randn(2, 6, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    return x[0], 2 * x[1] + 1  # the two batches of views have different statistics


def test_simclr_normalises_both_views_as_one_batch(model: Model, views: tuple[Tensor, Tensor]) -> None:
    x1, x2 = views
    z = normalised(torch.cat([x1, x2]).flatten(1))
    torch.testing.assert_close(SimCLR(temperature=0.3).loss(model, nn.Module(), x1, x2), nt_xent(z[:6], z[6:], 0.3))
    assert model.backbone[1].num_batches_tracked == 1  # type: ignore[index]


def test_info_nce_normalises_each_view_on_its_own(model: Model, views: tuple[Tensor, Tensor]) -> None:
    x1, x2 = views
    z1, z2 = normalised(x1.flatten(1)), normalised(x2.flatten(1))
    torch.testing.assert_close(InfoNCE(temperature=0.3).loss(model, nn.Module(), x1, x2), info_nce(z1, z2, 0.3))
    assert model.backbone[1].num_batches_tracked == 2  # type: ignore[index]


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_method_has_a_finite_loss_with_gradients(path: Path, views: tuple[Tensor, Tensor]) -> None:
    method = instantiate(compose([f"method={path.stem}"])["method"])
    assert isinstance(method, Method)
    torch.manual_seed(0)
    model = Model(nn.Flatten(), nn.Linear(12, 4), method.heads(4)).train()
    state = method.new_state(model)
    method.prepare(model, state, itertools.cycle(views))
    loss = method.loss(model, state, *views)
    loss.backward()
    assert loss.isfinite()
    assert model.projector.weight.grad.norm() > 1e-4  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("method", [SimCLR, InfoNCE])
@pytest.mark.parametrize("temperature", [0, -0.1, float("nan")])
def test_temperature_must_be_positive(method: type[SimCLR | InfoNCE], temperature: float) -> None:
    with pytest.raises(ConfigError, match=r"method\.temperature must be greater than 0, got"):
        method(temperature=temperature)


# --- BYOL ---
def test_byol_by_hand() -> None:
    """Identity networks, views at right angles, a predictor that turns by 90 degrees: 2 - 2 cos is 0 and 4."""
    model = Model(nn.Flatten(), nn.Identity(), {"predictor": nn.Linear(3, 3, bias=False)})
    with torch.no_grad():
        turn = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
        model.heads["predictor"].weight.copy_(turn)  # type: ignore[operator, union-attr]
    x1, x2 = torch.tensor([3.0, 0.0, 0.0]).view(1, 3, 1, 1), torch.tensor([0.0, 5.0, 0.0]).view(1, 3, 1, 1)
    method = BYOL(ema_decay=0.5, predictor_dim=1)
    torch.testing.assert_close(method.loss(model, TargetEncoder(model), x1, x2), torch.tensor(4.0))


def test_byols_target_follows_the_online_network_and_no_gradient_reaches_it() -> None:
    torch.manual_seed(0)
    method = BYOL(ema_decay=0.75, predictor_dim=8)
    model = Model(nn.Flatten(), nn.Linear(12, 4), method.heads(4))
    state = method.new_state(model)
    start = model.projector.weight.detach().clone()  # type: ignore[union-attr, operator]
    x = torch.randn(2, 6, 3, 2, 2)
    method.loss(model, state, x[0], x[1]).backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is None for parameter in state.parameters())
    with torch.no_grad():
        model.projector.weight.add_(1)  # type: ignore[union-attr, operator]
    method.after_step(model, state)
    torch.testing.assert_close(state.projector.weight, start + 0.25)


def test_byols_numbers_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"method\.ema_decay must be between 0 .* got 1\.1"):
        BYOL(ema_decay=1.1, predictor_dim=8)
    with pytest.raises(ConfigError, match=r"method\.predictor_dim must be at least 1, got 0"):
        BYOL(ema_decay=0.9, predictor_dim=0)


# --- queues ---
def test_a_queue_grows_then_drops_its_oldest() -> None:
    queue = EmbeddingQueue(3)
    assert len(queue) == 0
    queue.push(torch.tensor([[1.0], [2.0]]))
    assert queue.rows.tolist() == [[1], [2]]
    seen = queue.rows
    queue.push(torch.tensor([[3.0], [4.0]], dtype=torch.bfloat16))
    assert queue.rows.tolist() == [[2], [3], [4]]
    assert queue.rows.dtype == torch.float32
    queue.push(torch.arange(5.0, 10)[:, None])  # more than it holds
    assert queue.rows.tolist() == [[7], [8], [9]]
    assert seen.tolist() == [[1], [2]]  # a graph that holds it is not disturbed
    nothing = EmbeddingQueue(0)
    nothing.push(torch.ones(2, 1))
    assert len(nothing) == 0


@pytest.mark.parametrize("pushed", [0, 2, 5])
def test_a_queue_comes_back_from_its_state(pushed: int) -> None:
    queue, other = EmbeddingQueue(3), nn.ModuleDict({"queue": EmbeddingQueue(3)})
    if pushed:
        queue.push(torch.randn(pushed, 4))
    other.load_state_dict({f"queue.{name}": value for name, value in queue.state_dict().items()})
    assert torch.equal(other["queue"].rows, queue.rows)  # type: ignore[arg-type]
    queue.push(torch.ones(2, 4))
    other["queue"].push(torch.ones(2, 4))  # type: ignore[operator]
    assert torch.equal(other["queue"].rows, queue.rows)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({})


# --- MoCo ---
def moco(*, temperature: float = 0.5, queue_size: int = 4, ema_decay: float = 0.75, symmetric: bool = False) -> MoCo:
    return MoCo(temperature=temperature, queue_size=queue_size, ema_decay=ema_decay, symmetric=symmetric)


def images_of(*vectors: Tensor) -> Tensor:
    """Vectors of 3 numbers as images of one pixel."""
    return torch.stack(vectors).view(len(vectors), 3, 1, 1)


E1, E2, E3 = torch.eye(3)


@pytest.mark.parametrize("symmetric", [False, True])
def test_moco_by_hand(symmetric: bool) -> None:
    """Identity networks; key at 60 degrees, one key in the queue along the query, one at a right angle."""
    model, method = Model(nn.Flatten(), nn.Identity()), moco(queue_size=2, symmetric=symmetric)
    state = method.new_state(model)
    state.queue.push(torch.stack([E1, E2]))
    x1, x2 = images_of(3 * E1), images_of(E1 + math.sqrt(3) * E3)
    own, along, across = math.exp(0.5 / 0.5), math.exp(1 / 0.5), math.exp(0)
    expected = -math.log(own / (own + along + across))
    if symmetric:  # the other query is at 60 degrees from its key and from the queue's first
        expected -= math.log(own / (own + own + across))
    assert method.loss(model, state, x1, x2).item() == pytest.approx(expected, rel=1e-6)
    keys = [E1 / 2 + math.sqrt(3) / 2 * E3, E1] if symmetric else [E2, E1 / 2 + math.sqrt(3) / 2 * E3]
    torch.testing.assert_close(state.queue.rows, torch.stack(keys))  # unit keys, after scoring


def test_moco_fills_a_new_queue_with_keys_of_the_clients_images_and_leaves_an_old_one(model: Model) -> None:
    x = torch.randn(3, 5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    method = moco(queue_size=8)
    state = method.new_state(model).train()
    method.prepare(model, state, iter(x))
    keys = torch.cat([F.normalize(normalised(batch.flatten(1)), dim=1) for batch in x])
    torch.testing.assert_close(state.queue.rows, keys[2:10])
    assert model.backbone[1].num_batches_tracked == 0  # type: ignore[index]
    again = method.new_state(model).train()
    again.load_state_dict(state.state_dict())
    method.prepare(model, again, iter([]))
    assert torch.equal(again.queue.rows, state.queue.rows)


def test_mocos_key_encoder_follows_and_no_gradient_reaches_it() -> None:
    torch.manual_seed(0)
    method, model = moco(), Model(nn.Flatten(), nn.Linear(12, 4))
    state = method.new_state(model)
    x = torch.randn(2, 6, 3, 2, 2)
    method.prepare(model, state, itertools.cycle(x))
    queue, start = state.queue.rows.clone(), copy.deepcopy(model.projector)
    method.loss(model, state, x[0], x[1]).backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is None for parameter in state.parameters())
    z = start(x[0].flatten(1))
    momentum_contrast(z, start(x[1].flatten(1)).detach(), queue, 0.5).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(model.projector.weight.grad, start.weight.grad)  # type: ignore[operator, union-attr]
    with torch.no_grad():
        model.projector.weight.add_(1)  # type: ignore[union-attr, operator]
    method.after_step(model, state)
    torch.testing.assert_close(state.encoder.projector.weight, start.weight.detach() + 0.25)  # type: ignore[operator]


def test_preparation_sees_no_batch_of_one_image() -> None:
    """Nine images in batches of eight leave one, of which batch norm cannot make anything."""
    method = moco(queue_size=12)
    model = Model(nn.Flatten(), MLP(in_dim=192, hidden_dim=8, out_dim=4, batch_norm=True))
    memory: dict[str, Tensor] = {}
    run(model, image_set(9), method=method, memory=memory, batch_size=8, epochs=1)
    assert memory["queue.rows"].shape == (12, 4)


# --- SimSiam ---
@pytest.mark.parametrize("sign", [1, -1])
def test_simsiam_by_hand(sign: int) -> None:
    """Four images whose dimensions batch norm makes 1 and -1; the predictor turns one of three round, so cos is 1/3."""
    model = Model(nn.Flatten(), nn.Identity(), {"predictor": nn.Linear(3, 3, bias=False)})
    with torch.no_grad():
        model.heads["predictor"].weight.copy_(torch.diag(torch.tensor([1.0, 1.0, -1.0])))  # type: ignore[operator, union-attr]
    z = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    x1, x2 = images_of(*(3 * z + 5)), images_of(*(sign * 7 * z))  # scale and shift do not matter
    loss = SimSiam(predictor_dim=1).loss(model, nn.Module(), x1, x2)
    assert loss.item() == pytest.approx(1 - sign / 3, abs=1e-5)


def test_simsiams_target_stands_still() -> None:
    """The gradient is that of the predictions alone, for targets that are numbers."""
    torch.manual_seed(0)
    method = SimSiam(predictor_dim=3)
    model = Model(nn.Flatten(), nn.Linear(12, 4), method.heads(4))
    x1, x2 = torch.randn(2, 6, 3, 2, 2)
    method.loss(model, nn.Module(), x1, x2).backward()  # type: ignore[no-untyped-call]
    other = Model(nn.Flatten(), copy.deepcopy(model.projector), copy.deepcopy(dict(model.heads)))
    other.zero_grad()
    with torch.no_grad():
        targets = normalised(other(x2)), normalised(other(x1))
    predictor, loss = other.heads["predictor"], torch.zeros(())
    for x, target in zip((x1, x2), targets, strict=True):
        for p, z in zip(predictor(normalised(other(x))), target, strict=True):
            loss = loss - p @ z / (p.norm() * z.norm()) / 6 / 2
    loss.backward()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_simsiams_predictor_has_a_bottleneck() -> None:
    predictor = SimSiam(predictor_dim=2).heads(8)["predictor"]
    assert [tuple(w.shape) for w in predictor.parameters() if w.ndim == 2] == [(2, 8), (8, 2)]


# --- Barlow Twins, VICReg ---
@pytest.mark.parametrize(
    ("method", "loss"),
    [
        (BarlowTwins(off_diagonal_weight=0.1), lambda z1, z2: barlow_twins(z1, z2, 0.1)),
        (
            VICReg(invariance_weight=2, variance_weight=3, covariance_weight=0.5),
            lambda z1, z2: vicreg(z1, z2, 2, 3, 0.5),
        ),
    ],
)
def test_each_view_is_normalised_on_its_own(
    method: Method, loss: Callable[[Tensor, Tensor], Tensor], model: Model, views: tuple[Tensor, Tensor]
) -> None:
    x1, x2 = views
    expected = loss(normalised(x1.flatten(1)), normalised(x2.flatten(1)))
    torch.testing.assert_close(method.loss(model, nn.Module(), x1, x2), expected)


# --- SwAV ---
def swav(*, num_prototypes: int = 3, epsilon: float = 0.5, queue_size: int = 0) -> SwAV:
    return SwAV(
        num_prototypes=num_prototypes,
        temperature=0.2,
        epsilon=epsilon,
        sinkhorn_iterations=3,
        queue_size=queue_size,
    )


def with_prototypes(method: SwAV, prototypes: Tensor) -> Model:
    model = Model(nn.Flatten(), nn.Identity(), method.heads(3))
    with torch.no_grad():
        model.heads["prototypes"].weight.copy_(prototypes)  # type: ignore[operator, union-attr]
    return model


def test_swav_by_hand() -> None:
    """Three images, each on its prototype: codes are balanced as they are. Scores are the identity in both views."""
    method, x = swav(epsilon=0.5), images_of(2 * E1, E2, E3)
    code, probability = (torch.softmax(torch.tensor([1.0, 0, 0]) / t, dim=0) for t in (0.5, 0.2))
    expected = -2 * (code * probability.log()).sum()
    for length in (1, 7):  # what prototypes' lengths are does not matter
        model = with_prototypes(method, length * torch.eye(3))
        torch.testing.assert_close(method.loss(model, method.new_state(model), x, 3 * x), expected)


def test_swav_predicts_the_other_views_code() -> None:
    """View 1 of all images lies on prototype 1, so its codes are flat; view 2's are sharp, and view 1 misses them."""
    method = swav(epsilon=0.001)
    model = with_prototypes(method, torch.eye(3))
    x1, x2 = images_of(E1, E1, E1), images_of(E1, E2, E3)
    p = torch.softmax(torch.tensor([1.0, 0, 0]) / 0.2, dim=0).log()
    view1_of_sharp_codes = -p.mean()  # each prototype is the code of one image
    view2_of_flat_codes = -p.mean()
    expected = view1_of_sharp_codes + view2_of_flat_codes
    torch.testing.assert_close(method.loss(model, method.new_state(model), x1, x2), expected)


def test_swavs_codes_are_balanced_over_batch_and_queue() -> None:
    """Images on prototype 1 may keep it if the queue's are on the others."""
    method = swav(epsilon=0.05, queue_size=6)
    model = with_prototypes(method, torch.eye(3))
    state, x = method.new_state(model), images_of(E1, E1)
    flat = method.loss(model, state, x, x).item()
    torch.testing.assert_close(state.rows, torch.stack([E1] * 4))
    state.push(torch.stack([E2, E3] * 3))
    loss = method.loss(model, state, x, x).item()
    scores = cosine_scores(torch.stack([E1, E1, *[E2, E3] * 3]), torch.eye(3))
    p = torch.softmax(torch.tensor([1.0, 0, 0]) / 0.2, dim=0).log()
    assert loss == pytest.approx(-2 * float(balanced_assignment(scores, 0.05, 3)[0] @ p), rel=1e-5)
    assert flat == pytest.approx(-2 * float(p.mean()), rel=1e-5)
    assert loss < 0.1 * flat
    torch.testing.assert_close(state.rows, torch.stack([E2, E3, E1, E1, E1, E1]))


def test_swav_normalises_both_views_as_one_batch_and_trains_prototypes(views: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    method = swav()
    model = Model(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12)), nn.Identity(), method.heads(12)).train()
    loss = method.loss(model, method.new_state(model), *views)
    prototypes = model.heads["prototypes"].weight
    assert isinstance(prototypes, Tensor)
    scores = cosine_scores(normalised(torch.cat(views).flatten(1)), prototypes)
    expected = torch.zeros(())
    for s, t in ((scores[:6], scores[6:]), (scores[6:], scores[:6])):
        codes = balanced_assignment(t, 0.5, 3)
        for i in range(6):
            for j in range(3):
                expected = expected - codes[i, j] * (s[i, j] / 0.2 - (s[i] / 0.2).logsumexp(0)) / 6
    torch.testing.assert_close(loss, expected)
    (ours,) = torch.autograd.grad(loss, prototypes)
    (theirs,) = torch.autograd.grad(expected, prototypes)
    assert ours.norm() > 1e-3
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: moco(temperature=0), r"method\.temperature must be greater than 0, got 0"),
        (lambda: moco(queue_size=0), r"method\.queue_size must be at least 1, got 0"),
        (lambda: moco(ema_decay=-0.1), r"method\.ema_decay must be between 0 .* got -0\.1"),
        (lambda: SimSiam(predictor_dim=0), r"method\.predictor_dim must be at least 1, got 0"),
        (lambda: BarlowTwins(off_diagonal_weight=-1), r"method\.off_diagonal_weight must be at least 0, got -1"),
        (
            lambda: VICReg(invariance_weight=-1, variance_weight=1, covariance_weight=1),
            r"method\.invariance_weight must be at least 0, got -1",
        ),
        (
            lambda: VICReg(invariance_weight=1, variance_weight=0, covariance_weight=1),
            r"method\.variance_weight must be greater than 0, got 0",
        ),
        (lambda: swav(num_prototypes=1), r"method\.num_prototypes must be at least 2, got 1"),
        (lambda: swav(epsilon=0), r"method\.epsilon must be greater than 0, got 0"),
        (lambda: swav(queue_size=-1), r"method\.queue_size at least 0, got 3 and -1"),
    ],
)
def test_numbers_are_checked(make: Callable[[], Method], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


# --- in a federation ---
def memory_of(run_dir: Path, partition: int) -> dict[str, Tensor]:
    return ClientStore(run_dir / "clients").read(partition, before=9)


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_equals_one_that_was_left_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the method keeps is in the clients' memory, and in nothing that travels."""
    straight, run_dir = tmp_path / "straight", tmp_path / "run"
    queue = ["method.queue_size=40"] if name == "swav" else []  # its default has none
    overrides = ("strategy=fedavg", f"method={name}", "evaluate.every=9", *queue)
    fedssl.run(small(straight, *overrides))
    config = small(run_dir, *overrides)
    run_interrupted(config, monkeypatch, before_round=2)
    simulation.resume(config, run_dir)
    assert_same(final_arrays(run_dir), final_arrays(straight))
    assert rows(run_dir) == rows(straight)
    setup = Setup(config)
    for partition in range(4):
        kept = memory_of(straight, partition)
        model = setup.build_model(setup.family(partition))
        state = setup.method.new_state(model).state_dict()
        assert {key.split("/", 2)[2] for key in kept} == set(state)
        assert name != "swav" or [len(rows) for rows in kept.values()] == [40]
        assert_same(
            {key: value.numpy() for key, value in kept.items()},
            {key: value.numpy() for key, value in memory_of(run_dir, partition).items()},
        )
    heads = {key.split("/")[1] for key in final_arrays(straight) if "/heads." in key}
    assert heads == {f"heads.{key}" for key in setup.build_model("tiny").heads.state_dict() if "num_batches" not in key}


@pytest.mark.parametrize("strategy", ["fedavg", "flesd"])
@pytest.mark.parametrize(
    "names", [["simclr", "byol", "moco", "swav"], ["barlow_twins", "vicreg", "simsiam", "info_nce"]]
)
def test_every_client_with_a_method_of_its_own(names: list[str], strategy: str, tmp_path: Path) -> None:
    config = small(tmp_path / "run", f"strategy={strategy}", f"client.methods=[{','.join(names)}]", "evaluate.every=9")
    assert fedssl.run(config)["status"] == "completed"
    kept = [{key.split("/")[2].split(".")[0] for key in memory_of(tmp_path / "run", p)} for p in range(4)]
    state = {"byol": {"backbone", "projector"}, "moco": {"encoder", "queue"}, "swav": {"rows"}}
    assert kept == [state.get(name, set()) for name in names]
    heads = {"byol": {"predictor"}, "simsiam": {"predictor"}, "swav": {"prototypes"}}
    wanted = set().union(*(heads.get(name, set()) for name in names))
    for family in ("conv4_4", "conv4_2", "tiny"):  # all models of a family are alike, so all have all
        got = {key.split(".")[1] for key in final_arrays(tmp_path / "run") if key.startswith(f"{family}/heads.")}
        assert got == wanted


def test_heads_of_one_name_that_differ() -> None:
    message = r"two methods of this run have different heads 'predictor'.* give them the same widths"
    with pytest.raises(ConfigError, match=message):
        Setup(small(None, "client.methods=[byol,simsiam]")).build_model("tiny")
    alike = small(None, "client.methods=[byol,simsiam]", "method=byol", "method.predictor_dim=32")
    assert list(Setup(alike).build_model("tiny").heads) == ["predictor"]


def test_the_recipe_for_small_networks_runs(tmp_path: Path) -> None:
    """Its optimiser, views, head and queue, on digits; widths and sizes are the tests'."""
    sizes = [value for value in SMALL if "projector.hidden_dim" not in value]
    chosen = [
        "experiment=small_model_recipe",
        "data=digits",
        "views=strong",
        "evaluate.every=9",
        "method.queue_size=64",
    ]
    config = compose([*chosen, *sizes, f"run_dir={tmp_path / 'run'}"])
    assert Setup(config).build_model("tiny").projector.hidden.weight.shape == (2 * 54, 54)  # type: ignore[union-attr]
    assert fedssl.run(config)["status"] == "completed"
    assert memory_of(tmp_path / "run", 0)["method/conv4_4/queue.rows"].shape == (64, 8)
