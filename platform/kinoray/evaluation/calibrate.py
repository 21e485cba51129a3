"""`kinoray calibrate`: label a set whose classes are known, and fit on it what `label --calibration` takes."""

from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kinoray.errors import CatalogError
from kinoray.evaluation.config import CalibrateConfig
from kinoray.evaluation.fit import fit_margins, fit_temperature, likelihood_and_error, to_json
from kinoray.evaluation.summary import true_classes
from kinoray.label.calibration import Calibrated
from kinoray.label.open import Labelling, label_config, open_labelling
from kinoray.label.verb import refuse_too_many_bad, run_labelling
from kinoray.network.anytime import SegmentConsensus
from kinoray.storage.objects import Storage, absolute, join

__all__ = ["calibrate"]

_COLUMNS = ["row_key", "status", "scores", "segment_logits"]


def calibrate(config: CalibrateConfig) -> dict[str, Any]:
    """Label the split, fit temperature and margins, write OUT/calibration.json and print what they give.

    Returns:
        What is in calibration.json, with `uri`.

    Raises:
        CatalogError: a video of the split has no label, or none could be read.
        TooManyBad: more than max_bad_fraction were quarantined; calibration.json is written all the same.
        KinorayError: as `label`.
    """
    labelling = open_labelling(
        label_config(config, source=config.catalog, all_scores=True),
        "calibrate",
        check=lambda catalog, meta: true_classes(catalog, meta.labels),
        segments=True,
    )
    totals = run_labelling(labelling, config.resources, "calibrate")
    calibrated = _fit(labelling, labelling.consensus)
    uri = join(absolute(config.out), "calibration.json")
    Storage(config.storage).put(uri, to_json(calibrated))
    _print(calibrated, uri)
    refuse_too_many_bad(totals, config.max_bad_fraction, labelling.ledger.root)
    return asdict(calibrated) | {"uri": uri}


def _fit(labelling: Labelling, consensus: SegmentConsensus | None) -> Calibrated:
    rows = pa.concat_tables(labelling.ledger.read_units(labelling.plan.units, _COLUMNS)).to_pylist()
    rows = [row for row in rows if row["status"] == "labelled"]
    if not rows:
        raise CatalogError(f"no video of the catalog could be read, so nothing was fitted; see {labelling.ledger.root}")
    classes = dict(zip(labelling.keys, true_classes(labelling.catalog, labelling.meta.labels), strict=True))
    truth = np.array([classes[row["row_key"]] for row in rows], np.int64)
    smallest = float(np.finfo(np.float32).tiny)
    logits = np.log(np.maximum(np.array([row["scores"] for row in rows], np.float64), smallest))
    temperature = fit_temperature(logits, truth)
    before, after = (likelihood_and_error(logits, truth, value) for value in (1.0, temperature))
    sample = labelling.job.clip.sample
    margins = fit_margins(_segments(rows, sample.num_segments), consensus) if consensus else ()
    return Calibrated(
        model_digest=labelling.job.model_digest,
        num_segments=sample.num_segments,
        frames_per_segment=sample.frames_per_segment,
        num_videos=len(rows),
        temperature=temperature,
        nll=(before[0], after[0]),
        ece=(before[1], after[1]),
        margins=margins,
    )


def _segments(rows: list[dict[str, Any]], num_segments: int) -> NDArray[np.float32]:
    return np.array([row["segment_logits"] for row in rows], np.float32).reshape(len(rows), num_segments, -1)


def _print(calibrated: Calibrated, uri: str) -> None:
    print(
        f"calibrate: temperature {calibrated.temperature:.3f} on {calibrated.num_videos} videos: calibration error "
        f"{calibrated.ece[0]:.1%} -> {calibrated.ece[1]:.1%}, loss {calibrated.nll[0]:.3f} -> {calibrated.nll[1]:.3f}"
    )
    for point in calibrated.margins:
        print(
            f"calibrate: early exit at margin {point.margin:.3f}: {point.changed} labels changed (at most "
            f"{point.upper:.2%} with 95% certainty), {point.segments_saved:.0%} of the segments saved"
        )
    print(f"calibrate: written to {uri}; use it with: kinoray label ... --calibration {uri}", flush=True)
