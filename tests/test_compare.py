"""Ensembles and comparisons of evaluations, against plain loops; what does not fit together is refused by name."""

import json
import re
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml

from conftest import bucket_at, config_at
from decode_reference import moving
from kinoray.catalog.table import Catalog, catalog_of_source, save_catalog
from kinoray.cli import main
from kinoray.config.shared import StorageConfig, digest
from kinoray.demo.videos import make_video
from kinoray.errors import CatalogError, CheckpointMismatch, ConfigError, KinorayError, ObjectNotFound
from kinoray.evaluation.compare import Paired, compare
from kinoray.evaluation.config import CompareConfig, EvaluateConfig
from kinoray.evaluation.record import (
    ANSWER_COLUMNS,
    EvaluationRecord,
    Origin,
    evaluation_record,
    join_answers,
    print_evaluation,
    read_evaluation,
    true_classes,
    write_evaluation,
)
from kinoray.evaluation.verb import evaluate
from kinoray.label.keys import row_keys
from kinoray.label.ledger import Ledger, read_predictions
from kinoray.label.unit import PREDICTION_SCHEMA, labelling_id
from kinoray.library.config import ReportConfig
from kinoray.library.report import report
from kinoray.storage.objects import Storage, join
from small_sets import save_as_pack
from small_tables import job_record, planned

LOCAL = Storage(StorageConfig())
LABELS = ("ant", "bee", "cat", "dog", "<i>eel</i>", "fly")


@dataclass
class Made:
    """An evaluation written for a test, and what it was made of."""

    uri: str
    labels: tuple[str, ...]
    truth: dict[str, str]
    scores: dict[str, np.ndarray]
    """float32 [C] of each video that was scored."""

    def best(self, video_id: str) -> str:
        return self.labels[int(np.argmax(self.scores[video_id]))]

    def right(self, video_id: str) -> bool:
        return self.best(video_id) == self.truth[video_id]


def catalog_at(
    folder: str,
    num: int,
    *,
    storage: Storage = LOCAL,
    first: int = 0,
    labels: tuple[str, ...] = LABELS,
    num_train: int = 0,
) -> str:
    """A catalog of num videos v000, v001, ... that need not be there, the last ones for training; returns where."""
    splits = ["val"] * (num - num_train) + ["train"] * num_train
    rows = [
        f"v{n:03d}.mp4,{labels[(5 * n + n // 4) % len(labels)]},{split}" for n, split in enumerate(splits, start=first)
    ]
    storage.put(join(folder, "list.csv"), "\n".join(["path,label,split", *rows]).encode())
    catalog = catalog_of_source(storage, join(folder, "list.csv"))
    save_as_pack(storage, folder, catalog)
    return folder


