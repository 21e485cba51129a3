"""Score a checkpoint: the labelling job on a labelled catalog, then exact counts of what it got right.

Or an ensemble: the stored scores of several evaluations, averaged, are a table of predictions and an evaluation like
any other. What is easy to break: members must be joined by the names of videos and classes, never by their places; and
a video that one member could not read must not be answered by the others alone, since that is another ensemble.
"""

import uuid
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from kinoray.config.scoring import ScoringConfig, shared_settings
from kinoray.config.shared import digest
from kinoray.console import many
from kinoray.errors import CatalogError, CheckpointMismatch, ConfigError
from kinoray.evaluation.config import EvaluateConfig
from kinoray.evaluation.multilabel import (
    SET_COLUMNS,
    MultilabelRecord,
    multilabel_record,
    print_multilabel,
    require_truth,
)
from kinoray.evaluation.record import (
    ANSWER_COLUMNS,
    Evaluation,
    EvaluationRecord,
    Origin,
    evaluation_record,
    join_answers,
    print_evaluation,
    read_evaluation,
    true_classes,
    write_evaluation,
)
from kinoray.label.config import LabelConfig
from kinoray.label.ledger import Ledger
from kinoray.label.open import Labelling, open_labelling
from kinoray.label.plan import survey
from kinoray.label.unit import PREDICTION_SCHEMA, JobRecord, Unit, labelling_id
from kinoray.label.verb import refuse_too_many_bad, run_labelling
from kinoray.label.work import work_of
from kinoray.storage.leftovers import scratch_folder
from kinoray.storage.objects import Storage, absolute, join
from kinoray.storage.records import require_folder
from kinoray.video.info import MAX_COUNT

__all__ = ["evaluate"]

_TOP = 5
_UNIT_SIZE = 1024  # rows: nothing is decoded, so units may be large
_COUNTS = ("views", "windows", "segments_run", "frames_decoded", "frames_corrupt", "frames_missing")
_COLUMNS = ("uri", "error_class", "error_text", "scores", *_COUNTS)
_Row = dict[str, Any]


def evaluate(config: EvaluateConfig) -> EvaluationRecord | MultilabelRecord:
    """Label the split, compare with its labels, print the scores and write OUT/evaluation.json.

    Returns:
        What is in evaluation.json.

    Raises:
        CatalogError: a video of the split has no label.
        CheckpointMismatch: the catalog has a class that the checkpoint does not know.
        TooManyBad: more than max_bad_fraction were quarantined; evaluation.json is written all the same.
        KinorayError: as `label`, or a member that config.ensemble names cannot be averaged with the others.
    """
    config.require_one()
    if config.ensemble:
        return _ensemble(config)
    from kinoray.label.job import Workers  # here: it imports ray, which an ensemble need not wait for

    asked = LabelConfig(
        source=config.catalog,
        out=config.out,
        split=config.split,
        all_scores=True,
        calibration=config.calibration,
        **shared_settings(config, ScoringConfig),
    )
    with Workers(config.resources, "evaluate") as workers:
        labelling = open_labelling(asked, "evaluate", check=require_truth, look=workers.look)
        totals = run_labelling(labelling, config.resources, "evaluate", workers=workers)
    ledger = labelling.ledger
    record: EvaluationRecord | MultilabelRecord
    if labelling.meta.scores == "sigmoid":
        record = _several_record(config, labelling)
        print_multilabel("evaluate", record)
    else:
        record = _one_record(config, labelling)
        print_evaluation("evaluate", record)
    uri = write_evaluation(ledger.storage, absolute(config.out), record)
    print(f"evaluate: all numbers are in {uri}", flush=True)
    refuse_too_many_bad(totals, config.max_bad_fraction, ledger.root)
    return record


def _one_record(config: EvaluateConfig, labelling: Labelling) -> EvaluationRecord:
    labels = labelling.meta.labels
    predictions = pa.concat_tables(labelling.ledger.read_units(labelling.plan.units, list(ANSWER_COLUMNS)))
    truth = true_classes(labelling.catalog, labels)
    answers = join_answers(labelling.catalog, truth, predictions, len(labels))
    return evaluation_record(answers, labels, _origin(config, labelling))


