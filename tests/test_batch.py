"""Batches: shapes checked on both sides, and the numbers that a model is fed."""

import numpy as np
import pytest
import torch

from kinoray.errors import ModelError
from kinoray.network.batch import VideoBatch, collate, model_inputs
from kinoray.video.frames import Clip
from kinoray.video.info import VideoInfo
from tiny_models import Spec

INFO = VideoInfo(duration_s=1.0, fps=10.0, num_frames=10, width=8, height=6, codec="h264", rotation=0)


def make_clip(seed: int, *, size: int = 4, with_flow: bool = True) -> Clip:
    rng = np.random.default_rng(seed)
    return Clip(
        frames=rng.integers(0, 256, (2, 3, 3, size, size), dtype=np.uint8),
        flow=rng.integers(-127, 128, (2, 3, 2, size, size), dtype=np.int8) if with_flow else None,
        indices=np.arange(6).reshape(2, 3),
        num_frames=10,
        frames_decoded=6,
        frames_corrupt=0,
        info=INFO,
    )


def test_collate_stacks_clips_in_order() -> None:
    clips = [make_clip(seed) for seed in range(3)]
    batch = collate(clips)
    assert batch.rgb is not None
    assert batch.flow is not None
    assert len(batch) == 3
    for index, clip in enumerate(clips):
        assert np.array_equal(batch.rgb[index].numpy(), clip.frames)
        assert clip.flow is not None
        assert np.array_equal(batch.flow[index].numpy(), clip.flow)
    assert collate([make_clip(0, with_flow=False)]).flow is None


def test_collate_names_what_does_not_fit() -> None:
    with pytest.raises(ModelError, match="at least one clip"):
        collate([])
    with pytest.raises(ModelError, match=r"\(2, 3, 3, 4, 4\) and \(2, 3, 3, 5, 5\)"):
        collate([make_clip(0), make_clip(1, size=5)])
    with pytest.raises(ModelError, match="got 1 with flow of 2"):
        collate([make_clip(0), make_clip(1, with_flow=False)])


def test_a_batch_says_both_sides_of_a_mismatch() -> None:
    rgb, flow = torch.zeros(2, 1, 2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, 1, 2, 2, 4, 4, dtype=torch.int8)
    with pytest.raises(ModelError, match=r"rgb must be uint8 \[B, S, T, 3, H, W\], got float32 \[2, 1, 2, 3, 4, 4\]"):
        VideoBatch(rgb=rgb.float(), flow=None)
    with pytest.raises(ModelError, match=r"flow must be int8 \[B, S, T, 2, H, W\], got int8 \[2, 1, 2, 1, 4, 4\]"):
        VideoBatch(rgb=None, flow=flow[:, :, :, :1])
    with pytest.raises(ModelError, match=r"got rgb \[2, 1, 2, 3, 4, 4\] and flow \[1, 1, 2, 2, 4, 4\]"):
        VideoBatch(rgb=rgb, flow=flow[:1])
    with pytest.raises(ModelError, match="got neither"):
        VideoBatch(rgb=None, flow=None)


def test_model_inputs_equal_the_formula_value_by_value() -> None:
    spec = Spec(flow_channels=2, rgb_mean=(0.485, 0.456, 0.406), rgb_std=(0.229, 0.224, 0.225))
    batch = collate([make_clip(seed) for seed in range(2)])
    assert batch.rgb is not None
    assert batch.flow is not None
    before = batch.rgb.clone()

    inputs = model_inputs(batch, spec, "cpu")

    rgb, flow = inputs["rgb"], inputs["flow"]
    assert rgb is not None
    assert flow is not None
    assert rgb.dtype == flow.dtype == torch.float32
    assert rgb.shape == batch.rgb.shape
    for b, s, t, c, y, x in [(0, 0, 0, 0, 0, 0), (1, 1, 2, 1, 3, 2), (0, 1, 1, 2, 2, 3)]:
        expected = (int(batch.rgb[b, s, t, c, y, x]) / 255 - spec.rgb_mean[c]) / spec.rgb_std[c]
        assert float(rgb[b, s, t, c, y, x]) == pytest.approx(expected, abs=1e-6)  # float32
    for b, s, t, c, y, x in [(0, 0, 0, 0, 0, 0), (1, 1, 2, 1, 3, 2)]:
        assert float(flow[b, s, t, c, y, x]) == pytest.approx(int(batch.flow[b, s, t, c, y, x]) / 127, abs=1e-7)
    assert float(flow.abs().max()) <= 1.0
    assert torch.equal(batch.rgb, before)  # the batch itself is untouched


def test_a_model_gets_the_streams_it_asks_for() -> None:
    batch = collate([make_clip(0)])
    assert model_inputs(batch, Spec(), "cpu")["flow"] is None
    assert model_inputs(batch, Spec(rgb=False, flow_channels=2), "cpu")["rgb"] is None
    no_flow = collate([make_clip(0, with_flow=False)])
    with pytest.raises(ModelError, match="needs flow, but the batch has none"):
        model_inputs(no_flow, Spec(flow_channels=2), "cpu")
    with pytest.raises(ModelError, match="needs rgb, but the batch has none"):
        model_inputs(VideoBatch(rgb=None, flow=batch.flow), Spec(), "cpu")
    with pytest.raises(ModelError, match="needs 10 flow channels, but decoding gives 2"):
        model_inputs(batch, Spec(flow_channels=10), "cpu")
