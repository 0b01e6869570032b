"""Small versions of model families for torch: what ``docs/model_table.py`` checks and lists, and the conformance tests prove exact.

``FAMILIES`` maps a name to a builder of ``(model, inputs)``; the models have random weights, and few and narrow layers. BatchNorm, which
mixes examples, is given as GroupNorm wherever the definition takes a normalisation layer, and replaced by it otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

CLASSES, BATCH = 3, 4


def image(size: int = 16, batch: int = BATCH) -> Tensor:
    """Random images."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def tokens(length: int = 7, batch: int = BATCH) -> Tensor:
    """Random token ids, none of them a padding id."""
    return torch.randint(3, 30, (batch, length), generator=torch.Generator().manual_seed(0))


def group_norm(channels: int) -> nn.GroupNorm:
    """What stands for BatchNorm."""
    return nn.GroupNorm(4 if channels % 4 == 0 else 1, channels)


def without_batch_norm(module: nn.Module) -> nn.Module:
    """The module with every BatchNorm replaced; timm's, which hold an activation, as well."""
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            new: nn.Module = group_norm(child.num_features)
            setattr(module, name, nn.Sequential(new, child.drop, child.act) if hasattr(child, "act") else new)
        else:
            without_batch_norm(child)
    return module


# --- torchvision ---


def resnet(block: str = "BasicBlock", **settings: Any) -> tuple[nn.Module, Any]:
    """ResNet, WideResNet and ResNeXt."""
    from torchvision.models import resnet

    return resnet.ResNet(getattr(resnet, block), [1, 1, 1, 1], CLASSES, norm_layer=group_norm, **settings), image()


def vgg() -> tuple[nn.Module, Any]:
    """VGG."""
    from torchvision.models import vgg

    model = vgg.VGG(vgg.make_layers([4, "M", 8, "M", 8, 8, "M"]), CLASSES, dropout=0.0)
    model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(2), nn.Sequential(nn.Linear(32, 8), nn.ReLU(inplace=True), nn.Linear(8, CLASSES))
    return model, image()


def densenet() -> tuple[nn.Module, Any]:
    """DenseNet."""
    from torchvision.models import DenseNet

    return without_batch_norm(DenseNet(4, (2, 2), 8, num_classes=CLASSES)), image(32)


def mobilenet() -> tuple[nn.Module, Any]:
    """MobileNetV2."""
    from torchvision.models import MobileNetV2

    blocks = [[1, 8, 1, 1], [6, 8, 2, 2]]
    return MobileNetV2(CLASSES, 0.25, blocks, norm_layer=group_norm, dropout=0.0), image()


def efficientnet() -> tuple[nn.Module, Any]:
    """EfficientNet: depthwise convolutions, squeeze and excite."""
    from torchvision.models.efficientnet import EfficientNet, MBConvConfig

    blocks = [MBConvConfig(1, 3, 1, 8, 8, 1), MBConvConfig(2, 3, 2, 8, 12, 1)]
    return EfficientNet(blocks, 0.0, 0.0, CLASSES, norm_layer=group_norm, last_channel=16), image()


def convnext() -> tuple[nn.Module, Any]:
    """ConvNeXt: layer scale, a bare parameter."""
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt([CNBlockConfig(8, 8, 1), CNBlockConfig(8, None, 1)], num_classes=CLASSES), image()


def swin(version: int) -> tuple[nn.Module, Any]:
    """torchvision's Swin transformers: windows folded into the batch axis, bias tables."""
    from torchvision.models import swin_transformer as module

    parts: dict[str, Any] = {}
    if version == 2:
        parts = {"block": module.SwinTransformerBlockV2, "downsample_layer": module.PatchMergingV2}
    model = module.SwinTransformer([2, 2], 8, [2, 2], [2, 2], [4, 4], num_classes=CLASSES, stochastic_depth_prob=0.0, **parts)
    return model, image()


def vision_transformer() -> tuple[nn.Module, Any]:
    """torchvision's ViT: class token, position embedding, ``nn.MultiheadAttention``."""
    from torchvision.models import VisionTransformer

    return VisionTransformer(16, 4, 2, 2, 8, 12, num_classes=CLASSES), image()


# --- timm ---


def timm(name: str, size: int = 16, **settings: Any) -> tuple[nn.Module, Any]:
    """A model of timm by name."""
    import timm

    return without_batch_norm(timm.create_model(name, num_classes=CLASSES, **settings)), image(size)