def _several_record(config: EvaluateConfig, labelling: Labelling) -> MultilabelRecord:
    labels, rule = labelling.meta.labels, labelling.job.answer
    predictions = pa.concat_tables(labelling.ledger.read_units(labelling.plan.units, list(SET_COLUMNS)))
    thresholds = rule.thresholds or (rule.threshold,) * len(labels)
    return multilabel_record(labelling.catalog, labels, predictions, thresholds, _origin(config, labelling))


def _origin(config: EvaluateConfig, labelling: Labelling) -> Origin:
    job = labelling.job
    return Origin(
        catalog=absolute(config.catalog),
        split=config.split,
        catalog_digest=labelling.catalog.digest,
        checkpoint=job.checkpoint,
        protocol=config.protocol,
        views=job.views.num_views,
        view_average=job.views.average,
        num_segments=job.clip.sample.num_segments,
        frames_per_segment=job.clip.sample.frames_per_segment,
        inference=asdict(config.inference),
        model_digest=job.model_digest,
        config_digest=job.config_digest,
        predictions=labelling.ledger.root,
    )


def _ensemble(config: EvaluateConfig) -> EvaluationRecord:
    """Average the members' probabilities, commit the table, print the scores and write OUT/evaluation.json.

    Returns:
        What is in evaluation.json.

    Raises:
        CheckpointMismatch: the members know different classes.
        CatalogError: they were evaluated on another catalog, or on different videos of it.
        ConfigError: a member holds no scores of all classes.
        KinorayError: a member cannot be read, or the store fails.
    """
    storage = Storage(config.storage)
    require_folder(storage, "out", config.out, "label")
    members = [read_evaluation(storage, uri, catalog=config.catalog, columns=_COLUMNS) for uri in config.ensemble]
    for other in members[1:]:
        _check_alike(members[0], other)
    weights = np.array(config.weights or [1.0] * len(members))
    settings = {
        "ensemble": [member.record.origin.config_digest for member in members],
        "weights": weights.tolist(),
    }
    model_digest = digest([member.record.origin.model_digest for member in members])
    config_digest = digest(settings)
    catalog = members[0].catalog
    labels = members[0].labels
    ledger = Ledger(storage, join(absolute(config.out), labelling_id(model_digest, config_digest)))
    origin = Origin(
        members=tuple(member.uri for member in members),
        weights=tuple(weights.tolist()),
        views=sum(member.record.origin.views for member in members),
        catalog=absolute(config.catalog),
        split=members[0].record.origin.split,
        catalog_digest=catalog.digest,
        model_digest=model_digest,
        config_digest=config_digest,
        predictions=ledger.root,
    )
    ledger.pin_job(
        JobRecord(
            checkpoint="",
            members=origin.members or (),
            model_digest=model_digest,
            config_digest=config_digest,
            labels=labels,
            settings=settings,
        )
    )
    with scratch_folder("evaluate") as folder:
        found = survey(catalog, folder)
        plan = ledger.plan(found, _UNIT_SIZE, folder)
        done = ledger.committed()
        missing = [unit for unit in plan.units if unit.unit_id not in done]
        work = work_of(catalog, found.keys, ledger.labelling_id, missing)
        _commit(ledger, work, members, weights / weights.sum(), origin)
        ledger.finish(plan, ledger.check(plan, found.keys))

    predictions = pa.concat_tables(ledger.read_units(plan.units, list(ANSWER_COLUMNS)))
    answers = join_answers(catalog, members[0].answers.truth, predictions, len(labels))
    record = evaluation_record(answers, labels, origin)
    uri = write_evaluation(storage, absolute(config.out), record)
    print_evaluation("evaluate", record)
    for member in members:
        alone = member.answers.scores.top1
        print(f"evaluate: alone, top-1 of {many(alone.evaluated, 'video')} is {alone.value:.1%}: {member.uri}")
    print(f"evaluate: all numbers are in {uri}", flush=True)
    return record


