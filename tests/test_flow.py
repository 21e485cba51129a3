"""Optical flow against motions that are known, and its int8 form against a slow loop."""

import hashlib
import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest

from kinoray.video.transform import dis_flow, quantise


def textured(height: int, width: int, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width)).astype(np.uint8)
    return cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 2.5), None, 0, 255, cv2.NORM_MINMAX)


def shifted_pair(x: float, y: float, size: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Two cuts of one picture; what is at p in the first is at p + (x, y) in the second."""
    picture = textured(size + 60, size + 60)
    move = np.array([[1, 0, x], [0, 1, y]], np.float32)
    moved = cv2.warpAffine(picture, move, picture.shape[::-1], flags=cv2.INTER_CUBIC)
    inner = slice(30, 30 + size)
    return np.ascontiguousarray(picture[inner, inner]), np.ascontiguousarray(moved[inner, inner])


@pytest.mark.parametrize(("preset", "worst"), [("ultrafast", 0.5), ("fast", 0.4), ("medium", 0.3)])
@pytest.mark.parametrize(("x", "y"), [(3.0, 0.0), (0.0, -4.0), (-6.5, 2.25), (6.0, 5.0)])
def test_flow_finds_a_known_shift(preset: str, worst: float, x: float, y: float) -> None:
    flow = dis_flow(*shifted_pair(x, y), preset)
    assert flow.shape == (128, 128, 2)
    assert flow.dtype == np.float32
    inner = flow[16:-16, 16:-16]  # what has left the picture cannot be found
    assert np.hypot(inner[..., 0] - x, inner[..., 1] - y).mean() < worst


def test_nothing_moves_in_equal_frames() -> None:
    frame = textured(64, 80)
    assert np.abs(dis_flow(frame, frame.copy(), "ultrafast")).max() == 0


def test_small_frames_work() -> None:
    assert dis_flow(textured(16, 16), textured(16, 16, seed=1), "medium").shape == (16, 16, 2)


def test_flow_does_not_depend_on_earlier_calls_or_on_opencvs_threads() -> None:
    pair, other, smaller = shifted_pair(5, 1), shifted_pair(-9, 7), shifted_pair(2, 1, size=16)
    cv2.setNumThreads(1)
    first = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST).calc(*pair, None)
    for _ in range(2):
        dis_flow(*smaller, "ultrafast")
        assert np.array_equal(dis_flow(*pair, "ultrafast"), first)
    dis_flow(*other, "ultrafast")
    cv2.setNumThreads(4)
    assert np.array_equal(dis_flow(*pair, "ultrafast"), first)


PRESETS = ("ultrafast", "fast", "medium")
SIDES = (16, 24, 32, 40, 44, 45, 46, 64, 80, 84, 88, 90, 91, 96, 112, 128, 224)
THIN = ((1000, 16), (16, 1000), (45, 90), (90, 45), (24, 640), (13, 300))  # OpenCV's own choice of levels may crash


def squares(sides: Sequence[int]) -> list[tuple[int, int]]:
    return [(side, side) for side in sides]


def digests(shapes: Sequence[Sequence[int]]) -> dict[str, str]:
    """Of the flow between two pictures that have nothing in common, for each preset and shape."""
    found = {}
    for preset, (height, width) in itertools.product(PRESETS, shapes):
        pair = textured(height, width, 1), textured(height, width, 2)
        found[f"{preset} {height} x {width}"] = hashlib.sha256(dis_flow(*pair, preset).tobytes()).hexdigest()
    return found


def digests_elsewhere(shapes: Sequence[Sequence[int]]) -> dict[str, str]:
    """The same in a process that has seen nothing."""
    script = "import json, sys, test_flow; print(json.dumps(test_flow.digests(json.loads(sys.argv[1]))))"
    command = [sys.executable, "-c", script, json.dumps(shapes)]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def assert_one_flow_for_each_shape(shapes: list[tuple[int, int]]) -> None:
    """The first call for a shape, the next ones, and those of other processes after other shapes or none."""
    in_thread: list[dict[str, str]] = []
    thread = threading.Thread(target=lambda: in_thread.append(digests(shapes)))  # it has estimators of its own
    thread.start()
    thread.join()
    assert digests(shapes) == digests(shapes[::-1]) == in_thread[0] == digests_elsewhere(shapes[::-1])


@pytest.mark.parametrize("shapes", [squares(SIDES), list(THIN)], ids=["squares", "thin"])
def test_first_and_later_calls_and_other_processes_agree(shapes: list[tuple[int, int]]) -> None:
    assert_one_flow_for_each_shape(shapes)


@pytest.mark.slow
def test_first_and_later_calls_and_other_processes_agree_for_every_crop() -> None:
    assert_one_flow_for_each_shape(squares(range(16, 257)))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("sides", [SIDES, pytest.param(range(12, 400), marks=pytest.mark.slow, id="every crop")])
def test_flow_is_that_of_opencvs_estimator_once_it_has_settled(preset: str, sides: Sequence[int]) -> None:
    """Left alone, an estimator changes its levels in its first call, and no more for squares."""
    cv2.setNumThreads(1)
    for side in sides:
        pair = textured(side, side, 1), textured(side, side, 2)
        settled = cv2.DISOpticalFlow.create(getattr(cv2, f"DISOPTICAL_FLOW_PRESET_{preset.upper()}"))
        for _ in range(2):
            settled.calc(np.zeros_like(pair[0]), np.zeros_like(pair[0]), None)
        assert np.array_equal(dis_flow(*pair, preset), settled.calc(*pair, None)), side


def test_threads_do_not_disturb_each_other() -> None:
    pairs = [shifted_pair(step, -step) for step in range(1, 5)]
    expected = [dis_flow(*pair, "ultrafast") for pair in pairs]
    equal = [False] * len(pairs)

    def work(number: int) -> None:
        equal[number] = all(np.array_equal(dis_flow(*pairs[number], "ultrafast"), expected[number]) for _ in range(30))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(pairs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert equal == [True] * len(pairs)


@pytest.mark.parametrize(
    ("prev", "following", "preset", "message"),
    [
        (np.zeros((8, 8), np.uint8), np.zeros((8, 9), np.uint8), "fast", r"uint8 \(8, 8\) and uint8 \(8, 9\)"),
        (np.zeros((8, 8), np.float32), np.zeros((8, 8), np.float32), "fast", r"float32 \(8, 8\)"),
        (np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.uint8), "fast", r"\(8, 8, 3\)"),
        (np.zeros((8, 8), np.uint8), np.zeros((8, 8), np.uint8), "slow", "ultrafast, fast, medium, got 'slow'"),
    ],
)
def test_wrong_input_is_named(prev: np.ndarray, following: np.ndarray, preset: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dis_flow(prev, following, preset)


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [(0.0, 0), (20.0, 127), (-20.0, -127), (35.0, 127), (-1e9, -127), (10.0, 64), (-10.0, -64), (0.05, 0), (0.1, 1)],
)
def test_quantised_flow_is_linear_up_to_the_bound(pixels: float, expected: int) -> None:
    flow = np.full((3, 4, 2), pixels, np.float32)
    assert (quantise(flow, 20.0) == expected).all()


def test_quantised_flow_equals_a_slow_loop() -> None:
    flow = np.random.default_rng(0).normal(0, 12, (5, 7, 2)).astype(np.float32)
    out = quantise(flow, 15.0)
    assert out.dtype == np.int8
    assert out.flags.c_contiguous
    for row in range(5):
        for column in range(7):
            for axis in range(2):
                exact = min(max(float(flow[row, column, axis]), -15.0), 15.0) / 15.0 * 127
                assert abs(int(out[axis, row, column]) - exact) <= 0.5 + 1e-4
