"""Classes from words: networks of Hugging Face's transformers that compare pictures with texts.

    f_t = image tower(frame t) / |.|        v = mean_t f_t / |.|        CLIP, SigLIP, SigLIP 2
    logit_k = exp(logit_scale) * (v . t_k) + logit_bias                 t_k: the unit feature of class k (no bias: CLIP)

X-CLIP (Ni et al., 2022) sees the frames together, and moves each t_k by what it saw. Texts are read once, when a folder
is imported (video_baselines.image_text_folder): what is easy to break is that t_k are weights then, those of the
classifier, so that whoever labels needs neither tokenizer nor text tower, and other classes are another network. What
goes into that classifier, v, is the embedding.

Shapes: M videos, T frames, C channels, Y X pixels, F frames of all videos, N patches, D features, K classes
"""

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from video_baselines.huggingface import (
    build_errors,
    declared_entries,
    fed_spec,
    library,
    quiet,
    require_bounded,
    require_small_table,
)
from video_baselines.streams import ClipClassifier, require_count

__all__ = ["TEXT_TYPES", "WordClassifier", "both_towers", "image_text"]

TEXT_TYPES = ("clip", "siglip", "siglip2", "xclip")
"""Model types of the library that are built here."""

_NO_TEXT = dict.fromkeys(
    ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), 1
)


class WordClassifier(nn.Module):
    """The towers for pictures of one network, and the features of the classes: [M, T, C, Y, X] -> logits [M, K]."""

    def __init__(self, net: nn.Module, num_classes: int, num_features: int) -> None:
        super().__init__()
        self.net = net
        self.classifier = nn.Linear(num_features, num_classes, bias=False)
        self.classifier.is_classifier = True  # type: ignore[assignment]

    def forward(self, frames_MTCYX: Tensor) -> Tensor:
        """Return logits [M, K]."""
        net = cast(Any, self.net)
        moves_MKD = None
        if net.config.model_type == "xclip":
            video_MD, moves_MKD = self._frames_together(frames_MTCYX)
        else:
            images_FD = self._pictures(frames_MTCYX.flatten(0, 1))
            images_MTD = images_FD.reshape(*frames_MTCYX.shape[:2], -1)
            video_MD = F.normalize(images_MTD.float(), dim=-1).mean(dim=1)
        with _float32(frames_MTCYX.device.type):  # a scale of 100 makes half a logit of bfloat16's third digit
            video_MD = F.normalize(video_MD.float(), dim=-1)
            cosine_MK: Tensor = self.classifier(video_MD)
            if moves_MKD is not None:
                moves_MKD = moves_MKD.float()
                cosine_MK = cosine_MK + (moves_MKD @ video_MD[..., None]).squeeze(-1)
                cosine_MK = cosine_MK / (self.classifier.weight + moves_MKD).norm(dim=-1)
            logits_MK: Tensor = net.logit_scale.exp() * cosine_MK
            return logits_MK + net.logit_bias if hasattr(net, "logit_bias") else logits_MK

    def _pictures(self, frames_FCYX: Tensor) -> Tensor:
        """Features [F, D] of frames, each by itself."""
        net = cast(Any, self.net)
        if net.config.model_type != "siglip2":
            return cast(Tensor, net.get_image_features(pixel_values=frames_FCYX).pooler_output)
        side = net.config.vision_config.patch_size
        num_frames, colours, height, width = frames_FCYX.shape
        rows, columns = height // side, width // side
        grid = frames_FCYX.reshape(num_frames, colours, rows, side, columns, side).permute(0, 2, 4, 3, 5, 1)
        answer = net.get_image_features(
            pixel_values=grid.reshape(num_frames, rows * columns, -1),
            pixel_attention_mask=None,  # no frame is padded
            spatial_shapes=torch.tensor([rows, columns], device=frames_FCYX.device).expand(num_frames, 2),
        )
        return cast(Tensor, answer.pooler_output)

    def _frames_together(self, frames_MTCYX: Tensor) -> tuple[Tensor, Tensor]:
        """X-CLIP's feature of each video [M, D], and by how much it moves the feature of each class [M, K, D]."""
        net, shape = cast(Any, self.net), frames_MTCYX.shape[:2]
        seen = net.vision_model(pixel_values=frames_MTCYX.flatten(0, 1))
        frames_MTD = net.visual_projection(seen.pooler_output).reshape(*shape, -1)
        patches = net.prompts_visual_layernorm(seen.last_hidden_state[:, 1:]) @ net.prompts_visual_projection
        patches_MND = patches.reshape(*shape, *patches.shape[1:]).mean(dim=1)
        texts_MKD = self.classifier.weight.expand(shape[0], -1, -1)
        return net.mit(frames_MTD).pooler_output, net.prompts_generator(texts_MKD, patches_MND)


