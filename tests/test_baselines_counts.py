"""Parameters and multiply-accumulates of the baselines, counted without computing, against published figures.

Each row names its source. `own` marks figures of ours that nobody published: they guard against silent change.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import video_baselines as vb
from video_baselines.eco import Eco

PTV = "pytorchvideo 0.1.5, built and counted the same way"
PTV_ZOO = "pytorchvideo model zoo, docs/source/model_zoo.md"
NONLOCAL = "SlowFast paper, table 2: Nonlocal R50, 282 a view (128 frames, 256 px)"
MMACTION_TSM = "mmaction2 configs/recognition/tsm/README.md: R50 + 5 embedded Gaussian blocks, 31.68 M against 24.33 M"


@dataclass(frozen=True, kw_only=True)
class Published:
    """One row: how it is built and fed, and what was published of it."""

    build: Callable[..., nn.Module]
    clip: tuple[int, int, int]  # segments, frames, pixels
    source: str
    params: float | None = None  # millions
    gmac: float | None = None
    tolerance: float = 0.002  # relative; published figures have three or four digits
    options: dict[str, Any] = field(default_factory=dict)


ROWS = {
    "tsn R50 x 8": Published(
        build=vb.tsn,
        clip=(8, 1, 224),
        params=24.33,
        gmac=32.7,
        source="ResNet-50 at 224 px is 4.089 GMAC (torchvision's weight enum: 4.089 with 1000 classes), x 8 frames",
    ),
    "tsm R50 x 8": Published(
        build=vb.tsm,
        clip=(8, 1, 224),
        params=24.33,
        gmac=32.88,
        tolerance=0.006,
        source="mmaction2 configs/recognition/tsm/README.md: 32.88 G (0.5 % above our count)",
    ),
    "tsm R50 x 16": Published(
        build=vb.tsm, clip=(16, 1, 224), params=24.33, gmac=65.4, source="TSM paper, table 2: 65 G; 16 x 4.089"
    ),
    "i3d R50 8 x 256": Published(
        build=vb.i3d, clip=(1, 8, 256), params=28.04, gmac=37.1, source=PTV + "; its zoo prints 28.04 M, 37.53 G"
    ),
    "nonlocal R50 128 x 256": Published(
        build=vb.i3d_nl, clip=(1, 128, 256), gmac=282, options={"strided_stem": True}, source=NONLOCAL
    ),
    "i3d inception 64 x 224": Published(
        build=vb.i3d,
        clip=(1, 64, 224),
        gmac=108,
        tolerance=0.035,
        options={"backbone": "inception_v1"},
        source="SlowFast paper, table 2: I3D, 108 (64 frames; ours is 2.9 % more)",
    ),
    "two-stream i3d inception 64 x 224": Published(
        build=vb.two_stream_i3d,
        clip=(1, 64, 224),
        gmac=216,
        tolerance=0.035,
        options={"backbone": "inception_v1"},
        source="SlowFast paper, table 2: two-stream I3D, 216",
    ),
    "slowfast 16x8 R101 at 256": Published(
        build=vb.slowfast, clip=(1, 64, 256), params=53.77, gmac=213.0, source=PTV + "; SlowFast paper, table 2: 213"
    ),
    "slowfast 16x8 R101 at 224": Published(build=vb.slowfast, clip=(1, 64, 224), params=53.77, gmac=163.1, source=PTV),
    "slowfast 8x8 R101": Published(
        build=vb.slowfast,
        clip=(1, 32, 256),
        params=62.83,
        gmac=125.9,
        options={"max_temporal_blocks": None},
        source=PTV,
    ),
    "slowfast 8x8 R50": Published(
        build=vb.slowfast,
        clip=(1, 32, 256),
        params=34.57,
        gmac=65.71,
        options={"backbone": "resnet50", "fusion_kernel": 7},
        source=PTV_ZOO,
    ),
    "slowfast 4x16 R50": Published(
        build=vb.slowfast,
        clip=(1, 32, 256),
        params=34.48,
        gmac=36.69,
        tolerance=0.02,
        options={"backbone": "resnet50", "alpha": 8},
        source=PTV_ZOO + " (36.69 G there, 36.10 here: not explained; parameters agree)",
    ),
    "s3d 16 x 224": Published(
        build=vb.s3d, clip=(1, 16, 224), params=8.320048, gmac=17.979, source="torchvision S3D_Weights.KINETICS400_V1"
    ),
    "own s3d 16 x 224": Published(
        build=vb.s3dg,
        clip=(1, 16, 224),
        params=8.320048,
        gmac=17.979,
        options={"gating": False},
        source="torchvision S3D_Weights.KINETICS400_V1: the same network, written twice",
    ),
    "r2plus1d_34 32 x 112": Published(
        build=vb.r2plus1d_34,
        clip=(1, 32, 112),
        gmac=152,
        tolerance=0.012,
        source="SlowFast paper, table 2: R(2+1)D, 152 a view (32 frames, 112 px)",
    ),
    "r2plus1d_18": Published(
        build=vb.r2plus1d_18, clip=(1, 16, 112), params=31.505325, gmac=40.519, source="torchvision's weight enum"
    ),
    "r3d_18": Published(
        build=vb.r3d_18, clip=(1, 16, 112), params=33.371472, gmac=40.697, source="torchvision's weight enum"
    ),
    "mc3_18": Published(
        build=vb.mc3_18, clip=(1, 16, 112), params=11.695440, gmac=43.343, source="torchvision's weight enum"
    ),
    "mvit_v1_b": Published(
        build=vb.mvit_v1_b, clip=(1, 16, 224), params=36.610672, gmac=70.599, source="torchvision's weight enum"
    ),
    "mvit_v2_s": Published(
        build=vb.mvit_v2_s, clip=(1, 16, 224), params=34.537744, gmac=64.224, source="torchvision's weight enum"
    ),
    "swin3d_t": Published(
        build=vb.swin3d_t, clip=(1, 16, 224), params=28.158070, gmac=43.882, source="torchvision's weight enum"
    ),
    "artnet 16 x 112": Published(
        build=vb.artnet,
        clip=(1, 16, 112),
        gmac=23.5,
        tolerance=0.095,
        source="SlowFast paper, table 2: ARTNet, 23.5 a view (ours is 9.3 % more; in units of 2^30 it is 23.9). The "
        "authors' network file, which says no figure, is held layer by layer in test_baselines_tables.py",
    ),
    "own s3dg 64 x 224": Published(build=vb.s3dg, clip=(1, 64, 224), params=9.086, gmac=71.91, source="own"),
    "own slowfast_nl": Published(build=vb.slowfast_nl, clip=(1, 64, 256), params=60.080, gmac=242.0, source="own"),
    "own eco 16": Published(build=vb.eco, clip=(16, 1, 224), params=47.931, gmac=69.96, source="own"),
    "own eco lite 16": Published(
        build=vb.eco, clip=(16, 1, 224), params=37.941, gmac=52.04, options={"lite": True}, source="own"
    ),
    "own artnet": Published(build=vb.artnet, clip=(1, 16, 112), params=39.669, gmac=25.68, source="own"),
    "own stcnet": Published(build=vb.stcnet, clip=(1, 32, 112), params=96.086, gmac=19.18, source="own"),
    "own stnet": Published(build=vb.stnet, clip=(7, 5, 224), params=33.159, gmac=40.58, source="own"),
    "own lgd3d": Published(build=vb.lgd3d, clip=(1, 16, 224), params=65.265, gmac=37.72, source="own"),
}


def count(model: nn.Module, clip: tuple[int, int, int]) -> float:
    """GMAC of one video, both modalities offered."""
    segments, frames, px = clip
    rgb = torch.empty(1, segments, frames, 3, px, px, device="meta")
    flow = torch.empty(1, segments, frames, 2, px, px, device="meta")
    # The counter counts 2 for one multiply-accumulate.
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(rgb=rgb, flow=flow)
    return float(counter.get_total_flops()) / 2e9


def params(model: nn.Module) -> float:
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_counts_are_the_published_ones(row: Published) -> None:
    with torch.device("meta"):
        model = row.build(num_classes=400, **row.options).eval()
    if row.params is not None:
        assert params(model) == pytest.approx(row.params, rel=5e-4), row.source
    if row.gmac is not None:
        assert count(model, row.clip) == pytest.approx(row.gmac, rel=row.tolerance), row.source


def test_parameters_equal_torchvisions_metadata_to_the_last_one() -> None:
    for name in ("r2plus1d_18", "r3d_18", "mc3_18", "s3d", "mvit_v2_s", "swin3d_t", "swin3d_s", "swin3d_b"):
        published = torchvision.models.get_model_weights(name).KINETICS400_V1.meta["num_params"]
        with torch.device("meta"):
            model = getattr(vb, name)(num_classes=400)
        assert sum(parameter.numel() for parameter in model.parameters()) == published, name


def test_five_nonlocal_blocks_cost_what_was_published() -> None:
    with torch.device("meta"):
        plain, blocks = vb.i3d(num_classes=400), vb.i3d_nl(num_classes=400)
    assert params(blocks) - params(plain) == pytest.approx(31.68 - 24.33, abs=0.02), MMACTION_TSM


def test_tsm_has_not_one_parameter_more_than_tsn() -> None:
    with torch.device("meta"):
        tsn, tsm = vb.tsn(num_classes=400), vb.tsm(num_classes=400)
    assert params(tsm) == params(tsn)


def test_the_2d_half_of_eco_is_bn_inception() -> None:
    """osmr/imgclsmob, README: BN-Inception has 11,295,240 parameters, with biases in front of its BNs and 1000 classes.

    We leave those biases out: one for every output channel of a convolution.
    """
    with torch.device("meta"):
        net = Eco(400)
    convolutions = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    own = sum(p.numel() for n, p in net.named_parameters() if n.startswith(("stem.", "blocks.")))
    biases = sum(conv.out_channels for conv in convolutions)
    assert own + biases + 1024 * 1000 + 1000 == 11_295_240
