"""timm's networks as backbones: transformers' tokens as grids, files of weights, TSM's shift inside of their blocks."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import video_baselines as vb
from kinoray.network.prepare import FP32_TOLERANCE, prepare_for_inference
from vcm_sdd import vcm_sdd
from vcm_sdd.backbone import TimmGrid, build_backbone, build_backbones
from vcm_sdd.weights import WeightsMismatch

timm = pytest.importorskip("timm", reason="needs the package timm")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def randomised(net: nn.Module) -> nn.Module:
    """No norm, scale or bias is trivial, so that a lost or doubled one shows."""
    for name, parameter in net.named_parameters():
        if parameter.ndim == 1 and name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
        elif parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.5, 1.0)
    return net.eval()


@pytest.mark.parametrize(
    ("name", "prefix", "size", "grid"),
    [
        pytest.param("test_vit", 1, (64, 96), (4, 6), id="class token, not square"),
        pytest.param("vit_tiny_patch16_224", 1, (32, 48), (2, 3), id="ViT-Ti"),
        pytest.param("deit_tiny_distilled_patch16_224", 2, (48, 32), (3, 2), id="class and distillation tokens"),
        pytest.param("vit_small_patch14_reg4_dinov2", 5, (28, 42), (2, 3), id="class token and four registers"),
        pytest.param("vit_small_patch16_dinov3", 5, (32, 48), (2, 3), id="rotary positions", marks=pytest.mark.slow),
        pytest.param("vit_base_patch16_siglip_224", 0, (32, 48), (2, 3), id="no prefix", marks=pytest.mark.slow),
        pytest.param("swin_tiny_patch4_window7_224", 0, (64, 96), (2, 3), id="channels last", marks=pytest.mark.slow),
        pytest.param("mvitv2_tiny", 0, (64, 96), (2, 3), id="tokens of a pyramid", marks=pytest.mark.slow),
        pytest.param("test_resnet", 0, (64, 96), (2, 3), id="convolutions"),
    ],
)
def test_a_grid_is_timms_own_with_its_tokens_in_place(
    name: str, prefix: int, size: tuple[int, int], grid: tuple[int, int]
) -> None:
    net = TimmGrid(name)
    randomised(net)
    frames = torch.randn(2, 3, *size)
    with torch.inference_mode():
        found = net(frames)
        theirs = net.trunk.forward_features(frames)
    assert found.shape == (2, net.num_channels, *grid)
    assert found.std(dim=(2, 3)).mean() > 1e-4
    for row in range(grid[0]):
        for column in range(grid[1]):
            if theirs.ndim == 3:
                expected = theirs[:, prefix + row * grid[1] + column]
            elif theirs.shape[1] == net.num_channels:
                expected = theirs[:, :, row, column]
            else:
                expected = theirs[:, row, column]
            assert torch.equal(found[:, :, row, column], expected)


@pytest.mark.parametrize("name", ["test_vit", "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_tokens_lie_where_timm_itself_lays_them(name: str) -> None:
    net = TimmGrid(name)
    randomised(net)
    frames = torch.randn(2, 3, 32, 64)
    with torch.inference_mode():
        maps = net.trunk.forward_intermediates(frames, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True)
        torch.testing.assert_close(net(frames), maps[-1], rtol=1e-5, atol=1e-5)


def test_the_size_that_it_was_trained_with_gives_what_timm_gives() -> None:
    net = TimmGrid("test_vit")
    randomised(net)
    plain = timm.create_model("test_vit", num_classes=0).eval()
    plain.load_state_dict(net.trunk.state_dict(), strict=True)
    frames = torch.randn(1, 3, 160, 160)
    with torch.inference_mode():
        assert torch.equal(net.trunk.forward_features(frames), plain.forward_features(frames))


@pytest.mark.parametrize(
    ("name", "side", "message"),
    [
        ("vit_tiny_patch16_224", 40, r"'timm:vit_tiny_patch16_224' does not take frames of 40 x 40: Input height"),
        ("mixer_s32_224", 64, r"'timm:mixer_s32_224' does not take frames of 64 x 64: .*doesn't match model"),
        pytest.param(
            "crossvit_9_240",
            240,
            r"must return \[F, 384, H, W\], 'timm:crossvit_9_240' gives list",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_frames_that_a_network_does_not_take_are_refused(name: str, side: int, message: str) -> None:
    with torch.device("meta"):
        net = TimmGrid(name)
        with pytest.raises(ValueError, match=message):
            net(torch.zeros(1, 3, side, side))


def test_an_unknown_name_or_a_file_in_the_name_is_refused() -> None:
    with pytest.raises(ValueError, match="backbone 'timm:nobody' is not known to timm"):
        build_backbone("timm:nobody")
    with pytest.raises(ValueError, match=r"backbone=timm:test_vit backbone_weights=weights\.pth"):
        build_backbone("timm:test_vit:weights.pth")


# --- weights


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_a_file_of_timms_starts_both_streams(tmp_path: Path, name: str, ending: str) -> None:
    whole = randomised(timm.create_model(name))
    file = tmp_path / f"weights{ending}"
    state = {key: tensor.contiguous() for key, tensor in whole.state_dict().items()}
    if ending == ".pth":
        torch.save(state, file)
    else:
        save_file(state, file)
    rgb, flow = build_backbones(f"timm:{name}", flow_channels=2, weights=str(file))
    assert isinstance(rgb, TimmGrid)
    assert isinstance(flow, TimmGrid)
    size = rgb.trunk.pretrained_cfg["input_size"][1]
    frames = torch.randn(1, 3, size, size)
    prefix = rgb.num_prefix_tokens
    with torch.inference_mode():
        theirs, ours = whole.forward_features(frames), rgb.eval()(frames)
    flat = ours.flatten(2).transpose(1, 2) if theirs.ndim == 3 else ours
    assert torch.equal(flat, theirs[:, prefix:] if theirs.ndim == 3 else theirs)
    stem = state[f"{rgb.stem_name}.weight"]
    expected = stem.mean(dim=1, keepdim=True).repeat(1, 2, 1, 1)
    assert torch.equal(flow.trunk.get_parameter(f"{rgb.stem_name}.weight"), expected)


def test_a_file_of_another_network_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_vit2").state_dict(), file)
    with pytest.raises(WeightsMismatch, match=r"weights\.pth does not fit VisionTransformer"):
        build_backbones("timm:test_vit", flow_channels=2, weights=str(file))


# --- in networks


def test_vcm_sdd_and_tsn_run_on_a_transformer() -> None:
    rgb, flow = torch.randn(1, 2, 2, 3, 64, 64), torch.randn(1, 2, 2, 2, 64, 64)
    model = vcm_sdd(num_classes=4, backbone="timm:test_vit").train()
    model(rgb=rgb, flow=flow).square().sum().backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing
    small = vb.tsn(num_classes=4, backbone="timm:test_vit").eval()
    assert small(rgb=rgb, flow=None).shape == (1, 4)
    assert small.input_spec.rgb_mean == tuple(small.rgb_net.backbone.trunk.pretrained_cfg["mean"])


# --- TSM


def shifted(x_TC: Tensor, div: int, online: bool) -> Tensor:
    """out[t, c] = x[t + step(c), c] or 0, one element at a time."""
    out = torch.zeros_like(x_TC)
    frames, channels = x_TC.shape
    n = channels // div
    for t in range(frames):
        for c in range(channels):
            step = {0: -1 if online else 1, 1: 0 if online else -1}.get(c // n, 0)
            if 0 <= t + step < frames:
                out[t, c] = x_TC[t + step, c]
    return out


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("name", ["test_vit", "deit_tiny_distilled_patch16_224"])
def test_tsm_shifts_the_patch_tokens_of_a_transformer_only(name: str, online: bool) -> None:
    model = vb.tsm(num_classes=3, backbone=f"timm:{name}", shift="online" if online else "offline").eval()
    grid = model.rgb_net.backbone.grid
    prefix, block = grid.num_prefix_tokens, grid.trunk.blocks[0]
    seen: list[Tensor] = []
    block.norm1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    block.attn.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        model(rgb=torch.randn(1, 3, 1, 3, 32, 32), flow=None)
    before, after = seen
    assert torch.equal(after[:, :prefix], before[:, :prefix])
    for token in range(prefix, before.shape[1]):
        assert torch.equal(after[:, token], shifted(before[:, token], 8, online))


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "mobilenetv2_035"])
def test_online_tsm_never_looks_ahead_and_offline_does(name: str) -> None:
    frames = torch.randn(4, 3, 64, 64)
    changed = frames.clone()
    changed[3] += 1.0
    for shift in ("online", "offline"):
        # As built, timm's last norm of a branch is 0, and so is what the branch saw.
        grid = randomised(vb.tsm(num_classes=3, backbone=f"timm:{name}", shift=shift)).rgb_net.backbone
        with torch.inference_mode():
            before, after = grid(frames, 4), grid(changed, 4)
        assert torch.equal(before[:3], after[:3]) == (shift == "online")
        assert not torch.equal(before[3], after[3])


def test_tsm_with_one_frame_a_clip_is_tsn_without_its_first_channels() -> None:
    """The names and weights of TSN's network fit, and two videos never see each other."""
    tsn = vb.tsn(num_classes=3, backbone="timm:test_vit").eval()
    tsm = vb.tsm(num_classes=3, backbone="timm:test_vit").eval()
    state = {name.replace(".backbone.", ".backbone.grid."): value for name, value in tsn.state_dict().items()}
    tsm.load_state_dict(state, strict=True)
    rgb = torch.randn(2, 4, 1, 3, 64, 64)
    with torch.inference_mode():
        both = tsm(rgb=rgb, flow=None)
        single = torch.cat([tsm(rgb=rgb[i : i + 1], flow=None) for i in range(2)])
        assert not torch.allclose(both, tsn(rgb=rgb, flow=None), atol=1e-4)
    torch.testing.assert_close(both, single, rtol=1e-5, atol=1e-5)


