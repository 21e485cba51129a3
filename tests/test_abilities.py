"""The table of docs/models.md that says which network can do what is what the code says of each network that ships."""

import re
from pathlib import Path
from typing import cast

import pytest
from torch import nn

from kinoray.config.shared import ClipConfig, ModelConfig
from kinoray.errors import ConfigError
from kinoray.network.build import SHORT_NAMES, build_outline, clip_for, depths
from kinoray.network.resolve import torchvision_weights
from kinoray.network.scorer import EarlyExit, ScorerConfig, check_scorer

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
NAMES = [name for name in SHORT_NAMES if name not in ("huggingface", "image_text")]  # of a config
HEAD = "| network | fed by default | early exit | embeddings | layer decay | weights to import |"


def can(model: nn.Module, config: ScorerConfig) -> bool:
    """Whether a labelling with these settings is accepted for the network."""
    try:
        check_scorer(model, config, 400)  # type: ignore[arg-type]
    except ConfigError:
        return False
    return True


def fed(clip: ClipConfig) -> str:
    """`8 segments x 6`, or `32 frames, 1 apart at 15 fps`."""
    sample = clip.sample
    if not sample.stride:
        return f"{sample.num_segments} segments x {sample.frames_per_segment}"
    return f"{sample.frames_per_segment} frames, {sample.stride} apart" + (
        f" at {sample.fps:g} fps" if sample.fps else ""
    )


def row(name: str) -> str:
    """The line of one network."""
    model = build_outline(ModelConfig(factory=name), 400)
    clip = clip_for(cast("nn.Module", model).input_spec)  # type: ignore[arg-type]
    early = [
        kind
        for kind, margin in (("exact", None), ("margin", 0.5))
        if can(model, ScorerConfig(early_exit=EarlyExit(margin=margin)))
    ]
    exits = " and ".join(early) or "no"
    if early and clip.sample.num_segments == 1:
        exits += " (of several segments)"
    published = f"`torchvision:{name}`" if name in torchvision_weights() else "`i3d`" if name == "i3d" else ""
    try:
        depths(model)  # type: ignore[arg-type]
        decay = "yes"
    except ConfigError:
        decay = "no"
    embeds = "yes" if can(model, ScorerConfig(embeddings=True)) else "no"
    return f"| `{name}` | {fed(clip)} | {exits} | {embeds} | {decay} | {published} |"


@pytest.mark.parametrize("name", NAMES)
def test_the_page_says_what_a_network_can_do(name: str) -> None:
    assert row(name) in PAGE.read_text(encoding="utf-8").splitlines()


def test_the_table_has_the_networks_that_ship() -> None:
    text = PAGE.read_text(encoding="utf-8")
    table = text[text.index(HEAD) :].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE) == NAMES
