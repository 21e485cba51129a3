"""Score a checkpoint: the labelling job on a labelled catalog, then exact counts of what it got right.

What is easy to break: every video of the split counts once, those that could not be read too; an accuracy is never
shown without its coverage.
"""

import json
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kinoray.catalog import Catalog
from kinoray.checkpoint import CheckpointMeta
from kinoray.errors import CatalogError, CheckpointMismatch
from kinoray.metrics import Scores, score
from kinoray.run.label import Labelling, open_labelling, refuse_too_many_bad, run_labelling
from kinoray.storage import absolute, join
from kinoray.verbs import EvaluateConfig, LabelConfig

__all__ = ["confused_classes", "evaluate", "score_predictions", "true_classes"]

_TOP = 5
_MAX_LINES = 40  # classes listed on the terminal; evaluation.json has all
_MAX_PAIRS = 10


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Label the split, compare with its labels, print the scores and write OUT/evaluation.json.

    Returns:
        What is in evaluation.json: Scores.summary(), the classes, the confusion matrix [true][predicted], the most
        confused pairs, and what was evaluated with what.

    Raises:
        CatalogError: a video of the split has no label.
        CheckpointMismatch: the catalog has a class that the checkpoint does not know.
        TooManyBad: more than max_bad_fraction were quarantined; evaluation.json is written all the same.
        KinorayError: as `label`.
    """
    labelling = open_labelling(_label_config(config), "evaluate", check=true_classes)
    totals = run_labelling(labelling, config.resources, "evaluate")
    ledger, meta = labelling.ledger, labelling.meta
    predictions = pa.concat_tables(ledger.read_units(labelling.plan.units, ["video_id", "status", "id_topk"]))
    scores = score_predictions(labelling.catalog, true_classes(labelling.catalog, meta), predictions, len(meta.labels))
    record = _record(config, labelling, scores)
    uri = join(absolute(config.out), "evaluation.json")
    ledger.storage.put(uri, json.dumps(record, indent=1).encode())
    _print_scores(scores, meta.labels)
    print(f"evaluate: all numbers are in {uri}", flush=True)
    refuse_too_many_bad(totals, config.max_bad_fraction, ledger.root)
    return record


def true_classes(catalog: Catalog, meta: CheckpointMeta) -> NDArray[np.int64]:
    """The true class of each video as the checkpoint numbers its classes, int64 [N]; classes are matched by name.

    Raises:
        CatalogError: a video has no label.
        CheckpointMismatch: a label that the checkpoint does not know.
    """
    label_ids = catalog.table.column("label_id").to_pylist()
    if None in label_ids:
        first = catalog.table.column("video_id")[label_ids.index(None)].as_py()
        raise CatalogError(
            f"{label_ids.count(None)} of {len(label_ids)} videos have no label, {first!r} is the first; evaluate needs "
            "a labelled catalog (kinoray pack makes one), to label videos use kinoray label"
        )
    number = {label: index for index, label in enumerate(meta.labels)}
    used = [catalog.labels[label_id] for label_id in sorted(set(label_ids))]
    if unknown := [label for label in used if label not in number]:
        names = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        raise CheckpointMismatch(
            f"the checkpoint has {len(meta.labels)} classes, the catalog {len(catalog.labels)}; the checkpoint does "
            f"not know {names}; take a checkpoint that was trained on this catalog's classes"
        )
    return np.array([number[catalog.labels[label_id]] for label_id in label_ids], np.int64)


def score_predictions(catalog: Catalog, truth: NDArray[np.int64], predictions: pa.Table, num_classes: int) -> Scores:
    """Join predictions with labels by video_id.

    Args:
        truth: int64 [N], the true class of each row of the catalog.
        predictions: columns video_id, status and id_topk; a video of the catalog that is not there counts as missing.
        num_classes: classes of the model.
    """
    columns = [predictions.column(name).to_pylist() for name in ("video_id", "status", "id_topk")]
    found = {video_id: ids if status == "labelled" else None for video_id, status, ids in zip(*columns, strict=True)}
    labels: list[int] = []
    topk: list[list[int]] = []
    unreadable = missing = 0
    for video_id, label in zip(catalog.table.column("video_id").to_pylist(), truth.tolist(), strict=True):
        if video_id not in found:
            missing += 1
        elif (ids := found[video_id]) is None:
            unreadable += 1
        else:
            labels.append(label)
            topk.append(ids)
    return score(
        np.array(labels, np.int64),
        np.array(topk, np.int64).reshape(len(labels), -1 if labels else min(_TOP, num_classes)),
        num_classes,
        unreadable=unreadable,
        missing=missing,
    )


def confused_classes(scores: Scores, most: int = _MAX_PAIRS) -> list[tuple[int, int, int]]:
    """The most frequent mistakes as (true class, predicted class, videos), the most frequent first."""
    wrong = scores.confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = [(int(flat) // scores.num_classes, int(flat) % scores.num_classes) for flat in order]
    return [(true, said, int(wrong[true, said])) for true, said in pairs if wrong[true, said]]


def _label_config(config: EvaluateConfig) -> LabelConfig:
    return LabelConfig(
        source=config.catalog,
        checkpoint=config.checkpoint,
        out=config.out,
        split=config.split,
        num_segments=config.num_segments,
        top_k=_TOP,
        batch_size=config.batch_size,
        unit_size=config.unit_size,
        max_bad_fraction=config.max_bad_fraction,
        inference=config.inference,
        storage=config.storage,
        resources=config.resources,
    )


def _record(config: EvaluateConfig, labelling: Labelling, scores: Scores) -> dict[str, Any]:
    labels = labelling.meta.labels
    pairs = [
        {"true": labels[true], "predicted": labels[said], "videos": n} for true, said, n in confused_classes(scores)
    ]
    return {
        **scores.summary(),
        "labels": list(labels),
        "confusion": scores.confusion.tolist(),
        "confused": pairs,
        "catalog": absolute(config.catalog),
        "split": config.split,
        "catalog_digest": labelling.catalog.digest,
        "checkpoint": labelling.job.checkpoint,
        "num_segments": labelling.job.clip.sample.num_segments,
        "inference": asdict(config.inference),
        "model_digest": labelling.job.model_digest,
        "config_digest": labelling.job.config_digest,
        "predictions": labelling.ledger.root,
    }


def _print_scores(scores: Scores, labels: tuple[str, ...]) -> None:
    _say(
        f"{scores.total} videos = {scores.evaluated} evaluated + {scores.unreadable} unreadable + {scores.missing} "
        f"missing (coverage {_percent(scores.coverage)})"
    )
    for name, value, interval, of_all in (
        ("top-1", scores.top1, scores.top1_interval, scores.top1_of_all),
        ("top-5", scores.top5, scores.top5_interval, scores.top5_of_all),
    ):
        low, high = interval
        _say(
            f"{name} {_percent(value)} (95% interval {low:.1%} .. {high:.1%}); {_percent(of_all)} with unreadable and "
            "missing counted as wrong"
        )
    _say(f"mean class accuracy {_percent(scores.mean_class)}")
    support, accuracy = scores.confusion.sum(axis=1), scores.per_class
    shown = list(range(len(labels)))
    if len(labels) > _MAX_LINES:
        shown = sorted((index for index in shown if support[index]), key=lambda index: accuracy[index])[:_MAX_LINES]
        _say(f"the {len(shown)} classes with the lowest accuracy:")
    width = max((len(labels[index]) for index in shown), default=5)
    for index in shown:
        _say(f"  {labels[index]:<{width}}  {_percent(accuracy[index]):>6} of {support[index]}")
    if pairs := confused_classes(scores):
        _say("most often confused (true -> predicted):")
        for true, said, count in pairs:
            _say(f"  {labels[true]} -> {labels[said]}: {count}")


def _say(text: str) -> None:
    print(f"evaluate: {text}")


def _percent(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.1%}"
