"""Protocols: every view as decoded by hand, scores as averaged by hand, the same digits whoever did the work."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from decode_reference import moving, plain_decode
from kinoray.catalog.table import Catalog, catalog_of_source
from kinoray.config.scoring import ViewAverage, ViewsConfig, protocol_named
from kinoray.config.shared import ClipConfig, ModelConfig, SampleConfig, StorageConfig, ViewConfig
from kinoray.demo.videos import make_broken, make_video
from kinoray.errors import ConfigError
from kinoray.label.answers import AnswerRule, average_logits
from kinoray.label.config import LabelConfig
from kinoray.label.keys import row_keys
from kinoray.label.ledger import Ledger
from kinoray.label.open import open_labelling
from kinoray.label.stage import LabelJob, LabelUnits, pack_unit
from kinoray.label.unit import Unit
from kinoray.network.build import build_model
from kinoray.network.checkpoint import load_meta
from kinoray.network.scorer import ScorerConfig
from kinoray.storage.objects import Storage
from kinoray.video.frames import Clip, Frames, decode
from kinoray.video.request import Sampled, Views
from kinoray.video.sample import view_indices
from kinoray.video.sandbox.pool import Sandbox
from kinoray.video.transform import crop_views, dis_flow, quantise
from label_models import save_untrained
from small_tables import job_record, planned
from tiny_models import OWN_NETWORKS

LOCAL = Storage(StorageConfig())
LABELS = ("a", "b", "c", "d")
CLIP = ClipConfig(
    sample=SampleConfig(num_segments=2, frames_per_segment=3),
    view=ViewConfig(resize="short_side", resize_px=36, crop_px=32),
)


def naive_views(data: bytes, width: int, height: int, config: ClipConfig, views: ViewsConfig) -> list[Clip]:
    """Each view by itself: decode the whole video at the scaled size, cut, pick, estimate flow, mirror."""
    total = len(plain_decode(data))
    clips = []
    for indices in view_indices(total, config.sample, views.temporal):
        for cut in crop_views(config.view, width, height, views.crops):
            rows, columns = slice(cut.top, cut.top + cut.size), slice(cut.left, cut.left + cut.size)
            cuts = [frame[:, rows, columns] for frame in plain_decode(data, cut.height, cut.width)]
            frames = np.stack([cuts[index] for index in indices.reshape(-1)])
            flow = np.zeros((len(frames), 2, cut.size, cut.size), np.int8)
            for place, index in enumerate(indices.reshape(-1)):
                start = index if index + 1 < total else index - 1
                if start >= 0:
                    pair = [np.ascontiguousarray(cuts[t][1]) for t in (start, start + 1)]
                    flow[place] = quantise(dis_flow(*pair, config.flow.preset), config.flow.bound_px)
            if cut.flip:
                frames, flow = frames[..., ::-1], flow[..., ::-1] * np.array([-1, 1], np.int8)[:, None, None]
            shape = indices.shape
            clips.append(
                Clip(
                    frames=frames.reshape(*shape, *frames.shape[1:]),
                    flow=flow.reshape(*shape, *flow.shape[1:]),
                    indices=indices,
                    num_frames=total,
                    frames_decoded=0,
                    frames_corrupt=0,
                    info=decode(data, Sampled(), config.without_flow()).clip().info,
                )
            )
    return clips


def assert_same_views(found: Frames, expected: list[Clip]) -> None:
    clips = list(found.clips())
    assert len(found) == len(clips) == len(expected)
    for clip, naive in zip(clips, expected, strict=True):
        assert np.array_equal(clip.frames, naive.frames)
        assert clip.flow is not None
        assert naive.flow is not None
        assert np.array_equal(clip.flow, naive.flow)
        assert np.array_equal(clip.indices, naive.indices)
        assert clip.num_frames == naive.num_frames


@pytest.mark.parametrize(
    ("name", "num_views", "shape"),
    [
        ("center", 1, (2, 3)),
        ("8x6", 1, (8, 6)),
        ("16x6", 1, (16, 6)),
        ("10x3", 30, (2, 3)),
        ("5x3", 15, (2, 3)),
        ("25x10", 10, (25, 3)),
        ("1x1", 1, (2, 3)),
        ("4x3", 12, (2, 3)),
        ("12x1", 12, (2, 3)),
        ("2x10", 20, (2, 3)),
    ],
)
def test_protocols_are_what_their_names_say(name: str, num_views: int, shape: tuple[int, int]) -> None:
    protocol = protocol_named(name)
    clip, views = protocol.clip(CLIP), protocol.views("probs")
    assert views.num_views == num_views
    assert (clip.sample.num_segments, clip.sample.frames_per_segment) == shape
    assert replace(clip, sample=CLIP.sample) == CLIP
    data = make_video(moving(20, 40, 60))
    found = decode(data, Views(views=views), clip.without_flow())
    shapes = {one.frames.shape for one in found.clips()}
    assert (len(found), shapes) == (num_views, {(*shape, 3, 32, 32)})


@pytest.mark.parametrize(
    "views",
    [
        ViewsConfig(),
        ViewsConfig(temporal=5, crops="three"),
        ViewsConfig(temporal=2, crops="ten"),
    ],
    ids=["center", "5x3", "2x10"],
)
@pytest.mark.parametrize(("num_frames", "width", "height"), [(47, 64, 40), (47, 40, 64), (4, 64, 40), (1, 40, 40)])
def test_views_of_one_reading_are_those_decoded_one_by_one(
    num_frames: int, width: int, height: int, views: ViewsConfig
) -> None:
    data = make_video(moving(num_frames, height, width), gop=12)
    found = decode(data, Views(views=views), CLIP)
    assert_same_views(found, naive_views(data, width, height, CLIP, views))
    assert found.frames_decoded <= num_frames  # once for all views
    assert found.frames.shape[1] == len(np.unique(found.indices[0]))  # and held once


def test_the_centre_view_is_the_clip_that_training_is_scored_with() -> None:
    data = make_video(moving(31, 40, 64), gop=12)
    (view,) = decode(data, Views(views=ViewsConfig()), CLIP).clips()
    clip = decode(data, Sampled(), CLIP).clip()
    assert np.array_equal(view.frames, clip.frames)
    assert np.array_equal(view.flow, clip.flow)
    assert (view.frames_decoded, view.frames_corrupt, view.info) == (clip.frames_decoded, 0, clip.info)
    middle = list(decode(data, Views(views=ViewsConfig(temporal=3, crops="three")), CLIP).clips())[4]
    assert np.array_equal(middle.frames, clip.frames)  # an odd number of views has the centre among them
    assert np.array_equal(middle.flow, clip.flow)


def test_a_decoder_process_gives_the_same_views() -> None:
    data = make_video(moving(31, 40, 64), gop=12)
    views = ViewsConfig(temporal=3, crops="ten")
    with Sandbox(1) as sandbox:
        for config in (CLIP, CLIP.without_flow()):
            found = sandbox.decode(data, Views(views=views), config)
            expected = decode(data, Views(views=views), config)
            for one, other in zip(found.clips(), expected.clips(), strict=True):
                assert np.array_equal(one.frames, other.frames)
                assert (one.flow is None) is (config is not CLIP)
                assert one.flow is None or np.array_equal(one.flow, other.flow)
            assert (found.frames_decoded, found.info) == (expected.frames_decoded, expected.info)


@pytest.mark.parametrize("num_views", [1, 2, 30])
def test_scores_are_averaged_as_a_plain_loop_does(num_views: int) -> None:
    logits = np.random.default_rng(num_views).normal(size=(num_views, 5)) * 6
    p = [np.exp(row) / np.exp(row).sum() for row in logits]
    found = average_logits(logits, "probs")
    np.testing.assert_allclose(np.exp(found) / np.exp(found).sum(), sum(p) / num_views, rtol=1e-12)
    np.testing.assert_allclose(average_logits(logits, "logits"), sum(logits) / num_views, rtol=1e-12, atol=1e-12)
    far = average_logits(np.array([[1e4, 0.0], [1e4, -1e4]]), "probs")
    assert np.isfinite(far).all()


# The worker, without Ray


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine videos of several shapes and lengths, and one that cannot be read."""
    folder = tmp_path_factory.mktemp("library")
    for number in range(9):
        size = ((40, 60), (60, 40), (48, 48))[number % 3]
        (folder / f"{number}.mp4").write_bytes(make_video(moving(5 + 7 * number, *size, seed=number), gop=12))
    (folder / "4-bad.mp4").write_bytes(make_broken("random", (folder / "0.mp4").read_bytes()))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_untrained(LOCAL, str(tmp_path_factory.mktemp("run")), LABELS, CLIP, "label_models:mixing")


