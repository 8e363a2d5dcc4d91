"""The zoo's one table: models of other packages, built small, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Entry(NamedTuple):
    """A model and its input.

    build: makes the model; feed: makes positional and keyword arguments of a call; mask: for
    models that take padded input, the mask at the layers' resolution from the model and the
    input's mask; leaks: the part of such a model, other than norms, that reads padding.
    """

    package: str
    build: Callable[[], nn.Module]
    feed: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
    mask: Callable[[Any, Tensor], Tensor] | None = None
    leaks: str = ""


def first_tensor(out: Any) -> Tensor:
    """The floating-point tensor that a model's output begins with."""
    if isinstance(out, Tensor):
        return out
    if hasattr(out, "logits") and isinstance(out.logits, Tensor):
        return out.logits
    values = list(out.values()) if isinstance(out, dict) else list(out)
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
        if isinstance(value, (list, tuple, dict)):
            return first_tensor(value)
    raise TypeError(f"no tensor in {type(out).__name__}")


def _hugging(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        library = import_module("transformers")
        settings = getattr(library, config)(**options)
        if hasattr(library, model):
            return getattr(library, model)(settings)
        inner = import_module(type(settings).__module__.replace("configuration", "modeling"))
        return getattr(inner, model)(settings)

    return build


def _call(package: str, name: str, *args: Any, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return getattr(import_module(package), name)(*args, **options)

    return build


def _image(size: int, channels: int = 3, batch: int = 4) -> Callable[[], Any]:
    return lambda: ((torch.randn(batch, channels, size, size),), {})


def _speech(features: int, frames: int = 96) -> Callable[[], Any]:
    """Three utterances of other lengths, padded to the longest."""

    def feed() -> Any:
        lengths = torch.tensor([frames, 64, 40])
        mask = (torch.arange(frames) < lengths[:, None]).long()
        x = torch.randn(3, frames, features) * mask[..., None]
        return (), {"input_features": x, "attention_mask": mask}

    return feed


def _waves() -> Any:
    lengths = torch.tensor([4000, 3200, 2400])
    mask = (torch.arange(4000) < lengths[:, None]).long()
    return (), {"input_values": torch.randn(3, 4000) * mask, "attention_mask": mask}


def _graph() -> Any:
    edges = torch.stack([torch.arange(40), (torch.arange(40) + 7) % 40])
    return (torch.randn(40, 8), edges), {}


def _subsampled(model: Any, mask: Tensor) -> Tensor:
    frames = int(model._get_subsampling_output_length(torch.tensor([mask.shape[1]])))
    return model._get_output_attention_mask(mask, target_length=frames)


def _feature_vectors(model: Any, mask: Tensor) -> Tensor:
    frames = int(model._get_feat_extract_output_lengths(mask.shape[1]))
    return model._get_feature_vector_attention_mask(frames, mask)


_SPEECH = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
}
_DRY = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "layerdrop": 0.0}
_STAGES = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]}

