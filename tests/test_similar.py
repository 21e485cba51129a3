"""`kinoray labels search`, `dedup` and `select`, on tables that were labelled, against plain Python over their rows."""

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from decode_reference import moving
from kinoray.catalog.table import Catalog, save_catalog
from kinoray.cli import main
from kinoray.config.shared import ClipConfig, SampleConfig, StorageConfig, ViewConfig, digest
from kinoray.demo.videos import make_video
from kinoray.errors import CatalogError, ConfigError
from kinoray.label.config import LabelConfig
from kinoray.label.keys import row_keys
from kinoray.label.ledger import Ledger, read_predictions
from kinoray.label.open import open_network
from kinoray.label.predict import Model
from kinoray.label.unit import PREDICTION_SCHEMA
from kinoray.library import selection, similar
from kinoray.library.config import CorrectConfig, DedupConfig, SearchConfig, SelectConfig
from kinoray.library.correct import correct
from kinoray.library.selection import select
from kinoray.library.similar import Vectors, dedup, most_similar, search
from kinoray.storage.objects import Storage, join
from label_models import save_untrained
from small_sets import LABELS, catalog_of
from small_tables import ROOT_NAME, job_record, label_library, ledger_in, library, planned, rows_for

Row = dict[str, Any]
WIDTH = 16


def commit(ledger: Ledger, catalog: Catalog, vectors: Sequence[Any], **columns: Sequence[Any]) -> None:
    """A finished labelling of videos v0000, v0001, ...: the vector (and other columns) of each that is labelled."""
    plan = planned(ledger, catalog.digest, row_keys(catalog.table), 8)
    done = ledger.committed()
    for unit in plan.units:
        if unit.unit_id in done:
            continue
        rows = rows_for(catalog, unit.keys).to_pylist()
        for row in rows:
            number = int(row["video_id"].lstrip("v"))
            if row["status"] == "labelled":
                row["embedding"] = vectors[number]
            row.update({name: values[number] for name, values in columns.items()})
        ledger.commit(unit, pa.Table.from_pylist(rows, schema=PREDICTION_SCHEMA), "run")
    ledger.finish(plan, ledger.check(plan, row_keys(catalog.table)))


def drawn(num_rows: int, seed: int = 0) -> list[list[float]]:
    rows: list[list[float]] = (np.random.default_rng(seed).normal(size=(num_rows, WIDTH)) + 0.5).tolist()
    return rows


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> str:
    """43 videos, of which 35 are labelled; one of those has zeros for an embedding."""
    folder = tmp_path_factory.mktemp("out")
    vectors = drawn(43)
    vectors[7] = [0.0] * WIDTH
    commit(ledger_in(Storage(), folder), library(43), vectors)
    return str(folder)


def embedded(out: str) -> list[Row]:
    """Rows with an embedding that is not zero, and that as float64 of length 1."""
    rows: list[Row] = read_predictions(Storage(), out).to_pylist()
    rows = [row for row in rows if row["embedding"] and any(row["embedding"])]
    for row in rows:
        wide = np.array(row["embedding"], np.float64)
        row["unit"] = wide / np.linalg.norm(wide)
    return rows


def written(run: Callable[[Any], Row], config: Any, to: Path) -> list[Row]:
    """What it writes as JSON lines."""
    run(replace(config, format="jsonl", to=str(to)))
    return [json.loads(line) for line in to.read_text().splitlines()]


# Search