class Bench:
    """A labelling by workers in this process, each unit by whoever is told to."""

    def __init__(self, folder: Path, checkpoint: str, root: Path, **changes: Any) -> None:
        self.catalog: Catalog = catalog_of_source(LOCAL, str(folder))
        self.ledger = Ledger(LOCAL, str(root))
        self.ledger.pin_job(job_record(checkpoint=checkpoint, labels=LABELS))
        self.plan = planned(self.ledger, self.catalog.digest, row_keys(self.catalog.table), 2)
        job = LabelJob(
            allow_factory=OWN_NETWORKS,
            storage=LOCAL,
            root=str(root),
            checkpoint=checkpoint,
            model_digest=load_meta(LOCAL, checkpoint).model_digest,
            config_digest="c" * 16,
            run_id="r" * 16,
            clip=CLIP,
            answer=AnswerRule(top_k=3),
            scorer=ScorerConfig(batch_size=4),
            num_decoders=2,
            torch_threads=1,
        )
        self.job = replace(job, **changes)

    def rows(self, unit: Unit) -> pa.Table:
        start = 2 * self.plan.units.index(unit)
        return self.catalog.table.slice(start, len(unit.keys))

    def work(self, worker: LabelUnits, unit: Unit) -> None:
        (result,) = worker(pa.Table.from_pylist([pack_unit(unit, self.rows(unit))])).to_pylist()
        assert result["error_text"] == ""

    def table(self) -> list[dict[str, Any]]:
        return pa.concat_tables(self.ledger.read_units(self.plan.units)).to_pylist()