def evaluated(
    out: str,
    source: str,
    seed: int,
    *,
    labels: tuple[str, ...] = LABELS,
    skill: float = 1.0,
    quarantined: tuple[str, ...] = (),
    all_scores: bool = True,
    storage: Storage = LOCAL,
    split: str = "val",
) -> Made:
    """What `evaluate` leaves behind for a model of this skill whose scores are drawn from the seed."""
    catalog: Catalog = catalog_of_source(storage, source).select(split)
    rng = np.random.default_rng(seed)
    about = {"model_digest": digest(f"model {seed}"), "config_digest": digest(f"config {all_scores}")}
    root = join(out, labelling_id(about["model_digest"], about["config_digest"]))
    ledger = Ledger(storage, root)
    ledger.pin_job(job_record(**about, labels=tuple(labels), checkpoint=f"run-{seed}"))
    plan = planned(ledger, catalog.digest, row_keys(catalog.table), 16)
    truth = dict(zip(catalog.table["video_id"].to_pylist(), catalog.table["label"].to_pylist(), strict=True))
    scores: dict[str, np.ndarray] = {}
    records = []
    for key, row in zip(row_keys(catalog.table), catalog.table.to_pylist(), strict=True):
        logits = rng.normal(size=len(labels))
        logits[labels.index(row["label"])] += skill
        p = (np.exp(logits) / np.exp(logits).sum()).astype(np.float32)
        record = {name: row[name] for name in ("video_id", "uri", "offset", "length")}
        record |= {
            "row_key": key,
            "abstained": False,
            "run_id": "r",
            "views": 1,
            "windows": 1,
            "segments_run": 1,
            "frames_decoded": 8,
            **about,
        }
        record |= {"frames_corrupt": 0, "frames_missing": 0, "status": "labelled"}
        if row["video_id"] in quarantined:
            record |= {"status": "quarantined", "error_class": "EmptyMedia", "error_text": "no bytes"}
        else:
            order = np.argsort(-p, kind="stable")[:5].tolist()
            record |= {"id_topk": order, "label_topk": [labels[n] for n in order], "score_topk": p[order]}
            record |= {"scores": p if all_scores else None, "margin": 0.0, "entropy": 0.0}
            scores[row["video_id"]] = p
        records.append(record)
    for place, unit in enumerate(plan.units):
        ledger.commit(unit, pa.Table.from_pylist(records[16 * place : 16 * place + 16], PREDICTION_SCHEMA), "r")
    ledger.finish(plan, ledger.check(plan, row_keys(catalog.table)))
    predictions = pa.concat_tables(ledger.read_units(plan.units, list(ANSWER_COLUMNS)))
    answers = join_answers(catalog, true_classes(catalog, labels), predictions, len(labels))
    origin = Origin(
        **about,
        catalog=source,
        split=split,
        catalog_digest=catalog.digest,
        predictions=root,
        checkpoint=f"run-{seed}",
    )
    write_evaluation(storage, out, evaluation_record(answers, labels, origin))
    return Made(uri=out, labels=labels, truth=truth, scores=scores)


def stored(storage: Storage, out: str) -> EvaluationRecord:
    """What evaluation.json holds."""
    uri = join(out, "evaluation.json")
    return EvaluationRecord.from_json(storage.read(uri), uri)


# Ensembles


