"""1,000 videos, 50 of them broken in eight ways, through the real jobs: each has its row, and no good one is lost.

What is expected of a broken file is written here, by its kind; what is expected of a good one is worked out in this
process, without sandbox, Ray or batches.
"""

import hashlib
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from bombs import box
from kinoray.catalog.rows import load_quarantine
from kinoray.catalog.table import load_catalog, read_videos, references
from kinoray.config.shared import ClipConfig, ModelConfig, ResourcesConfig, SampleConfig, StorageConfig, ViewConfig
from kinoray.demo.videos import make_broken, make_video
from kinoray.label.config import LabelConfig
from kinoray.label.ledger import read_predictions
from kinoray.label.verb import label
from kinoray.network.build import build_model
from kinoray.pack.config import PackConfig
from kinoray.pack.verb import pack
from kinoray.storage.objects import Storage, join
from kinoray.video.frames import decode
from kinoray.video.request import Sampled
from label_models import save_untrained
from small_sets import COLOURS, LABELS
from tiny_models import OWN_NETWORKS

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.usefixtures("ray_local")]

CLIP = ClipConfig(sample=SampleConfig(num_segments=2, frames_per_segment=2), view=ViewConfig(resize_px=36, crop_px=32))
NUM_VIDEOS, NUM_BROKEN, NUM_BASES = 1000, 50, 36
LOCAL = Storage(StorageConfig())
TWO = ResourcesConfig(num_workers=2)


def never_filled(good: bytes) -> bytes:
    """Zeros where the pictures should be: a download that reserved its place and stopped."""
    begin = good.index(b"mdat") + 4
    (size,) = struct.unpack_from(">I", good, begin - 8)
    return good[:begin] + bytes(size - 8) + good[begin - 8 + size :]


def playlist(good: bytes) -> bytes:
    """Names a good neighbour, which must not be opened in its place."""
    return b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nclip-0001.mp4\n#EXT-X-ENDLIST\n"


def claims_much(good: bytes) -> bytes:
    """A good video with a fragment behind it that claims 100,000,000 samples."""
    track = box(b"tfhd", struct.pack(">II", 0x020000, 1)) + box(b"trun", struct.pack(">II", 0, 10**8))
    return good + box(b"moof", box(b"mfhd", struct.pack(">II", 0, 1)), box(b"traf", track))


BROKEN: dict[str, tuple[Callable[[bytes], bytes], str, str]] = {
    "empty": (lambda good: make_broken("empty", good), "EmptyMedia", "0 bytes"),
    "random": (lambda good: make_broken("random", good), "UnreadableContainer", "no video file of a known format"),
    "text": (lambda _: b"<html>404 not found</html>\n" * 20, "UnreadableContainer", "no video file of a known format"),
    "index_lost": (lambda good: make_broken("index_lost", good), "UnreadableContainer", "its index is lost"),
    "never_filled": (never_filled, "UndecodableVideo", "no frame comes out of"),
    "audio_only": (lambda good: make_broken("audio_only", good), "NoVideoStream", "the file holds audio"),
    "playlist": (playlist, "UnreadableContainer", "no video file of a known format"),
    "claims_much": (claims_much, "MediaOverBudget", "100,000,000 samples are claimed"),
}
"""Kind -> how it is made of a good file, the error class it must get, and words of the reason."""


@dataclass(frozen=True)
class Truth:
    """What was written where."""

    data: bytes
    base: int
    """Number of the good video that it is a copy of, or was made from."""
    kind: str = ""
    """Key of BROKEN; empty for a good one."""


def base_videos() -> list[bytes]:
    """Different videos of 64 x 48 with 12 to 24 frames, a third of each colour."""
    videos = []
    for number in range(NUM_BASES):
        rng = np.random.default_rng(number)
        colour = np.array(COLOURS[LABELS[number % len(LABELS)]]) + rng.integers(-25, 26, 3)
        noise = rng.integers(-30, 31, (12 + number % 13, 48, 64, 1))
        videos.append(make_video(np.clip(colour + noise, 0, 255).astype(np.uint8)))
    return videos


