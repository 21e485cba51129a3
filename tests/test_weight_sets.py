"""torchvision's Kinetics weights: its metadata, its scaling, and files of its state dicts as our networks."""

import copy
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

import video_baselines as vb
from kinoray.config.shared import ModelConfig
from kinoray.network.build import build_model, classifier_names
from vcm_sdd.preprocess import preprocess
from vcm_sdd.weights import WeightsMismatch, read_state
from video_baselines.weight_sets import WeightSet, adopt_state, weight_sets

SETS = weight_sets()
FACTORIES = sorted({found.factory for found in SETS})
# Clips that torchvision's own network takes where it is not 16 x 224: frames, side.
SIZES = {name: (4, 32) for name in FACTORIES if name.startswith(("mc3", "r2plus1d", "r3d", "swin3d"))}
QUICK = ("mc3_18", "r2plus1d_18")


def random_network(name: str, num_classes: int) -> nn.Module:
    """torchvision's own network, with norms that are not the trivial ones."""
    torch.manual_seed(0)
    net: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=num_classes).eval()
    for buffer_name, buffer in net.named_buffers():
        if buffer_name.endswith("running_mean"):
            buffer.uniform_(-0.1, 0.1)
        elif buffer_name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return net


def test_every_weight_set_of_torchvision_is_listed_and_has_a_factory() -> None:
    models = torchvision.models
    names = {(n, w.name) for n in models.list_models(module=models.video) for w in models.get_model_weights(n)}
    assert {(found.factory, found.name) for found in SETS} == names
    assert all(hasattr(vb, found.factory) for found in SETS)


@pytest.mark.parametrize(
    ("factory", "frames", "fps", "resize", "resize_px", "crop_px", "clips", "top1"),
    [
        ("mvit_v2_s", 16, 7.5, "shortest", (256, 256), 224, 5, 80.757),
        ("mvit_v1_b", 16, 7.5, "shortest", (256, 256), 224, 5, 78.477),
        ("swin3d_t", 32, 15.0, "shortest", (256, 256), 224, 12, 77.715),
        ("s3d", 128, 15.0, "exact", (256, 256), 224, 1, 68.368),
        ("r2plus1d_18", 16, 15.0, "exact", (128, 171), 112, 5, 67.463),
    ],
)
def test_metadata_says_how_the_network_was_fed(
    factory: str,
    frames: int,
    fps: float,
    resize: str,
    resize_px: tuple[int, int],
    crop_px: int,
    clips: int,
    top1: float,
) -> None:
    found = next(one for one in SETS if one.factory == factory)
    recipe = found.spec.recipe
    assert (recipe.frames, recipe.fps, recipe.stride) == (frames, fps, 1)
    assert (recipe.resize, recipe.resize_px, recipe.crop_px) == (resize, resize_px, crop_px)
    assert (found.clips_per_video, found.top1) == (clips, top1)
    assert len(found.class_names) == 400
    assert found.class_names[0] == "abseiling"


