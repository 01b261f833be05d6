"""Every family at every resolution keeps the one interface; heads and measurements."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from fedssl.errors import ConfigError
from fedssl.models import Model, calibrate_batch_norm, feature_dim, num_parameters
from fedssl.models.backbones import Conv4, ResNet8, ViTTiny, mobilenet_v3, resnet18
from fedssl.models.heads import MLP

CONF = Path(__file__).parent.parent / "conf"
FEATURES = {
    "conv4_16": 128,
    "conv4_32": 256,
    "resnet8": 64,
    "resnet18": 512,
    "mobilenet_v3_small": 576,
    "mobilenet_v3_large": 960,
    "shufflenet_v2_x0_5": 1024,
    "efficientnet_b0": 1280,
    "vit_tiny": 192,
}


def build(family: str, image_size: int) -> nn.Module:
    models = OmegaConf.load(CONF / "models" / "default.yaml")
    config = OmegaConf.create({"data": {"image_size": image_size}, "models": models})
    backbone = instantiate(config.models[family])
    assert isinstance(backbone, nn.Module)
    return backbone


def images(b: int, size: int, seed: int = 0) -> Tensor:
    return torch.randn(b, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_the_shipped_families_are_the_documented_ones() -> None:
    assert set(OmegaConf.load(CONF / "models" / "default.yaml")) == set(FEATURES)


@pytest.mark.parametrize("image_size", [16, 32, 64, 224])
@pytest.mark.parametrize("family", FEATURES)
def test_a_family_trains_on_two_images_of_any_size(family: str, image_size: int) -> None:
    backbone = build(family, image_size)
    assert feature_dim(backbone, image_size) == FEATURES[family]
    features = backbone.train()(images(2, image_size))
    assert features.shape == (2, FEATURES[family])
    assert features.isfinite().all()
    (features * torch.linspace(-1, 1, FEATURES[family])).sum().backward()
    without = [name for name, parameter in backbone.named_parameters() if parameter.grad is None]
    assert without == []  # every weight takes part


@pytest.mark.parametrize("family", [family for family in FEATURES if family != "vit_tiny"])
@pytest.mark.parametrize(("image_size", "least"), [(16, 2), (32, 4), (64, 8), (224, 7)])
def test_the_last_feature_map_keeps_some_extent(family: str, image_size: int, least: int) -> None:
    sides: list[int] = []
    backbone = build(family, image_size)
    last = [module for module in backbone.modules() if isinstance(module, nn.Conv2d)][-1]
    last.register_forward_hook(lambda _module, _inputs, output: sides.append(output.shape[-1]))
    feature_dim(backbone, image_size)
    assert sides[0] >= least


@pytest.mark.parametrize("image_size", [16, 32, 64, 224])
def test_a_vision_transformer_sees_64_patches(image_size: int) -> None:
    backbone = ViTTiny(image_size=image_size)
    assert backbone.transformer.encoder.pos_embedding.shape == (1, 64 + 1, 192)


def test_parameter_counts_by_hand() -> None:
    def conv4(w: int) -> int:  # 9 weights per pair of channels, two numbers of batch norm per channel
        return 9 * (3 * w + 2 * w * w + 8 * w * w + 32 * w * w) + 2 * 15 * w

    assert num_parameters(build("conv4_16", 32)) == conv4(16)
    assert num_parameters(build("conv4_32", 32)) == conv4(32)
    blocks = 9 * (3 * 16 + 2 * 16 * 16 + 16 * 32 + 32 * 32 + 32 * 64 + 64 * 64) + 16 * 32 + 32 * 64
    assert num_parameters(ResNet8()) == blocks + 2 * (3 * 16 + 3 * 32 + 3 * 64)
    original = 11_689_512 - (512 * 1000 + 1000)  # He et al.'s network without its classifier
    assert num_parameters(resnet18(image_size=224)) == original
    assert num_parameters(resnet18(image_size=32)) == original - 64 * 3 * (7 * 7 - 3 * 3)


def test_conv4_is_the_documented_stack() -> None:
    """A literal transcription of the family's definition, on the same weights."""
    backbone = Conv4(width=4).eval()
    weights = backbone.state_dict()
    x = expected = images(3, 20)
    for layer in range(4):
        expected = torch.conv2d(expected, weights[f"{4 * layer}.weight"], padding=1)
        expected = torch.relu(expected / (1 + 1e-5) ** 0.5)  # batch norm as initialised, in eval mode
        if layer < 3:
            expected = torch.max_pool2d(expected, 2)
    torch.testing.assert_close(backbone(x), expected.mean((2, 3)))


def test_calibrated_batch_norm_means_eval_mode_equals_train_mode() -> None:
    backbone = build("mobilenet_v3_small", 16).eval()
    x = images(64, 16) + 3
    calibrate_batch_norm(backbone, x)
    assert not any(module.training for module in backbone.modules())
    assert {module.momentum for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)} == {0.1}
    evaluated, trained = backbone(x), backbone.train()(x)
    assert (evaluated - trained).norm() < 0.1 * trained.norm()  # variances' n / (n - 1), over 34 layers