def _float32(device: str) -> contextlib.AbstractContextManager[object]:
    """No autocast inside; where there is none (meta) nothing."""
    is_there = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if is_there else contextlib.nullcontext()


def image_text(
    *,
    num_classes: int,
    config: Mapping[str, Any],
    rgb_mean: tuple[float, float, float],
    rgb_std: tuple[float, float, float],
    recipe: Mapping[str, Any] | None = None,
) -> ClipClassifier:
    """Build the towers for pictures of a network of TEXT_TYPES, random, and a classifier for what was said of classes.

    config: model_type, `vision_config`, and the other entries of that type's config but `text_config`. The others: as
    of video_baselines.huggingface. All frames of a video, S x T, are seen at once; X-CLIP takes its number, one of each
    segment. Raises ValueError naming the option.
    """
    require_count("num_classes", num_classes)
    if not isinstance(config, Mapping) or config.get("model_type") not in TEXT_TYPES:
        found = config.get("model_type") if isinstance(config, Mapping) else config
        raise ValueError(f"config.model_type must be one of {', '.join(TEXT_TYPES)}, got {found!r:.100}")
    kind = config["model_type"]
    entries = {name: value for name, value in config.items() if name != "model_type"}
    _require_declared(entries, declared_entries(kind) - {"text_config"}, "config")
    _require_declared(entries.get("vision_config"), declared_entries(f"{kind}_vision_model"), "config.vision_config")
    built = both_towers(
        kind, {**entries, "vision_config": dict(entries["vision_config"]), "text_config": dict(_NO_TEXT)}
    )
    vision = built.vision_config
    spec = fed_spec(vision, rgb_mean, rgb_std, recipe)
    if kind == "xclip":
        spec = dataclasses.replace(spec, num_segments=vision.num_frames, frames_per_segment=1)
    with quiet(library()), build_errors("config: its network cannot be built"):
        net = library().AutoModel.from_config(built, trust_remote_code=False)
        for name in ("text_model", "text_projection"):
            if hasattr(net, name):
                delattr(net, name)
        num_features = built.projection_dim if kind in ("clip", "xclip") else vision.hidden_size
        return ClipClassifier(spec, rgb_net=WordClassifier(net, num_classes, num_features), grouping="video")


def _require_declared(entries: Any, declared: set[str], where: str) -> None:
    """Raise ValueError unless they are entries of that config: the library would take any other name, too."""
    if not isinstance(entries, Mapping):
        raise ValueError(f"{where} must be entries of a config, got {entries!r:.100}")
    if unknown := sorted(set(entries) - declared):
        raise ValueError(f"{where}.{unknown[0]:.100} is not an entry of such a config")


def both_towers(kind: str, entries: Mapping[str, Any]) -> Any:
    """The library's config of both towers, bounded. Raises ValueError."""
    transformers = library()
    try:
        with quiet(transformers):
            config = transformers.AutoConfig.for_model(kind, **entries)
    except Exception as error:  # its checks raise kinds of their own
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"config is not one of {kind}: {reason}") from error
    require_bounded(config, declared_entries(kind))
    for tower in ("vision", "text"):
        require_bounded(getattr(config, f"{tower}_config"), declared_entries(f"{kind}_{tower}_model"))
    require_small_table(config.vision_config)
    if not getattr(config.vision_config, "vision_use_head", True):
        raise ValueError("config.vision_config.vision_use_head must be true: without it a picture has no feature")
    return config
