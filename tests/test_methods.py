"""The methods: which loss, and which images share a batch's normalisation."""

import itertools
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from fedssl.errors import ConfigError
from fedssl.losses import info_nce, nt_xent
from fedssl.methods import Method
from fedssl.methods.byol import BYOL
from fedssl.methods.info_nce import InfoNCE
from fedssl.methods.simclr import SimCLR
from fedssl.models import Model, TargetEncoder

CONF = Path(__file__).parent.parent / "conf" / "method"


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
    method = instantiate(OmegaConf.load(path))
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
