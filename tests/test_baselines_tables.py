"""The last systems of the paper's tables (ARTNet, STC, StNet, LGD-3D) against loops, closed forms and torchvision."""

from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import Bottleneck, ResNet

import video_baselines as vb
from test_baselines_exact import randomise_norms
from video_baselines.artnet import SmartBlock
from video_baselines.lgd3d import LgdBlock, LgdResNet3d, P3dBranch
from video_baselines.stcnet import StcBlock
from video_baselines.stnet import TemporalBlock, TemporalXception


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def normal(x: Tensor, bn: nn.Module) -> Tensor:
    """A batch norm in eval mode, written out; channels are the second axis."""
    mean, var, weight, bias = (
        getattr(bn, name).reshape(1, -1, *[1] * (x.ndim - 2))
        for name in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def numel(net: nn.Module, without: tuple[str, ...] = ()) -> int:
    return sum(p.numel() for name, p in net.named_parameters() if not name.startswith(without))


# --- ARTNet


def smart(channels: int) -> list[tuple[int, int, tuple[int, int, int], int]]:
    kernels = ((1, 3, 3), (3, 3, 3))
    return [*((channels, channels, kernel, 1) for kernel in kernels), (channels * 3 // 2, channels, (1, 1, 1), 1)]


CUBE = (3, 3, 3)
ARTNET = [
    *[(3, 64, (1, 7, 7), 2), (3, 64, (3, 7, 7), 2), (96, 64, (1, 1, 1), 1)],
    *[(64, 64, CUBE, 1), *smart(64), (64, 64, CUBE, 1), *smart(64)],
    *[(64, 128, CUBE, 2), *smart(128), (64, 128, CUBE, 2), (128, 128, CUBE, 1), *smart(128)],
    *[(128, 256, CUBE, 2), *smart(256), (128, 256, CUBE, 2), (256, 256, CUBE, 1), *smart(256)],
    *[(256, 512, CUBE, 2), (512, 512, CUBE, 1), (256, 512, CUBE, 2), (512, 512, CUBE, 1), (512, 512, CUBE, 1)],
]
"""wanglimin/ARTNet, models/112_artnet_resnet_18_deploy.prototxt: inputs, outputs, kernel and stride of its convolutions
in its order, without its fixed `pooling` ones, which are means of two channels here."""


def test_artnet_has_the_convolutions_of_its_authors_network_file() -> None:
    with torch.device("meta"):
        net = vb.artnet(num_classes=400).eval()
        clip = torch.empty(1, 1, 16, 3, 112, 112)
    called = []

    def note(conv: nn.Conv3d, inputs: tuple[Tensor], output: Tensor) -> None:
        assert {conv.stride[0], conv.stride[1], conv.stride[2]} == {conv.stride[0]}
        called.append((conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride[0]))

    for module in net.modules():
        if isinstance(module, nn.Conv3d):
            module.register_forward_hook(note)  # type: ignore[arg-type]
    with torch.no_grad():
        net(rgb=clip, flow=None)
    assert called == ARTNET


@pytest.mark.parametrize("stride", [1, 2])
def test_smart_block_equals_its_formula_channel_by_channel(stride: int) -> None:
    block = randomise_norms(SmartBlock(3, 4, stride=stride)).double()
    x = torch.randn(2, 3, 3, 5, 4, dtype=torch.float64)
    appearance, relation = block.appearance, block.relation
    seen = normal(F.conv3d(x, appearance[0].weight, stride=stride, padding=(0, 1, 1)), appearance[1])
    moved = normal(F.conv3d(x, relation[0].weight, stride=stride, padding=1), relation[1])
    pairs = torch.stack([(moved[:, 2 * c] ** 2 + moved[:, 2 * c + 1] ** 2) / 2 for c in range(2)], dim=1)
    joined = torch.cat((seen, normal(pairs, block.energy_bn)), dim=1).clamp(min=0)
    expected = torch.zeros(2, 4, *joined.shape[2:], dtype=torch.float64)
    for out in range(4):
        for c in range(6):
            expected[:, out] += block.reduce.weight[out, c, 0, 0, 0] * joined[:, c]
    torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-10)


# --- STC


def test_stc_block_equals_loops() -> None:
    block = StcBlock(6, 3, 2).double()
    x = torch.randn(2, 6, 3, 2, 4, dtype=torch.float64)
    expected = torch.zeros_like(x)
    for m in range(2):
        pooled = torch.stack([x[m, c].mean() for c in range(6)])
        framed = torch.stack([x[m, c, t].mean() for c in range(6) for t in range(3)])
        scales = []
        for vector, layers in ((pooled, block.temporal), (framed, block.spatial)):
            inner = (layers[0].weight @ vector + layers[0].bias).clamp(min=0)
            assert len(inner) == len(vector) // 2
            scales.append(1 / (1 + (-(layers[2].weight @ inner + layers[2].bias)).exp()))
        for c in range(6):
            expected[m, c] = (scales[0][c] * x[m, c] + scales[1][c] * x[m, c]) / 2
    torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("frames", [1, 5, 16])
def test_stc_blocks_fit_the_frames_that_are_left_in_their_stage(frames: int) -> None:
    with torch.device("meta"):
        net = vb.stcnet(num_classes=7, backbone="resnext50_32x4d", frames=frames).eval()
        clips = torch.empty(2, 1, frames, 3, 48, 48)
    with torch.no_grad():
        assert net(rgb=clips, flow=None).shape == (2, 7)


def test_stcnet_is_torchvisions_resnext_with_cubes_and_stc_blocks() -> None:
    """Parameters: its 3x3 kernels three times, its 7x7 one seven times, and two pairs of matrices a block."""
    with torch.device("meta"):
        net = vb.stcnet(num_classes=400)
        flat = ResNet(Bottleneck, [3, 4, 23, 3], groups=32, width_per_group=4, num_classes=400)
    expected = numel(flat)
    expected += sum(2 * p.numel() for p in flat.parameters() if p.shape[2:] == (3, 3)) + 6 * flat.conv1.weight.numel()
    for depth, channels, frames in ((3, 256, 16), (4, 512, 8), (23, 1024, 4), (3, 2048, 2)):
        for inputs in (channels, frames * channels):
            inner = inputs // 16
            expected += depth * (inputs * inner + inner + inner * channels + channels)
    assert numel(net) == expected


# --- StNet


def test_a_segments_frames_are_one_super_image() -> None:
    net = vb.stnet(num_classes=2, backbone="resnet18", frames=2).eval()
    rgb = torch.randn(2, 3, 2, 3, 32, 32)
    seen = []
    net.rgb_net.stem[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        net(rgb=rgb, flow=None)
    (supers,) = seen
    assert supers.shape == (6, 6, 32, 32)
    for video in range(2):
        for segment in range(3):
            for channel in range(6):
                frame, colour = divmod(channel, 3)
                assert torch.equal(supers[3 * video + segment, channel], rgb[video, segment, frame, colour])


def test_stnets_stem_sees_a_still_grey_frame_as_the_2d_stem_does(tmp_path: Path) -> None:
    flat, path = torchvision.models.resnet18(weights=None), tmp_path / "resnet18.safetensors"
    save_file(flat.state_dict(), path)
    net = vb.stnet(num_classes=2, backbone="resnet18", backbone_weights=str(path), frames=5)
    frame = torch.randn(1, 1, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(net.rgb_net.stem[0](frame.repeat(1, 15, 1, 1)), flat.conv1(frame.repeat(1, 3, 1, 1)))
    assert torch.equal(net.rgb_net.layer4[1].conv2.weight, flat.layer4[1].conv2.weight)


def over_time(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """out[m, o, s] = b[o] + sum over i, k of w[o, i, k] x[m, i, s + k - 1], nothing beyond the ends."""
    out = torch.zeros(x.shape[0], weight.shape[0], x.shape[2], dtype=x.dtype)
    for s in range(x.shape[2]):
        out[:, :, s] = bias
        for k in range(3):
            if 0 <= s + k - 1 < x.shape[2]:
                out[:, :, s] += x[:, :, s + k - 1] @ weight[:, :, k].T
    return out


def test_temporal_blocks_of_stnet_equal_loops() -> None:
    block = randomise_norms(TemporalBlock(4)).double()
    xception = randomise_norms(TemporalXception(4, 6)).double()
    for conv in (block.conv, *xception.deep, xception.plain):
        if getattr(conv, "bias", None) is not None and not isinstance(conv, nn.BatchNorm1d):
            nn.init.normal_(conv.bias)
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    after = over_time(x, block.conv.weight[..., 0, 0], block.conv.bias).clamp(min=0)
    torch.testing.assert_close(
        block(x[..., None, None])[..., 0, 0], x + normal(after, block.bn), rtol=1e-10, atol=1e-10
    )

    def alone(z: Tensor, conv: nn.Conv1d) -> Tensor:  # channel by channel
        return over_time(z, torch.diag_embed(conv.weight[:, 0].T).permute(1, 2, 0), conv.bias)

    def mixed(z: Tensor, conv: nn.Conv1d) -> Tensor:
        return torch.einsum("oi,mis->mos", conv.weight[:, :, 0], z) + conv.bias[None, :, None]

    z, deep = normal(x, xception.before), xception.deep
    y = normal(mixed(alone(z, deep[0]), deep[1]), deep[2]).clamp(min=0)
    y = mixed(alone(y, deep[4]), deep[5]) + mixed(z, xception.plain)
    torch.testing.assert_close(xception(x), normal(y, xception.after).clamp(min=0), rtol=1e-10, atol=1e-10)


def test_stnet_is_torchvisions_resnet_with_its_blocks_over_time() -> None:
    with torch.device("meta"):
        net, flat = vb.stnet(num_classes=400), torchvision.models.resnet50()
    temporal = sum(3 * d * d + d + 2 * d for d in (512, 1024))
    apart = 4 * 2048 + 4 * 1024  # three weights and a bias a channel
    mixing = 2 * (2048 * 1024 + 1024) + 1024 * 1024 + 1024
    norms = 2 * (2048 + 1024 + 1024)
    expected = numel(flat, ("fc.",)) + 64 * 12 * 49 + temporal + apart + mixing + norms + 1024 * 400 + 400
    assert numel(net) == expected


# --- LGD-3D


@pytest.mark.parametrize("kind", ["a", "b", "c"])
def test_pseudo_3d_convolutions_are_3d_ones_with_composed_kernels(kind: str) -> None:
    branch = randomise_norms(P3dBranch(kind, 5, 3, 2)).double()  # type: ignore[arg-type]
    x = torch.randn(2, 5, 4, 6, 6, dtype=torch.float64)
    z = normal(F.conv3d(x, branch.conv1.weight), branch.bn1).clamp(min=0)
    space, time = branch.conv2.weight[:, :, 0], branch.conv2_t.weight[..., 0, 0]
    cube = torch.zeros(3, 3, 3, 3, 3, dtype=torch.float64)  # outputs, inputs, t, y, x
    if kind == "a":
        cube = torch.einsum("omt,miyx->oityx", time, space)
    else:
        cube[:, :, 1] = space
        cube[:, :, :, 1, 1] += time if kind == "b" else 0
    y = normal(F.conv3d(z, cube, stride=(1, 2, 2), padding=1), branch.bn2).clamp(min=0)
    if kind == "c":
        y = (y + F.conv3d(y, branch.conv2_t.weight, padding=(1, 0, 0))).clamp(min=0)
    expected = normal(F.conv3d(y, branch.conv3.weight), branch.bn3)
    torch.testing.assert_close(branch(x), expected, rtol=1e-10, atol=1e-10)


def test_an_lgd_block_updates_the_vector_and_then_every_cell() -> None:
    block = randomise_norms(LgdBlock("a", 8, 16, 2)).double()
    nn.init.normal_(block.to_local[1].weight)
    x, g = torch.randn(2, 8, 3, 4, 4, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)
    local, old, out = (
        (lambda v, pair=pair: (v @ pair[0].weight.T + pair[0].bias) @ pair[1].weight.T + pair[1].bias)
        for pair in (block.from_local, block.from_global, block.to_local)
    )
    expected_g = (local(torch.stack([clip.flatten(1).mean(dim=1) for clip in x])) + old(g)).clamp(min=0)
    residual = block.branch(x) + block.downsample(x)
    found_x, found_g = block(x, g)
    torch.testing.assert_close(found_g, expected_g, rtol=1e-10, atol=1e-10)
    added = out(expected_g)
    for t in range(3):
        for cell in ((0, 0), (0, 1), (1, 1)):
            expected = (residual[:, :, t, cell[0], cell[1]] + added).clamp(min=0)
            torch.testing.assert_close(found_x[:, :, t, cell[0], cell[1]], expected, rtol=1e-10, atol=1e-10)


def starts_as_the_2d_network(net: nn.Module, flat: nn.Module) -> None:
    """On the third frame of each four, without what the global path says."""
    flat.fc = nn.Identity()
    flat.double().eval()
    net.double().eval()
    nn.init.zeros_(net.global_classifier.weight)
    nn.init.zeros_(net.global_classifier.bias)
    clip = torch.randn(1, 8, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = net.classifier(flat(clip[0, [2, 6]]).mean(dim=0)) / 2
        torch.testing.assert_close(net(clip)[0], expected, rtol=1e-9, atol=1e-9)


def test_a_2d_network_becomes_an_lgd_one_that_sees_one_frame_of_four() -> None:
    flat = randomise_norms(ResNet(Bottleneck, [1, 1, 1, 1]))
    net = LgdResNet3d((1, 1, 1, 1), 3, in_channels=3, stride=4, dropout=0.5)
    state = {name: value for name, value in flat.state_dict().items() if not name.startswith("fc.")}
    net.load_2d(state, source="flat")
    starts_as_the_2d_network(net, flat)


@pytest.mark.slow
def test_lgd3d_starts_from_a_file_of_a_2d_network(tmp_path: Path) -> None:
    flat, path = torchvision.models.resnet50(weights=None), tmp_path / "resnet50.safetensors"
    save_file(flat.state_dict(), path)
    net = vb.lgd3d(num_classes=3, backbone="resnet50", backbone_weights=str(path))
    starts_as_the_2d_network(net.rgb_net, flat)


def test_lgd3d_is_torchvisions_resnet_with_temporal_kernels_and_low_rank_matrices() -> None:
    with torch.device("meta"):
        net, flat = vb.lgd3d(num_classes=400), torchvision.models.resnet101()
    expected = numel(flat, ("fc.",)) + 3 * flat.conv1.weight.numel() + 2 * (2048 * 400 + 400)
    inputs = 64
    for depth, width in ((3, 64), (4, 128), (23, 256), (3, 512)):
        outputs, rank = 4 * width, width // 4
        for _ in range(depth):
            expected += 3 * width * width
            for into in (inputs, inputs, outputs):
                expected += into * rank + rank + rank * outputs + outputs
            inputs = outputs
    assert numel(net) == expected