def write_library(folder: Path, bases: list[bytes]) -> dict[str, Truth]:
    """Path -> what lies there. Broken files are spread evenly; each good one has other bytes than all others."""
    step = NUM_VIDEOS // NUM_BROKEN
    found: dict[str, Truth] = {}
    kinds = list(BROKEN)
    for number in range(NUM_VIDEOS):
        base = number % len(bases)
        unique = bases[base] + box(b"free", b"copy %06d" % number)
        kind = kinds[number // step % len(kinds)] if number % step == step // 2 else ""
        data = BROKEN[kind][0](unique) if kind else unique
        path = folder / LABELS[base % len(LABELS)] / f"part-{number % 7}" / f"clip-{number:04d}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        found[str(path)] = Truth(data, base, kind)
    assert sum(bool(truth.kind) for truth in found.values()) == NUM_BROKEN
    assert {truth.kind for truth in found.values()} == {"", *BROKEN}
    good = [hashlib.sha256(truth.data).digest() for truth in found.values() if not truth.kind]
    assert len(set(good)) == len(good) == NUM_VIDEOS - NUM_BROKEN
    return found


def true_scores(bases: list[bytes]) -> list[np.ndarray]:
    """Probabilities of each base's classes, one video at a time."""
    torch.manual_seed(7)
    model = build_model(ModelConfig(factory="tiny_models:mean_colour"), len(LABELS))
    scores = []
    for data in bases:
        frames = decode(data, Sampled(), CLIP.without_flow()).clip().frames
        with torch.inference_mode():
            logits = model(rgb=((torch.from_numpy(frames).float() / 255 - 0.5) / 0.25)[None], flow=None)
        scores.append(logits.double().softmax(dim=1)[0].numpy())
    return scores


def test_of_1000_videos_each_has_its_row_and_no_good_one_is_lost(tmp_path: Path) -> None:
    """The same for 60 videos, in every run of the tests: test_label.py; for 19 files: test_pack.py."""
    bases = base_videos()
    library = write_library(tmp_path / "library", bases)
    broken = {uri: truth for uri, truth in library.items() if truth.kind}
    by_class = Counter(BROKEN[truth.kind][1] for truth in broken.values())

    out = str(tmp_path / "set")
    totals = pack(PackConfig(source=str(tmp_path / "library"), out=out, resources=TWO, shard_mb=1))
    assert (totals["found"], totals["packed"], totals["quarantined"]) == (
        NUM_VIDEOS,
        NUM_VIDEOS - NUM_BROKEN,
        NUM_BROKEN,
    )
    assert totals["reasons"] == dict(by_class)
    refused = load_quarantine(LOCAL, join(out, "quarantine.parquet"))
    assert sorted(row.uri for row in refused) == sorted(broken)
    for row in refused:
        _, error_class, words = BROKEN[broken[row.uri].kind]
        assert (row.error_class, row.stage) == (error_class, "probe")
        assert words in row.error_text
    catalog = load_catalog(LOCAL, out)
    ids = {f"{Path(uri).parents[1].name}__{Path(uri).parent.name}__{Path(uri).stem}": uri for uri in library}
    packed = zip(catalog.table.to_pylist(), read_videos(LOCAL, references(catalog.table)), strict=True)
    seen = set()
    for video, data in packed:
        uri = ids[video["video_id"]]
        assert data == library[uri].data
        assert video["label"] == LABELS[library[uri].base % len(LABELS)]
        seen.add(uri)
    assert seen == set(library) - set(broken)

    checkpoint = save_untrained(LOCAL, str(tmp_path / "checkpoint"), LABELS, CLIP, "tiny_models:mean_colour")
    counts = label(
        LabelConfig(
            allow_factory=OWN_NETWORKS,
            source=str(tmp_path / "library"),
            checkpoint=checkpoint,
            out=str(tmp_path / "labels"),
            resources=TWO,
        )
    )
    assert (counts["labelled"], counts["quarantined"], counts["skipped"]) == (NUM_VIDEOS - NUM_BROKEN, NUM_BROKEN, 0)
    assert counts["labelled"] + counts["quarantined"] + counts["skipped"] == counts["inputs"] == NUM_VIDEOS
    rows = read_predictions(LOCAL, counts["root"]).to_pylist()
    assert sorted(row["uri"] for row in rows) == sorted(library)
    expected = true_scores(bases)
    for row in rows:
        truth = library[row["uri"]]
        if truth.kind:
            _, error_class, words = BROKEN[truth.kind]
            assert (row["status"], row["error_class"]) == ("quarantined", error_class)
            assert words in row["error_text"]
            assert row["label_topk"] is None
            continue
        assert (row["status"], row["error_class"], row["error_text"]) == ("labelled", None, None)
        ranking = np.argsort(-expected[truth.base])
        assert row["id_topk"] == ranking.tolist()
        np.testing.assert_allclose(row["score_topk"], expected[truth.base][ranking], rtol=1e-5)
