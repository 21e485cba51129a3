"""RAFT runs as torchvision runs it, on any size of image; files that are no weights of RAFT are refused by name."""

import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torchvision.models.optical_flow import raft_small

from kinoray.config.shared import ClipConfig, DecodeConfig, FlowConfig, SampleConfig, ViewConfig
from kinoray.demo.videos import make_video
from kinoray.errors import ConfigError
from kinoray.network.device_input import DeviceInput, collate_raw, quantised
from kinoray.storage.objects import Storage
from kinoray.video.clip import decode_clip
from kinoray.video.flow_raft import load_raft
from test_yuv420 import scenery

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Images here are small: several threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    """raft_small, untrained: its trained weights are not to be had here."""
    torch.manual_seed(0)
    return raft_small(weights=None).eval()


def images(count: int, height: int, width: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, height, width)).astype(np.uint8))


def as_colours(grey: Tensor) -> Tensor:
    return (grey.float() / 255 * 2 - 1)[:, None].expand(-1, 3, -1, -1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_it_is_torchvisions_network_with_the_weights_of_the_file(
    network: torch.nn.Module, suffix: str, device: str, tmp_path: Path
) -> None:
    path = tmp_path / f"raft.{suffix}"
    save_file(network.state_dict(), path) if suffix == "safetensors" else torch.save(network.state_dict(), path)
    first, second = images(2, 128, 136), images(4, 128, 136)[2:]
    with torch.no_grad():
        expected = network(as_colours(first), as_colours(second))[-1]
    found = load_raft(Storage(), str(path), device)(first.to(device), second.to(device))
    assert (found.device.type, found.dtype) == (device, torch.float32)
    # On the CPU 1 / 127.5 is rounded otherwise than 2 / 255; on a GPU convolutions are.
    torch.testing.assert_close(found.cpu(), expected, atol=1e-2, rtol=1e-2)


def test_images_are_filled_up_to_what_the_network_takes(network: torch.nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "raft.safetensors"
    save_file(network.state_dict(), path)
    raft = load_raft(Storage(), str(path), "cpu")
    first, second = images(1, 60, 131), images(2, 60, 131)[1:]
    filled = [torch.cat([x, x[:, -1:].expand(-1, 68, -1)], 1) for x in (first, second)]
    filled = [torch.cat([x, x[..., -1:].expand(-1, -1, 5)], 2) for x in filled]
    found = raft(first, second)
    assert found.shape == (1, 2, 60, 131)
    assert torch.equal(found, raft(*filled)[..., :60, :131])
    assert raft(first[:0], second[:0]).shape == (0, 2, 60, 131)


def test_a_clip_gets_its_flow_from_it(network: torch.nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "raft.safetensors"
    save_file(network.state_dict(), path)
    clip = ClipConfig(
        sample=SampleConfig(num_segments=1, frames_per_segment=2),
        decode=DecodeConfig(scale_on="device"),
        view=ViewConfig(resize_px=128, crop_px=128),
        flow=FlowConfig(estimator="raft", weights=str(path)),
    )
    raw = decode_clip(make_video(scenery(9, 128, 128)), clip, with_flow=True)
    flow = DeviceInput(clip, "cpu", Storage())(collate_raw([raw])).flow
    assert flow is not None
    assert raw.partners is not None
    own, theirs = torch.from_numpy(raw.frames[0, :, 1]), torch.from_numpy(raw.partners[0, :, 0])
    expected = load_raft(Storage(), str(path), "cpu")(own, theirs)
    assert torch.equal(flow[0, 0], quantised(expected, 20.0))


class _Canary:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_what_is_no_weights_file_is_named(network: torch.nn.Module, tmp_path: Path) -> None:
    state = network.state_dict()
    canary = tmp_path / "canary"
    (tmp_path / "text.pth").write_bytes(b"no weights")
    (tmp_path / "text.safetensors").write_bytes(b"no weights")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(_Canary(canary), protocol=2))
    torch.save([1, 2], tmp_path / "list.pth")
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    save_file(
        {name: x for name, x in state.items() if "mask" not in name} | {"x": torch.zeros(1)}, tmp_path / "x.safetensors"
    )
    messages = {
        "gone.pth": "is not there; it must be a file that every worker can read",
        "text.pth": "cannot be read as tensors only",
        "text.safetensors": "cannot be read as tensors only",
        "pickle.pth": "cannot be read as tensors only",
        "list.pth": "holds a list, expected a dict of tensors",
        "other.safetensors": "does not hold weights of torchvision's raft_small or raft_large",
        "x.safetensors": "does not fit raft_small",
    }
    for name, message in messages.items():
        with pytest.raises(ConfigError, match=rf"flow\.weights .*{name} {message}"):
            load_raft(Storage(), str(tmp_path / name), "cpu")
    assert not canary.exists()
