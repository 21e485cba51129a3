"""The study of the paper's table 2 and of what stands beside it: rows of a table as trials of a sweep, and answers.

Each trial is scored by its last epoch, so that nothing is chosen by looking at the videos that it is scored on. Then
its network answers once more, with the frames of each segment, and the flow that belongs to them, in their own order,
reversed, and shuffled: a head that sees order must lose (kinoray.tune.study_page has the tables). What is easy to
break: reversed frames show their own flow, not that of a reversed video.

Shapes: B videos, S segments, T frames a segment
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kinoray.catalog.rows import error_of, refusals_of_columns
from kinoray.catalog.table import REFERENCE_COLUMNS, Catalog, load_catalog
from kinoray.config.shared import digest
from kinoray.console import Progress
from kinoray.errors import CatalogError, JobError, ObjectNotFound, StorageUnavailable
from kinoray.network.batch import FLOW_CHANNELS, DeviceInput, RawBatch, VideoBatch, model_inputs
from kinoray.network.build import SplitModel, VideoModel, is_split
from kinoray.network.checkpoint import load_model
from kinoray.network.process import set_up_to_compute
from kinoray.storage.objects import Storage, join
from kinoray.storage.records import read_record
from kinoray.train.config import TrainConfig
from kinoray.train.decoding import DecodeTask
from kinoray.train.input import decoded_clips
from kinoray.train.runfolder import RunFolder
from kinoray.tune.config import Settings, trial_id
from kinoray.tune.job import trial_run
from kinoray.tune.results import TrialRow, known_trials, read_trial
from kinoray.video.sample import clip_rng

__all__ = [
    "GAINS",
    "ORDERS",
    "PAPER_ROWS",
    "ROWS",
    "X_ROW",
    "Answers",
    "Row",
    "found_trials",
    "in_order",
    "read_answers",
    "score_orders",
    "study_trials",
]

ORDERS = ("forward", "reversed", "shuffled")
"""In which a network sees the frames of each segment."""

_BLOCK = 16  # videos that are decoded at a time
_TOGETHER = 8  # networks that look at a block one after the other
_ANSWERS = "orders.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One network of the study."""

    name: str
    """What a command calls it."""
    title: str
    """What the table calls it."""
    factory: str
    """A short name of a network."""
    options: Mapping[str, Any]
    """Its own options, beside those that the study gives all networks."""
    paper_top1: float | None = None
    """Kinetics-400 top-1 in the paper, percent (tables 2 and 3)."""

    def settings(self, seed: int, options: Mapping[str, Any]) -> Settings:
        """What its trial with a seed sets."""
        if self.factory == "vcm_sdd":
            own = {**options, **self.options}
        else:
            own = {name: value for name, value in options.items() if name.startswith("backbone")} | {**self.options}
        chosen = {f"model.options.{name}": value for name, value in own.items()}
        return {"model.factory": self.factory, "optim.seed": seed, **chosen}


def _paper(name: str, title: str, paper_top1: float, *, stc: bool, mff: bool, scale: str = "frobenius") -> Row:
    return Row(
        name=name,
        title=title,
        factory="vcm_sdd",
        options={"stc": stc, "mff": mff} | ({"scale": scale} if mff else {}),
        paper_top1=paper_top1,
    )


_NEITHER = _paper("no_stc_no_mff", "No_STC No_MFF", 71.7, stc=False, mff=False)
_STC = _paper("stc", "STC No_MFF", 73.9, stc=True, mff=False)
_MFF = _paper("mff", "No_STC MFF, scale as printed", 78.5, stc=False, mff=True)
_MFF_ROOT = _paper("mff_dim", "No_STC MFF, scale sqrt(d)", 78.5, stc=False, mff=True, scale="dim")
_BOTH = _paper("stc_mff", "STC MFF, scale as printed", 80.1, stc=True, mff=True)
_BOTH_ROOT = _paper("stc_mff_dim", "STC MFF, scale sqrt(d)", 80.1, stc=True, mff=True, scale="dim")
PAPER_ROWS = (_NEITHER, _STC, _MFF, _MFF_ROOT, _BOTH, _BOTH_ROOT)
"""The four rows of table 2, those with MFF once for each scale."""
X_ROW = Row(name="x", title="VCM-SDD/X", factory="vcm_sdd_x", options={})
"""The head that sees content and order, on both streams."""