@pytest.mark.parametrize("by", ["video_id", "row_key"])
@pytest.mark.parametrize("cached", [False, True])
def test_search_finds_what_every_comparison_finds(
    out: str, tmp_path: Path, by: str, cached: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = embedded(out)
    asked = rows[11]
    others = [row for row in rows if row is not asked]
    others.sort(key=lambda row: -float(row["unit"] @ asked["unit"]))
    config = SearchConfig(predictions=out, like=asked[by], limit=9, cache=str(tmp_path / "cache") if cached else "")
    for _ in range(2):
        found = written(search, config, tmp_path / "found")
        assert [row["video_id"] for row in found] == [row["video_id"] for row in others[:9]]
        for row, other in zip(found, others, strict=False):
            assert row["similarity"] == pytest.approx(float(other["unit"] @ asked["unit"]), abs=1e-6)
            assert (row["row_key"], row["uri"]) == (other["row_key"], other["uri"])
    assert "labels search: 9 of 34 embeddings, the nearest first; 9 rows have no embedding" in capsys.readouterr().out


def test_a_cache_is_read_in_place_of_the_parts_until_there_are_other_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = ledger_in(Storage(), tmp_path / "out")
    commit(ledger, library(20), drawn(60))
    config = SearchConfig(predictions=str(tmp_path / "out"), like="v0002", limit=100, cache=str(tmp_path / "cache"))
    first = search(config)
    with monkeypatch.context() as patch:
        patch.setattr("kinoray.library.similar.scan", None)  # the parts cannot be read
        assert search(config) == first
    commit(ledger, library(60), drawn(60))
    assert search(config)["compared"] == 48 > first["compared"]
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:1000])  # a disk that was full
    assert search(config)["compared"] == 48
    assert list((tmp_path / "cache").iterdir()) == [file]


def test_a_part_that_was_labelled_again_makes_the_cache_anew(tmp_path: Path) -> None:
    """As an error about a damaged part asks for: its unit has the same id, and other rows."""
    ledger = ledger_in(Storage(), tmp_path / "out")
    commit(ledger, library(8), [None] * 4 + drawn(8)[4:])
    config = SearchConfig(predictions=str(tmp_path / "out"), like="v0005", limit=100, cache=str(tmp_path / "cache"))
    assert search(config)["compared"] == 3
    for part in Path(ledger.root, "parts").iterdir():
        part.unlink()
    commit(ledger, library(8), drawn(8))
    assert search(config)["compared"] == 7


def test_a_cache_that_is_replaced_stays_the_table_that_was_opened(tmp_path: Path) -> None:
    """Two commands share it, and the second sees newer rows: no row may get the embedding of another."""
    ledger = ledger_in(Storage(), tmp_path / "out")
    commit(ledger, library(20), drawn(60))
    vectors = Vectors(Storage(), str(tmp_path / "out"), str(tmp_path / "cache"))
    rows, vectors_ND = vectors.whole()
    commit(ledger, library(60), drawn(60, seed=1))
    assert len(Vectors(Storage(), str(tmp_path / "out"), str(tmp_path / "cache")).whole()[0]) > len(rows)
    assert vectors.whole()[0] == rows
    row_key, vector_D = vectors.find("v0013") or ("", np.empty(0))
    place = rows["video_id"].to_pylist().index("v0013")
    assert rows["row_key"][place].as_py() == row_key
    assert (vector_D == vectors_ND[place]).all()


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    commit(ledger_in(Storage(), tmp_path / "out"), library(9), drawn(9))
    (tmp_path / "file").write_text("mine")
    config = SearchConfig(predictions=str(tmp_path / "out"), like="v0001", cache=str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"cache: .*/file cannot be used \(File exists\); name another folder"):
        search(config)
    left = tmp_path / "cache" / f"{digest([str(tmp_path / 'out' / ROOT_NAME)])}.4711.tmp"
    left.parent.mkdir()
    left.touch()
    os.utime(left, (1, 1))  # of a command that was killed long ago
    search(replace(config, cache=str(left.parent)))
    assert not left.exists()


