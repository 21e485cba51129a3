"""Batches that are launched ahead give what batches one by one give; the batch size is found and agreed on once."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kinoray.config.shared import ClipConfig, InferenceConfig, SampleConfig, StorageConfig, ViewConfig
from kinoray.errors import ChecksumMismatch, ModelError
from kinoray.network.batch import Feeder, collate
from kinoray.network.forward import CPU_BATCH, Forward, agreed_batch_size, auto_batch_size, largest_batch
from kinoray.network.scorer import ClipScorer, ScorerConfig
from kinoray.storage.objects import Storage
from kinoray.video.frames import Clip
from kinoray.video.info import VideoInfo
from tiny_models import MeanColour, mean_colour, refuses, wrong_shape

CLIP = ClipConfig(sample=SampleConfig(num_segments=2, frames_per_segment=1), view=ViewConfig(resize_px=16, crop_px=16))
INFO = VideoInfo(duration_s=1.0, fps=30.0, num_frames=30, width=16, height=16, codec="h264", rotation=0)


def clips(count: int, seed: int = 0) -> list[Clip]:
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 256, (count, 2, 1, 3, 16, 16), dtype=np.uint8)
    return [Clip(one, None, np.zeros((2, 1), np.int64), 30, 2, 0, INFO) for one in frames]


def forward(model: MeanColour, num_classes: int = 3) -> Forward:
    return Forward(model.eval(), model.input_spec, "cpu", num_classes)


def test_batches_launched_ahead_keep_their_order_and_digits() -> None:
    torch.manual_seed(0)
    model = mean_colour(3)
    batches = [clips(4, seed) for seed in range(3)]
    launched = [forward(model).launch(batch) for batch in batches]
    for batch, under_way in zip(batches, launched, strict=True):
        logits, embeddings = under_way.fetch()
        frames = torch.from_numpy(np.stack([one.frames for one in batch]))
        with torch.no_grad():
            expected = model(rgb=(frames / 255.0 - 0.5) / 0.25, flow=None)
        assert logits.dtype == np.float64
        assert embeddings is None
        np.testing.assert_array_equal(logits, expected.double().numpy())


def test_a_batchs_answers_come_with_the_batch_after_it() -> None:
    torch.manual_seed(0)
    model, given = mean_colour(3).eval(), clips(10)
    scorer = ClipScorer[int](model, CLIP, ScorerConfig(batch_size=4), num_classes=3, device="cpu")
    arrived = [[(ticket, answer.logits) for ticket, answer in scorer.put(n, clip)] for n, clip in enumerate(given)]
    rest = [(ticket, answer.logits) for ticket, answer in scorer.flush()]
    assert [[ticket for ticket, _ in answers] for answers in arrived] == [[]] * 7 + [[0, 1, 2, 3], [], []]
    assert [ticket for ticket, _ in rest] == [4, 5, 6, 7, 8, 9]
    assert list(scorer.flush()) == []
    found = np.stack([logits for _, logits in [*arrived[7], *rest]])
    expected = [forward(model).launch(given[start : start + 4]).fetch()[0] for start in (0, 4, 8)]
    np.testing.assert_array_equal(found, np.concatenate(expected))


def test_nothing_of_what_was_cleared_is_left() -> None:
    model = mean_colour(3).eval()
    scorer = ClipScorer[int](model, CLIP, ScorerConfig(batch_size=4), num_classes=3, device="cpu")
    for number, clip in enumerate(clips(6)):  # one batch is under way, two clips wait
        assert list(scorer.put(number, clip)) == []
    scorer.clear()
    assert list(scorer.flush()) == []
    arrived = [answer for number, clip in enumerate(clips(4, 1)) for answer in scorer.put(10 + number, clip)]
    arrived += scorer.flush()
    assert [ticket for ticket, _ in arrived] == [10, 11, 12, 13]
    expected, _ = forward(model).launch(clips(4, 1)).fetch()
    np.testing.assert_array_equal(np.stack([answer.logits for _, answer in arrived]), expected)


def test_what_is_fed_to_a_device_is_the_collated_batch() -> None:
    one = clips(3)  # the feeder is the GPU's, here with the CPU as its device
    flow = np.arange(2 * 2 * 16 * 16).astype(np.int8).reshape(2, 1, 2, 16, 16)
    both = [replace(clip, flow=flow + number) for number, clip in enumerate(one)]
    for batch in (one, both, both[:1]):
        fed, collated = collate(batch, Feeder("cpu").stacked), collate(batch)
        for name in ("rgb", "flow"):
            found, expected = getattr(fed, name), getattr(collated, name)
            assert found is expected is None or torch.equal(found, expected)


def test_a_network_that_fails_says_so_when_it_is_launched() -> None:
    with pytest.raises(ModelError, match=r"^the model failed on a batch {'rgb': \[4, 2, 1, 3, 16, 16\]}: .* has a bug"):
        forward(refuses(3)).launch(clips(4))


def test_wrong_logits_are_refused_when_they_are_fetched() -> None:
    with pytest.raises(ModelError, match=r"^the model gave logits \[4, 4\], expected \[4, 3\] for its labels"):
        forward(wrong_shape(3)).launch(clips(4)).fetch()
    broken = mean_colour(3)
    with torch.no_grad():
        broken.classify.bias[1] = float("nan")
    with pytest.raises(ModelError, match=r"^the model gave NaN or infinite logits for 4 of 4 clips"):
        forward(broken).launch(clips(4)).fetch()


@pytest.mark.parametrize(("room", "most", "found"), [(0, 64, 0), (1, 64, 1), (23, 64, 16), (64, 64, 64), (99, 64, 64)])
def test_the_largest_batch_is_the_last_power_of_two_that_fits(room: int, most: int, found: int) -> None:
    def fits(size: int) -> bool:
        if size > room + 4:
            raise torch.OutOfMemoryError("out of memory")
        return size <= room

    assert largest_batch(fits, most) == found


def test_on_a_cpu_each_clip_is_a_batch_of_its_own() -> None:
    assert auto_batch_size(mean_colour(3), CLIP, InferenceConfig(), "cpu") == CPU_BATCH == 1


def test_the_batch_size_of_a_labelling_is_found_once(tmp_path: Path) -> None:
    storage, root = Storage(StorageConfig()), str(tmp_path / "labels")
    asked: list[int] = []

    def find(size: int) -> int:
        asked.append(size)
        return size

    assert agreed_batch_size(storage, root, lambda: find(32)) == 32
    assert agreed_batch_size(storage, root, lambda: find(16)) == 32
    assert asked == [32]
    for record in ("{}", '{"batch_size": 0}', '{"batch_size": 1152921504606846976}'):
        (tmp_path / "labels" / "batch_size.json").write_text(record)
        with pytest.raises(ChecksumMismatch, match=r"batch_size\.json does not hold what kinoray wrote"):
            agreed_batch_size(storage, root, lambda: find(16))
