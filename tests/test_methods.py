"""The methods: which loss, and which images share a batch's normalisation."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from fedssl.errors import ConfigError
from fedssl.losses import info_nce, nt_xent
from fedssl.methods import Method
from fedssl.methods.info_nce import InfoNCE
from fedssl.methods.simclr import SimCLR
from fedssl.models import Model

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
    torch.testing.assert_close(SimCLR(temperature=0.3).loss(model, x1, x2), nt_xent(z[:6], z[6:], 0.3))
    assert model.backbone[1].num_batches_tracked == 1  # type: ignore[index]


def test_info_nce_normalises_each_view_on_its_own(model: Model, views: tuple[Tensor, Tensor]) -> None:
    x1, x2 = views
    z1, z2 = normalised(x1.flatten(1)), normalised(x2.flatten(1))
    torch.testing.assert_close(InfoNCE(temperature=0.3).loss(model, x1, x2), info_nce(z1, z2, 0.3))
    assert model.backbone[1].num_batches_tracked == 2  # type: ignore[index]


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_method_has_a_finite_loss_with_gradients(path: Path, views: tuple[Tensor, Tensor]) -> None:
    method = instantiate(OmegaConf.load(path))
    assert isinstance(method, Method)
    torch.manual_seed(0)
    model = Model(nn.Flatten(), nn.Linear(12, 4))
    loss = method.loss(model, *views)
    loss.backward()
    assert loss.isfinite()
    assert model.projector.weight.grad.norm() > 1e-4  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("method", [SimCLR, InfoNCE])
@pytest.mark.parametrize("temperature", [0, -0.1, float("nan")])
def test_temperature_must_be_positive(method: type[SimCLR | InfoNCE], temperature: float) -> None:
    with pytest.raises(ConfigError, match=r"method\.temperature must be greater than 0, got"):
        method(temperature=temperature)