# No dropout in TSN and TSM: the rows of table 2 have none.
ROWS = (
    Row(name="tsn_rgb", title="TSN, RGB", factory="tsn", options={"modality": "rgb", "dropout": 0.0}, paper_top1=71.3),
    Row(name="tsn_flow", title="TSN, flow", factory="tsn", options={"modality": "flow", "dropout": 0.0}),
    Row(name="tsm_rgb", title="TSM, RGB", factory="tsm", options={"modality": "rgb", "dropout": 0.0}, paper_top1=75.1),
    Row(name="tsm", title="TSM, two streams", factory="tsm", options={"modality": "two_stream", "dropout": 0.0}),
    *PAPER_ROWS,
    Row(name="x_rgb", title="VCM-SDD/X, RGB", factory="vcm_sdd_x", options={"modality": "rgb"}),
    Row(name="x_flow", title="VCM-SDD/X, flow", factory="vcm_sdd_x", options={"modality": "flow"}),
    X_ROW,
)
"""Single streams, the four rows of table 2 with both scales, and the head that sees content and order."""
GAINS = (
    *((_STC, _NEITHER), (_MFF, _NEITHER), (_MFF_ROOT, _NEITHER), (_BOTH, _MFF), (_BOTH_ROOT, _MFF_ROOT)),
    (X_ROW, _NEITHER),
)
"""Which rows are compared, the second in each pair with what the first adds to it."""


def study_trials(options: Mapping[str, Any], seeds: Sequence[int], rows: Sequence[Row] = ROWS) -> list[Settings]:
    """All trials, seed by seed, so that a study cut short has whole tables of its first seeds.

    Args:
        options: of every network (backbone, ...); those that are not the backbone's are VCM-SDD's alone.
    """
    return [row.settings(seed, options) for seed in seeds for row in rows]


def found_trials(storage: Storage, out: str, options: Mapping[str, Any]) -> tuple[list[TrialRow], int]:
    """The trials in a study's folder that are rows of ROWS with these options, of all seeds; how many others it has."""
    known = known_trials(storage, out)
    seeds = [settings.get("optim.seed") for settings in known.values()]
    trials = study_trials(options, sorted({seed for seed in seeds if type(seed) is int}))
    names = {trial_id(settings): settings for settings in trials}
    rows = [read_trial(storage, out, name, settings) for name, settings in names.items() if name in known]
    return rows, len(known) - len(rows)


# Order


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """What a trial's last network says of the videos that it was scored on."""

    checkpoint: str
    truth: tuple[int, ...]
    """The class of each video, in the order of the catalog; of those that can be decoded."""
    classes: Mapping[str, tuple[int, ...]]
    """Its first class for each, by the order of the frames (ORDERS)."""
    videos: str = ""
    """Digest of their ids; "" in older records."""
    quarantined: int = 0
    """Videos that could not be decoded."""

    def right(self, order: str = "forward") -> NDArray[np.bool_]:
        """Which videos it got right, bool [N]."""
        return np.equal(self.truth, self.classes[order])


def read_answers(storage: Storage, out: str, name: str) -> Answers | None:
    """What score_orders wrote of a trial; None: nothing yet."""
    try:
        return read_record(storage, join(trial_run(out, name), _ANSWERS), _to_answers)
    except ObjectNotFound:
        return None