@pytest.mark.parametrize("found", SETS, ids=lambda found: f"{found.factory}:{found.name}")
def test_frames_are_fed_as_the_weights_transforms_feed_them(found: WeightSet) -> None:
    presets = torchvision.models.get_model_weights(found.factory)[found.name].transforms()
    frames = torch.randint(0, 256, (2, 241, 321, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = presets(frames.permute(0, 3, 1, 2)).transpose(0, 1)
    # The presets resize in float and round; torchvision's newer transforms, and we, in whole numbers.
    level = 1 / 255 / min(found.spec.rgb_std)
    torch.testing.assert_close(preprocess(frames, found.spec), expected, rtol=0, atol=level + 1e-6)


@pytest.mark.parametrize("found", SETS, ids=lambda found: f"{found.factory}:{found.name}")
def test_our_network_says_the_same_as_its_weight_set(found: WeightSet) -> None:
    with torch.device("meta"):
        spec = getattr(vb, found.factory)(num_classes=2).input_spec
    assert spec.recipe == found.spec.recipe
    assert (spec.crop_px, spec.rgb_mean, spec.rgb_std) == (
        found.spec.crop_px,
        found.spec.rgb_mean,
        found.spec.rgb_std,
    )


@pytest.mark.parametrize("name", FACTORIES)
def test_our_network_is_torchvisions_layer_by_layer(name: str) -> None:
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name, weights=None, num_classes=3)
        ours = getattr(vb, name)(num_classes=3).rgb_net.net
    lines = str(ours).replace("ClippedPool3d()", "AvgPool3d(kernel_size=(2, 7, 7), stride=1, padding=0)")
    assert lines == str(theirs)


def same_logits(name: str, net: nn.Module, model: nn.Module, frames: int, side: int) -> None:
    clip = torch.randn(1, frames, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = net(clip.transpose(1, 2))
        found = model(rgb=clip[:, None], flow=None)
    assert expected.std() > 1e-4, name
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def written(state: dict[str, Tensor], folder: Path, ending: str) -> Path:
    file = folder / f"weights{ending}"
    if ending == ".pth":
        torch.save(state, file)
    else:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)
    return file


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FACTORIES]
)
def test_a_file_of_torchvisions_gives_torchvisions_logits(tmp_path: Path, name: str) -> None:
    net = random_network(name, num_classes=5)
    frames, side = SIZES.get(name, (16, 224))
    states = []
    for ending in (".pth", ".safetensors"):
        file = written(net.state_dict(), tmp_path, ending)
        num_classes, state = adopt_state(name, read_state(file, option="weights"), source=str(file))
        assert num_classes == 5
        states.append(state)
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())
    options = {} if side == 224 else {"crop_px": None}
    model = getattr(vb, name)(num_classes=5, **options).eval()
    model.load_state_dict(states[1], strict=True)
    same_logits(name, net, model, frames, side)


def test_a_file_of_another_network_is_refused() -> None:
    state = random_network("r3d_18", num_classes=5).state_dict()
    with pytest.raises(WeightsMismatch, match=r"x\.pth does not fit VideoResNet: .*missing: stem\.3"):
        adopt_state("r2plus1d_18", state, source="x.pth")
    with pytest.raises(ValueError, match=r"torchvision has video networks mc3_18, .*, got 'resnet50'"):
        adopt_state("resnet50", state, source="x.pth")
    with pytest.raises(WeightsMismatch, match=r"1 unexpected: extra"):
        adopt_state("r3d_18", {**state, "extra": torch.zeros(1)}, source="x.pth")
    without = {key: tensor for key, tensor in state.items() if not key.startswith("fc.")}
    with pytest.raises(WeightsMismatch, match=r"2 missing: fc\.weight, fc\.bias"):
        adopt_state("r3d_18", without, source="x.pth")


@pytest.mark.parametrize("name", [*FACTORIES, "i3d"])
def test_another_number_of_classes_changes_the_last_layer_only(name: str) -> None:
    config = ModelConfig(factory=name)
    with torch.device("meta"):
        names = classifier_names(build_model(config, 7), config, 7)
    assert len(names) == 2
    assert {one.rpartition(".")[2] for one in names} == {"weight", "bias"}


@pytest.mark.parametrize("name", ["mvit_v1_b", "mvit_v2_s", "swin3d_t"])
def test_drop_path_is_the_last_blocks_rate_and_off_outside_of_training(name: str) -> None:
    from torchvision.ops import StochasticDepth

    with torch.device("meta"):
        rates = [
            [layer.p for layer in getattr(vb, name)(num_classes=2, **options).modules() if isinstance(layer, kind)]
            for options in ({}, {"drop_path": 0.4}, {"drop_path": 0.0})
            for kind in (StochasticDepth,)
        ]
    default = 0.1 if name.startswith("swin") else 0.2
    assert max(rates[0]) == pytest.approx(default)
    assert rates[1] == pytest.approx([rate * 0.4 / default for rate in rates[0]])
    assert set(rates[2]) == {0.0}
    with pytest.raises(ValueError, match="drop_path must be a number in 0"):
        getattr(vb, name)(num_classes=2, drop_path=1.0)


def test_drop_path_leaves_branches_out_in_training_only() -> None:
    torch.manual_seed(0)
    model = vb.swin3d_t(num_classes=3, crop_px=32, drop_path=0.9)
    calm = copy.deepcopy(model).eval()
    rgb = torch.randn(2, 1, 2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(calm(rgb=rgb, flow=None), calm(rgb=rgb, flow=None))
        assert not torch.equal(model(rgb=rgb, flow=None), model(rgb=rgb, flow=None))
