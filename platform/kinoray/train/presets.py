"""Whole recipes by name: `kinoray train SET --out RUN --preset NAME`; flags override what they say.

A preset holds the network, its input and the recipe. Machines, storage and limits are the user's.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import tyro

from kinoray.config.shared import (
    AugmentConfig,
    ClipConfig,
    FlowConfig,
    ModelConfig,
    OptimConfig,
    SampleConfig,
    ViewConfig,
)
from kinoray.train.config import TrainConfig

__all__ = ["PRESETS", "demo", "k400_paper", "k600_paper", "small"]


def k400_paper() -> TrainConfig:
    """VCM-SDD on Kinetics-400 as published (section 4.1): 16 x 6 frames, ResNet-101 twice, batch 128, 100 epochs.

    Frames are resized to 256 x 256, aspect not kept, and cut to 224 x 224, in training with multi-scale crops and
    flips; AdamW with rate 0.008; the segments' logits are averaged. Not published, and ours: weight decay, warm-up,
    gradient norm. Weights start at random; `--model.options backbone_weights=imagenet` takes ImageNet's. The paper
    used 8 GPUs: 16 videos each. recompute changes no number and makes room; for more of it see optim.accumulate and
    optim.precision.
    """
    return TrainConfig(
        catalog=tyro.MISSING,
        out=tyro.MISSING,
        model=ModelConfig(factory="vcm_sdd_r101", options={"consensus": "logits", "scale": "frobenius"}),
        clip=ClipConfig(
            sample=SampleConfig(num_segments=16, frames_per_segment=6),
            view=ViewConfig(
                resize="stretch", resize_px=256, crop_px=224, train_scales=(1.0, 0.875, 0.75, 0.66), train_flip=True
            ),
        ),
        optim=OptimConfig(epochs=100, batch_size=128, lr=0.008, recompute="all"),
    )


def k600_paper() -> TrainConfig:
    """The same on Kinetics-600, with rate 0.012."""
    base = k400_paper()
    return replace(base, optim=replace(base.optim, lr=0.012))


def small() -> TrainConfig:
    """For hundreds to thousands of videos on one machine: smaller frames, ResNet-18 twice, the scale that we recommend.

    Mild colours, smoothed labels and a moving average stand against learning a small set by heart.
    """
    return TrainConfig(
        catalog=tyro.MISSING,
        out=tyro.MISSING,
        model=ModelConfig(options={"backbone": "resnet18", "scale": "dim"}),
        clip=ClipConfig(
            sample=SampleConfig(num_segments=4, frames_per_segment=4),
            view=ViewConfig(resize_px=128, crop_px=112),
            flow=FlowConfig(bound_px=10.0),
        ),
        augment=AugmentConfig(colour_jitter=0.2),
        optim=OptimConfig(epochs=30, batch_size=16, lr=1e-3, label_smoothing=0.1, ema_decay=0.99),
    )


def demo() -> TrainConfig:
    """What `kinoray demo` trains: four small frames a video, a tiny network, two minutes on two cores.

    Flips are safe in its set: no class becomes another one in the mirror.
    """
    return TrainConfig(
        catalog=tyro.MISSING,
        out=tyro.MISSING,
        model=ModelConfig(options={"backbone": "tiny", "heads": 4, "scale": "dim"}),
        clip=ClipConfig(
            sample=SampleConfig(num_segments=2, frames_per_segment=2),
            view=ViewConfig(resize_px=88, crop_px=80, train_scales=(1.0, 0.875)),
            flow=FlowConfig(bound_px=4.0),
        ),
        optim=OptimConfig(epochs=10, batch_size=16),
    )


PRESETS: Mapping[str, Callable[[], TrainConfig]] = {
    "k400_paper": k400_paper,
    "k600_paper": k600_paper,
    "small": small,
    "demo": demo,
}
"""The presets by name."""
