"""What a report is made of: the rows of predictions, what is still to come, and all that it says in numbers.

What is easy to break: a table may be read while it is being written; what is to come is counted from commits that were
listed before the rows were read, so no input is lost between the two. The numbers cover all rows, not only the videos
that the site lists, and accuracy is never counted over videos that the model was trained on where the catalog names
another split.
"""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kinoray.catalog.folders import in_label_list, label_list
from kinoray.catalog.table import Catalog
from kinoray.config.shared import digest
from kinoray.errors import CatalogError
from kinoray.evaluation.metrics import (
    Accuracy,
    Calibration,
    ClassCounts,
    calibration_of,
    class_counts,
    count_confusion,
)
from kinoray.label.keys import numbers_of
from kinoray.label.ledger import Ledger, open_ledger, read_predictions
from kinoray.label.plan import unfinished_keys
from kinoray.label.planfile import shown_plans
from kinoray.label.unit import JobRecord
from kinoray.library.rows import first_item, is_multi_label
from kinoray.storage.objects import Storage

__all__ = [
    "ClassRow",
    "Confusion",
    "Kind",
    "Numbers",
    "ResultTable",
    "SplitAccuracy",
    "choose",
    "count",
    "count_codecs",
    "count_durations",
    "join_truth",
    "read_result",
    "true_lists",
]

TRAIN_SPLIT = "train"
NUM_BINS = 20
_OTHERS_SHARE = 4  # at least a fourth of the list is for videos without an answer, where there are so many
_COLUMNS = [
    "video_id",
    "uri",
    "offset",
    "length",
    "row_key",
    "status",
    "error_class",
    "error_text",
    "label_topk",
    "score_topk",
    "margin",
    "entropy",
    "abstained",
    "model_digest",
    "config_digest",
    "run_id",
    "windows",
]
_DURATIONS_S = (0, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600, math.inf)


# Rows


@dataclass(frozen=True, kw_only=True, slots=True)
class ResultTable:
    """What there is of a labelling."""

    rows: pa.Table
    """PREDICTION_SCHEMA without the columns that a report does not show."""
    labels: tuple[str, ...]
    """The model's classes in its order; empty where the labelling does not name them."""
    num_pending: int
    """Inputs that have no row yet."""
    digest: str
    """Names the labelling and its newest catalog; the same before and after it is finished."""
    several: bool
    """Whether a video may have several classes."""
    ledger: Ledger
    """The labelling itself."""
    job: JobRecord
    """What all its rows share."""

    @property
    def num_inputs(self) -> int:
        """All inputs: those with a row and those to come."""
        return len(self.rows) + self.num_pending


def read_result(storage: Storage, predictions: str) -> ResultTable:
    """Read all rows that are committed.

    Raises:
        StorageError: it cannot be read, or nothing was labelled there.
        ConfigError: results of several models or settings are there.
        CatalogError: no rows yet.
    """
    ledger = open_ledger(storage, predictions)
    committed = ledger.committed()
    rows = read_predictions(storage, predictions, columns=_COLUMNS)
    if not len(rows):
        raise CatalogError(
            f"{predictions} holds no finished rows yet; run kinoray label, or wait for its first unit, then this"
        )
    plans = shown_plans(ledger)
    job = ledger.job()
    pending = np.concatenate([np.empty(0, np.uint64), *(unfinished_keys(plan, committed) for plan in plans)])
    pending = np.setdiff1d(pending, numbers_of(rows["row_key"]))
    return ResultTable(
        several=is_multi_label(ledger),
        rows=rows,
        labels=job.labels,
        num_pending=len(pending),
        digest=digest([ledger.labelling_id, plans[0].catalog_digest if plans else ""]),
        ledger=ledger,
        job=job,
    )


