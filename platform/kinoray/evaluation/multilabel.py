"""Numbers of networks that name any number of classes a video: average precision, F1, and what evaluation.json says.

What is easy to break: a class without a video has no average precision and is left out of the mean, never counted as 0
or 1; intervals draw videos anew, not pairs of a video and a class, since the classes of one video belong together.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from kinoray.catalog.table import Catalog
from kinoray.console import many, table, visible
from kinoray.errors import CatalogError, CheckpointMismatch
from kinoray.evaluation.metrics import average_precisions, f1_of, mean_precision, resampled_precisions, wilson_interval
from kinoray.evaluation.record import MULTILABEL, Origin, true_classes
from kinoray.network.checkpoint import CheckpointMeta

__all__ = [
    "SET_COLUMNS",
    "ClassScores",
    "MultilabelRecord",
    "multilabel_record",
    "print_multilabel",
    "require_truth",
    "true_sets",
]

Flags = NDArray[np.bool_]
Floats = NDArray[np.float64]

SET_COLUMNS = ("video_id", "status", "id_topk", "scores")
"""Columns of predictions that `multilabel_record` needs."""

_MAX_LINES = 40


# What an evaluation says


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassScores:
    """One class, over the videos that were scored; None where nothing was counted."""

    label: str
    videos: int
    """Videos that are of the class."""
    called: int
    """Videos that were called so."""
    right: int
    """Videos that are both."""
    threshold: float
    """The score from which on a video was called so."""
    precision: float | None
    recall: float | None
    f1: float | None
    f1_interval: tuple[float, float]
    ap: float | None
    ap_interval: tuple[float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class MultilabelRecord:
    """What evaluation.json holds where videos may have several classes; the fields of `origin` lie beside the others.

    Intervals are of 95%: of average precisions by drawing the videos anew, of F1 and of shares Wilson's.
    """

    map: float | None
    """Mean average precision over the classes that have a video."""
    map_interval: tuple[float, float]
    macro_f1: float | None
    """Mean F1 over the classes that have a video or were called."""
    micro_f1: float | None
    """F1 over all pairs of a video and a class."""
    exact: float | None
    """Share of videos that were called exactly what they are."""
    exact_interval: tuple[float, float]
    evaluated: int
    """Videos that were scored."""
    quarantined: int
    missing: int
    """Videos of the split without any row."""
    total: int
    coverage: float | None
    """Share of the split that was scored; the numbers above are of it alone."""
    labels: tuple[str, ...]
    classes: tuple[ClassScores, ...]
    """In the order of the labels."""
    origin: Origin

    def to_json(self) -> bytes:
        """The file's bytes; `kind` says that it is no evaluation of one class a video."""
        tree = asdict(self)
        origin = {name: value for name, value in tree.pop("origin").items() if value is not None}
        return json.dumps({"kind": MULTILABEL, **tree, **origin}, indent=1).encode()


def true_sets(catalog: Catalog, labels: Sequence[str]) -> Flags:
    """Which classes each video has, bool [N, C] as the model numbers them; classes are matched by name.

    Raises:
        CatalogError: a video has no label list.
        CheckpointMismatch: a class that the model does not know.
    """
    lists = catalog.table.column("label_ids")
    if lists.null_count:
        first = catalog.table.column("video_id")[lists.is_null().to_pylist().index(True)].as_py()
        raise CatalogError(
            f"{lists.null_count} of {len(lists)} videos have no label list, {first!r} is the first; this network gives "
            "a video any number of classes, so it is scored on a set that is packed from a list path,labels[,split]"
        )
    number = {label: index for index, label in enumerate(labels)}
    names = catalog.class_names()
    if unknown := sorted({name for found in names for name in found} - set(labels)):
        shown = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        raise CheckpointMismatch(
            f"the checkpoint has {len(labels)} classes, the catalog {len(catalog.labels)}; the checkpoint does not "
            f"know {shown}; take a checkpoint that was trained on this catalog's classes"
        )
    flags = np.zeros((len(names), len(labels)), bool)
    for row, found in enumerate(names):
        flags[row, [number[name] for name in found]] = True
    return flags


def require_truth(catalog: Catalog, meta: CheckpointMeta) -> None:
    """Check that the catalog says of each video what the network is to say. Raises as `true_sets`, `true_classes`."""
    (true_sets if meta.scores == "sigmoid" else true_classes)(catalog, meta.labels)