def test_tsm_refuses_a_network_whose_blocks_it_does_not_know() -> None:
    with (
        torch.device("meta"),
        pytest.raises(
            ValueError, match="'timm:swin_tiny_patch4_window7_224' has no blocks that tsm knows how to shift"
        ),
    ):
        vb.tsm(num_classes=3, backbone="timm:swin_tiny_patch4_window7_224")


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_a_copy_prepared_for_inference_says_the_same_or_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folding runs parts of a network on batches of frames, which would cut a shift off from its neighbours."""
    monkeypatch.setattr("kinoray.network.prepare._CPU_PIXELS", 2 * 64 * 64)
    model = randomised(vb.tsm(num_classes=3, backbone=f"timm:{name}"))
    rgb = torch.randn(1, 4, 1, 3, 64, 64)
    with torch.inference_mode():
        expected = model(rgb=rgb, flow=None)
        unfolded = prepare_for_inference(model, fold=False)(rgb=rgb, flow=None)
        assert torch.equal(unfolded, expected)
        try:
            found = prepare_for_inference(model)(rgb=rgb, flow=None)
        except (AttributeError, RuntimeError):
            assert name == "test_resnet"  # the platform sees this, and leaves its batch norms where they are
            return
    assert (found - expected).abs().max() <= FP32_TOLERANCE * max(1.0, float(expected.abs().max()))
