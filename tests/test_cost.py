"""Costs against published and hand-worked figures."""

from collections.abc import Iterator

import pytest
import torch
import torchvision
from torch import Tensor, nn

from kinoray.network import InputSpec
from kinoray.network.cost import count_macs, describe
from vcm_sdd.network import vcm_sdd, vcm_sdd_r101


@pytest.fixture(autouse=True)
def _meta() -> Iterator[None]:
    """Costs need no numbers: every network here is made without storage, except where a test wants one with."""
    with torch.device("meta"):
        yield


def test_papers_network_costs_what_it_honestly_costs() -> None:
    cost = describe(vcm_sdd_r101(num_classes=400), 16, 6, 224, name="vcm_sdd_r101")
    parts = {part.name: part for part in cost.parts}
    assert list(parts) == ["rgb backbone", "flow backbone", "STC", "MFF", "classifiers"]
    assert [part.parameters for part in cost.parts] == [42_500_160, 42_497_024, 128, 0, 1_639_200]
    assert cost.parameters == 86_636_512

    # torchvision states 7.801 GMAC (its "GFLOPS") a frame for ResNet-101 with its classifier.
    stated = torchvision.models.ResNet101_Weights.IMAGENET1K_V1.meta["_ops"]
    frame = parts["rgb backbone"].segment_macs / 6 + 2048 * 1000
    assert frame / 1e9 == pytest.approx(stated, abs=0.0005)
    # Six of them are the paper's 46.8 "GFLOPs" (its tables 3 and 4).
    assert 6 * frame / 1e9 == pytest.approx(46.8, abs=0.05)
    assert "46.81" in str(cost)

    # The flow stem has 2 channels where the RGB stem has 3: 64 kernels of 7 x 7 on 112 x 112 outputs.
    stem = 64 * 7 * 7 * 112 * 112
    assert parts["rgb backbone"].macs - parts["flow backbone"].macs == 96 * stem
    # STC: one 294 x 294 matrix times 294 x 2048, a stream and segment; 27 table rows are made once for each call.
    assert parts["STC"].macs == pytest.approx(2 * 16 * 294 * 294 * 2048, rel=1e-5)
    # MFF: one product of scores, and two vectors times 294 x 2048.
    assert parts["MFF"].macs == 16 * (294 * 294 * 2048 + 2 * 294 * 2048)
    assert parts["classifiers"].macs == 2 * 2048 * 400

    assert cost.macs / 1e9 == pytest.approx(1502.2, abs=0.1)
    assert cost.flops == 2 * cost.macs


def test_two_equal_streams_give_the_1506_gmac_that_are_quoted() -> None:
    """With a 3-channel flow image, the form in which both streams cost the same."""
    model = vcm_sdd_r101(num_classes=400, flow_channels=3).eval()
    clip = torch.empty(1, 16, 6, 3, 224, 224)
    assert count_macs(lambda: model(rgb=clip, flow=clip)) / 1e9 == pytest.approx(1506, abs=0.5)


@pytest.mark.parametrize("changed", [{}, {"mff": False}, {"stc": False}, {"mff": False, "stc": False}], ids=str)
def test_parts_add_up_to_the_model(changed: dict[str, bool]) -> None:
    model = vcm_sdd(num_classes=5, backbone="tiny", **changed)
    cost = describe(model, 3, 2, 64)
    inputs = {"rgb": torch.empty(1, 3, 2, 3, 64, 64), "flow": torch.empty(1, 3, 2, 2, 64, 64)}
    assert cost.macs == count_macs(lambda: model.eval()(**inputs))
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert [part.name for part in cost.parts] == ["rgb backbone", "flow backbone", "STC", "MFF", "classifiers"]
    by_name = {part.name: part.macs for part in cost.parts}
    assert (by_name["STC"] > 0) == changed.get("stc", True)
    assert (by_name["MFF"] > 0) == changed.get("mff", True)


def test_segments_are_counted_once_each() -> None:
    model = vcm_sdd(num_classes=5, backbone="tiny", consensus="probs", stc=False)
    one, three = describe(model, 1, 2, 64), describe(model, 3, 2, 64)
    assert three.macs == 3 * one.macs
    assert three.segment_macs == one.segment_macs == one.macs


class OwnModel(nn.Module):
    """A user's network: one convolution over frames, one over nothing else, and a linear layer outside any child."""

    input_spec = InputSpec(rgb=True, num_segments=4, crop_px=16)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.weight = nn.Parameter(torch.empty(5, 8))

    def forward(self, *, rgb: Tensor, flow: Tensor | None) -> Tensor:
        assert flow is None
        features = self.stem(rgb.flatten(0, 2)).mean(dim=(2, 3))
        return (features @ self.weight.t()).unflatten(0, (rgb.shape[0], -1)).mean(dim=1)


def test_any_model_with_an_input_spec_can_be_described() -> None:
    cost = describe(OwnModel(), frames_per_segment=2)
    assert [(part.name, part.parameters, part.macs) for part in cost.parts] == [
        ("stem", 8 * 27 + 8, 8 * (8 * 27 * 256)),
        ("other", 40, 8 * 40),
    ]
    assert cost.segment_macs == cost.macs // 4
    assert cost.streams == ("rgb",)
    assert "paper" not in str(cost)


def test_sizes_that_contradict_the_spec_are_refused() -> None:
    with pytest.raises(ValueError, match="num_segments must be 4 for this model, got 8"):
        describe(OwnModel(), 8)
    with pytest.raises(ValueError, match="frames_per_segment must be at least 1, got 0"):
        describe(OwnModel(), frames_per_segment=0)


def test_describing_a_model_leaves_it_as_it_was() -> None:
    with torch.device("cpu"):
        model = vcm_sdd(num_classes=5, backbone="tiny")
        model.head.eval()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        describe(model, 2, 2, 64)
        assert model.training
        assert not model.head.training
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        clip = {"rgb": torch.randn(1, 2, 2, 3, 64, 64), "flow": torch.randn(1, 2, 2, 2, 64, 64)}
        assert model.eval()(**clip).isfinite().all()


def test_table_says_what_is_counted() -> None:
    text = str(describe(vcm_sdd(num_classes=5, backbone="tiny"), 2, 3, 64, name="mine"))
    lines = text.splitlines()
    assert lines[0] == "mine: rgb and flow (2 channels), 64 x 64 px, 2 segments x 3 frames, one view"
    assert lines[1].split() == ["part", "parameters", "GMAC/segment", "GMAC/video", "GFLOP/video"]
    assert "1 MAC = 2 FLOP" in text
    assert "optical flow come on top" in text
