"""The baselines' parts against slow loops, second implementations and closed forms."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck

import video_baselines as vb
from vcm_sdd.backbone import ResNetGrid
from video_baselines.i3d import PooledClassifier
from video_baselines.inception3d import FeatureGate, Inception3d, SamePool3d
from video_baselines.nonlocal_block import NonLocalBlock, nonlocal_positions
from video_baselines.resnet3d import BasicBlock3d, Bottleneck3d, ResNet3d, TimeConv3d, inflate_kernel, inflate_state
from video_baselines.slowfast import SlowFast
from video_baselines.tsn import FrameClassifier, ShiftedGrid, temporal_shift


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def randomise_norms(net: nn.Module) -> nn.Module:
    """Give every BN statistics and weights that are not the trivial ones, and switch to eval mode."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.uniform_(module.bias, -0.1, 0.1)
    return net.eval()


# --- averages over frames, segments, streams


def test_tsn_is_the_mean_of_every_frames_logits() -> None:
    model = randomise_norms(vb.tsn(num_classes=3, backbone="tiny")).double()
    net = model.rgb_net
    assert isinstance(net, FrameClassifier)
    rgb = torch.randn(2, 3, 2, 3, 32, 32, dtype=torch.float64)
    expected = torch.zeros(2, 3, dtype=torch.float64)
    for video in range(2):
        for segment in range(3):
            for frame in range(2):
                grid = net.backbone(rgb[video, segment, frame][None])
                expected[video] += net.classifier(grid[0].mean(dim=(1, 2))) / 6
    torch.testing.assert_close(model(rgb=rgb, flow=None), expected, rtol=1e-10, atol=1e-10)


