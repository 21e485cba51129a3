"""Score a checkpoint: the labelling job on a labelled catalog, then exact counts of what it got right."""

from dataclasses import asdict

import pyarrow as pa

from kinoray.config.scoring import ScoringConfig, shared_settings
from kinoray.evaluation.config import EvaluateConfig
from kinoray.evaluation.ensemble import ensemble
from kinoray.evaluation.record import (
    ANSWER_COLUMNS,
    EvaluationRecord,
    Origin,
    evaluation_record,
    join_answers,
    print_evaluation,
    true_classes,
    write_evaluation,
)
from kinoray.label.config import LabelConfig
from kinoray.label.open import Labelling, open_labelling
from kinoray.label.verb import refuse_too_many_bad, run_labelling
from kinoray.storage.objects import absolute

__all__ = ["evaluate"]

_TOP = 5


def evaluate(config: EvaluateConfig) -> EvaluationRecord:
    """Label the split, compare with its labels, print the scores and write OUT/evaluation.json.

    Returns:
        What is in evaluation.json.

    Raises:
        CatalogError: a video of the split has no label.
        CheckpointMismatch: the catalog has a class that the checkpoint does not know.
        TooManyBad: more than max_bad_fraction were quarantined; evaluation.json is written all the same.
        KinorayError: as `label`, or as `ensemble`, whose members config.ensemble names.
    """
    config.require_one()
    if config.ensemble:
        return ensemble(config)
    labelling = open_labelling(
        LabelConfig(
            source=config.catalog,
            out=config.out,
            split=config.split,
            top_k=_TOP,
            all_scores=True,
            **shared_settings(config, ScoringConfig),
        ),
        "evaluate",
        check=lambda catalog, meta: true_classes(catalog, meta.labels),
    )
    totals = run_labelling(labelling, config.resources, "evaluate")
    ledger = labelling.ledger
    labels = labelling.meta.labels
    predictions = pa.concat_tables(ledger.read_units(labelling.plan.units, list(ANSWER_COLUMNS)))
    truth = true_classes(labelling.catalog, labels)
    answers = join_answers(labelling.catalog, truth, predictions, len(labels))
    record = evaluation_record(answers, labels, _origin(config, labelling))
    uri = write_evaluation(ledger.storage, absolute(config.out), record)
    print_evaluation("evaluate", record)
    print(f"evaluate: all numbers are in {uri}", flush=True)
    refuse_too_many_bad(totals, config.max_bad_fraction, ledger.root)
    return record


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
