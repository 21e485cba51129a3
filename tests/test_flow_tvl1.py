"""TV-L1 against motions that are known, and against OpenCV's DIS on the same pairs; where there is a GPU, there too."""

import cv2
import numpy as np
import pytest
import torch

from kinoray.network.flow_tvl1 import tvl1_flow
from kinoray.video.transform import dis_flow

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SIDE, MARGIN = 256, 42
AS_GOOD_PX = 0.15
"""Mean error that is good enough where DIS medium has less: what it has itself (0.11 to 0.25 px) on real frames, which
have less texture than these. Measured here: 0.07 to 0.12."""

MOTIONS = {
    "shift 1.5": (np.eye(2), (1.2, 0.9)),
    "shift 6": (np.eye(2), (-3.6, 4.8)),
    "shift 14": (np.eye(2), (11.2, -8.4)),
    "rotate 3 degrees": (np.array([[0.99863, -0.052336], [0.052336, 0.99863]]), (0.0, 0.0)),
    "zoom 4 %": (1.04 * np.eye(2), (0.0, 0.0)),
    "mixed": (1.02 * np.array([[0.99863, -0.052336], [0.052336, 0.99863]]), (2.0, -1.5)),
}


def texture(seed: int) -> np.ndarray:
    """Grey levels, float32: large smooth parts and fine ones, as photographs have them."""
    rng = np.random.default_rng(seed)
    total = np.zeros((SIDE + 2 * MARGIN,) * 2, np.float32)
    for sigma, share in ((24, 1.0), (8, 0.5), (2.5, 0.25), (1, 0.1)):
        noise = cv2.GaussianBlur(rng.normal(size=total.shape).astype(np.float32), (0, 0), sigma)
        total += share / noise.std() * noise
    return np.clip(128 + 40 * total, 0, 255)


def moved_pair(motion: str, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two uint8 pictures with noise of 2 grey levels, and the flow between them, float64 [2, H, W]."""
    matrix, shift = MOTIONS[motion]
    middle = np.full(2, MARGIN + (SIDE - 1) / 2)
    offset = middle + shift - matrix @ middle
    picture = texture(seed)
    moved = cv2.warpAffine(
        picture,
        np.c_[matrix, offset],
        picture.shape[::-1],
        flags=cv2.INTER_CUBIC,
        borderMode=cv2.BORDER_REFLECT,
    )
    rng = np.random.default_rng(100 + seed)
    inner = slice(MARGIN, MARGIN + SIDE)
    first, second = (
        np.clip(np.rint(x[inner, inner] + rng.normal(0, 2, (SIDE, SIDE))), 0, 255).astype(np.uint8)
        for x in (picture, moved)
    )
    y, x = np.mgrid[inner, inner].astype(np.float64)
    places = np.stack([x, y])
    flow = np.einsum("ij,jyx->iyx", matrix, places) + offset[:, None, None] - places
    return first, second, flow


def error_px(flow: np.ndarray, truth: np.ndarray) -> float:
    return float(np.hypot(*(flow - truth)).mean())


def tensors(pairs: list[tuple[np.ndarray, np.ndarray, np.ndarray]], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = (torch.from_numpy(np.stack([pair[place] for pair in pairs])).to(device) for place in (0, 1))
    return first, second


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("motion", MOTIONS)
def test_known_motions_are_found_as_exactly_as_by_dis_medium(motion: str, device: str) -> None:
    pairs = [moved_pair(motion, seed) for seed in range(2)]
    found = tvl1_flow(*tensors(pairs, device))
    assert found.shape == (2, 2, SIDE, SIDE)
    assert found.dtype == torch.float32
    assert found.device.type == device
    ours = np.mean([error_px(flow, truth) for flow, (_, _, truth) in zip(found.cpu().numpy(), pairs, strict=True)])
    theirs = np.mean([error_px(np.moveaxis(dis_flow(*pair, "medium"), 2, 0), truth) for *pair, truth in pairs])
    assert ours <= max(theirs, AS_GOOD_PX)


@pytest.mark.parametrize("device", DEVICES)
def test_a_pair_has_the_same_flow_alone_and_in_a_batch(device: str) -> None:
    pairs = [moved_pair(motion, seed) for seed, motion in enumerate(MOTIONS)]
    first, second = (x[:, :70, :83].repeat(3, 1, 1) for x in tensors(pairs, device))  # 18: more than one group
    together = tvl1_flow(first, second)
    for place in (0, 5, 17):
        alone = tvl1_flow(first[place : place + 1], second[place : place + 1])
        assert torch.equal(alone[0], together[place])


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_moves_in_equal_images(device: str) -> None:
    first, _ = tensors([moved_pair("mixed", 0)], device)
    assert tvl1_flow(first, first.clone()).abs().max() == 0


def test_flow_does_not_depend_on_the_kind_of_numbers() -> None:
    first, second = (x[:, :64, :64] for x in tensors([moved_pair("shift 6", 0)], "cpu"))
    assert torch.equal(tvl1_flow(first, second), tvl1_flow(first.double(), second.double()))


def test_mirrored_images_have_the_mirrored_flow_with_the_other_sign_of_x() -> None:
    first, second = tensors([moved_pair("mixed", 1)], "cpu")
    flow, mirrored = tvl1_flow(first, second), tvl1_flow(first.flip(2), second.flip(2)).flip(3)
    mirrored[:, 0] *= -1
    # Forward and backward differences change places, so the two are not equal to the last bit.
    assert float((flow - mirrored).abs().mean()) < 0.02


@pytest.mark.parametrize("size", [(2, 2), (2, 40), (16, 16), (31, 33), (200, 35)])
def test_any_size_of_image_has_a_finite_flow(size: tuple[int, int]) -> None:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 1, *size)).astype(np.uint8))
    flow = tvl1_flow(*images)
    assert flow.shape == (1, 2, *size)
    assert bool(flow.isfinite().all())


def test_no_pairs_have_no_flow() -> None:
    none = torch.zeros(0, 32, 40, dtype=torch.uint8)
    assert tvl1_flow(none, none).shape == (0, 2, 32, 40)


def test_wrong_input_is_named() -> None:
    image = torch.zeros(1, 8, 8, dtype=torch.uint8)
    for first, second in ((image, image[:, :7]), (image[0], image[0]), (image[:, :1], image[:, :1])):
        with pytest.raises(ValueError, match=r"of one shape \[P, H, W\], H and W at least 2, got \["):
            tvl1_flow(first, second)