def test_clip_networks_average_the_logits_of_their_segments() -> None:
    model = randomise_norms(vb.i3d(num_classes=3, backbone="resnet18")).double()
    rgb = torch.randn(2, 3, 4, 3, 32, 32, dtype=torch.float64)
    single = [model(rgb=rgb[:, segment : segment + 1], flow=None) for segment in range(3)]
    expected = (single[0] + single[1] + single[2]) / 3
    torch.testing.assert_close(model(rgb=rgb, flow=None), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("flow_weight", [1.0, 1.5])
def test_two_streams_are_the_weighted_mean_of_both(flow_weight: float) -> None:
    options = {"backbone": "tiny", "modality": "two_stream", "flow_weight": flow_weight}
    model = randomise_norms(vb.tsn(num_classes=3, **options)).double()
    rgb, flow = (torch.randn(2, 2, 1, channels, 32, 32, dtype=torch.float64) for channels in (3, 2))
    one, two = copy.deepcopy(model), copy.deepcopy(model)
    one.flow_net = two.rgb_net = None
    expected = (one(rgb=rgb, flow=flow) + flow_weight * two(rgb=rgb, flow=flow)) / (1 + flow_weight)
    assert not torch.equal(one(rgb=rgb, flow=flow), two(rgb=rgb, flow=flow))
    torch.testing.assert_close(model(rgb=rgb, flow=flow), expected, rtol=1e-10, atol=1e-10)


# --- TSM


def shifted_by_loops(x: Tensor, div: int, online: bool) -> Tensor:
    """out[t, c] = x[t + step(c), c] or 0, one element at a time."""
    out = torch.zeros_like(x)
    clips, frames, channels = x.shape[:3]
    n = channels // div
    for m in range(clips):
        for t in range(frames):
            for c in range(channels):
                step = {0: -1 if online else 1, 1: 0 if online else -1}.get(c // max(n, 1), 0) if n else 0
                if 0 <= t + step < frames:
                    out[m, t, c] = x[m, t + step, c]
    return out


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize(("frames", "channels", "div"), [(1, 8, 8), (2, 16, 8), (5, 17, 4), (3, 6, 8), (4, 8, 2)])
def test_temporal_shift_equals_loops(frames: int, channels: int, div: int, online: bool) -> None:
    x = torch.randn(2, frames, channels, 3, 2)
    assert torch.equal(temporal_shift(x, div=div, online=online), shifted_by_loops(x, div, online))


@pytest.mark.parametrize(("name", "online"), [("resnet18", True), ("resnet50", False)])
def test_tsm_is_the_2d_network_with_its_branches_fed_with_shifted_frames(name: str, online: bool) -> None:
    plain = randomise_norms(ResNetGrid(name)).double()
    shifted = ShiftedGrid(copy.deepcopy(plain), online=online)
    frames = torch.randn(4, 3, 32, 32, dtype=torch.float64)

    def shift_input(module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        x = inputs[0]
        return shifted_by_loops(x.reshape(2, 2, *x.shape[1:]), 8, online).reshape(x.shape)

    for stage in (plain.layer1, plain.layer2, plain.layer3, plain.layer4):
        for block in stage:
            block.conv1.register_forward_pre_hook(shift_input)
    torch.testing.assert_close(shifted(frames, 2), plain(frames), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("shift", "looks_ahead"), [("online", False), ("offline", True)])
@pytest.mark.parametrize("backbone", ["resnet18", "tiny"])
def test_online_tsm_never_looks_ahead(shift: str, looks_ahead: bool, backbone: str) -> None:
    model = randomise_norms(vb.tsm(num_classes=3, backbone=backbone, shift=shift))
    grid = model.rgb_net.backbone
    frames = torch.randn(4, 3, 64, 64)
    changed = frames.clone()
    changed[3] += 1.0
    before, after = grid(frames, 4), grid(changed, 4)
    assert torch.equal(before[:3], after[:3]) != looks_ahead
    assert not torch.equal(before[3], after[3])


def test_tsm_takes_segments_and_frames_as_one_sequence() -> None:
    model = randomise_norms(vb.tsm(num_classes=3, backbone="resnet18"))
    rgb = torch.randn(1, 4, 1, 3, 32, 32)
    torch.testing.assert_close(model(rgb=rgb, flow=None), model(rgb=rgb.reshape(1, 2, 2, 3, 32, 32), flow=None))


# --- inflation


@pytest.fixture
def _float64() -> Iterator[None]:
    """Networks are built and loaded in float64: a kernel divided by 5 in float32 is not exact."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def resnet_file(tmp_path: Path, name: str) -> tuple[ResNetGrid, str]:
    net = randomise_norms(ResNetGrid(name))
    assert isinstance(net, ResNetGrid)
    path = tmp_path / f"{name}.pth"
    torch.save(net.state_dict(), path)
    return net, str(path)


@pytest.mark.parametrize(
    ("how", "replicate", "from_end"), [("mean", False, 2), ("mean", True, 0), ("centre", False, 0)]
)
def test_inflated_kernel_sees_a_repeated_frame_as_the_2d_kernel_sees_one(
    how: str, replicate: bool, from_end: int
) -> None:
    """With zeros beyond the ends, a mean kernel of 5 falls short in the 2 frames at either end, and only there."""
    conv = TimeConv3d(3, 4, time=5, space=3, replicate=replicate).double()
    kernel = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    conv.weight.data = inflate_kernel(kernel, 5, how)
    frame = torch.randn(1, 3, 6, 7, dtype=torch.float64)
    expected = F.conv2d(frame, kernel, padding=1)
    out = conv(frame[:, :, None].repeat(1, 1, 8, 1, 1))
    same = [torch.allclose(out[:, :, t], expected, rtol=0, atol=1e-12) for t in range(8)]
    assert same == [from_end <= t < 8 - from_end for t in range(8)]


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize(
    ("name", "inflation", "time_padding", "px"),
    [
        ("resnet18", "centre", "zeros", 64),
        pytest.param("resnet50", "mean", "replicate", 32, marks=pytest.mark.slow),
    ],
)
def test_i3d_on_a_still_clip_is_the_2d_network_on_its_frame(
    tmp_path: Path, name: str, inflation: str, time_padding: str, px: int
) -> None:
    net, path = resnet_file(tmp_path, name)
    options = {"backbone_weights": path, "inflation": inflation, "time_padding": time_padding}
    model = vb.i3d(num_classes=3, backbone=name, **options).eval()
    frame = torch.randn(1, 3, px, px)
    grid = model.rgb_net.features(frame[:, :, None].repeat(1, 1, 4, 1, 1))
    assert grid.shape[2] == 2
    torch.testing.assert_close(grid, net(frame)[:, :, None].expand_as(grid), rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("ours", "theirs", "expansion"), [(BasicBlock3d, BasicBlock, 1), (Bottleneck3d, Bottleneck, 4)]
)
def test_an_inflated_block_on_a_still_clip_is_torchvisions_block(
    ours: type[nn.Module], theirs: type[nn.Module], expansion: int, stride: int
) -> None:
    shortcut = nn.Sequential(nn.Conv2d(6, 4 * expansion, 1, stride=stride, bias=False), nn.BatchNorm2d(4 * expansion))
    flat = randomise_norms(theirs(6, 4, stride=stride, downsample=shortcut))
    block = ours(6, 4, 4 * expansion, time=3, stride=stride, replicate=True).eval()
    block.load_state_dict(inflate_state(flat.state_dict(), block))
    frame = torch.randn(2, 6, 5, 7)
    out = block(frame[:, :, None].repeat(1, 1, 4, 1, 1))
    torch.testing.assert_close(out, flat(frame)[:, :, None].expand_as(out), rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("_float64")
def test_i3d_with_zeros_beyond_its_ends_is_right_in_the_middle_only(tmp_path: Path) -> None:
    """Mean inflation with zero padding (the original): frames near either end see zeros, those far from both do not."""
    net, path = resnet_file(tmp_path, "resnet18")
    model = vb.i3d(num_classes=3, backbone="resnet18", backbone_weights=path).eval()
    frame = torch.randn(1, 3, 32, 32)
    grid = model.rgb_net.features(frame[:, :, None].repeat(1, 1, 32, 1, 1))
    expected = net(frame)
    # Reach: stem 2 and two blocks of res2, 1 each: 4 frames = 2 after the pool; res3, res4, res5: 1 each. In all 5.
    near = [torch.allclose(grid[:, :, t], expected, rtol=0, atol=1e-10) for t in range(16)]
    assert near == [5 <= t < 11 for t in range(16)]


@pytest.mark.usefixtures("_float64")
def test_inflated_googlenet_on_a_still_clip_is_googlenet(tmp_path: Path) -> None:
    net = torchvision.models.googlenet(weights=None, aux_logits=False, init_weights=False)
    randomise_norms(net)
    torch.save(net.state_dict(), tmp_path / "googlenet.pth")
    options = {"backbone": "inception_v1", "inflation": "centre", "backbone_weights": str(tmp_path / "googlenet.pth")}
    model = vb.i3d(num_classes=3, **options).eval()
    net.fc = nn.Identity()
    frame = torch.randn(1, 3, 64, 64)
    grid = model.rgb_net.features(frame[:, :, None].repeat(1, 1, 4, 1, 1))
    torch.testing.assert_close(grid.mean(dim=(2, 3, 4)), net(frame), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("factory", [vb.tsn, vb.i3d])
def test_flow_stem_starts_as_the_mean_of_the_rgb_stem(tmp_path: Path, factory: object) -> None:
    net, path = resnet_file(tmp_path, "resnet18")
    options = {"backbone": "resnet18", "backbone_weights": path, "modality": "two_stream", "flow_channels": 10}
    model = factory(num_classes=3, **options)  # type: ignore[operator]
    stems = [p for n, p in model.flow_net.named_parameters() if n.endswith("conv1.weight") and p.shape[1] == 10]
    assert len(stems) == 1
    expected = net.conv1.weight.mean(dim=1)
    if stems[0].ndim == 5:
        expected = expected[:, None] / 5
    torch.testing.assert_close(stems[0], expected[:, None].expand_as(stems[0]))
    rgb = dict(model.rgb_net.named_parameters())
    layer = next(name for name in rgb if name.endswith("layer4.1.conv2.weight"))
    last = rgb[layer]
    torch.testing.assert_close(last[:, :, 0] if last.ndim == 5 else last, net.layer4[1].conv2.weight)


# --- non-local


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize(("subsample", "size"), [(True, (2, 3, 4)), (False, (3, 2, 2)), (True, (2, 1, 5))])
def test_nonlocal_block_equals_loops(scaled: bool, subsample: bool, size: tuple[int, int, int]) -> None:
    block = randomise_norms(NonLocalBlock(6, subsample=subsample, scaled=scaled)).double()
    for conv in (block.theta, block.phi, block.g, block.out):
        nn.init.normal_(conv.weight)
        nn.init.normal_(conv.bias)
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    weights = {name: getattr(block, name).weight[:, :, 0, 0, 0] for name in ("theta", "phi", "g", "out")}
    biases = {name: getattr(block, name).bias for name in weights}
    expected = torch.zeros_like(x)
    for m in range(2):
        source = {cell: x[m][(slice(None), *cell)] for cell in cells(size)}
        asked = pooled_cells(x[m]) if subsample else list(source.values())
        for cell, value in source.items():
            theta = weights["theta"] @ value + biases["theta"]
            scores = [theta @ (weights["phi"] @ other + biases["phi"]) / (3**0.5 if scaled else 1) for other in asked]
            shares = torch.stack(scores).softmax(dim=0)
            y = sum(share * (weights["g"] @ o + biases["g"]) for share, o in zip(shares, asked, strict=True))
            out = weights["out"] @ y + biases["out"]
            bn = block.bn
            normal = (out - bn.running_mean) / (bn.running_var + bn.eps).sqrt() * bn.weight + bn.bias
            expected[m][(slice(None), *cell)] = normal + value
    torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-10)


def cells(size: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    return [(t, h, w) for t in range(size[0]) for h in range(size[1]) for w in range(size[2])]


def pooled_cells(x: Tensor) -> list[Tensor]:
    """Maxima of 1 x 2 x 2 windows (1 x 1 x 2 in a grid of one row), an odd last row or column left out."""
    _, frames, height, width = x.shape
    rows, columns = min(2, height), min(2, width)
    return [
        x[:, t, h * rows : (h + 1) * rows, w * columns : (w + 1) * columns].amax(dim=(1, 2))
        for t in range(frames)
        for h in range(height // rows)
        for w in range(width // columns)
    ]


def test_a_new_nonlocal_block_is_the_identity() -> None:
    x = torch.randn(2, 8, 3, 4, 5)
    for mode in (True, False):
        assert torch.equal(NonLocalBlock(8).train(mode)(x), x)


@pytest.mark.parametrize("factory", [vb.i3d, vb.slowfast])
def test_new_nonlocal_blocks_change_no_logit(factory: object) -> None:
    with_blocks = {vb.i3d: 5, vb.slowfast: 3}[factory]  # type: ignore[index]
    build = {"num_classes": 3, "backbone": "resnet18"}
    plain = randomise_norms(factory(**build))  # type: ignore[operator]
    more = factory(**build, nonlocal_blocks=with_blocks).eval()  # type: ignore[operator]
    report = more.load_state_dict(plain.state_dict(), strict=False)
    assert report.missing_keys
    assert not report.unexpected_keys
    rgb = torch.randn(1, 1, 8, 3, 64, 64)
    assert torch.equal(more(rgb=rgb, flow=None), plain(rgb=rgb, flow=None))


@pytest.mark.parametrize(
    ("num_blocks", "wanted", "positions"),
    [(4, 2, (1, 3)), (6, 3, (1, 3, 5)), (23, 3, (6, 13, 20)), (4, 4, (0, 1, 2, 3)), (2, 3, (0, 1)), (6, 0, ())],
)
def test_nonlocal_blocks_stand_where_the_authors_put_them(
    num_blocks: int, wanted: int, positions: tuple[int, ...]
) -> None:
    """1, 3 / 1, 3, 5 / 6, 13, 20: the configurations that were released with the SlowFast paper."""
    assert nonlocal_positions(num_blocks, wanted) == positions


# --- inception


def test_our_s3d_is_torchvisions() -> None:
    theirs = randomise_norms(torchvision.models.video.s3d(weights=None)).double()
    ours = Inception3d("separable", pool_both=True).double().eval()
    values = [value for name, value in theirs.state_dict().items() if name.startswith("features.")]
    names = list(ours.state_dict())
    assert [value.shape for value in values] == [ours.state_dict()[name].shape for name in names]
    ours.load_state_dict(dict(zip(names, values, strict=True)))
    x = torch.randn(1, 3, 8, 48, 48, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs.features(x), rtol=1e-10, atol=1e-10)


def test_feature_gate_equals_loops() -> None:
    gate = FeatureGate(3).double()
    x = torch.randn(2, 3, 2, 2, 3, dtype=torch.float64)
    expected = torch.zeros_like(x)
    for m in range(2):
        means = [x[m, c].sum() / 12 for c in range(3)]
        for c in range(3):
            z = sum(gate.linear.weight[c, k] * means[k] for k in range(3)) + gate.linear.bias[c]
            expected[m, c] = x[m, c] / (1 + torch.exp(-z))
    torch.testing.assert_close(gate(x), expected, rtol=1e-12, atol=1e-12)


def test_gates_that_are_wide_open_make_s3dg_into_s3d() -> None:
    plain = randomise_norms(Inception3d("separable"))
    gated = Inception3d("gated").eval()
    gated.load_state_dict(plain.state_dict(), strict=False)
    gates = [module for module in gated.modules() if isinstance(module, FeatureGate)]
    assert len(gates) == 20  # the stem, conv3 and two in each of nine blocks
    for gate in gates:
        nn.init.zeros_(gate.linear.weight)
        nn.init.constant_(gate.linear.bias, 40.0)  # sigmoid(40) is 1 in float32
    x = torch.randn(1, 3, 8, 32, 32)
    assert torch.equal(gated(x), plain(x))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8, 14])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (2, 2), (1, 1)])
def test_same_pool_equals_loops(size: int, kernel: int, stride: int) -> None:
    """Output t looks at inputs from t * stride - front on, front = half of what is missing, rounded down."""
    x = torch.rand(size)
    outputs = -(-size // stride)
    missing = max((outputs - 1) * stride + kernel - size, 0)
    expected = []
    for t in range(outputs):
        start = t * stride - missing // 2
        expected.append(max(x[i] for i in range(start, start + kernel) if 0 <= i < size))
    pool = SamePool3d((kernel, 1, 1), (stride, 1, 1))
    assert pool(x.reshape(1, 1, size, 1, 1)).flatten().tolist() == [float(value) for value in expected]


# --- SlowFast, MViT, ECO


def test_the_slow_pathway_sees_every_alpha_th_frame_only() -> None:
    model = randomise_norms(vb.slowfast(num_classes=3, backbone="resnet18", alpha=4))
    net = model.rgb_net
    assert isinstance(net, SlowFast)
    for lateral in net.laterals:  # cut what comes from the fast pathway
        nn.init.zeros_(lateral.bn.weight)
        nn.init.zeros_(lateral.bn.bias)
    nn.init.zeros_(net.classifier.weight[:, 512:])
    rgb = torch.randn(1, 1, 8, 3, 32, 32)
    base = model(rgb=rgb, flow=None)
    seen = []
    for t in range(8):
        changed = rgb.clone()
        changed[:, :, t] += 1.0
        if not torch.equal(model(rgb=changed, flow=None), base):
            seen.append(t)
    assert seen == [0, 4]


def test_every_frame_reaches_the_slow_pathway_through_the_lateral_connections() -> None:
    model = randomise_norms(vb.slowfast(num_classes=3, backbone="resnet18", alpha=4))
    nn.init.zeros_(model.rgb_net.classifier.weight[:, 512:])
    rgb = torch.randn(1, 1, 8, 3, 32, 32)
    base = model(rgb=rgb, flow=None)
    for t in range(8):
        changed = rgb.clone()
        changed[:, :, t] += 1.0
        assert not torch.equal(model(rgb=changed, flow=None), base), t


def test_our_mvit_has_every_entry_of_torchvisions() -> None:
    with torch.device("meta"):
        ours = vb.mvit_v2_s(num_classes=400).rgb_net.net
        theirs = torchvision.models.video.mvit_v2_s(weights=None)
    shapes = [{name: value.shape for name, value in net.state_dict().items()} for net in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert repr(ours) == repr(theirs)


def test_eco_lite_is_eco_without_its_2d_tail_and_only_its_3d_tail_sees_the_order_of_frames() -> None:
    full, lite = randomise_norms(vb.eco(num_classes=3)), vb.eco(num_classes=3, lite=True).eval()
    state = full.rgb_net.state_dict()
    names = {name: name.replace("lite_maps", "blocks.3c.maps") for name in lite.rgb_net.state_dict()}
    # The 2D vector comes first: 1024 entries, then the 512 of the 3D network.
    state["classifier.weight"] = state["classifier.weight"][:, 1024:]
    lite.rgb_net.load_state_dict({name: state[source] for name, source in names.items()})
    rgb = torch.randn(1, 3, 1, 3, 48, 48)
    weight = full.rgb_net.classifier.weight.data
    both = weight.clone()
    with torch.no_grad():
        weight[:, :1024] = 0
        torch.testing.assert_close(full(rgb=rgb, flow=None), lite(rgb=rgb, flow=None))
        moved = full(rgb=rgb, flow=None) - full(rgb=rgb.flip(1), flow=None)
        assert moved.abs().max() > 1e-4  # rounding: 1e-7
        weight[:, :1024], weight[:, 1024:] = both[:, :1024], 0
        torch.testing.assert_close(full(rgb=rgb, flow=None), full(rgb=rgb.flip(1), flow=None))


@pytest.mark.slow
def test_wrapped_networks_compute_what_torchvisions_do() -> None:
    for name, frames, px in (("s3d", 16, 224), ("r2plus1d_18", 8, 112), ("swin3d_t", 4, 224), ("mvit_v2_s", 16, 224)):
        theirs = torchvision.models.get_model(name, weights=None).eval()
        ours = getattr(vb, name)(num_classes=400).eval()
        ours.rgb_net.net.load_state_dict(theirs.state_dict())
        rgb = torch.randn(1, 1, frames, 3, px, px)
        with torch.no_grad():
            expected = theirs(rgb[:, 0].transpose(1, 2))
            torch.testing.assert_close(ours(rgb=rgb, flow=None), expected, rtol=1e-5, atol=1e-5)


def test_features_shrink_as_documented() -> None:
    """8 frames of 64 px: I3D halves time, with a strided stem divides it by 8; inception divides it by 8."""
    x = torch.randn(1, 3, 8, 64, 64)
    with torch.no_grad():
        assert ResNet3d("resnet18")(x).shape == (1, 512, 4, 2, 2)
        assert ResNet3d("resnet18", strided_stem=True)(x).shape == (1, 512, 1, 2, 2)
        assert Inception3d("joint")(x).shape == (1, 1024, 1, 2, 2)
        assert isinstance(vb.i3d(num_classes=2, backbone="resnet18").rgb_net, PooledClassifier)
