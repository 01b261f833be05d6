"""Small backbones. One interface: (b, 3, s, s) images to (b, feature_dim) features, already pooled and flattened.

`conf/models/default.yaml` names the families. Where torchvision has the network, it is torchvision's, untrained and
without its classifier. Those were drawn for 224 pixels and halve the resolution five times, which leaves a 32-pixel
image as one point; up to `LOW_RESOLUTION` pixels the first two halvings are taken out (each docstring says which), so
that 16 pixels end as 2x2, 32 as 4x4 and 64 as 8x8. Weights keep their shapes, except the first kernel of ResNet-18.

Your own backbone is any `nn.Module` with this interface, named by `_target_` under `models`. A timm model needs no
wrapper: `_target_: timm.create_model, model_name: resnet10t, num_classes: 0` pools and drops the classifier.
"""

from functools import partial

import torchvision
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from fedssl.errors import ConfigError

LOW_RESOLUTION = 64  # pixels: the largest image side that gets the low-resolution stem


class Conv4(nn.Sequential):
    """Four 3x3 convolutions with batch norm and ReLU, max-pooling after the first three, global mean.

    The few-shot literature's Conv-4 with growing widths; 8 or more pixels. The cheapest family: one core trains it.

    Args:
        width: channels of the first layer; the others have 2, 4 and 8 times as many. 8 * width features.
    """

    def __init__(self, *, width: int) -> None:
        if width < 1:
            raise ConfigError(
                f"a conv4 backbone needs a width of at least 1, got {width}; see its entry under `models`."
            )
        layers: list[nn.Module] = []
        channels = 3
        for out_channels in (width, 2 * width, 4 * width, 8 * width):
            layers += [
                nn.Conv2d(channels, out_channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(out_channels),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(2),
            ]
            channels = out_channels
        super().__init__(*layers[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten())


class ResNet8(nn.Sequential):
    """A 3x3 stem of 16 channels, one basic block each of 16, 32 and 64 with strides 1, 2 and 2, global mean.

    He et al. 2015, section 4.2 with n = 1 (https://arxiv.org/abs/1512.03385), but with 1x1 convolutions on the
    shortcuts that change width (option B). 64 features.
    """

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            BasicBlock(16, 16),
            BasicBlock(16, 32, stride=2, downsample=_shortcut(16, 32)),
            BasicBlock(32, 64, stride=2, downsample=_shortcut(32, 64)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def resnet18(*, image_size: int) -> nn.Module:
    """torchvision's ResNet-18; 512 features.

    Up to 64 pixels: a 3x3 first convolution of stride 1 instead of 7x7 of stride 2, and no max-pooling; what SimCLR
    (https://arxiv.org/abs/2002.05709, appendix B.9) and FLESD do for CIFAR.
    """
    network: nn.Module = torchvision.models.resnet18(weights=None)
    network.fc = nn.Identity()
    if image_size <= LOW_RESOLUTION:
        stem = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
        network.conv1 = stem
        network.maxpool = nn.Identity()
    return network


def mobilenet_v3(*, size: str, image_size: int, batch_norm_momentum: float) -> nn.Module:
    """torchvision's MobileNetV3, the features before its two-layer classifier; 576 (small) or 960 (large).

    Up to 64 pixels: stride 1 instead of 2 in the first convolution and in the first block that has stride 2.

    Args:
        size: "small" or "large".
        image_size: side of the images in pixels.
        batch_norm_momentum: weight of the newest batch in the running averages. torchvision's 0.01 suits long
            training: after a client's 20 steps, 80 % of an average would still be its initial value.
    """
    if size not in ("small", "large"):
        raise ConfigError(
            f"MobileNetV3 comes in the sizes 'small' and 'large', got {size!r}; see its entry under `models`."
        )
    build = torchvision.models.mobilenet_v3_small if size == "small" else torchvision.models.mobilenet_v3_large
    network: nn.Module = build(
        weights=None, norm_layer=partial(nn.BatchNorm2d, eps=0.001, momentum=batch_norm_momentum)
    )
    network.classifier = nn.Identity()
    if image_size <= LOW_RESOLUTION:
        _remove_first_strides(network, 2)
    return network


def shufflenet_v2_x0_5(*, image_size: int) -> nn.Module:
    """torchvision's ShuffleNetV2 at half width; 1024 features.

    Up to 64 pixels: stride 1 instead of 2 in the first convolution, and no max-pooling.
    """
    network: nn.Module = torchvision.models.shufflenet_v2_x0_5(weights=None)
    network.fc = nn.Identity()
    if image_size <= LOW_RESOLUTION:
        _remove_first_strides(network, 1)
        network.maxpool = nn.Identity()
    return network


def efficientnet_b0(*, image_size: int, stochastic_depth: float) -> nn.Module:
    """torchvision's EfficientNet-B0; 1280 features.

    Up to 64 pixels: stride 1 instead of 2 in the first convolution and in the first block that has stride 2.

    Args:
        image_size: side of the images in pixels.
        stochastic_depth: probability of skipping the last block, linearly less for earlier ones; torchvision: 0.2.
    """
    network: nn.Module = torchvision.models.efficientnet_b0(weights=None, stochastic_depth_prob=stochastic_depth)
    network.classifier = nn.Identity()
    if image_size <= LOW_RESOLUTION:
        _remove_first_strides(network, 2)
    return network


class ViTTiny(nn.Module):
    """torchvision's vision transformer at DeiT-Ti's size: width 192, 12 layers, 3 heads. 192 features, the class token.

    Touvron et al. 2020, Table 1 (https://arxiv.org/abs/2012.12877). The patch is an eighth of the image, so that there
    are 64 tokens and the class token at every resolution.

    Args:
        image_size: side of the images in pixels, a multiple of 8.
    """

    def __init__(self, *, image_size: int) -> None:
        super().__init__()
        if image_size % 8 != 0 or image_size < 8:
            raise ConfigError(
                f"vit_tiny cuts an image into 8 x 8 patches, so data.image_size must be a multiple of 8, "
                f"got {image_size}."
            )
        self.transformer = torchvision.models.VisionTransformer(
            image_size=image_size, patch_size=image_size // 8, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=768
        )
        self.transformer.heads = nn.Identity()

    def forward(self, x: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b 192"]:
        """The class token after the last layer norm."""
        features: Tensor = self.transformer(x)
        return features


def _shortcut(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride=2, bias=False), nn.BatchNorm2d(out_channels))


def _remove_first_strides(network: nn.Module, count: int) -> None:
    """Give the first `count` convolutions of stride 2, in the order of the network, stride 1."""
    strided = [module for module in network.modules() if isinstance(module, nn.Conv2d) and module.stride == (2, 2)]
    for convolution in strided[:count]:
        convolution.stride = (1, 1)