def timm_vit(name: str, **settings: Any) -> tuple[nn.Module, Any]:
    """A vision transformer of timm."""
    return timm(name, **{"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, **settings})


def timm_swin(name: str) -> tuple[nn.Module, Any]:
    """A Swin transformer of timm."""
    return timm(name, img_size=16, patch_size=2, window_size=4, embed_dim=8, depths=(2, 2), num_heads=(2, 2))


def timm_convolutions() -> tuple[nn.Module, Any]:
    """The convolutions of norm-free networks and of EfficientNet's TensorFlow weights: the weight is computed, or the input padded."""
    from timm.layers import Conv2dSame, ScaledStdConv2d, StdConv2d
    from timm.layers.grn import GlobalResponseNorm

    body = [ScaledStdConv2d(3, 8, 3, padding=1), nn.SiLU(), StdConv2d(8, 8, 3, groups=2), nn.SiLU(), Conv2dSame(8, 6, 3, stride=2)]
    return nn.Sequential(
        *body, GlobalResponseNorm(6, channels_last=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES)
    ), image()


def mixer() -> tuple[nn.Module, Any]:
    """MLP-Mixer."""
    from timm.models.mlp_mixer import MlpMixer

    return MlpMixer(CLASSES, 16, patch_size=4, num_blocks=2, embed_dim=8), image()


# --- transformers ---

TEXT = {"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16}
NARROW = {**TEXT, "intermediate_size": 12}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def transformer(name: str, attention_mask: bool = False, **settings: Any) -> tuple[nn.Module, Any]:
    """A text model of transformers; ``name`` without ``For...`` is that of its configuration."""
    import transformers

    config = getattr(transformers, f"{name.partition('For')[0].removesuffix('LMHeadModel')}Config")(**settings)
    inputs = {"input_ids": tokens()}
    return getattr(transformers, name)(config), {**inputs, "attention_mask": torch.ones_like(tokens())} if attention_mask else inputs


def t5() -> tuple[nn.Module, Any]:
    """T5: encoder and decoder, relative position biases from an embedding."""
    import transformers

    config = transformers.T5Config(vocab_size=30, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2, dropout_rate=0.0)
    return transformers.T5ForConditionalGeneration(config), {"input_ids": tokens(), "decoder_input_ids": tokens(5)}


def hugging_face_image(name: str, **settings: Any) -> tuple[nn.Module, Any]:
    """An image model of transformers."""
    import transformers

    config = getattr(transformers, f"{name}Config")(image_size=16, num_labels=CLASSES, drop_path_rate=0.0, **QUIET, **settings)
    return getattr(transformers, f"{name}ForImageClassification")(config), image()


def lora(build: Callable[[], tuple[nn.Module, Any]], targets: list[str]) -> tuple[nn.Module, Any]:
    """Low-rank adapters of peft on a frozen model."""
    import peft

    model, inputs = build()
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)), inputs


def bert() -> tuple[nn.Module, Any]:
    """BERT; its position ids are broadcast over the batch."""
    return transformer("BertForSequenceClassification", num_labels=CLASSES, **NARROW, **QUIET)


DISTIL = {"vocab_size": 30, "dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 12, "max_position_embeddings": 16, "num_labels": CLASSES}
DISTIL |= {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
GPT2 = {
    "vocab_size": 30,
    "n_embd": 8,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 16,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
}
OPT = {**TEXT, "ffn_dim": 12, "word_embed_proj_dim": 8, "dropout": 0.0, "attention_dropout": 0.0}
LAYERS = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}

FAMILIES: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "ResNet (torchvision)": resnet,
    "WideResNet (torchvision)": lambda: resnet("Bottleneck", width_per_group=16),
    "ResNeXt (torchvision)": lambda: resnet("Bottleneck", groups=4, width_per_group=4),
    "VGG (torchvision)": vgg,
    "DenseNet (torchvision)": densenet,
    "MobileNetV2 (torchvision)": mobilenet,
    "EfficientNet (torchvision)": efficientnet,
    "ConvNeXt (torchvision)": convnext,
    "Swin (torchvision)": lambda: swin(1),
    "Swin v2 (torchvision)": lambda: swin(2),
    "ViT (torchvision)": vision_transformer,
    "standardised and padded convolutions (timm)": timm_convolutions,
    "ConvNeXt (timm)": lambda: timm("convnext_tiny", 32, dims=(8, 8, 8, 8), depths=(1, 1, 1, 1)),
    "ViT (timm)": lambda: timm_vit("vit_tiny_patch16_224"),
    "ViT with rotary embedding (timm)": lambda: timm_vit("vit_base_patch16_rope_reg1_gap_256"),
    "DeiT, distilled (timm)": lambda: timm_vit("deit_tiny_distilled_patch16_224"),
    "BEiT (timm)": lambda: timm_vit("beit_base_patch16_224"),
    "CaiT (timm)": lambda: timm_vit("cait_xxs24_224"),
    "XCiT (timm)": lambda: timm("xcit_nano_12_p16_224", 32, img_size=32, embed_dim=16, depth=2, num_heads=2),
    "Swin (timm)": lambda: timm_swin("swin_tiny_patch4_window7_224"),
    "Swin v2 (timm)": lambda: timm_swin("swinv2_tiny_window8_256"),
    "MLP-Mixer (timm)": mixer,
    "PVT v2 (timm)": lambda: timm("pvt_v2_b0", 32, embed_dims=(8, 8, 8, 8), depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1)),
    "BERT (transformers)": bert,
    "RoBERTa (transformers)": lambda: transformer("RobertaForSequenceClassification", True, num_labels=CLASSES, **NARROW, **QUIET),
    "DistilBERT (transformers)": lambda: transformer("DistilBertForSequenceClassification", **DISTIL),
    "GPT-2 (transformers)": lambda: transformer("GPT2LMHeadModel", **GPT2),
    "OPT (transformers)": lambda: transformer("OPTForCausalLM", True, **OPT),
    "LLaMA (transformers)": lambda: transformer("LlamaForCausalLM", num_key_value_heads=1, **NARROW),
    "T5 (transformers)": t5,
    "ViT (transformers)": lambda: hugging_face_image("ViT", patch_size=4, **LAYERS),
    "BEiT (transformers)": lambda: hugging_face_image("Beit", patch_size=4, use_relative_position_bias=True, **LAYERS),
    "Swin (transformers)": lambda: hugging_face_image("Swin", patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4),
    "LoRA on BERT (peft)": lambda: lora(bert, ["query", "value"]),
    "LoRA on ViT (peft, timm)": lambda: lora(lambda: timm_vit("vit_tiny_patch16_224"), ["qkv", "fc1"]),
}