def test_calibration_leaves_layers_alone_that_have_averages() -> None:
    old, new = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    x = images(16, 4) + 3
    old(x)
    before = {name: value.clone() for name, value in old.state_dict().items()}
    calibrate_batch_norm(nn.Sequential(old, new, nn.Dropout(0.5)), 2 * x)
    torch.testing.assert_close(old.state_dict(), before, rtol=0, atol=0)
    assert new.num_batches_tracked == 1
    torch.testing.assert_close(new.running_mean, torch.zeros(3), rtol=0, atol=1e-5)  # what comes out of `old`
    torch.testing.assert_close(new.running_var, torch.ones(3), rtol=0, atol=0.01)
    calibrate_batch_norm(nn.Sequential(new), x)
    torch.testing.assert_close(new.running_mean, torch.zeros(3), rtol=0, atol=1e-5)
    calibrate_batch_norm(nn.Linear(2, 2), x)  # nothing to calibrate: not even called


def test_errors_of_the_backbones() -> None:
    with pytest.raises(ConfigError, match="must be a multiple of 8, got 20"):
        ViTTiny(image_size=20)
    with pytest.raises(ConfigError, match="'small' and 'large', got 'tiny'"):
        mobilenet_v3(size="tiny", image_size=32, batch_norm_momentum=0.1)
    with pytest.raises(ConfigError, match="width of at least 1, got 0"):
        Conv4(width=0)


class UserBackbone(nn.Module):
    """A class from elsewhere, as a researcher would write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.norm.eval()  # frozen on purpose

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x)).relu().mean((2, 3))


def test_a_users_own_class_by_target() -> None:
    backbone = instantiate({"_target_": f"{__name__}.UserBackbone", "width": 7})
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    assert feature_dim(backbone, 16) == 7
    assert backbone.training
    assert not backbone.norm.training  # each part is back in the mode it had
    torch.testing.assert_close(backbone.state_dict(), before, rtol=0, atol=0)


def test_a_timm_model_by_target() -> None:
    pytest.importorskip("timm")
    backbone = instantiate({"_target_": "timm.create_model", "model_name": "test_resnet.r160_in1k", "num_classes": 0})
    model = Model(backbone, MLP(in_dim=feature_dim(backbone, 32), hidden_dim=None, out_dim=8, batch_norm=False))
    assert model(images(2, 32)).shape == (2, 8)


def test_feature_dim_names_what_is_wrong_with_a_backbone() -> None:
    with pytest.raises(ConfigError, match=r"Conv2d returned shape \(1, 4, 6, 6\)\. Pool in its forward"):
        feature_dim(nn.Conv2d(3, 4, 3), 8)
    with pytest.raises(ConfigError, match=r"Sequential cannot take \(b, 3, 4, 4\) images: .* data\.image_size=4"):
        feature_dim(nn.Sequential(nn.Conv2d(3, 4, 5), nn.Flatten()), 4)
    with pytest.raises(ConfigError, match=r"ViTTiny cannot take \(b, 3, 16, 16\) images"):
        feature_dim(ViTTiny(image_size=32), 16)


def test_a_model_projects_the_features() -> None:
    torch.manual_seed(0)
    model = Model(nn.Flatten(), MLP(in_dim=12, hidden_dim=None, out_dim=5, batch_norm=False))
    x = images(4, 2)
    first, second = (layer for layer in model.projector.modules() if isinstance(layer, nn.Linear))
    assert (first.in_features, first.out_features, second.in_features, second.out_features) == (12, 12, 12, 5)
    expected = torch.relu(x.flatten(1) @ first.weight.T + first.bias) @ second.weight.T + second.bias
    torch.testing.assert_close(model(x), expected)


def test_a_heads_batch_norm_whitens_its_hidden_layer() -> None:
    torch.manual_seed(0)
    head = MLP(in_dim=6, hidden_dim=10, out_dim=4, batch_norm=True).train()
    hidden: list[Tensor] = []
    head.activation.register_forward_hook(lambda _module, inputs, _output: hidden.append(inputs[0]))
    assert head(5 + torch.randn(32, 6)).shape == (32, 4)
    torch.testing.assert_close(hidden[0].mean(0), torch.zeros(10), rtol=0, atol=1e-5)
    assert num_parameters(head) == 6 * 10 + 2 * 10 + 10 * 4 + 4  # no bias beside batch norm's


def test_the_shipped_projector_is_flesds() -> None:
    head = instantiate(OmegaConf.load(CONF / "projector" / "mlp.yaml"), in_dim=64)
    assert [layer.out_features for layer in head.modules() if isinstance(layer, nn.Linear)] == [64, 128]
    assert not any(isinstance(layer, nn.BatchNorm1d) for layer in head.modules())


@pytest.mark.parametrize(("widening", "hidden"), [(2.0, 128), (0.51, 33)])
def test_the_wide_projector_is_as_wide_as_it_says(widening: float, hidden: int) -> None:
    config = OmegaConf.load(CONF / "projector" / "wide.yaml")
    head = instantiate(OmegaConf.merge(config, {"widening": widening}), in_dim=64)
    assert [layer.out_features for layer in head.modules() if isinstance(layer, nn.Linear)] == [hidden, 128]


def test_head_widths_must_be_positive() -> None:
    with pytest.raises(ConfigError, match=r"projector\.out_dim must be at least 1, got 3 and 0"):
        MLP(in_dim=2, hidden_dim=3, out_dim=0, batch_norm=False)


def test_frozen_parameters_and_buffers_are_not_counted() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    assert num_parameters(module) == 3 * 2 + 2 + 2 * 2
    module[0].requires_grad_(False)
    assert num_parameters(module) == 2 * 2