def test_an_ensemble_is_the_weighted_mean_of_the_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second member numbers the classes otherwise, and could not read what the first could."""
    source = catalog_at(str(tmp_path / "set"), 40)
    one = evaluated(str(tmp_path / "one"), source, 1, quarantined=("v003",))
    two = evaluated(str(tmp_path / "two"), source, 2, labels=LABELS[::-1], quarantined=("v005", "v003"))
    config = EvaluateConfig(catalog=source, ensemble=(one.uri, two.uri), weights=(1.0, 3.0), out=str(tmp_path / "both"))
    record = evaluate(config)

    readable = sorted(one.scores.keys() & two.scores.keys())
    assert len(readable) == 38
    expected = {
        name: (one.scores[name].astype(float) + 3 * two.scores[name][::-1].astype(float)) / 4 for name in readable
    }
    rows = {row["video_id"]: row for row in read_predictions(LOCAL, config.out).to_pylist()}
    assert len(rows) == 40
    for name in readable:
        row, ranking = rows[name], np.argsort(-expected[name])
        np.testing.assert_allclose(row["scores"], expected[name], rtol=1e-6)
        assert row["id_topk"] == ranking[:5].tolist()
        assert row["label_topk"] == [LABELS[index] for index in ranking[:5]]
        assert row["score_topk"] == [row["scores"][index] for index in ranking[:5]]
        assert row["margin"] == pytest.approx(expected[name][ranking[0]] - expected[name][ranking[1]], abs=1e-6)
        assert row["entropy"] == pytest.approx(-(expected[name] * np.log(expected[name])).sum(), abs=1e-6)
        assert row["views"] == 2
    assert (rows["v005"]["status"], rows["v005"]["error_class"], rows["v005"]["views"]) == (
        "quarantined",
        "EmptyMedia",
        0,
    )
    assert rows["v005"]["error_text"] == f"in {two.uri}: no bytes"
    right = sum(LABELS[int(np.argmax(expected[name]))] == one.truth[name] for name in readable)
    scores = record.scores
    assert (scores.top1, scores.evaluated, scores.quarantined) == (right / 38, 38, 2)
    assert (scores.top1_of_all, scores.coverage) == (right / 40, 38 / 40)
    assert record.origin.members == (one.uri, two.uri)
    said = capsys.readouterr().out
    assert "40 videos = 38 evaluated + 2 quarantined + 0 missing (coverage 95.0%)" in said

    assert evaluate(config) == record  # again: nothing is written twice
    assert len(list(tmp_path.glob("both/*/parts/*"))) == 1
    assert stored(LOCAL, config.out) == record
    written = json.loads((tmp_path / "both" / "evaluation.json").read_text())
    assert (written["top1"], written["members"], written["views"]) == (right / 38, [one.uri, two.uri], 2)
    assert "checkpoint" not in written
    nested = evaluate(EvaluateConfig(catalog=source, ensemble=(config.out, one.uri), out=str(tmp_path / "nested")))
    assert (nested.scores.evaluated, nested.origin.views) == (38, 3)
    totals = report(ReportConfig(predictions=config.out, catalog=source, out=str(tmp_path / "page"), max_strips=0))
    assert totals["top1"] == scores.top1
    page = (tmp_path / "page" / "index.html").read_text()
    assert f"Calibration error (ECE) {record.calibration.ece:.1%}" in page
    assert page.count('<circle class="right"') == sum(row.videos > 0 for row in record.calibration.bins)


def test_members_that_do_not_fit_are_named(tmp_path: Path) -> None:
    source = catalog_at(str(tmp_path / "set"), 29, num_train=9)
    one = evaluated(str(tmp_path / "one"), source, 1)

    def refusal(other: Made, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            evaluate(EvaluateConfig(catalog=source, ensemble=(one.uri, other.uri), out=str(tmp_path / "both")))
        assert not (tmp_path / "both").exists()

    classes = evaluated(str(tmp_path / "classes"), source, 2, labels=(*LABELS[:-1], "yak", "fly", "zebu"))
    refusal(classes, CheckpointMismatch, r"their classes differ: only the second has yak, zebu;")
    message = r"their videos differ: only the second has v020, v021, .*, v024 and 4 more; evaluate both on one split"
    refusal(evaluated(str(tmp_path / "videos"), source, 2, split=""), CatalogError, message)
    more = catalog_at(str(tmp_path / "more"), 28, first=2)
    message = r"elsewhere was made with another catalog \(.*\) than .*set holds now"
    refusal(evaluated(str(tmp_path / "elsewhere"), more, 2), CatalogError, message)
    few = evaluated(str(tmp_path / "few"), source, 3, all_scores=False)
    refusal(few, ConfigError, r"few does not hold the scores of all 6 classes, .* evaluate it again")
    turned = catalog_at(str(tmp_path / "turned"), 29, num_train=9, labels=LABELS[::-1])
    refusal(evaluated(str(tmp_path / "truth"), turned, 4), CatalogError, "truth was made with another catalog")
    with pytest.raises(ConfigError, match=r"weights must be 2 numbers, one for each evaluation, got \(1.0,\)"):
        EvaluateConfig(catalog=source, ensemble=("a", "b"), weights=(1.0,), out="c")
    with pytest.raises(ConfigError, match="ensemble must be two evaluations or more"):
        EvaluateConfig(catalog=source, ensemble=("a",), out="c")


def test_an_evaluation_that_is_gone_changed_or_moved_is_told(tmp_path: Path) -> None:
    source = catalog_at(str(tmp_path / "set"), 20)
    one, two = evaluated(str(tmp_path / "one"), source, 1), evaluated(str(tmp_path / "two"), source, 2)
    config = EvaluateConfig(catalog=source, ensemble=(one.uri, two.uri), out=str(tmp_path / "both"))
    with pytest.raises(ObjectNotFound, match=r"nothing/evaluation.json; expected the --out of `kinoray evaluate`"):
        evaluate(replace(config, ensemble=(one.uri, str(tmp_path / "nothing"))))
    (tmp_path / "set").rename(tmp_path / "new")
    with pytest.raises(ObjectNotFound, match=r"its catalog is gone .*--catalog"):
        evaluate(config)
    (tmp_path / "two").rename(tmp_path / "moved")
    moved = replace(
        config, ensemble=(one.uri, str(tmp_path / "moved")), catalog=str(tmp_path / "new" / "catalog.parquet")
    )
    assert evaluate(moved).scores.evaluated == 20
    catalog_at(str(tmp_path / "new"), 19)
    with pytest.raises(CatalogError, match=r"one was made with another catalog \(.*\) than .*new.* holds now"):
        evaluate(moved)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "evaluation.json").write_text('{"top1": 0.5}')
    with pytest.raises(ConfigError, match=r"lacks calibration, catalog, .*evaluate again"):
        evaluate(replace(config, ensemble=(str(tmp_path / "old"), one.uri)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"catalog": "s3://stranger/set"},
            r"says that its catalog is s3://stranger/set, .* --catalog s3://stranger/set",
        ),
        ({"catalog": "https://stranger/set"}, r"only s3:// addresses and local paths are understood"),
        ({"catalog": "/proc"}, r"its catalog is gone \(/proc/catalog\.parquet.*--catalog"),
        ({"catalog": "LIST"}, r"its catalog is gone .*, or is a list or folder of videos; name where it is"),
        ({"catalog": "/tmp/\0"}, r"its catalog is gone|null"),
        ({"predictions": "s3://stranger/none"}, r"the predictions in .*/one/none are gone"),
        ({"predictions": "/etc/.."}, r"the predictions in .*/one are gone"),
    ],
)
def test_a_record_of_an_evaluation_leads_to_no_other_store_and_lists_nothing(
    tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    source = catalog_at(str(tmp_path / "set"), 6)
    one = evaluated(str(tmp_path / "one"), source, 1)
    path = tmp_path / "one" / "evaluation.json"
    changes = {name: value.replace("LIST", join(source, "list.csv")) for name, value in changes.items()}
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(KinorayError, match=message):
        read_evaluation(LOCAL, one.uri)


def test_of_a_catalog_that_only_a_record_names_no_video_elsewhere_is_read(tmp_path: Path) -> None:
    source = catalog_at(str(tmp_path / "set"), 12)
    moved = join(catalog_at(str(tmp_path / "other"), 1), "catalog.parquet")
    save_catalog(LOCAL, moved, catalog_of_source(LOCAL, source))
    a, b = (evaluated(str(tmp_path / f"{seed}"), moved, seed) for seed in (1, 2))
    for catalog, reason in (("", "lies outside of"), (moved, "ObjectNotFound")):
        config = CompareConfig(a=a.uri, b=b.uri, out=str(tmp_path / "p.html"), catalog=catalog)
        flips = compare(config)
        reasons = [text for text in Page((tmp_path / "p.html").read_text()).text if reason in text]
        assert len(reasons) == len(flips.gained) + len(flips.lost) >= 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top1": "half"}, r"scores\.top1 must be a number, got 'half'"),
        ({"labels": "abc"}, r"labels must be a list, got 'abc'"),
        (
            {"calibration": {"ece": 0.1, "mean_score": 0.2, "bins": [{"low": []}]}},
            r"calibration\.bins\[0\]\.low must be",
        ),
        ({"catalog": 3}, r"origin\.catalog must be text, got 3"),
        ({"views": None}, r"origin\.views must be a whole number, got None"),
    ],
)
def test_an_evaluation_of_the_wrong_types_is_refused_by_name(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    one = evaluated(str(tmp_path / "one"), catalog_at(str(tmp_path / "set"), 6), 1)
    path = tmp_path / "one" / "evaluation.json"
    known = stored(LOCAL, one.uri)
    path.write_text(json.dumps({**json.loads(path.read_text()), "of a later version": 1}))
    assert stored(LOCAL, one.uri) == known
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ConfigError, match=f"one/evaluation.json is not what evaluate wrote: {message}"):
        compare(CompareConfig(a=one.uri, b=one.uri, out=str(tmp_path / "p.html")))


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '"x"'])
def test_what_is_no_evaluation_at_all_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "evaluation.json").write_text(text)
    with pytest.raises(ConfigError, match=r"evaluation\.json is not what evaluate wrote: "):
        compare(CompareConfig(a=str(tmp_path), b=str(tmp_path), out=str(tmp_path / "p.html")))


def test_the_command_line_takes_many_evaluations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "evaluate",
        "set",
        "--ensemble",
        "s3://b/one",
        "two",
        "three",
        "--weights",
        "1",
        "1.5",
        "2",
        "--out",
        "x",
    ]
    assert main([*command, "--print-config"]) == 0
    printed = capsys.readouterr().out
    tree = yaml.safe_load(printed)
    assert (tree["ensemble"], tree["weights"]) == (["s3://b/one", "two", "three"], [1.0, 1.5, 2.0])
    (tmp_path / "c.yaml").write_text(printed)
    assert main(["evaluate", "--config", str(tmp_path / "c.yaml"), "--print-config"]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "checkpoint must be given, or ensemble instead of it (one of the two), got nothing"),
        (["--ensemble", "a"], "ensemble must be two evaluations or more, got ('a',)"),
        (["--weights", "1"], "weights must be left out without ensemble, got (1.0,)"),
        (["--ensemble", "a", "b", "--weights", "1", "0"], "weights must be greater than 0, got (1.0, 0.0)"),
        (["--ensemble", "a", "b", "--checkpoint", "c"], "checkpoint must be left out with ensemble, which runs no"),
        (["--ensemble", "a", "b", "--protocol", "5x3"], "protocol must be left out with ensemble, which runs no"),
        (["--ensemble", "a", "b", "--workers", "4"], "resources must be left out with ensemble, which runs no"),
        (
            ["--ensemble", "a", "b", "--split", "test"],
            "split must be left out with ensemble: it is that of its members",
        ),
    ],
)
def test_an_evaluation_is_of_a_checkpoint_or_of_an_ensemble(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "set", "--out", "x", *flags]) == 2
    assert message in capsys.readouterr().err


# Comparisons


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.images: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.images += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_a_comparison_is_what_plain_loops_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Overlapping sets of videos, classes numbered otherwise, and videos that only one could read."""
    first = catalog_at(str(tmp_path / "set"), 120)
    second = catalog_at(str(tmp_path / "other"), 115, first=10)
    a = evaluated(str(tmp_path / "a"), first, 1, quarantined=("v020", "v021"))
    b = evaluated(str(tmp_path / "b"), second, 2, labels=LABELS[::-1], skill=2.0, quarantined=("v021", "v022", "v023"))
    out = tmp_path / "page.html"
    monkeypatch.setattr("kinoray.evaluation.compare._MAX_VIDEOS", 5)
    config = CompareConfig(a=a.uri, b=b.uri, out=str(out), frames_per_video=0)
    record = compare(config).summary()

    both = sorted(a.scores.keys() & b.scores.keys())
    counts = {
        (x, y): sum((a.right(name), b.right(name)) == (x, y) for name in both)
        for x in (True, False)
        for y in (True, False)
    }
    expected = Paired(counts[True, True], counts[True, False], counts[False, True], counts[False, False])
    assert min(counts.values()) > 0
    assert [record[name] for name in ("both_right", "only_a_right", "only_b_right", "both_wrong")] == list(
        counts.values()
    )
    assert record["videos"] == len(both) == 106
    assert (record["num_common"], record["num_only_in_a"], record["num_only_in_b"]) == (110, 10, 5)
    assert (record["num_scored_by_a"], record["num_scored_by_b"]) == (2, 1)
    assert record["agreement"] == sum(a.best(name) == b.best(name) for name in both) / 106
    assert record["difference"] == pytest.approx(sum(b.right(n) - a.right(n) for n in both) / 106, abs=1e-15)
    assert (record["mcnemar_p"], tuple(record["difference_interval"])) == (expected.p, expected.interval)
    for move in record["classes"]:
        of_class = [name for name in both if a.truth[name] == move["label"]]
        assert move["videos"] == len(of_class)
        assert move["top1_a"] == pytest.approx(sum(map(a.right, of_class)) / len(of_class))
        assert move["top1_b"] == pytest.approx(sum(map(b.right, of_class)) / len(of_class))
        assert move["only_b_right"] == sum(b.right(name) and not a.right(name) for name in of_class)
    sizes = [abs(move["difference"]) for move in record["classes"]]
    assert sizes == sorted(sizes, reverse=True)
    gained = [name for name in both if b.right(name) and not a.right(name)]
    assert {flip["video_id"] for flip in record["gained"]} == set(gained)
    assert {flip["video_id"] for flip in record["lost"]} == {n for n in both if a.right(n) and not b.right(n)}
    for flip in record["gained"] + record["lost"]:
        name = flip["video_id"]
        assert (flip["true"], flip["said_a"], flip["said_b"]) == (a.truth[name], a.best(name), b.best(name))
        assert (flip["score_a"], flip["score_b"]) == (float(a.scores[name].max()), float(b.scores[name].max()))
    surest = sorted(gained, key=lambda name: -b.scores[name].max())
    assert [flip["video_id"] for flip in record["gained"]] == surest

    assert json.loads((tmp_path / "page.json").read_text()) == json.loads(json.dumps(record))
    said = capsys.readouterr().out
    assert f"B less A {100 * expected.difference:+.1f} points" in said
    assert f"{counts[False, True]} videos became right, {counts[True, False]} wrong" in said
    assert (
        "left out: 10 videos only in A, 5 videos only in B, 2 videos scored by A only, 1 video scored by B only" in said
    )
    page = out.read_text()
    text = " ".join(" ".join(Page(page).text).split())
    assert f"Became right: {counts[False, True]}" in text
    assert f"The first 5 of {counts[False, True]}." in text
    assert [name for name in re.findall(r"v\d{3}", text) if name in gained] == surest[:5]
    assert (
        main(
            [
                "compare",
                a.uri,
                b.uri,
                "--out",
                str(tmp_path / "again.html"),
                "--frames-per-video",
                "0",
            ]
        )
        == 0
    )
    assert (tmp_path / "again.html").read_text() == page


HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "a\u202eb",
    "{{ 7 * 7 }}",
    "javascript:x",
    "<!--",
)


@pytest.mark.parametrize("num_classes", [5, 6])
def test_top_5_is_shown_only_where_there_are_more_than_five_classes(
    num_classes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, labels = str(tmp_path / "set"), LABELS[:num_classes]
    catalog_at(source, 30, labels=labels)
    a, b = (evaluated(str(tmp_path / f"{seed}"), source, seed, labels=labels) for seed in (1, 2))
    compare(CompareConfig(a=a.uri, b=b.uri, out=str(tmp_path / "p.html"), frames_per_video=0))
    print_evaluation("evaluate", read_evaluation(LOCAL, a.uri).record)
    for text in ((tmp_path / "p.html").read_text(), capsys.readouterr().out):
        assert "top-1" in text.lower()
        assert ("top-5" in text.lower()) == (num_classes > 5)


def test_nothing_in_a_page_comes_from_a_name(tmp_path: Path) -> None:
    source = str(tmp_path / "set")
    catalog_at(source, 30, labels=LABELS)
    catalog = catalog_of_source(LOCAL, source)
    names = dict(zip(sorted(set(catalog.labels)), HOSTILE, strict=True))
    table = catalog.table.set_column(
        catalog.table.schema.get_field_index("label"),
        "label",
        pa.array([names[x] for x in catalog.table["label"].to_pylist()]),
    )
    ids = [f"{HOSTILE[n % 6]}{n}" for n in range(30)]
    table = table.set_column(0, catalog.table.schema.field(0), pa.array(ids))
    assert table.schema.names[0] == "video_id"
    hostile = Catalog(table.cast(catalog.table.schema), tuple(names[x] for x in catalog.labels))
    save_as_pack(LOCAL, source, hostile)
    a, b = (evaluated(str(tmp_path / f"{seed}"), source, seed, labels=HOSTILE) for seed in (1, 2))
    compare(CompareConfig(a=a.uri, b=b.uri, out=str(tmp_path / "p.html"), frames_per_video=0))
    text = (tmp_path / "p.html").read_text()
    page = Page(text)
    assert "script" not in page.tags
    assert page.images == []
    assert "\u202e" not in text
    assert not re.search(r"https?://|url\(|@import", text)
    assert "default-src &#39;none&#39;" in text or "default-src 'none'" in text
    shown = "".join(page.text)
    for name in ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a\\u202eb", "{{ 7 * 7 }}", "<!--"):
        assert name in shown


def test_flipped_videos_are_shown_and_a_file_that_is_gone_says_so(tmp_path: Path) -> None:
    source = catalog_at(str(tmp_path / "set"), 12)
    a, b = evaluated(str(tmp_path / "a"), source, 1), evaluated(str(tmp_path / "b"), source, 2)
    flipped = [name for name in a.scores if a.right(name) != b.right(name)]
    assert len(flipped) >= 3
    for name in flipped[1:]:
        (tmp_path / "set" / f"{name}.mp4").write_bytes(make_video(moving(6, 40, 64)))
    compare(CompareConfig(a=a.uri, b=b.uri, out=str(tmp_path / "p.html"), frames_per_video=2))
    page = Page((tmp_path / "p.html").read_text())
    assert len(page.images) == 2 * (len(flipped) - 1)
    assert all(image.startswith("data:image/jpeg;base64,") for image in page.images)
    (reason,) = [text for text in page.text if "ObjectNotFound" in text]
    assert f"{flipped[0]}.mp4" in reason


def test_evaluations_without_a_common_truth_are_refused(tmp_path: Path) -> None:
    source = catalog_at(str(tmp_path / "set"), 12)
    a = evaluated(str(tmp_path / "a"), source, 1)
    apart = evaluated(str(tmp_path / "b"), catalog_at(str(tmp_path / "apart"), 5, first=50), 2)
    with pytest.raises(CatalogError, match=r"no scored video in common \(0 of 12 and 5 are in both\)"):
        compare(CompareConfig(a=a.uri, b=apart.uri, out=str(tmp_path / "p.html")))
    turned = evaluated(str(tmp_path / "c"), catalog_at(str(tmp_path / "turned"), 12, labels=LABELS[::-1]), 2)
    with pytest.raises(CatalogError, match=r"of 12 videos have another true label in .*: v000 \(ant and fly\)"):
        compare(CompareConfig(a=a.uri, b=turned.uri, out=str(tmp_path / "p.html")))
    assert not (tmp_path / "p.html").exists()


def test_ensemble_and_compare_on_s3(moto_server: str) -> None:
    storage_config, bucket = config_at(moto_server), bucket_at(moto_server)
    storage = Storage(storage_config)
    source = catalog_at(join(bucket, "set"), 20, storage=storage)
    one, two = (evaluated(join(bucket, f"eval{seed}"), source, seed, storage=storage) for seed in (1, 2))
    out = join(bucket, "both")
    record = evaluate(EvaluateConfig(catalog=source, ensemble=(one.uri, two.uri), out=out, storage=storage_config))
    assert stored(storage, out) == record
    page = join(bucket, "pages/compare.html")
    found = compare(CompareConfig(a=one.uri, b=out, out=page, frames_per_video=0, storage=storage_config))
    assert found.paired.total == 20
    assert json.loads(storage.read(join(bucket, "pages/compare.json"))) == json.loads(json.dumps(found.summary()))
    assert storage.read(page).startswith(b"<!DOCTYPE html>")