def _check_alike(first: Evaluation, other: Evaluation) -> None:
    """Raise unless both are of the same classes and videos; true labels are those of the one catalog."""
    where = f"{first.uri} and {other.uri}"
    if set(first.labels) != set(other.labels):
        raise CheckpointMismatch(
            f"{where} cannot be averaged, their classes differ: {_difference(first.labels, other.labels)}; "
            "ensemble networks that were trained on the same classes"
        )
    if set(first.answers.video_ids) != set(other.answers.video_ids):
        raise CatalogError(
            f"{where} cannot be averaged, their videos differ: "
            f"{_difference(first.answers.video_ids, other.answers.video_ids)}; evaluate both on one split"
        )
    for one in (first, other):
        rows = one.predictions.filter(pc.equal(one.predictions.column("status"), "labelled"))
        if rows.column("scores").null_count:
            raise ConfigError(
                f"{one.uri} does not hold the scores of all {len(one.labels)} classes, only of the first few, which "
                "cannot be averaged; evaluate it again (kinoray evaluate stores them all)"
            )


def _difference(one: Any, other: Any) -> str:
    only = [sorted(set(one) - set(other)), sorted(set(other) - set(one))]
    return " and ".join(
        f"only the {name} has {_some(names)}" for name, names in zip(("first", "second"), only, strict=True) if names
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _commit(
    ledger: Ledger,
    work: Iterable[tuple[Unit, pa.Table]],
    members: list[Evaluation],
    weights: NDArray[np.float64],
    origin: Origin,
) -> None:
    """Write these units."""
    rows_of = [
        {video_id: row for row, video_id in enumerate(member.predictions.column("video_id").to_pylist())}
        for member in members
    ]
    run_id = uuid.uuid4().hex[:16]
    shared: _Row = {
        "abstained": False,
        "run_id": run_id,
        "model_digest": origin.model_digest,
        "config_digest": origin.config_digest,
    }
    for unit, rows in work:
        parts = [
            member.predictions.take([places[video_id] for video_id in rows.column("video_id").to_pylist()]).to_pylist()
            for member, places in zip(members, rows_of, strict=True)
        ]
        records = [
            {
                **{name: row[name] for name in ("video_id", "uri", "offset", "length")},
                "row_key": key,
                **_averaged(list(said), members, weights),
                **shared,
            }
            for key, row, *said in zip(unit.keys, rows.to_pylist(), *parts, strict=True)
        ]
        ledger.commit(unit, pa.Table.from_pylist(records, schema=PREDICTION_SCHEMA), run_id)


def _averaged(said: list[_Row], members: list[Evaluation], weights: NDArray[np.float64]) -> _Row:
    """The columns of one video, from those of all members."""
    counts = {
        **{
            name: min(MAX_COUNT, sum(row[name] for row in said)) for name in ("views", "segments_run", "frames_decoded")
        },
        **{name: max(row[name] for row in said) for name in ("windows", "frames_corrupt", "frames_missing")},
    }
    for row, member in zip(said, members, strict=True):
        if row["status"] != "labelled":
            return {
                **counts,
                "status": row["status"],
                "views": 0,
                "windows": 0,
                "segments_run": 0,
                "error_class": row["error_class"],
                "error_text": f"in {member.uri}: {row['error_text']}",
            }
    labels = members[0].labels
    p = np.zeros(len(labels))
    for row, member, weight in zip(said, members, weights, strict=True):
        scores = dict(zip(member.labels, row["scores"], strict=True))
        p += weight * np.array([scores[label] for label in labels])
    p = np.minimum(p, 1.0)  # weights are rounded
    order = np.argsort(-p, kind="stable")
    best = order[:_TOP]
    known = p[p > 0]
    return {
        "status": "labelled",
        **counts,
        "label_topk": [labels[index] for index in best],
        "id_topk": best.tolist(),
        "score_topk": p[best].tolist(),
        "scores": p,
        "margin": float(p[order[0]] - p[order[1]]) if len(p) > 1 else float(p[0]),
        "entropy": float(-(known * np.log(known)).sum()),
    }