MODELS: dict[str, Entry] = {
    "Parakeet": Entry(
        "transformers",
        _hugging(
            "ParakeetEncoder",
            "ParakeetEncoderConfig",
            num_mel_bins=80,
            dropout_positions=0.0,
            subsampling_conv_channels=16,
            **_SPEECH,
            **_DRY,
        ),
        _speech(80),
        _subsampled,
    ),
    "LASR": Entry(
        "transformers",
        _hugging(
            "LasrEncoder",
            "LasrEncoderConfig",
            num_mel_bins=80,
            dropout_positions=0.0,
            subsampling_conv_channels=16,
            **_SPEECH,
            **_DRY,
        ),
        _speech(80),
        _subsampled,
    ),
    "SeamlessM4T's conformer": Entry(
        "transformers",
        _hugging(
            "SeamlessM4TSpeechEncoder",
            "SeamlessM4TConfig",
            hidden_size=32,
            feature_projection_input_dim=40,
            speech_encoder_layers=2,
            speech_encoder_attention_heads=2,
            speech_encoder_intermediate_size=48,
            speech_encoder_dropout=0.0,
            speech_encoder_layerdrop=0.0,
            add_adapter=False,
            adaptor_dropout=0.0,
            position_embeddings_type="relative",
            vocab_size=32,
        ),
        _speech(40),
        lambda model, mask: mask,
    ),
    "Wav2Vec2-Conformer": Entry(
        "transformers",
        _hugging(
            "Wav2Vec2ConformerModel",
            "Wav2Vec2ConformerConfig",
            vocab_size=32,
            conv_dim=[16, 16, 16],
            conv_stride=[5, 4, 4],
            conv_kernel=[10, 8, 4],
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=2,
            apply_spec_augment=False,
            hidden_dropout=0.0,
            conformer_conv_dropout=0.0,
            feat_proj_dropout=0.0,
            feat_extract_norm="layer",
            final_dropout=0.0,
            mask_time_prob=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
            layerdrop=0.0,
            **_SPEECH,
        ),
        _waves,
        _feature_vectors,
        "its depthwise convolutions read padded frames",
    ),
    "ResNet": Entry(
        "transformers",
        _hugging("ResNetForImageClassification", "ResNetConfig", **_STAGES),
        _image(64),
    ),
    "RegNet": Entry(
        "transformers",
        _hugging("RegNetForImageClassification", "RegNetConfig", groups_width=8, **_STAGES),
        _image(64),
    ),
    "MobileNetV2": Entry(
        "transformers",
        _hugging(
            "MobileNetV2ForImageClassification",
            "MobileNetV2Config",
            depth_multiplier=0.25,
            classifier_dropout_prob=0.0,
        ),
        _image(64),
    ),
    "LeViT": Entry(
        "transformers",
        _hugging(
            "LevitForImageClassification",
            "LevitConfig",
            image_size=64,
            hidden_sizes=[16, 24, 32],
            num_attention_heads=[2, 2, 2],
            depths=[1, 1, 1],
            key_dim=[8, 8, 8],
            drop_path_rate=0,
        ),
        _image(64),
    ),
    "PatchTST": Entry(
        "transformers",
        _hugging(
            "PatchTSTForPrediction",
            "PatchTSTConfig",
            num_input_channels=3,
            context_length=32,
            patch_length=8,
            patch_stride=8,
            prediction_length=4,
            d_model=16,
            ffn_dim=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            norm_type="batchnorm",
            attention_dropout=0.0,
            ff_dropout=0.0,
            path_dropout=0.0,
            head_dropout=0.0,
            loss="mse",
            scaling=None,
        ),
        lambda: ((torch.randn(4, 32, 3),), {}),
    ),
    "resnet18": Entry("timm", _call("timm", "create_model", "resnet18", num_classes=4), _image(64)),
    "efficientnet_b0": Entry(
        "timm", _call("timm", "create_model", "efficientnet_b0", num_classes=4), _image(64)
    ),
    "mobilenetv3_small_050": Entry(
        "timm", _call("timm", "create_model", "mobilenetv3_small_050", num_classes=4), _image(64)
    ),
    "regnetx_002": Entry(
        "timm", _call("timm", "create_model", "regnetx_002", num_classes=4), _image(64)
    ),
    "repvgg_a0": Entry(
        "timm", _call("timm", "create_model", "repvgg_a0", num_classes=4), _image(64)
    ),
    "densenet121": Entry(
        "timm", _call("timm", "create_model", "densenet121", num_classes=4), _image(64)
    ),
    "levit_128s": Entry(
        "timm",
        _call("timm", "create_model", "levit_128s", num_classes=4, img_size=64),
        _image(64),
    ),
    "GIN": Entry(
        "torch_geometric",
        _call("torch_geometric.nn", "GIN", 8, 16, 3, out_channels=4, norm="BatchNorm"),
        _graph,
    ),
    "GCN": Entry(
        "torch_geometric",
        _call("torch_geometric.nn", "GCN", 8, 16, 3, out_channels=4, norm="BatchNorm"),
        _graph,
    ),
    "BasicUNet": Entry(
        "monai",
        _call(
            "monai.networks.nets",
            "BasicUNet",
            spatial_dims=2,
            norm="batch",
            features=(8, 8, 16, 16, 16, 8),
        ),
        _image(32, 1),
    ),
    "SegResNet": Entry(
        "monai",
        _call(
            "monai.networks.nets",
            "SegResNet",
            spatial_dims=3,
            norm="BATCH",
            init_filters=4,
            in_channels=1,
            out_channels=2,
        ),
        lambda: ((torch.randn(2, 1, 16, 16, 16),), {}),
    ),
    "TabNet": Entry(
        "pytorch-tabnet",
        _call(
            "pytorch_tabnet.tab_network",
            "TabNet",
            8,
            3,
            virtual_batch_size=16,
            group_attention_matrix=torch.eye(8),
        ),
        lambda: ((torch.randn(32, 8),), {}),
    ),
    "Unet": Entry(
        "segmentation-models-pytorch",
        _call("segmentation_models_pytorch", "Unet", "resnet18", encoder_weights=None),
        _image(64),
    ),
    "resnet50": Entry(
        "torchvision", _call("torchvision.models", "resnet50", num_classes=4), _image(64)
    ),
}
