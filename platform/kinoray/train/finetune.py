"""Start a run from a checkpoint of another one: every weight must fit, but for the classifier of other classes."""

from collections.abc import Sequence
from typing import cast

from torch import nn

from kinoray.config.shared import ModelConfig
from kinoray.network.build import VideoModel
from kinoray.network.checkpoint import (
    find_checkpoint,
    load_meta,
    load_model_state,
    load_weights,
    require_weights,
    weight_shapes,
)
from kinoray.network.parts import classifier_names
from kinoray.storage.objects import Storage

__all__ = ["start_from"]


def start_from(storage: Storage, uri: str, model: VideoModel, config: ModelConfig, labels: Sequence[str]) -> str:
    """Copy the weights of the checkpoint (or run folder) at uri into the model; what was and was not taken, in a line.

    The classifier is taken only if the checkpoint's classes are `labels`, in their order: equal counts are not enough.

    Raises:
        CheckpointNotFound, CheckpointCorrupt: as load_model_state.
        CheckpointMismatch: other weights than the classifier's are missing, not wanted or of another shape.
    """
    where = find_checkpoint(storage, uri)
    meta = load_meta(storage, where)
    shapes, own = weight_shapes(storage, where), model.state_dict()
    classifier = classifier_names(model, config, len(labels)) if meta.labels != tuple(labels) else frozenset[str]()
    left_out: list[str] = []
    for name in sorted(classifier):
        found = f"{list(shapes[name].shape)} there" if name in shapes else "not there"
        left_out.append(f"{name} ({found}, {list(own[name].shape)} here)")
    kept = {name: own[name] for name in classifier}
    require_weights(cast(nn.Module, model), shapes | kept, where)  # before they are read: they may be huge
    load_weights(cast(nn.Module, model), load_model_state(storage, where) | kept, where)
    taken = f"train: starts from {where}: {len(own) - len(left_out)} of {len(own)} weights"
    why = f"; left out, as its {len(meta.labels)} classes are not these {len(labels)}: {', '.join(left_out)}"
    return taken + (why if left_out else "")
