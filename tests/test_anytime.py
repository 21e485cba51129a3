"""Early exit: the rule against brute force, and the scorer against whole forward passes."""

import dataclasses
from typing import Any, Literal, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kinoray.config.shared import ClipConfig, InferenceConfig, ModelConfig, SampleConfig, ViewConfig
from kinoray.errors import ConfigError
from kinoray.evaluation.calibrate import MAX_CHANGED, fit_margins, fit_temperature, likelihood_and_error
from kinoray.network.build import VideoModel, build_model
from kinoray.network.scorer import (
    ClipAnswer,
    ClipScorer,
    EarlyExit,
    RunningAnswer,
    ScorerConfig,
    check_scorer,
    nested_order,
)
from kinoray.video.frames import Clip
from kinoray.video.info import VideoInfo

S, T, C = 8, 2, 3
CLIP = ClipConfig(sample=SampleConfig(num_segments=S, frames_per_segment=T), view=ViewConfig(resize_px=32, crop_px=32))


def segment_probs(num_videos: int, num_segments: int, num_classes: int, seed: int, sharp: float) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(size=(num_videos, num_segments, num_classes)) * sharp
    p = np.exp(logits)
    return np.asarray(p / p.sum(axis=2, keepdims=True))


# The rule


@given(st.integers(1, 70))
def test_nested_order_is_a_permutation_spread_over_the_video(num_segments: int) -> None:
    order = nested_order(num_segments).tolist()
    assert sorted(order) == list(range(num_segments))
    power = 1
    while power * 2 <= num_segments and num_segments & (num_segments - 1) == 0:
        power *= 2
        assert sorted(order[:power]) == list(range(0, num_segments, num_segments // power))
    assert nested_order(16).tolist() == [0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15]


@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 10_000), st.sampled_from([0.3, 2.0, 9.0]))
def test_an_exact_exit_never_changes_the_top_1(num_segments: int, num_classes: int, seed: int, sharp: float) -> None:
    for probs in segment_probs(20, num_segments, num_classes, seed, sharp):
        running = RunningAnswer(num_segments, "probs")
        for segment in nested_order(num_segments):
            running.add(np.log(probs[segment]), 1)
            if running.is_settled(EarlyExit()):
                break
        end = running.seen
        assert 2 * end > num_segments
        assert running.logits.argmax() == probs.sum(axis=0).argmax()
        np.testing.assert_allclose(np.exp(running.logits), probs[nested_order(num_segments)[:end]].mean(axis=0))


def test_a_lead_that_the_rest_can_make_up_for_is_not_final() -> None:
    """Two segments say a for certain; two more that say b would make it a tie."""
    running = RunningAnswer(4, "probs")
    running.add(np.log([1 - 1e-300, 1e-300]), 2)
    assert not running.is_settled(EarlyExit())
    running.add(np.log([1 - 1e-300, 1e-300]), 1)
    assert running.is_settled(EarlyExit())


def test_logits_have_no_bound_so_only_a_margin_settles_them() -> None:
    running = RunningAnswer(4, "logits")
    running.add(np.array([9.0, 0.0]), 3)
    assert not running.is_settled(EarlyExit())
    assert running.is_settled(EarlyExit(margin=0.99))
    assert not running.is_settled(EarlyExit(margin=1.0))


def test_margins_keep_to_their_share_and_are_the_lowest_that_do() -> None:
    """Reference: a loop over videos and margins."""
    probs = segment_probs(300, 6, 4, 5, 1.5)
    order, stages = nested_order(6), EarlyExit(margin=0.5).stages(6)

    def replay(margin: float) -> tuple[int, int]:
        changed = run = 0
        for video in probs:
            for end in stages:
                p = video[order[:end]].mean(axis=0)
                second, first = sorted(p)[-2:]
                if end == 6 or first - second >= margin:
                    break
            changed += int(p.argmax() != video.mean(axis=0).argmax())
            run += end
        return changed, run

    points = fit_margins(np.log(probs), "probs")
    assert [point.max_changed for point in points] == list(MAX_CHANGED)
    assert points[0].margin > points[-1].margin
    for point in points:
        changed, run = replay(point.margin)
        assert point.changed == changed <= point.max_changed * 300
        assert point.segments_saved == pytest.approx(1 - run / 1800)
        assert point.upper > changed / 300
        if point.margin > 0.001:
            assert replay(point.margin - 0.001)[0] > point.max_changed * 300