def test_duplicates_are_found_while_a_job_commits_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = ledger_in(Storage(), tmp_path / "out")
    commit(ledger, library(8), drawn(60))
    vectors = Vectors(Storage(), str(tmp_path / "out"))
    read = similar.shown_units

    def and_more(ledger: Ledger) -> Any:
        counted = read(ledger)
        commit(ledger, library(60), drawn(60))
        return counted

    monkeypatch.setattr(similar, "shown_units", and_more)
    rows, vectors_ND = vectors.whole()
    expected = {row["video_id"]: row["embedding"] for row in embedded(str(tmp_path / "out"))}
    assert rows["video_id"].to_pylist() == list(expected)
    assert (vectors_ND == np.array(list(expected.values()), np.float16)).all()


def test_two_labellings_share_a_folder_of_caches(tmp_path: Path) -> None:
    for name in ("one", "other"):
        commit(ledger_in(Storage(), tmp_path / name), library(10), drawn(10, seed=len(name)))
    found = []
    for _ in range(2):
        for name in ("one", "other"):
            config = SearchConfig(predictions=str(tmp_path / name), like="v0000", cache=str(tmp_path / "cache"))
            found.append(written(search, config, tmp_path / "found"))
    assert found[0] == found[2] != found[1] == found[3]
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("cached", [False, True])
def test_videos_of_one_id_are_told_apart_by_row_key(tmp_path: Path, cached: bool) -> None:
    """Two folders were labelled into one table; ids are unique in each."""
    ledger = ledger_in(Storage(), tmp_path / "out")
    commit(ledger, library(8), drawn(16))
    commit(ledger, library(8, uri="s3://other"), drawn(16)[8:])
    rows = [row for row in embedded(str(tmp_path / "out")) if row["video_id"] == "v0002"]
    config = SearchConfig(predictions=str(tmp_path / "out"), like="v0002", cache=str(tmp_path / "c") if cached else "")
    named = ", ".join(rf"{row['row_key']} \({row['uri']}\)" for row in rows)
    with pytest.raises(
        ConfigError, match=f"2 videos of .* have the video_id 'v0002': {named}; name one by its row_key"
    ):
        search(config)
    nearest = [search(replace(config, like=row["row_key"]))["rows"] for row in rows]
    assert nearest[0] != nearest[1]


def test_a_vector_of_any_origin_can_be_asked_for(out: str) -> None:
    rows = embedded(out)
    query = np.random.default_rng(8).normal(size=WIDTH).astype(np.float32)
    found = most_similar(Vectors(Storage(), out), query, 3)
    wide = query.astype(np.float64) / np.linalg.norm(query.astype(np.float64))
    rows.sort(key=lambda row: -float(row["unit"] @ wide))
    assert found["video_id"].to_pylist() == [row["video_id"] for row in rows[:3]]
    with pytest.raises(ConfigError, match=rf"like: its embedding has 3 numbers, and those of .* have {WIDTH}"):
        most_similar(Vectors(Storage(), out), query[:3], 3)


