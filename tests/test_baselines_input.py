"""How a baseline is named, built, fed and refused: through kinoray's own door, with messages that say both sides."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

import video_baselines as vb
from kinoray.config.shared import ClipConfig, ModelConfig, SampleConfig, ViewConfig
from kinoray.errors import ConfigError
from kinoray.network.build import SHORT_NAMES, build_model, check_clip
from vcm_sdd.backbone import ResNetGrid
from vcm_sdd.weights import WeightsMismatch

FACTORIES = sorted(set(vb.__all__) - {"ClipClassifier", "huggingface", "image_text"})  # a config makes those


@pytest.mark.parametrize("name", FACTORIES)
def test_every_factory_has_a_short_name_and_builds_with_a_spec_that_says_what_to_feed_it(name: str) -> None:
    assert SHORT_NAMES[name] == f"video_baselines:{name}"
    with torch.device("meta"):
        model = build_model(ModelConfig(factory=name), 7)
    spec = model.input_spec
    size = spec.crop_px or 64
    shape = (2, spec.num_segments or 1, spec.frames_per_segment or 8)
    rgb = torch.empty(*shape, 3, size, size, device="meta") if spec.rgb else None
    flow = torch.empty(*shape, spec.flow_channels, size, size, device="meta") if spec.flow_channels else None
    with torch.no_grad():
        assert model(rgb=rgb, flow=flow).shape == (2, 7)
    assert len(spec.rgb_mean) == len(spec.rgb_std) == 3
    assert isinstance(model, nn.Module)
    owners = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
    assert len(owners) == len(set(owners)), "two names for one tensor: safetensors would refuse to save it"


def test_torchvisions_scaling_and_crops_reach_the_spec() -> None:
    with torch.device("meta"):
        specs = {name: getattr(vb, name)(num_classes=2).input_spec for name in ("r2plus1d_18", "mvit_v2_s", "swin3d_t")}
    assert specs["r2plus1d_18"].rgb_mean == (0.43216, 0.394666, 0.37645)
    assert specs["r2plus1d_18"].rgb_std == (0.22803, 0.22145, 0.216989)
    assert specs["r2plus1d_18"].crop_px == 112
    assert specs["mvit_v2_s"].rgb_mean == (0.45, 0.45, 0.45)
    assert (specs["mvit_v2_s"].crop_px, specs["mvit_v2_s"].frames_per_segment) == (224, 16)
    assert specs["swin3d_t"].rgb_mean == (0.485, 0.456, 0.406)


def test_a_clip_of_another_shape_is_refused_before_anything_starts() -> None:
    with torch.device("meta"):
        model = vb.mvit_v2_s(num_classes=2)
    fits = ClipConfig(sample=SampleConfig(num_segments=3, frames_per_segment=16), view=ViewConfig(crop_px=224))
    check_clip(model.input_spec, fits)
    with pytest.raises(ConfigError, match="frames_per_segment must be 16 for this model, got 8"):
        check_clip(model.input_spec, dataclasses.replace(fits, sample=SampleConfig(frames_per_segment=8)))
    with pytest.raises(ConfigError, match="crop_px must be 224 for this model, got 112"):
        check_clip(model.input_spec, dataclasses.replace(fits, view=ViewConfig(crop_px=112)))


RGB = torch.zeros(1, 2, 4, 3, 32, 32)
FLOW = torch.zeros(1, 2, 4, 2, 32, 32)


@pytest.mark.parametrize(
    ("options", "inputs", "message"),
    [
        ({}, {"rgb": None}, r"rgb must be float \[videos, segments, frames, 3, height, width\], got None"),
        (
            {},
            {"rgb": RGB[:, :, :, :2]},
            r"frames, 3, height, width\], none of them 0, got shape \[1, 2, 4, 2, 32, 32\]",
        ),
        ({}, {"rgb": RGB[:, 0]}, r"got shape \[1, 4, 3, 32, 32\]"),
        ({}, {"rgb": RGB[:, :0]}, r"none of them 0, got shape \[1, 0, 4, 3, 32, 32\]"),
        ({}, {"rgb": RGB.to(torch.uint8)}, r"normalised as its input_spec says, got dtype torch.uint8"),
        (
            {"modality": "flow"},
            {"rgb": RGB},
            r"flow must be float \[.*2, height, width\], got None: this model needs flow",
        ),
        ({"modality": "two_stream"}, {"rgb": RGB}, "this model needs flow"),
        ({"modality": "two_stream"}, {"flow": FLOW}, "this model needs rgb"),
        ({"modality": "two_stream"}, {"rgb": RGB, "flow": RGB}, r"frames, 2, height.*got shape \[1, 2, 4, 3, 32, 32\]"),
        ({"modality": "two_stream"}, {"rgb": RGB, "flow": FLOW.repeat(2, 1, 1, 1, 1, 1)}, "must hold the same videos"),
    ],
)
def test_wrong_input_is_refused_with_what_was_expected_and_received(
    options: dict[str, Any], inputs: dict[str, torch.Tensor | None], message: str
) -> None:
    model = vb.tsn(num_classes=2, backbone="tiny", **options)
    with pytest.raises(ValueError, match=message):
        model(**{"rgb": None, "flow": None, **inputs})


def test_clips_of_a_length_that_a_network_cannot_take_are_refused() -> None:
    with torch.device("meta"):
        slowfast, s3d = vb.slowfast(num_classes=2, backbone="resnet18"), vb.s3d(num_classes=2, crop_px=32)
        mvit = vb.mvit_v2_s(num_classes=2, crop_px=32, frames=4)
        lgd3d, stnet = vb.lgd3d(num_classes=2, backbone="resnet50"), vb.stnet(num_classes=2, backbone="resnet18")
        rgb = torch.zeros(1, 1, 6, 3, 32, 32)
    with pytest.raises(ValueError, match="multiple of alpha=4 frames a segment, got 6"):
        slowfast(rgb=rgb, flow=None)
    with pytest.raises(ValueError, match="multiple of stride=4 frames a segment, got 6"):
        lgd3d(rgb=rgb, flow=None)
    with pytest.raises(
        ValueError, match=r"rgb must be float \[videos, segments, 5, 3, height, width\].*got shape \[1, 1, 6"
    ):
        stnet(rgb=rgb, flow=None)
    with pytest.raises(ValueError, match="s3d needs at least 5 frames a segment, got 4"):
        s3d(rgb=rgb[:, :, :4], flow=None)
    with pytest.raises(
        ValueError, match=r"rgb must be float \[videos, segments, 4, 3, 32, 32\].*got shape \[1, 1, 6, 3"
    ):
        mvit(rgb=rgb, flow=None)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tsn", {"modality": "audio"}, "modality must be one of rgb, flow, two_stream, got 'audio'"),
        ("tsn", {"backbone": "vgg16"}, "backbone must be tiny, timm:NAME or one of resnet18"),
        ("tsn", {"dropout": 1.0}, r"dropout must be a number in 0 .. 1 \(1 excluded\), got 1.0"),
        ("tsn", {"modality": "flow", "flow_channels": 0}, "flow_channels must be a whole number of at least 1, got 0"),
        ("tsn", {"modality": "two_stream", "flow_weight": -1}, "flow_weight must be greater than 0, got -1"),
        ("tsn", {"modality": "two_stream", "flow_weight": math.nan}, "flow_weight must be greater than 0, got nan"),
        ("tsm", {"shift": "sideways"}, "shift must be one of offline, online, got 'sideways'"),
        ("tsm", {"shift_div": 1}, "shift_div must be a whole number of at least 2, got 1"),
        (
            "i3d",
            {"backbone": "resnext50_32x4d"},
            "backbone must be one of inception_v1, resnet18.*got 'resnext50_32x4d'",
        ),
        ("i3d", {"nonlocal_blocks": 4}, "nonlocal_blocks must be one of 0, 5, 10, got 4"),
        ("i3d", {"backbone": "inception_v1", "nonlocal_blocks": 5}, "need a ResNet backbone, got inception_v1"),
        ("i3d", {"inflation": "max"}, "inflation must be one of mean, centre, got 'max'"),
        ("slowfast", {"alpha": 0}, "alpha must be a whole number of at least 1, got 0"),
        ("slowfast", {"beta_inv": 3}, "beta_inv must be one of 1, 2, 4, 8, 16, 32, got 3"),
        ("slowfast", {"fusion_kernel": 4}, "fusion_kernel must be one of 1, 3, 5, 7, 9, got 4"),
        ("mvit_v2_s", {"frames": 7}, "frames must be a multiple of 2, got 7"),
        ("mvit_v2_s", {"crop_px": 100}, "crop_px must be a multiple of 32, got 100"),
        ("r2plus1d_18", {"crop_px": 8}, "crop_px must be a whole number of at least 16, got 8"),
        (
            "r2plus1d_18",
            {"weights": "imagenet"},
            "weights must be kinetics400, KINETICS400_V1, DEFAULT or a file, got 'imagenet'",
        ),
        ("eco", {"dropout": "no"}, "dropout must be a number"),
        ("lgd3d", {"backbone": "resnet18"}, "backbone must be one of resnet50, resnet101, resnet152, got 'resnet18'"),
        ("stcnet", {"reduction": 0}, "reduction must be a whole number of at least 1, got 0"),
        ("stnet", {"backbone": "tiny"}, "backbone must be one of resnet18, .*, got 'tiny'"),
        ("tsn", {"backbon": "tiny"}, "backbon is not an option of tsn; known: backbone, "),
    ],
)
def test_a_wrong_option_is_refused_by_name(name: str, options: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match=message):
        build_model(ModelConfig(factory=name, options=options), 3)


@pytest.mark.parametrize("name", FACTORIES)
def test_no_classes_are_refused(name: str) -> None:
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match="num_classes must be a whole number of at least 1, got 0"),
    ):
        getattr(vb, name)(num_classes=0)


# --- weights from files


def test_tsm_takes_a_file_of_torchvision_weights_classifier_and_all(tmp_path: Path) -> None:
    full = torchvision.models.resnet18(weights=None)
    path = tmp_path / "resnet18.safetensors"
    save_file(full.state_dict(), path)
    model = vb.tsm(num_classes=3, backbone="resnet18", backbone_weights=str(path))
    loaded = model.rgb_net.backbone.grid.state_dict()
    for name, value in full.state_dict().items():
        if not name.startswith("fc."):
            assert torch.equal(loaded[name], value), name


def test_weights_of_another_network_are_refused_with_a_list(tmp_path: Path) -> None:
    path = tmp_path / "resnet18.pth"
    torch.save(ResNetGrid("resnet18").state_dict(), path)
    with pytest.raises(WeightsMismatch, match=r"resnet18.pth does not fit .*missing: .*"):
        vb.tsn(num_classes=3, backbone="resnet34", backbone_weights=str(path))
    with pytest.raises(ValueError, match=r"resnet18.pth is not of torchvision's GoogLeNet: no conv1.conv.weight"):
        vb.i3d(num_classes=3, backbone="inception_v1", backbone_weights=str(path))


def test_a_file_of_video_weights_keeps_its_head_only_with_as_many_classes(tmp_path: Path) -> None:
    net = torchvision.models.video.mc3_18(weights=None, num_classes=5)
    path = tmp_path / "mc3.pth"
    torch.save(net.state_dict(), path)
    same = vb.mc3_18(num_classes=5, weights=str(path)).rgb_net.net
    other = vb.mc3_18(num_classes=3, weights=str(path)).rgb_net.net
    assert torch.equal(same.fc.weight, net.fc.weight)
    assert other.fc.weight.shape == (3, 512)
    for loaded in (same, other):
        assert torch.equal(loaded.stem[0].weight, net.stem[0].weight)
        assert torch.equal(loaded.layer4[1].conv2[0].weight, net.layer4[1].conv2[0].weight)
    with pytest.raises(WeightsMismatch, match="does not fit VideoResNet"):
        vb.r3d_18(num_classes=5, weights=str(path))


def test_the_head_that_is_replaced_is_the_last_layer() -> None:
    from video_baselines.torchvision_video import _head

    expected = {"r2plus1d_18": "fc", "s3d": "classifier.1", "mvit_v2_s": "head.1", "swin3d_t": "head"}
    with torch.device("meta"):
        for name, head in expected.items():
            net: nn.Module = getattr(vb, name)(num_classes=11).rgb_net.net
            found, layer = _head(net)
            assert found == head
            assert layer.weight.shape[0] == 11
