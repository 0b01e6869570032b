"""The torch backend of dptrain, its API for users with a model of their own, and layers to compose models from."""

import dptrain_torch.process  # noqa: F401  # settings of the process
from dptrain_torch.describe import describe
from dptrain_torch.engine import check_bounds, clipped_sum, make_plan, per_sample_norms, project, self_check, validate
from dptrain_torch.fix import fix, fix_report, freeze_all_but
from dptrain_torch.layers import (
    Abs,
    BoundedBias,
    BoundedInput,
    Flatten,
    FrobeniusDense,
    FrobeniusLinear,
    FullSort,
    GroupSort,
    Householder,
    LayerCentering,
    LossGradientClip,
    MaxPool2d,
    MixerBlock,
    Patches,
    Permute,
    ReLU,
    Reshape,
    Residual,
    ScaledAveragePooling2D,
    ScaledAvgPool2d,
    ScaledGlobalAveragePooling2D,
    ScaledGlobalAvgPool2d,
    ScaledGlobalL2NormPool2d,
    ScaledGlobalL2NormPooling2D,
    ScaledL2NormPool2d,
    ScaledL2NormPooling2D,
    SpectralConv1D,
    SpectralConv1d,
    SpectralConv2D,
    SpectralConv2d,
    SpectralDense,
    SpectralLinear,
)
from dptrain_torch.privacy_engine import PrivacyEngine

__all__ = [
    "Abs", "BoundedBias", "BoundedInput", "Flatten", "FrobeniusDense", "FrobeniusLinear", "FullSort", "GroupSort", "Householder",
    "LayerCentering", "LossGradientClip", "MaxPool2d", "MixerBlock", "Patches", "Permute", "PrivacyEngine", "ReLU", "Reshape", "Residual",
    "ScaledAveragePooling2D", "ScaledAvgPool2d", "ScaledGlobalAveragePooling2D", "ScaledGlobalAvgPool2d", "ScaledGlobalL2NormPool2d",
    "ScaledGlobalL2NormPooling2D", "ScaledL2NormPool2d", "ScaledL2NormPooling2D", "SpectralConv1D", "SpectralConv1d", "SpectralConv2D",
    "SpectralConv2d", "SpectralDense", "SpectralLinear", "check_bounds", "clipped_sum", "describe", "fix", "fix_report", "freeze_all_but",
    "make_plan", "per_sample_norms", "project", "self_check", "validate",
]  # fmt: skip