@pytest.mark.parametrize("true_temperature", [0.4, 1.0, 2.5])
def test_the_temperature_is_the_one_that_was_taken_away(true_temperature: float) -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(20_000, 5)) * 2
    p = np.exp(logits)
    p /= p.sum(axis=1, keepdims=True)
    truth = (p.cumsum(axis=1) < rng.random((len(p), 1))).sum(axis=1).astype(np.int64)
    found = fit_temperature(logits * true_temperature, truth)
    assert found == pytest.approx(true_temperature, rel=0.05)
    grid = [likelihood_and_error(logits * true_temperature, truth, t)[0] for t in np.linspace(0.2, 4, 200)]
    loss, error = likelihood_and_error(logits * true_temperature, truth, found)
    assert loss <= min(grid) + 1e-9
    assert error < 0.02


def test_a_set_that_is_wholly_right_ends_at_the_lowest_temperature() -> None:
    assert fit_temperature(np.eye(4) * 3, np.arange(4)) == pytest.approx(0.05)


# The scorer


def network(consensus: Literal["logits", "probs"] = "probs", sharp: float = 40.0) -> VideoModel:
    """An untrained VCM-SDD that is sure of itself."""
    torch.manual_seed(3)
    model = build_model(ModelConfig(factory="vcm_sdd", options={"backbone": "tiny", "consensus": consensus}), C)
    with torch.no_grad():
        for classifier in (model.head.rgb_classifier, model.head.flow_classifier):  # type: ignore[attr-defined]
            classifier.weight.mul_(sharp)
    return cast(VideoModel, cast(torch.nn.Module, model).eval())


def clips(count: int) -> list[Clip]:
    rng = np.random.default_rng(11)
    info = VideoInfo(duration_s=1.0, fps=30.0, num_frames=30, width=32, height=32, codec="h264", rotation=0)
    made = []
    for _ in range(count):
        base = rng.integers(0, 256, (1, 1, 3, 1, 1))
        frames = np.clip(base + rng.integers(-90, 90, (S, T, 3, 32, 32)), 0, 255).astype(np.uint8)
        flow = rng.integers(-127, 128, (S, T, 2, 32, 32)).astype(np.int8)
        made.append(Clip(frames, flow, np.zeros((S, T), np.int64), 30, S * T, 0, info))
    return made


def answers(model: VideoModel, config: ScorerConfig, given_clips: list[Clip]) -> list[ClipAnswer]:
    scorer: ClipScorer[int] = ClipScorer(model, CLIP, config, num_classes=C, device="cpu")
    found: dict[int, ClipAnswer] = {}
    for number, clip in enumerate(given_clips):
        found.update(scorer.put(number, clip))
    found.update(scorer.flush())
    assert sorted(found) == list(range(len(given_clips)))
    return [found[number] for number in range(len(given_clips))]


def whole(model: VideoModel, clip: Clip) -> np.ndarray:
    """One forward pass over one clip, inputs made by hand."""
    rgb = (
        torch.from_numpy(clip.frames) / 255.0 - torch.tensor(model.input_spec.rgb_mean).view(3, 1, 1)
    ) / torch.tensor(model.input_spec.rgb_std).view(3, 1, 1)
    flow = torch.from_numpy(cast(np.ndarray, clip.flow)) / 127.0
    with torch.no_grad():
        return cast(np.ndarray, model(rgb=rgb[None], flow=flow[None])[0].double().numpy())