def multilabel_record(
    catalog: Catalog, labels: Sequence[str], predictions: pa.Table, thresholds: Sequence[float], origin: Origin
) -> MultilabelRecord:
    """All numbers of an evaluation.

    Args:
        predictions: SET_COLUMNS; a video of the catalog that is not there counts as missing.
        thresholds: of each class, as they were labelled with.

    Raises:
        CatalogError, CheckpointMismatch: as `true_sets`.
    """
    truth = true_sets(catalog, labels)
    row_of = {video_id: row for row, video_id in enumerate(predictions.column("video_id").to_pylist())}
    places = [row_of.get(video_id) for video_id in catalog.table.column("video_id").to_pylist()]
    status, ids = (predictions.column(name).to_pylist() for name in ("status", "id_topk"))
    answered = [place for place, row in enumerate(places) if row is not None and status[row] == "labelled"]
    rows = [row for place in answered if (row := places[place]) is not None]
    flat = pc.list_flatten(predictions.column("scores").take(pa.array(rows, pa.int64()))).to_numpy()
    scores = flat.astype(np.float64).reshape(len(rows), len(labels))
    called = np.zeros((len(rows), len(labels)), bool)
    for place, row in enumerate(rows):
        called[place, ids[row]] = True
    truth = truth[answered]
    precisions = average_precisions(scores, truth)
    drawn = resampled_precisions(scores, truth) if len(rows) else np.empty((0, len(labels)))
    classes = tuple(
        _class_scores(label, truth[:, place], called[:, place], thresholds[place], precisions[place], drawn[:, place])
        for place, label in enumerate(labels)
    )
    missing = places.count(None)
    exact = int((truth == called).all(axis=1).sum())
    micro, _ = f1_of(int(truth.sum()), int(called.sum()), int((truth & called).sum()))
    known = [item.f1 for item in classes if item.f1 is not None]
    return MultilabelRecord(
        map=_or_none(mean_precision(precisions)),
        map_interval=_span(np.array([mean_precision(row) for row in drawn])),
        macro_f1=sum(known) / len(known) if known else None,
        micro_f1=micro,
        exact=exact / len(rows) if rows else None,
        exact_interval=wilson_interval(exact, len(rows)),
        evaluated=len(rows),
        quarantined=len(places) - missing - len(rows),
        missing=missing,
        total=len(places),
        coverage=len(rows) / len(places) if places else None,
        labels=tuple(labels),
        classes=classes,
        origin=origin,
    )


def _class_scores(
    label: str, truth_N: Flags, called_N: Flags, threshold: float, precision: float, drawn_R: Floats
) -> ClassScores:
    videos, called, right = int(truth_N.sum()), int(called_N.sum()), int((truth_N & called_N).sum())
    f1, interval = f1_of(videos, called, right)
    return ClassScores(
        label=label,
        videos=videos,
        called=called,
        right=right,
        threshold=float(threshold),
        precision=right / called if called else None,
        recall=right / videos if videos else None,
        f1=f1,
        f1_interval=interval,
        ap=_or_none(precision),
        ap_interval=_span(drawn_R),
    )


def _span(values: Floats) -> tuple[float, float]:
    """What 95% of them lie between; (0, 1) of none."""
    known = values[~np.isnan(values)]
    if not len(known):
        return 0.0, 1.0
    low, high = np.quantile(known, (0.025, 0.975))
    return float(low), float(high)


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def print_multilabel(task: str, record: MultilabelRecord) -> None:
    """The numbers in a few lines, each after the name of the verb."""
    low, high = record.exact_interval
    lines = [
        f"{many(record.total, 'video')} = {record.evaluated:,} evaluated + {record.quarantined:,} quarantined + "
        f"{record.missing:,} missing (coverage {_percent(record.coverage)})",
        f"mAP {_percent(record.map)} (95% interval {record.map_interval[0]:.1%} .. {record.map_interval[1]:.1%})",
        f"F1 {_percent(record.macro_f1)} (mean over classes), {_percent(record.micro_f1)} (over all answers)",
        f"all classes of a video right, and no other: {_percent(record.exact)} (95% interval {low:.1%} .. {high:.1%})",
    ]
    shown = [item for item in record.classes if item.videos]
    if len(shown) > _MAX_LINES:
        shown = sorted(shown, key=lambda item: item.ap or 0.0)[:_MAX_LINES]
        lines.append(f"the {len(shown)} classes with the lowest average precision:")
    cells = [
        (
            item.label,
            _percent(item.ap),
            _percent(item.f1),
            f"{item.f1_interval[0]:.1%} .. {item.f1_interval[1]:.1%}",
            f"{item.threshold:.2f}",
            f"{item.videos:,}",
        )
        for item in shown
    ]
    head = ["class", "AP", "F1", "95% interval", "from", "videos"]
    lines += table(cells, head=head, right=(1, 2, 3, 4, 5), indent="  ")
    print("\n".join(f"{task}: {visible(line)}" for line in lines))


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