def test_search_from_the_command_line(out: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["labels", "search", out, "--like", "v0003", "--limit", "2"]) == 0
    head, *lines, last = capsys.readouterr().out.splitlines()
    assert head.split() == ["SIMILARITY", "VIDEO_ID", "LABEL", "SCORE", "MARGIN"]
    assert len(lines) == 2
    assert last == "labels search: 2 of 34 embeddings, the nearest first; 9 rows have no embedding"
    assert main(["labels", "search", out, "--like", "v0003", "--format", "csv"]) == 0
    printed = capsys.readouterr()
    assert len(list(csv.DictReader(io.StringIO(printed.out)))) == 10
    assert printed.err.startswith("labels search: 10 of 34")
    assert main(["labels", "search", out, "--like", "nobody.mp4"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("kinoray labels search: ConfigError: like: ")
    assert "has no video 'nobody.mp4' with an embedding (by video_id or row_key), and no such file is there" in error


def test_embeddings_that_are_not_there_are_asked_for(tmp_path: Path) -> None:
    label_library(ledger_in(Storage(), tmp_path), library(9))
    for run, config in (
        (search, SearchConfig(predictions=str(tmp_path), like="v0001")),
        (dedup, DedupConfig(predictions=str(tmp_path))),
        (select, SelectConfig(predictions=str(tmp_path), budget=3, out=str(tmp_path / "next.csv"))),
    ):
        with pytest.raises(ConfigError, match=r"no row of .* has an embedding; label with --embeddings"):
            run(config)  # type: ignore[operator]


def test_a_table_without_an_answer_is_not_told_to_ask_for_embeddings(tmp_path: Path) -> None:
    ledger = Ledger(Storage(), join(str(tmp_path / "out"), ROOT_NAME))
    ledger.pin_job(job_record(settings={"scorer": {"embeddings": True}}))
    commit(ledger, library(3), drawn(3), status=["quarantined"] * 3, embedding=[None] * 3)
    with pytest.raises(ConfigError, match="has an embedding; none of its 3 rows is of a video that was labelled"):
        dedup(DedupConfig(predictions=str(tmp_path / "out")))


def test_embeddings_of_two_lengths_are_refused(tmp_path: Path) -> None:
    vectors = drawn(20)
    vectors[12] = vectors[12][:-1]
    commit(ledger_in(Storage(), tmp_path), library(20), vectors)
    with pytest.raises(CatalogError, match=f"embeddings of {WIDTH - 1} and of {WIDTH} numbers are in one table"):
        dedup(DedupConfig(predictions=str(tmp_path)))


# Search by a file, and copies that were encoded again

CLIP = ClipConfig(sample=SampleConfig(num_segments=2, frames_per_segment=2), view=ViewConfig(resize_px=40, crop_px=32))


def encoded_again(frames: np.ndarray, crf: int, scale: float, every: int) -> bytes:
    """The frames as H.264, scaled and with only every so many of them."""
    small = [cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) for frame in frames[::every]]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8 // every)
        stream.height, stream.width = (side // 2 * 2 for side in small[0].shape[:2])
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": str(crf)}
        for frame in small:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[: stream.height, : stream.width]), "rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return buffer.getvalue()


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder of 8 videos and two copies of each, and their labelling: five views each, by an untrained network."""
    folder = tmp_path_factory.mktemp("seen")
    storage = Storage(StorageConfig())
    options = {"backbone": "tiny", "consensus": "probs", "scale": "dim"}
    checkpoint = save_untrained(storage, str(folder / "run"), LABELS, CLIP, "vcm_sdd", **options)
    names = []
    for number in range(8):
        frames = moving(24, 96, 128, number)
        names += [f"v{number:04d}", f"v{number + 8:04d}", f"v{number + 16:04d}"]
        (folder / f"v{number:04d}.mp4").write_bytes(make_video(frames))
        (folder / f"v{number + 8:04d}.mp4").write_bytes(encoded_again(frames, 33, 0.75, 1))
        (folder / f"v{number + 16:04d}.mp4").write_bytes(encoded_again(frames, 26, 1.0, 2))
    paths = [folder / f"{name}.mp4" for name in sorted(names)]
    config = LabelConfig(source="", checkpoint=checkpoint, embeddings=True, protocol="5x1")
    record = open_network(config, say=print, warn=print).record
    with Model(config) as model:
        answers = model.predict(paths)
    catalog = catalog_of([{"video_id": path.stem, "uri": str(path)} for path in paths])
    ledger = Ledger(storage, join(str(folder / "out"), "0123456789abcdef"))
    ledger.pin_job(record)
    plan = planned(ledger, catalog.digest, row_keys(catalog.table), 30)
    rows = rows_for(catalog, plan.units[0].keys).to_pylist()
    for row, answer in zip(rows, answers, strict=True):
        assert answer.embedding is not None
        row.update(status="labelled", error_class=None, error_text=None, embedding=answer.embedding.tolist())
        row.update(label_topk=["red"], id_topk=[2], score_topk=[0.5], margin=0.5, entropy=0.5)
    ledger.commit(plan.units[0], pa.Table.from_pylist(rows, schema=PREDICTION_SCHEMA), "run")
    ledger.finish(plan, ledger.check(plan, row_keys(catalog.table)))
    return folder, str(folder / "out")


def test_a_file_is_seen_as_the_labelling_saw_the_others(seen: tuple[Path, str], tmp_path: Path) -> None:
    folder, out = seen
    (tmp_path / "other.mp4").write_bytes((folder / "v0003.mp4").read_bytes())
    found = written(search, SearchConfig(predictions=out, like=str(tmp_path / "other.mp4")), tmp_path / "found")
    assert (found[0]["video_id"], found[0]["similarity"]) == ("v0003", pytest.approx(1, abs=1e-6))
    by_id = written(search, SearchConfig(predictions=out, like="v0003", limit=9), tmp_path / "found")
    assert found[1:] == by_id  # the same digits, so the same five views


def test_copies_that_were_encoded_again_are_the_nearest(seen: tuple[Path, str]) -> None:
    _, out = seen
    for number in range(8):
        copies = {f"v{number + 8:04d}", f"v{number + 16:04d}"}
        assert set(search(SearchConfig(predictions=out, like=f"v{number:04d}", limit=2))["rows"]) == copies


def test_a_file_is_refused_by_another_network_and_where_it_is_no_video(seen: tuple[Path, str], tmp_path: Path) -> None:
    folder, out = seen
    (tmp_path / "no.mp4").write_bytes(b"no video at all")
    with pytest.raises(ConfigError, match=r"like: .*no.mp4 gives no embedding: "):
        search(SearchConfig(predictions=out, like=str(tmp_path / "no.mp4")))
    other = save_untrained(Storage(), str(tmp_path / "run"), LABELS, CLIP, "vcm_sdd", backbone="tiny", heads=2)
    with pytest.raises(ConfigError, match="is not the network that labelled these videos"):
        search(SearchConfig(predictions=out, like=str(folder / "v0003.mp4"), checkpoint=other))


# Duplicates


def near(vector: Sequence[float], seed: int) -> list[float]:
    """A copy of it, with a similarity of about 0.999."""
    noise = np.random.default_rng(seed).normal(size=WIDTH)
    moved = np.array(vector) + 0.04 * np.linalg.norm(vector) * noise / np.linalg.norm(noise)
    return [float(number) for number in moved]


COPIES = {1: 0, 12: 0, 33: 0, 21: 10, 40: 35, 4: 3}
"""Of which video each is a copy; 4 is quarantined, so nobody knows."""


@pytest.fixture(scope="module")
def doubled(tmp_path_factory: pytest.TempPathFactory) -> str:
    """43 videos, three of which have copies."""
    folder = tmp_path_factory.mktemp("doubled")
    vectors = drawn(43)
    for copy, original in COPIES.items():
        vectors[copy] = near(vectors[original], copy)
    damaged = [int(number == 10) for number in range(43)]
    commit(ledger_in(Storage(), folder), library(43), vectors, frames_corrupt=damaged)
    return str(folder)


def test_groups_of_copies_are_found_and_the_first_sound_one_is_kept(
    doubled: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = written(dedup, DedupConfig(predictions=doubled), tmp_path / "found")
    assert [(row["group"], row["keep"], row["video_id"]) for row in found] == [
        *((1, True, "v0000"), (1, False, "v0001"), (1, False, "v0012"), (1, False, "v0033")),
        *((2, True, "v0021"), (2, False, "v0010")),  # which has damaged frames
        *((3, True, "v0035"), (3, False, "v0040")),
    ]
    rows = {row["video_id"]: row["unit"] for row in embedded(doubled)}
    kept = {row["group"]: row["video_id"] for row in found if row["keep"]}
    for row in found:
        expected = float(rows[row["video_id"]] @ rows[kept[row["group"]]])
        assert row["similarity"] == pytest.approx(expected, abs=1e-6)
    said = "labels dedup: 3 groups with 8 of 35 videos, 5 of them to spare; 8 rows have no embedding"
    printed = capsys.readouterr().out
    assert said in printed
    assert "the first undamaged of each in the table is kept: --join the library" in printed
    assert dedup(DedupConfig(predictions=doubled, threshold=1.0))["groups"] == 0
    assert "8 rows have no embedding; a --threshold below 1 finds copies that are less alike" in capsys.readouterr().out


def joinable(folder: Path, rows: Sequence[Row]) -> str:
    """A catalog of the 43 videos with what is known of them; of the others nothing."""
    known = {row["video_id"]: row for row in rows}
    names = [f"v{number:04d}" for number in range(43)]
    catalog = catalog_of([{"video_id": name, "uri": f"s3://x/{name}", **known.get(name, {})} for name in names])
    save_catalog(Storage(), str(folder / "set.parquet"), catalog)
    return str(folder / "set.parquet")


@pytest.mark.parametrize(
    ("known", "kept"),
    [
        ({"v0001": {"duration_s": 9.0}, "v0012": {"duration_s": 10.0}, "v0033": {"duration_s": 9.9}}, "v0012"),
        ({"v0001": {"width": 320, "height": 240}, "v0012": {"width": 640, "height": 480}}, "v0012"),
        (
            {
                "v0001": {"duration_s": 5.0, "width": 1920, "height": 1080},
                "v0012": {"duration_s": 10.0, "width": 320, "height": 240},
                "v0033": {"duration_s": 9.9, "width": 640, "height": 480},
            },
            "v0033",
        ),
        ({"v0001": {"size_bytes": 100}, "v0033": {"size_bytes": 300}}, "v0033"),
        ({}, "v0000"),
    ],
)
def test_the_longest_then_the_largest_is_kept(doubled: str, tmp_path: Path, known: dict[str, Row], kept: str) -> None:
    join_with = joinable(tmp_path, [{"video_id": name, **values} for name, values in known.items()])
    found = written(dedup, DedupConfig(predictions=doubled, join=join_with), tmp_path / "found")
    assert [row["video_id"] for row in found if row["group"] == 1 and row["keep"]] == [kept]
    assert Counter(row["group"] for row in found) == {1: 4, 2: 2, 3: 2}


def test_what_is_in_train_and_in_val_is_found(doubled: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    val = {"v0012", "v0040"}
    rows = [{"video_id": f"v{number:04d}", "split": "train"} for number in range(43) if number != 33]
    rows = [{**row, "split": "val"} if row["video_id"] in val else row for row in rows]
    join_with = joinable(tmp_path, rows)
    config = DedupConfig(predictions=doubled, join=join_with, across="catalog_split")
    found = written(dedup, config, tmp_path / "found")
    assert {(row["video_id"], row["catalog_split"]) for row in found} == {
        *(("v0000", "train"), ("v0001", "train"), ("v0012", "val"), ("v0033", None)),
        *(("v0035", "train"), ("v0040", "val")),
    }
    assert sorted({row["group"] for row in found}) == [1, 2]
    assert main(["labels", "dedup", doubled, "--join", join_with, "--across", "catalog_split"]) == 0
    printed = capsys.readouterr().out
    assert "CATALOG_SPLIT" in printed
    assert "labels dedup: 2 groups across catalog_split with 6 of 35 videos, 4 of them to spare" in printed
    assert "; the first undamaged of each in the table is kept\n" in printed  # the catalog says no size


def test_duplicates_that_are_not_in_the_catalog_are_counted(
    doubled: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"v{number:04d}" for number in range(43) if number not in (12, 40)]
    known = catalog_of([{"video_id": name, "uri": f"s3://x/{name}", "split": "train"} for name in names])
    save_catalog(Storage(), str(tmp_path / "set.parquet"), known)
    config = DedupConfig(predictions=doubled, join=str(tmp_path / "set.parquet"), across="catalog_split")
    assert dedup(config)["groups"] == 0
    said = f"; of 8 duplicates 2 have no video in {tmp_path}/set.parquet"
    assert capsys.readouterr().out.rstrip().endswith(said)


def test_a_wrong_column_or_catalog_is_refused(doubled: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="join must be the catalog that has catalog_split, with --across"):
        DedupConfig(predictions=doubled, across="catalog_split")
    with pytest.raises(ConfigError, match=r"across: there is no column 'split'; there are video_id, label, "):
        dedup(DedupConfig(predictions=doubled, across="split"))
    other = catalog_of([{"video_id": "other", "uri": "s3://x/other"}])
    save_catalog(Storage(), str(tmp_path / "other.parquet"), other)
    with pytest.raises(CatalogError, match="none of the 8 videos is in"):
        dedup(DedupConfig(predictions=doubled, join=str(tmp_path / "other.parquet")))


def test_duplicates_as_a_table_and_as_parquet(doubled: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["labels", "dedup", doubled, "--cache", str(tmp_path / "cache")]) == 0
    head, *lines, last = capsys.readouterr().out.splitlines()
    assert head.split() == ["GROUP", "KEEP", "SIMILARITY", "VIDEO_ID", "LABEL"]
    assert (len(lines), last.partition(":")[0]) == (8, "labels dedup")
    path = str(tmp_path / "found.parquet")
    assert main(["labels", "dedup", doubled, "--format", "parquet", "--to", path]) == 0
    assert pq.read_table(path)["keep"].to_pylist().count(True) == 3
    assert main(["labels", "dedup", doubled, "--to", path]) == 2
    assert "format must be given with --to, such as --format parquet" in capsys.readouterr().err


# What to label next


def chosen(config: SelectConfig) -> list[Row]:
    """The lines that it writes."""
    select(config)
    return list(csv.DictReader(io.StringIO(Path(config.out).read_text(encoding="utf-8"))))


def test_what_is_chosen_is_doubtful_far_apart_and_not_chosen_again(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "_POOL", 3)
    monkeypatch.setattr(selection, "_DROP_ROWS", 2)  # so that it drops rows many times
    rows = {row["row_key"]: row for row in embedded(out)}
    config = SelectConfig(predictions=out, budget=5, out=str(tmp_path / "next.csv"))
    seen: list[str] = []
    for _ in range(2):
        left = sorted((key for key in rows if key not in seen), key=lambda key: rows[key]["margin"])[:15]
        expected: list[str] = []
        for _ in range(5):
            near_to = [rows[key]["unit"] for key in [*seen, *expected]]
            wanted = {
                key: (1 - rows[key]["margin"]) * (1 - max((rows[key]["unit"] @ other for other in near_to), default=-1))
                for key in left
                if key not in expected
            }
            expected.append(max(wanted, key=lambda key: wanted[key]))
        lines = chosen(replace(config, corrections=(str(tmp_path / "seen.csv"),) if seen else ()))
        assert [line["row_key"] for line in lines] == expected
        assert all(not line["label"] and line["predicted"] and line["uri"] for line in lines)
        seen += expected
        (tmp_path / "seen.csv").write_text("row_key,label\n" + "".join(f"{key},red\n" for key in seen))
    (tmp_path / "seen.csv").write_text("row_key,label\n" + "".join(f"{key},red\n" for key in rows))
    with pytest.raises(CatalogError, match="no labelled video with an embedding that is not corrected yet"):
        select(replace(config, corrections=(str(tmp_path / "seen.csv"),)))


@pytest.mark.parametrize(
    ("counts", "budget", "shares"),
    [
        ({"a": 50, "b": 50, "c": 50}, 9, {"a": 3, "b": 3, "c": 3}),
        ({"a": 50, "b": 50, "c": 50}, 10, {"a": 4, "b": 3, "c": 3}),
        ({"a": 50, "b": 1, "c": 50}, 9, {"a": 4, "b": 1, "c": 4}),
        ({"a": 50, "b": 1, "c": 2}, 2, {"b": 1, "c": 1}),
        ({"a": 2, "b": 1}, 9, {"a": 2, "b": 1}),
        ({}, 9, {}),
    ],
)
def test_a_budget_is_shared_among_classes(counts: dict[str, int], budget: int, shares: dict[str, int]) -> None:
    assert selection._shares(counts, budget) == shares


def test_a_stratified_choice_has_each_class_that_is_named(out: str, tmp_path: Path) -> None:
    config = SelectConfig(predictions=out, budget=12, out=str(tmp_path / "next.csv"), stratified=True)
    assert Counter(line["predicted"] for line in chosen(config)) == {"red": 4, "green": 4, "blue": 4}
    everything = chosen(replace(config, budget=1000, cache=str(tmp_path / "cache")))
    assert {line["row_key"] for line in everything} == {row["row_key"] for row in embedded(out)}


def test_lines_that_were_filled_in_are_corrections(out: str, tmp_path: Path) -> None:
    path = tmp_path / "next.csv"
    lines = chosen(SelectConfig(predictions=out, budget=4, out=str(path)))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows({**line, "label": "blue"} for line in lines)
    totals = correct(CorrectConfig(predictions=out, corrections=(str(path),), out=str(tmp_path / "set")))
    assert totals["corrected"] == 4


def test_a_file_that_somebody_filled_in_is_not_written_over(out: str, tmp_path: Path) -> None:
    path = tmp_path / "next.csv"
    config = SelectConfig(predictions=out, budget=4, out=str(path))
    path.touch()
    assert chosen(config) == chosen(config)
    text = path.read_text()
    for filled, problem in (
        (text.replace(",,", ",blue,", 1), "has 1 label that somebody filled in"),
        (text.replace(",,", ",blue,").replace(",", ";"), "has 4 labels that somebody filled in"),
        ("notes of mine", "is there, and is no list of this verb's"),
        (text.replace(",label,", ",class,"), "is there, and is no list of this verb's"),
    ):
        path.write_text(filled)
        with pytest.raises(ConfigError, match=f"out: {path} {problem}: choose another name"):
            select(replace(config, corrections=(str(path),)))
        assert path.read_text() == filled
    path.write_bytes(text.replace(",,", ",bl\xe4u,", 1).encode("latin-1"))
    with pytest.raises(ConfigError, match="is no list of this verb's"):
        select(config)


def test_corrections_of_other_videos_are_said(out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "seen.csv").write_text("\ufeffrow_key,label\r\nk0123456789abcdef,red\r\n", "utf-8")
    config = SelectConfig(
        predictions=out, budget=4, out=str(tmp_path / "next.csv"), corrections=(str(tmp_path / "seen.csv"),)
    )
    with pytest.raises(CatalogError, match=r"corrections: none of 1 row_key in .*seen.csv is of a video of .* with an"):
        select(config)
    assert not Path(config.out).exists()
    key = embedded(out)[0]["row_key"]
    (tmp_path / "seen.csv").write_text(f"row_key,label\nk0123456789abcdef,red\n{key},red\n")
    assert key not in {line["row_key"] for line in chosen(config)}
    assert "9 rows have no embedding; 1 correction of no such video; fill in" in capsys.readouterr().out


def test_a_file_without_row_keys_is_refused(out: str, tmp_path: Path) -> None:
    (tmp_path / "seen.csv").write_text("video,label\nv0001,red\n")
    config = SelectConfig(
        predictions=out, budget=4, out=str(tmp_path / "next.csv"), corrections=(str(tmp_path / "seen.csv"),)
    )
    with pytest.raises(CatalogError, match="there is no column row_key; expected a CSV of corrections"):
        select(config)