@pytest.mark.parametrize("average", ["probs", "logits"])
def test_a_worker_scores_the_mean_of_the_views(
    library: Path, checkpoint: str, tmp_path: Path, average: ViewAverage
) -> None:
    """Reference: every view decoded by hand, one forward pass for each, softmax and mean in float64."""
    views = ViewsConfig(temporal=2, crops="three", average=average)
    bench = Bench(
        library,
        checkpoint,
        tmp_path / "out",
        views=views,
        scorer=ScorerConfig(batch_size=1),
        answer=AnswerRule(top_k=3, all_scores=True),
    )
    worker = LabelUnits(bench.job)
    for unit in bench.plan.units:
        bench.work(worker, unit)
    torch.manual_seed(7)
    model = build_model(ModelConfig(factory="label_models:mixing"), len(LABELS))
    for row in bench.table():
        if row["status"] != "labelled":
            assert (row["video_id"], row["views"], row["scores"]) == ("4-bad", 0, None)
            continue
        data = Path(row["uri"]).read_bytes()
        info = decode(data, Sampled(), CLIP.without_flow()).clip().info
        logits = []
        for clip in naive_views(data, info.width, info.height, CLIP, views):
            rgb = (torch.from_numpy(np.ascontiguousarray(clip.frames)).float() / 255 - 0.5) / 0.25
            flow = torch.from_numpy(np.ascontiguousarray(clip.flow)).float() / 127
            with torch.no_grad():
                logits.append(model(rgb=rgb[None], flow=flow[None])[0].double())
        stacked = torch.stack(logits)
        p = stacked.softmax(1).mean(0) if average == "probs" else stacked.mean(0).softmax(0)
        np.testing.assert_allclose(row["scores"], p.numpy(), rtol=1e-5)
        assert row["views"] == 6
        assert row["id_topk"] == p.argsort(descending=True)[:3].tolist()
        np.testing.assert_allclose(row["score_topk"], np.array(row["scores"])[row["id_topk"]], rtol=1e-6)