def test_an_exact_exit_gives_the_top_1_of_the_whole_pass_with_fewer_segments() -> None:
    model, given_clips = network(), clips(40)
    found = answers(model, ScorerConfig(batch_size=4, early_exit=EarlyExit()), given_clips)
    full = [whole(model, clip) for clip in given_clips]
    assert [answer.logits.argmax() for answer in found] == [logits.argmax() for logits in full]
    run = [answer.segments_run for answer in found]
    assert min(run) == S // 2 + 1
    assert max(run) == S
    for answer, logits in zip(found, full, strict=True):
        if answer.segments_run == S:
            np.testing.assert_allclose(np.exp(answer.logits), np.exp(logits), atol=1e-5)


def test_a_margin_stops_where_the_replay_of_the_stored_segments_says() -> None:
    model, given_clips = network(sharp=8.0), clips(30)
    stored = answers(model, ScorerConfig(batch_size=4, segment_logits=True), given_clips)
    segments = np.stack([cast(np.ndarray, answer.segment_logits) for answer in stored])
    for answer, clip in zip(stored, given_clips, strict=True):
        np.testing.assert_allclose(np.exp(answer.logits), np.exp(whole(model, clip)), atol=1e-5)
    point = next(point for point in fit_margins(segments, "probs") if point.max_changed == 0.05)
    found = answers(model, ScorerConfig(batch_size=4, early_exit=EarlyExit(margin=point.margin)), given_clips)
    changed = sum(a.logits.argmax() != b.logits.argmax() for a, b in zip(found, stored, strict=True))
    assert changed == point.changed
    run = sum(answer.segments_run for answer in found)
    assert run < 30 * S
    assert point.segments_saved == pytest.approx(1 - run / (30 * S))


@pytest.mark.parametrize("consensus", ["logits", "probs"])
def test_embeddings_are_what_the_classifiers_see(consensus: Literal["logits", "probs"]) -> None:
    """Reference: the head's own pooled vectors, averaged over segments."""
    model, given_clips = network(consensus), clips(5)
    heard: list[torch.Tensor] = []
    pool = model.head.pool  # type: ignore[attr-defined]

    def listening(*arguments: Any) -> Any:
        pooled = pool(*arguments)
        heard.append(torch.cat([x.float().mean(dim=0) for x in pooled]))
        return pooled

    model.head.pool = listening  # type: ignore[attr-defined]
    for clip in given_clips:
        whole(model, clip)
    model.head.pool = pool  # type: ignore[attr-defined]
    expected = [vector.numpy() for vector in heard]
    for config in (ScorerConfig(batch_size=3), ScorerConfig(batch_size=3, early_exit=EarlyExit(margin=1.0))):
        found = answers(model, dataclasses.replace(config, embeddings=True), given_clips)
        for answer, vector in zip(found, expected, strict=True):
            if answer.segments_run == S:
                np.testing.assert_allclose(cast(np.ndarray, answer.embedding), vector, rtol=1e-3, atol=1e-4)
    assert answers(model, ScorerConfig(), given_clips)[0].embedding is None


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        (
            network("logits"),
            ScorerConfig(early_exit=EarlyExit()),
            "early_exit exact needs a network that averages prob",
        ),
        (
            build_model(ModelConfig(factory="tsm", options={"backbone": "tiny"}), C),
            ScorerConfig(early_exit=EarlyExit(margin=0.5)),
            "early_exit needs a network whose answer is a mean over segments",
        ),
        (
            build_model(ModelConfig(factory="tsm", options={"backbone": "tiny"}), C),
            ScorerConfig(segment_logits=True),
            "segment_scores needs",
        ),
        (
            network(),
            ScorerConfig(embeddings=True, inference=InferenceConfig(compile=True)),
            "leave out inference.compile",
        ),
        (
            cast(VideoModel, torch.nn.Identity()),
            ScorerConfig(embeddings=True),
            "no linear layer with 3 outputs",
        ),
    ],
)
def test_what_a_network_cannot_give_is_refused(model: VideoModel, config: ScorerConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_scorer(model, config, C)
