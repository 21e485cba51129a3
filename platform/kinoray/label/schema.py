"""Columns of the result table and of its windows, as every part in storage has them."""

import pyarrow as pa

__all__ = ["PREDICTION_SCHEMA", "WINDOW_SCHEMA"]

PREDICTION_SCHEMA = pa.schema(
    [
        pa.field("video_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("offset", pa.int64()),
        pa.field("length", pa.int64()),
        pa.field("row_key", pa.string(), nullable=False),  # names the input: plan.row_keys
        pa.field("status", pa.string(), nullable=False),  # labelled, quarantined or skipped
        pa.field("error_class", pa.string()),
        pa.field("error_text", pa.string()),
        pa.field("label_topk", pa.list_(pa.string())),  # likeliest first; null unless labelled, as all below
        pa.field("id_topk", pa.list_(pa.int32())),
        pa.field("score_topk", pa.list_(pa.float32())),  # probabilities
        pa.field("scores", pa.list_(pa.float32())),  # of all classes in the model's order; null unless asked for
        pa.field("margin", pa.float32()),  # first score less the second
        pa.field("entropy", pa.float32()),  # of all classes, in nats
        pa.field("abstained", pa.bool_(), nullable=False),
        pa.field("embedding", pa.list_(pa.float16())),  # what goes into the classifiers; null unless asked for
        pa.field("segment_logits", pa.list_(pa.float32())),  # [S, C] row by row; null unless asked for
        pa.field("views", pa.int32(), nullable=False),  # of all windows together
        pa.field("windows", pa.int32(), nullable=False),  # 1 unless the video was cut
        pa.field("segments_run", pa.int32(), nullable=False),  # that the network looked at, of all views together
        pa.field("frames_decoded", pa.int32(), nullable=False),
        pa.field("frames_corrupt", pa.int32(), nullable=False),
        pa.field("frames_missing", pa.int32(), nullable=False),  # promised by the file's header, and not there
        pa.field("model_digest", pa.string(), nullable=False),
        pa.field("config_digest", pa.string(), nullable=False),
        pa.field("run_id", pa.string(), nullable=False),
    ]
)
"""One row for every input."""

WINDOW_SCHEMA = pa.schema(
    [
        pa.field("video_id", pa.string(), nullable=False),
        pa.field("row_key", pa.string(), nullable=False),
        pa.field("window", pa.int32(), nullable=False),  # 0, 1, ... in the order of time
        pa.field("begin_s", pa.float64(), nullable=False),
        pa.field("end_s", pa.float64(), nullable=False),
        *(
            PREDICTION_SCHEMA.field(name)
            for name in ("label_topk", "id_topk", "score_topk", "scores", "margin", "entropy", "abstained")
        ),
    ]
)
"""One row for every window of a labelled video, where the settings cut long videos into windows."""