def choose(rows: pa.Table, most: int) -> pa.Table:
    """The at most `most` rows to list: labelled ones, least certain first, then the others, every reason in turn.

    Args:
        rows: what `join_truth` gave.
    """
    is_labelled = pc.equal(rows["status"], "labelled")
    labelled = rows.filter(is_labelled)
    others = rows.filter(pc.invert(is_labelled))
    num_others = min(len(others), max(most // _OTHERS_SHARE, most - len(labelled)))
    labelled = labelled.sort_by([("margin", "ascending"), ("video_id", "ascending")])
    return pa.concat_tables([labelled.slice(0, most - num_others), _by_turns(others).slice(0, num_others)])


def _by_turns(others: pa.Table) -> pa.Table:
    """The first row of every reason, then the second of each, so that a cut list lacks no reason."""
    reason = pc.coalesce(others["error_class"], others["status"])
    others = others.append_column("reason", reason)
    others = others.sort_by([("reason", "ascending"), ("status", "ascending"), ("video_id", "ascending")])
    codes = others["reason"].combine_chunks().dictionary_encode().indices.to_numpy()
    place = np.arange(len(codes))
    is_first = np.ones(len(codes), bool)
    is_first[1:] = codes[1:] != codes[:-1]
    turn = place - np.maximum.accumulate(np.where(is_first, place, 0)) if len(codes) else place
    return others.take(pa.array(np.argsort(turn, kind="stable"))).drop_columns(["reason"])


# Numbers


@dataclass(frozen=True, slots=True)
class SplitAccuracy:
    """How right the answers are for the videos of one split (None: of all)."""

    split: str | None
    top1: Accuracy


@dataclass(frozen=True, slots=True)
class ClassRow:
    """One class: what the model called so, and how right it was."""

    num_predicted: int
    """All videos that were called so."""
    mean_score: float | None
    """Their mean first score; None of none."""
    counts: ClassCounts
    """Over the videos that the accuracy counts; 0 of 0 without a catalog."""


@dataclass(frozen=True, slots=True)
class Confusion:
    """counts[i, j]: videos of true class names[i] that were called names[j]; int64 [C, C]."""

    names: tuple[str, ...]
    counts: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class Numbers:
    """Everything that the site says in numbers."""

    num_videos: int
    num_labelled: int
    num_quarantined: int
    num_skipped: int
    num_abstained: int
    mean_margin: float | None
    histogram: np.ndarray
    """int64 [3, NUM_BINS]: top-1 scores in 0 .. 1 of right, wrong and unknown answers."""
    margin_histogram: np.ndarray
    """int64 [3, NUM_BINS]: the same of margins."""
    classes: tuple[ClassRow, ...]
    accuracy: SplitAccuracy | None
    """Over the videos that count: not those of the training split where there is another."""
    splits: tuple[SplitAccuracy, ...]
    confusion: Confusion | None
    calibration: Calibration | None
    """Over the videos that the accuracy counts."""


def join_truth(table: pa.Table, catalog: Catalog | None, *, several: bool = False) -> pa.Table:
    """Add `top1` and `score` (the first answer), `true_label`, `split` and `right` (null where unknown) to predictions.

    And `duration_s` and `codec`, as the catalog has them.

    Where a video may have several classes, `top1` and `true_label` are all of them in one text, `red|round`, so that an
    answer is right if it names these and no other; `score` is that of the first.

    Raises:
        CatalogError: the catalog has no labels, or none for any of these videos.
    """
    top1 = _as_lists(table["label_topk"].to_pylist()) if several else first_item(table["label_topk"])
    table = table.append_column("top1", top1)
    table = table.append_column("score", first_item(table["score_topk"]))
    truth, split = pa.nulls(len(table), pa.string()), pa.nulls(len(table), pa.string())
    duration_s, codec = pa.nulls(len(table), pa.float64()), pa.nulls(len(table), pa.string())
    if catalog is not None:
        place = pc.index_in(table["video_id"], value_set=catalog.table["video_id"].combine_chunks())
        known = true_lists(catalog) if several else catalog.table["label"].combine_chunks()
        truth = pc.take(known, place)
        split, duration_s, codec = (
            pc.take(catalog.table[name].combine_chunks(), place) for name in ("split", "duration_s", "codec")
        )
        if pc.count(known).as_py() == 0:
            why = "; it has label lists, the predictions one class a video" if catalog.is_multilabel else ""
            raise CatalogError(
                f"the catalog has no labels to compare with{why}; leave --catalog out, or name a labelled one"
            )
        if pc.count(truth).as_py() == 0:
            raise CatalogError(
                f"none of the {len(table)} videos in the predictions has a label in the catalog of {len(catalog)}; "
                f"ids look like {table['video_id'][0]} and {catalog.table['video_id'][0]}: is it the right catalog?"
            )
    table = table.append_column("true_label", truth).append_column("split", split)
    table = table.append_column("duration_s", duration_s).append_column("codec", codec)
    return table.append_column("right", pc.equal(table["top1"], table["true_label"]))


def _as_lists(lists: Sequence[Sequence[str] | None]) -> pa.Array:
    """Each list of classes as one text; those of equal classes are equal."""
    return pa.array([None if names is None else label_list(names) for names in lists], pa.string())


def true_lists(catalog: Catalog) -> pa.Array:
    """The classes of each video as one text; null where they are not known."""
    column = catalog.table["label_ids" if catalog.is_multilabel else "label"]
    known = column.is_valid().to_pylist()
    return _as_lists([names if is_one else None for names, is_one in zip(catalog.class_names(), known, strict=True)])


def count(rows: pa.Table, labels: Sequence[str], *, several: bool = False) -> Numbers:
    """Count what `join_truth` gave. `labels`: class names in the catalog's order (may be empty).

    Where a video may have several classes, each class is counted by itself, and there is no confusion of two.
    """
    status = rows["status"]
    labelled = rows.filter(pc.equal(status, "labelled"))
    counted, accuracy, splits = _accuracies(rows)
    if several:
        classes, confusion = _list_rows(labelled, counted, labels), None
    else:
        names = _class_names(labelled, counted, labels)
        confusion = _confusion(counted, names) if accuracy else None
        classes = _class_rows(labelled, names, confusion)
    return Numbers(
        num_videos=len(rows),
        num_labelled=len(labelled),
        num_quarantined=pc.sum(pc.equal(status, "quarantined")).as_py() or 0,
        num_skipped=pc.sum(pc.equal(status, "skipped")).as_py() or 0,
        num_abstained=pc.sum(labelled["abstained"]).as_py() or 0,
        mean_margin=pc.mean(labelled["margin"]).as_py(),
        histogram=_histogram(labelled, "score"),
        margin_histogram=_histogram(labelled, "margin"),
        classes=classes,
        accuracy=accuracy,
        splits=splits,
        confusion=confusion,
        calibration=_calibration(counted) if accuracy and not several else None,
    )


def _calibration(counted: pa.Table) -> Calibration:
    return calibration_of(counted["score"].to_numpy(), counted["right"].to_numpy().astype(bool))


def _accuracies(rows: pa.Table) -> tuple[pa.Table, SplitAccuracy | None, tuple[SplitAccuracy, ...]]:
    """The answered rows that count, their accuracy, and the accuracy of each split."""
    known = rows.filter(pc.is_valid(rows["true_label"]))
    found = sorted({split for split in pc.unique(known["split"]).to_pylist() if split})
    counted = known
    shown = None
    if TRAIN_SPLIT in found and len(found) > 1:
        counted = known.filter(pc.fill_null(pc.not_equal(known["split"], TRAIN_SPLIT), True))
        shown = " + ".join(name for name in found if name != TRAIN_SPLIT)
    elif len(found) == 1:
        shown = found[0]
    splits = [_accuracy(name, known.filter(pc.equal(known["split"], name))) for name in found]
    answered = counted.filter(pc.is_valid(counted["top1"]))
    return answered, _accuracy(shown, counted), tuple(item for item in splits if item)


def _accuracy(split: str | None, rows: pa.Table) -> SplitAccuracy | None:
    """Of rows with a true class; None where none has an answer, and a row without any class has none."""
    evaluated = pc.count(rows["top1"]).as_py()
    if not evaluated:
        return None
    quarantined = pc.sum(pc.not_equal(rows["status"], "labelled")).as_py() or 0
    top1 = Accuracy(
        right=pc.sum(rows["right"]).as_py() or 0,
        evaluated=evaluated,
        quarantined=quarantined,
        missing=len(rows) - evaluated - quarantined,
    )
    return SplitAccuracy(split, top1)


def _class_names(labelled: pa.Table, counted: pa.Table, labels: Sequence[str]) -> tuple[str, ...]:
    """The catalog's classes in its order, then those that only the model or only a row names, sorted."""
    seen = set(pc.unique(labelled["top1"]).to_pylist()) | set(pc.unique(counted["true_label"]).to_pylist())
    return (*labels, *sorted(name for name in seen - set(labels) if name is not None))


def _class_rows(labelled: pa.Table, names: tuple[str, ...], confusion: Confusion | None) -> tuple[ClassRow, ...]:
    answered = labelled.filter(pc.is_valid(labelled["top1"]))
    places = _places(answered["top1"], names)
    predicted = np.bincount(places, minlength=len(names)).tolist()
    totals = np.bincount(places, weights=answered["score"].to_numpy(), minlength=len(names)).tolist()
    counts = confusion.counts if confusion else np.zeros((len(names), len(names)), np.int64)
    return tuple(
        ClassRow(
            num_predicted=predicted[place],
            mean_score=totals[place] / predicted[place] if predicted[place] else None,
            counts=of_class,
        )
        for place, of_class in enumerate(class_counts(counts, names))
    )


def _list_rows(labelled: pa.Table, counted: pa.Table, labels: Sequence[str]) -> tuple[ClassRow, ...]:
    """The classes in their order, then those that only a row names; a video counts for each class that it has."""
    named: Counter[str] = Counter()
    scores: defaultdict[str, float] = defaultdict(float)
    for names, values in zip(labelled["label_topk"].to_pylist(), labelled["score_topk"].to_pylist(), strict=True):
        for name, value in zip(names or (), values or (), strict=True):
            named[name] += 1
            scores[name] += value
    true: Counter[str] = Counter()
    called: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for text, names in zip(counted["true_label"].to_pylist(), counted["label_topk"].to_pylist(), strict=True):
        found = in_label_list(text)
        true.update(found)
        called.update(names or ())
        right.update(set(found).intersection(names or ()))
    others = sorted((named.keys() | true.keys()) - set(labels))
    return tuple(
        ClassRow(
            num_predicted=named[name],
            mean_score=scores[name] / named[name] if named[name] else None,
            counts=ClassCounts(label=name, videos=true[name], called=called[name], right=right[name], within_top5=None),
        )
        for name in (*labels, *others)
    )


def _confusion(counted: pa.Table, names: tuple[str, ...]) -> Confusion:
    truth = _places(counted["true_label"], names)
    first = _places(counted["top1"], names)
    return Confusion(names, count_confusion(truth, first, len(names)))


def _places(column: pa.ChunkedArray, names: tuple[str, ...]) -> np.ndarray:
    """int64 [N]: the place of each value in the names, all of which are there."""
    places = pc.index_in(column, value_set=pa.array(names, pa.string()))
    return np.asarray(places.to_numpy(), np.int64)


@dataclass(frozen=True, slots=True)
class Kind:
    """Videos that have a length, or a codec, in common."""

    name: str
    """What people call it."""
    value: str
    """What the site's filter takes: `10..20`, `h264`."""
    num_videos: int


def count_durations(seconds: np.ndarray) -> tuple[Kind, ...]:
    """How many of these lengths (float64 [N], none NaN) there are from each step to below the next, first to last."""
    bins = np.searchsorted(_DURATIONS_S, seconds, side="right") - 1
    counts = np.bincount(bins, minlength=len(_DURATIONS_S) - 1).tolist()
    kinds = [
        Kind(_said(low, high), f"{low:g}..{high:g}" if high < math.inf else f"{low:g}..", number)
        for (low, high), number in zip(itertools.pairwise(_DURATIONS_S), counts, strict=True)
    ]
    some = [index for index, kind in enumerate(kinds) if kind.num_videos]
    return tuple(kinds[some[0] : some[-1] + 1]) if some else ()


def _said(low: float, high: float) -> str:
    """`10 to 20 s`, `30 to 60 min`."""
    unit, seconds = ("h", 3600) if low >= 3600 else ("min", 60) if low >= 60 else ("s", 1)
    if high == math.inf:
        return f"{low / seconds:g} {unit} and more"
    return f"{low / seconds:g} to {high / seconds:g} {unit}"


def count_codecs(names: Sequence[str]) -> tuple[Kind, ...]:
    """How many there are of each, the most frequent first."""
    counts = Counter(names).most_common()
    return tuple(Kind(name, name, number) for name, number in sorted(counts, key=lambda item: (-item[1], item[0])))


def _histogram(labelled: pa.Table, name: str) -> np.ndarray:
    known = labelled.filter(pc.is_valid(labelled[name]))
    bins = np.clip((known[name].to_numpy().astype(np.float64) * NUM_BINS).astype(np.int64), 0, NUM_BINS - 1)
    right = pc.fill_null(pc.cast(known["right"], pa.int8()), -1).to_numpy()
    return np.stack([np.bincount(bins[right == value], minlength=NUM_BINS) for value in (1, 0, -1)]).astype(np.int64)