def _to_answers(record: dict[str, Any]) -> Answers:
    truth = tuple(map(int, record["truth"]))
    classes = {order: tuple(map(int, record["classes"][order])) for order in ORDERS}
    if any(len(said) != len(truth) for said in classes.values()):
        raise ValueError(f"expected an answer for each of {len(truth)} videos in each order")
    return Answers(
        checkpoint=str(record["checkpoint"]),
        truth=truth,
        classes=classes,
        videos=str(record.get("videos", "")),
        quarantined=int(record.get("quarantined", 0)),
    )


def in_order(x_BST: Tensor, order: str, video_ids: Sequence[str]) -> Tensor:
    """The frames [B, S, T, ...] of each segment in another order; a shuffle is one for each video, drawn from its id.

    A draw that would leave the frames as they are is drawn again, where there is another order.
    """
    num_frames = x_BST.shape[2]
    if order == "reversed":
        return x_BST.flip(2)
    if order == "shuffled":
        shuffled = [
            x_ST[:, torch.from_numpy(_shuffle(name, num_frames))] for x_ST, name in zip(x_BST, video_ids, strict=True)
        ]
        return torch.stack(shuffled)
    return x_BST


def _shuffle(video_id: str, num_frames: int) -> NDArray[np.int64]:
    rng = clip_rng(0, 0, video_id)
    places = np.arange(num_frames)
    while num_frames > 1 and np.array_equal(places, np.arange(num_frames)):
        places = rng.permutation(num_frames)
    return places


@dataclass(frozen=True, slots=True)
class _Network:
    """A trial's last network."""

    trial: str
    checkpoint: str
    model: VideoModel
    backbones: str
    """What tells it from networks with other backbones."""


def score_orders(base: TrainConfig, trials: Sequence[Settings]) -> None:
    """Have the last network of each trial that ended answer for every video of val_split, in each order.

    What has been answered before is left. Networks share decoded clips, and those with the same backbones (frozen ones)
    what these make of a clip.

    Raises:
        CatalogError: no video of the split can be decoded.
        JobError: a trial has no sound checkpoint of its last epoch.
        StorageUnavailable: the store is down.
    """
    storage = Storage(base.storage)
    catalog = load_catalog(storage, base.catalog).select(base.val_split)
    missing = []
    for settings in trials:
        name = trial_id(settings)
        found = RunFolder(storage, trial_run(base.out, name)).checkpoints()
        if not found or found[-1][1].epoch < base.optim.epochs:
            where = trial_run(base.out, name)
            raise JobError(
                f"{where}: expected a sound checkpoint of epoch {base.optim.epochs}, found "
                f"{found[-1][0] if found else 'none'}; remove {where}, and the same command trains it again"
            )
        before = read_answers(storage, base.out, name)
        if before is None or before.checkpoint != found[-1][0]:
            missing.append((name, found[-1][0]))
    progress = Progress(len(missing), "orders", "trials")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    set_up_to_compute(torch.get_num_threads())
    keys = {name: _backbones(load_model(storage, checkpoint)[0], base, checkpoint) for name, checkpoint in missing}
    missing.sort(key=lambda item: keys[item[0]])
    for start in range(0, len(missing), _TOGETHER):
        networks = [
            _Network(name, checkpoint, _on(load_model(storage, checkpoint)[0], device), keys[name])
            for name, checkpoint in missing[start : start + _TOGETHER]
        ]
        for network, answers in zip(networks, _answers(networks, base, storage, catalog, device), strict=True):
            storage.put(join(trial_run(base.out, network.trial), _ANSWERS), json.dumps(asdict(answers)).encode())
            progress.update()
    progress.close()


def _on(model: VideoModel, device: str) -> VideoModel:
    cast(nn.Module, model).to(device)
    return model