def test_digits_do_not_depend_on_who_worked_when_or_was_killed(
    library: Path, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model mixes what is in a batch, so that tables are equal only if every batch was."""
    views = ViewsConfig(temporal=3, crops="three")
    quiet = Bench(library, checkpoint, tmp_path / "quiet", views=views)
    worker = LabelUnits(quiet.job)
    for unit in quiet.plan.units:
        quiet.work(worker, unit)
    expected = quiet.table()
    assert len({tuple(row["score_topk"]) for row in expected if row["score_topk"]}) == 9

    other = Bench(library, checkpoint, tmp_path / "other", views=views)
    workers = [LabelUnits(replace(other.job, num_decoders=1 + n)) for n in range(4)]
    with monkeypatch.context() as patch:  # a worker that dies where it would commit

        def die(*_: object) -> None:
            raise SystemExit("killed")

        patch.setattr(Storage, "put_if_absent", die)
        with pytest.raises(SystemExit):
            other.work(workers[0], other.plan.units[2])
    for turn, unit in enumerate(reversed(other.plan.units)):
        other.work(workers[1 + turn % 3], unit)
    assert other.table() == expected


# What a labelling is called, and what is refused


def test_a_protocol_is_another_labelling_unless_it_means_the_same(
    library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = replace(CLIP, sample=SampleConfig(num_segments=8, frames_per_segment=6))
    run = save_untrained(LOCAL, str(tmp_path / "run"), LABELS, trained, "label_models:mixing")
    config = LabelConfig(allow_factory=OWN_NETWORKS, source=str(library), checkpoint=run, out=str(tmp_path / "out"))
    names = ("center", "1x1", "8x6", "16x6", "10x3", "5x3", "25x10")
    roots = {name: open_labelling(replace(config, protocol=name), "label").ledger.root for name in names}
    assert roots["center"] == roots["8x6"] == roots["1x1"]
    assert len(set(roots.values())) == len(names) - 2
    logits = open_labelling(replace(config, protocol="10x3", view_average="logits"), "label").ledger.root
    scores = open_labelling(replace(config, all_scores=True), "label").ledger.root
    assert len({*roots.values(), logits, scores}) == len(names)
    assert "label: protocol 10x3, 30 views of each video" in capsys.readouterr().out
    job = Ledger(LOCAL, roots["10x3"]).job()
    assert job.settings["views"] == {
        "temporal": 10,
        "placed": False,
        "crops": "three",
        "average": "probs",
        "windows": None,
    }


def test_a_protocol_that_the_network_cannot_be_fed_with_is_refused(library: Path, tmp_path: Path) -> None:
    run = save_untrained(LOCAL, str(tmp_path / "run"), LABELS, CLIP, "label_models:two_segments")
    config = LabelConfig(
        allow_factory=OWN_NETWORKS, source=str(library), checkpoint=run, out=str(tmp_path / "out"), protocol="25x10"
    )
    with pytest.raises(ConfigError, match=r"protocol 25x10: clip.sample.num_segments must be 2 for this model, got 25"):
        open_labelling(config, "label")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("num_rows", "given", "rows"),
    [(9, {}, 2), (1, {}, 1), (100, {}, 13), (513, {}, 64), (10**6, {}, 64), (9, {"unit_size": 5}, 5)],
)
def test_in_a_small_library_each_worker_gets_some_units(num_rows: int, given: dict[str, int], rows: int) -> None:
    assert LabelConfig(source="x", checkpoint="c", out="o", **given).rows_a_unit(num_rows) == rows  # two workers


@pytest.mark.parametrize("name", ["", "10x", "0x3", "10x2", "10x6", "1000x1", "10X3", "05x3", "centre", "10x3x1"])
def test_a_protocol_that_is_none_is_refused(name: str) -> None:
    got = f"'{name}'" if name else "nothing"
    with pytest.raises(ConfigError, match=rf"CLIPSxCROPS with 1, 3 or 10 crops, such as 10x3, got {got}$"):
        LabelConfig(source="x", checkpoint="c", out="o", protocol=name)


def test_one_dense_clip_is_the_middle_one_or_the_samplers(library: Path, tmp_path: Path) -> None:
    """torchvision begins with the video, where a 1x1 of its paper lies; for a spread clip there is no difference."""
    sample = SampleConfig(num_segments=1, frames_per_segment=4, stride=2, placement="torchvision")
    trained = replace(CLIP, sample=sample)
    run = save_untrained(LOCAL, str(tmp_path / "run"), LABELS, trained, "label_models:mixing")
    config = LabelConfig(allow_factory=OWN_NETWORKS, source=str(library), checkpoint=run, out=str(tmp_path / "out"))
    center, placed = (open_labelling(replace(config, protocol=name), "label").job for name in ("center", "1x1"))
    assert center.config_digest != placed.config_digest
    data = (library / "8.mp4").read_bytes()
    starts = [int(decode(data, Views(views=job.views), job.clip).indices[0].min()) for job in (center, placed)]
    assert starts == [(61 - 7) // 2, 0]


def test_a_protocol_that_names_its_segments_takes_no_other_number() -> None:
    with pytest.raises(ConfigError, match="num_segments must be left out with protocol 16x6, which names it, got 4"):
        LabelConfig(source="x", checkpoint="c", out="o", protocol="16x6", num_segments=4)
    assert LabelConfig(source="x", checkpoint="c", out="o", protocol="10x3", num_segments=4).num_segments == 4