@torch.inference_mode()
def _backbones(model: VideoModel, base: TrainConfig, where: str) -> str:
    """Tells networks by what their backbones make of a clip of noise; a network without halves is like no other."""
    if not is_split(model):
        return where
    sample, size = base.clip.sample, base.clip.view.crop_px
    shape = (1, sample.num_segments, sample.frames_per_segment)
    noise = torch.Generator().manual_seed(0)
    rgb = torch.randint(0, 256, (*shape, 3, size, size), generator=noise, dtype=torch.uint8)
    flow = torch.randint(-127, 128, (*shape, FLOW_CHANNELS, size, size), generator=noise, dtype=torch.int8)
    features = model.to_features(**model_inputs(VideoBatch(rgb=rgb, flow=flow), model.input_spec, "cpu"))
    found = hashlib.sha256()
    for name, x in sorted(features.items()):
        found.update(f"{name} {list(x.shape)}".encode())
        found.update(x.contiguous().numpy().data)
    return found.hexdigest()


def _answers(
    networks: Sequence[_Network], base: TrainConfig, storage: Storage, catalog: Catalog, device: str
) -> list[Answers]:
    """Of each network."""
    truth: list[int] = []
    seen: list[str] = []
    classes: list[dict[str, list[int]]] = [{order: [] for order in ORDERS} for _ in networks]
    for batch, video_ids, label_ids in _batches(base, storage, catalog, device):
        truth += label_ids
        seen += video_ids
        for order in ORDERS:
            rgb, flow = (None if x is None else in_order(x, order, video_ids) for x in (batch.rgb, batch.flow))
            for found, logits in zip(classes, _logits(networks, VideoBatch(rgb=rgb, flow=flow), device), strict=True):
                found[order] += logits.argmax(dim=1).tolist()
    if not truth:
        raise CatalogError(f"{base.catalog}: no video of {base.val_split} can be decoded")
    return [
        Answers(
            checkpoint=network.checkpoint,
            truth=tuple(truth),
            classes={order: tuple(ids) for order, ids in found.items()},
            videos=digest(seen),
            quarantined=len(catalog) - len(seen),
        )
        for network, found in zip(networks, classes, strict=True)
    ]


@torch.inference_mode()
def _logits(networks: Sequence[_Network], batch: VideoBatch, device: str) -> list[Tensor]:
    """Of networks of which those with the same backbones stand side by side, [B, C] each."""
    logits: list[Tensor] = []
    for _, same in itertools.groupby(networks, key=lambda network: network.backbones):
        models = [network.model for network in same]
        first = models[0]
        inputs = model_inputs(batch, first.input_spec, device)
        if is_split(first):
            features = first.to_features(**inputs)
            logits += [cast(SplitModel, model).from_features(features).cpu() for model in models]
        else:
            logits += [model(**inputs).cpu() for model in models]
    return logits


def _batches(
    base: TrainConfig, storage: Storage, catalog: Catalog, device: str
) -> Iterator[tuple[VideoBatch, list[str], list[int]]]:
    """Clips of the middle frames as training scores them, with the videos' ids and classes."""
    clip = base.clip.for_network(FLOW_CHANNELS)
    task = DecodeTask(storage=storage, clip=clip)
    finish = DeviceInput(clip.flow.bound_px, device)
    table = catalog.table.select(["video_id", "label_id", *REFERENCE_COLUMNS])
    for start in range(0, table.num_rows, _BLOCK):
        block = table.slice(start, _BLOCK)
        block = block.append_column("row", pa.array(np.arange(start, start + block.num_rows))).combine_chunks()
        columns = task(block)
        for refusal in refusals_of_columns(columns):
            error = None if refusal is None else error_of(refusal)
            if isinstance(error, StorageUnavailable):
                raise error
        ok = columns["ok"]
        if not ok.any():
            continue
        clips = decoded_clips(columns, ok)
        kept = block.filter(pa.array(ok))
        batch = finish(clips) if isinstance(clips, RawBatch) else clips
        yield batch, kept["video_id"].to_pylist(), kept["label_id"].to_pylist()
