"""The study of the paper's table 2 and of what stands beside it: rows of a table as trials of a sweep, read as pairs.

Each trial is scored by its last epoch, so that nothing is chosen by looking at the videos that it is scored on. Then
its network answers once more, with the frames of each segment, and the flow that belongs to them, in their own order,
reversed, and shuffled: a head that sees order must lose. What is easy to break: reversed frames show their own flow,
not that of a reversed video.

Shapes: B videos, S segments, T frames a segment
"""

import hashlib
import html
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kinoray.catalog.rows import error_of, refusals_of_columns
from kinoray.catalog.table import REFERENCE_COLUMNS, Catalog, load_catalog
from kinoray.config.shared import ModelConfig
from kinoray.console import Progress
from kinoray.errors import CatalogError, JobError, ObjectNotFound, StorageUnavailable
from kinoray.network.batch import FLOW_CHANNELS, VideoBatch, model_inputs
from kinoray.network.build import VideoModel, build_outline, is_split, without_start_weights
from kinoray.network.checkpoint import load_model
from kinoray.network.cost import describe
from kinoray.storage.objects import Storage, join
from kinoray.storage.records import read_record
from kinoray.train.config import TrainConfig
from kinoray.train.decoding import DecodeTask
from kinoray.train.runfolder import RunFolder
from kinoray.tune.config import Settings, apply, trial_id
from kinoray.tune.job import trial_run
from kinoray.tune.results import TrialRow
from kinoray.video.sample import clip_rng

__all__ = [
    "ORDERS",
    "ROWS",
    "Answers",
    "PairedGain",
    "Row",
    "in_order",
    "paired_gain",
    "read_answers",
    "score_orders",
    "study_costs",
    "study_page",
    "study_plot",
    "study_trials",
]

ORDERS = ("forward", "reversed", "shuffled")
"""In which a network sees the frames of each segment."""

_BLOCK = 16  # videos that are decoded at a time
_TOGETHER = 16  # networks that look at a block one after the other
_DRAWS = 20_000
_ANSWERS = "orders.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One network of the study."""

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


def _paper(title: str, paper_top1: float, *, stc: bool, mff: bool, scale: str = "frobenius") -> Row:
    return Row(
        title=title,
        factory="vcm_sdd",
        options={"stc": stc, "mff": mff} | ({"scale": scale} if mff else {}),
        paper_top1=paper_top1,
    )


_NEITHER = _paper("No_STC No_MFF", 71.7, stc=False, mff=False)
_STC = _paper("STC No_MFF", 73.9, stc=True, mff=False)
_MFF = _paper("No_STC MFF, scale as printed", 78.5, stc=False, mff=True)
_MFF_ROOT = _paper("No_STC MFF, scale sqrt(d)", 78.5, stc=False, mff=True, scale="dim")
_BOTH = _paper("STC MFF, scale as printed", 80.1, stc=True, mff=True)
_BOTH_ROOT = _paper("STC MFF, scale sqrt(d)", 80.1, stc=True, mff=True, scale="dim")
_PAPERS = (_NEITHER, _STC, _MFF, _MFF_ROOT, _BOTH, _BOTH_ROOT)
_X = Row(title="VCM-SDD/X", factory="vcm_sdd_x", options={})

# No dropout in TSN and TSM: the rows of table 2 have none.
ROWS = (
    Row(title="TSN, RGB", factory="tsn", options={"modality": "rgb", "dropout": 0.0}, paper_top1=71.3),
    Row(title="TSN, flow", factory="tsn", options={"modality": "flow", "dropout": 0.0}),
    Row(title="TSM, RGB", factory="tsm", options={"modality": "rgb", "dropout": 0.0}, paper_top1=75.1),
    Row(title="TSM, two streams", factory="tsm", options={"modality": "two_stream", "dropout": 0.0}),
    *_PAPERS,
    Row(title="VCM-SDD/X, RGB", factory="vcm_sdd_x", options={"modality": "rgb"}),
    Row(title="VCM-SDD/X, flow", factory="vcm_sdd_x", options={"modality": "flow"}),
    _X,
)
"""Single streams, the four rows of table 2 with both scales, and the head that sees content and order."""
_GAINS = ((_STC, _NEITHER), (_MFF, _NEITHER), (_MFF_ROOT, _NEITHER), (_BOTH, _MFF), (_BOTH_ROOT, _MFF_ROOT))


def study_trials(options: Mapping[str, Any], seeds: Sequence[int], rows: Sequence[Row] = ROWS) -> list[Settings]:
    """All trials, seed by seed, so that a study cut short has whole tables of its first seeds.

    Args:
        options: of every network (backbone, ...); those that are not the backbone's are VCM-SDD's alone.
    """
    return [row.settings(seed, options) for seed in seeds for row in rows]


def study_costs(base: TrainConfig) -> dict[str, int]:
    """Multiply-accumulates of one clip by the title of each row."""
    sample, view = base.clip.sample, base.clip.view
    found = {}
    for row in ROWS:
        config = apply(replace(base, model=ModelConfig()), row.settings(0, base.model.options)).model
        model = build_outline(without_start_weights(config), 2)
        found[row.title] = describe(model, sample.num_segments, sample.frames_per_segment, view.crop_px).macs
    return found


# Order


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """What a trial's last network says of the videos that it was scored on."""

    checkpoint: str
    truth: tuple[int, ...]
    """The class of each video, in the order of the catalog; of those that can be decoded."""
    classes: Mapping[str, tuple[int, ...]]
    """Its first class for each, by the order of the frames (ORDERS)."""

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
    classes = {order: tuple(map(int, record["classes"][order])) for order in ORDERS}
    return Answers(checkpoint=str(record["checkpoint"]), truth=tuple(map(int, record["truth"])), classes=classes)


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


def score_orders(base: TrainConfig, trials: Sequence[Settings]) -> None:
    """Have the last network of each trial that ended answer for every video of val_split, in each order.

    What has been answered before is left. Networks with the same backbones (frozen ones) share what these make of a
    clip.

    Raises:
        CatalogError: no video of the split can be decoded.
        JobError: a trial has no checkpoint.
        StorageUnavailable: the store is down.
    """
    storage = Storage(base.storage)
    catalog = load_catalog(storage, base.catalog).select(base.val_split)
    missing = []
    for settings in trials:
        name = trial_id(settings)
        found = RunFolder(storage, trial_run(base.out, name)).checkpoints()
        if not found:
            raise JobError(f"trial {name} of {base.out} has no checkpoint; the same command goes on with it")
        before = read_answers(storage, base.out, name)
        if before is None or before.checkpoint != found[-1][0]:
            missing.append((name, found[-1][0]))
    progress = Progress(len(missing), "orders", "trials")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    groups: dict[str, list[tuple[str, str]]] = {}
    for name, checkpoint in missing:
        key = _backbones(load_model(storage, checkpoint)[0], base, checkpoint)
        groups.setdefault(key, []).append((name, checkpoint))
    for members in groups.values():
        for start in range(0, len(members), _TOGETHER):
            some = members[start : start + _TOGETHER]
            networks = [_Network(name, uri, _on(load_model(storage, uri)[0], device)) for name, uri in some]
            for network, answers in _answers(networks, base, storage, catalog, device):
                record = {"checkpoint": answers.checkpoint, "truth": answers.truth, "classes": dict(answers.classes)}
                storage.put(join(trial_run(base.out, network.trial), _ANSWERS), json.dumps(record).encode())
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
) -> Iterator[tuple[_Network, Answers]]:
    truth: list[int] = []
    classes: list[dict[str, list[int]]] = [{order: [] for order in ORDERS} for _ in networks]
    for batch, video_ids, label_ids in _batches(base, storage, catalog):
        truth += label_ids
        for order in ORDERS:
            rgb, flow = (None if x is None else in_order(x, order, video_ids) for x in (batch.rgb, batch.flow))
            for found, logits in zip(classes, _logits(networks, VideoBatch(rgb=rgb, flow=flow), device), strict=True):
                found[order] += logits.argmax(dim=1).tolist()
    if not truth:
        raise CatalogError(f"{base.catalog}: no video of {base.val_split} can be decoded")
    for network, found in zip(networks, classes, strict=True):
        kept = {order: tuple(ids) for order, ids in found.items()}
        yield network, Answers(checkpoint=network.checkpoint, truth=tuple(truth), classes=kept)


@torch.inference_mode()
def _logits(networks: Sequence[_Network], batch: VideoBatch, device: str) -> list[Tensor]:
    """Of networks with the same backbones, [B, C] each."""
    first = networks[0].model
    inputs = model_inputs(batch, first.input_spec, device)
    if not is_split(first):
        return [network.model(**inputs).cpu() for network in networks]
    features = first.to_features(**inputs)
    return [cast(Any, network.model).from_features(features).cpu() for network in networks]


def _batches(
    base: TrainConfig, storage: Storage, catalog: Catalog
) -> Iterator[tuple[VideoBatch, list[str], list[int]]]:
    """Clips of the middle frames as training scores them, with the videos' ids and classes."""
    task = DecodeTask(storage=storage, clip=base.clip.for_network(FLOW_CHANNELS))
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
        rgb, flow = (torch.from_numpy(columns[name][ok]) for name in ("rgb", "flow"))
        kept = block.filter(pa.array(ok))
        yield VideoBatch(rgb=rgb, flow=flow), kept["video_id"].to_pylist(), kept["label_id"].to_pylist()


# Numbers


@dataclass(frozen=True, slots=True)
class PairedGain:
    """How much more often one network is right than another, in points."""

    points: float
    low: float
    """95% interval over videos."""
    high: float
    p: float
    """Two-sided."""


def paired_gain(ours: Mapping[int, NDArray[np.bool_]], theirs: Mapping[int, NDArray[np.bool_]]) -> PairedGain | None:
    """Compare runs of equal seeds on the same videos; None where no seed is in both.

    Of each video the difference is the mean over the seeds of being right, ours less theirs. p is that of a sign test
    by permutation: how often random signs of these differences give a mean as far from 0, of 20,000 draws and the one
    that was found. The interval is normal, from the differences' sample deviation.

    Args:
        ours, theirs: which videos were right, bool [N], by seed.
    """
    seeds = sorted(set(ours) & set(theirs))
    if not seeds:
        return None
    difference_N = np.mean([ours[seed].astype(float) - theirs[seed] for seed in seeds], axis=0)
    mean = float(difference_N.mean())
    spread = 1.96 * float(difference_N.std(ddof=1)) / math.sqrt(len(difference_N)) if len(difference_N) > 1 else 1.0
    different_N = difference_N[difference_N != 0]
    rng = np.random.Generator(np.random.PCG64(0))
    num_as_far = 1
    for draws in np.split(np.arange(_DRAWS), 20):
        signs = rng.integers(0, 2, (len(draws), len(different_N))) * 2 - 1
        sums = np.abs(signs @ different_N)
        num_as_far += int(np.count_nonzero(sums >= abs(different_N.sum()) - 1e-9))
    return PairedGain(100 * mean, 100 * (mean - spread), 100 * (mean + spread), num_as_far / (_DRAWS + 1))


def _mean(values: Sequence[float]) -> str:
    """`82.6 +- 5.4`, or the mean alone of a single run; `-` of none."""
    if not values:
        return "-"
    spread = f" +- {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *(["---:"] * (len(header) - 1))], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


class _Study:
    """What has been found of each row."""

    def __init__(self, storage: Storage, base: TrainConfig, found: Sequence[TrialRow], seeds: Sequence[int]) -> None:
        by_id = {row.trial: row for row in found if row.status != "failed" and row.curve}
        self.answers: dict[str, dict[int, Answers]] = {}
        for row in ROWS:
            ids = {seed: trial_id(row.settings(seed, base.model.options)) for seed in seeds}
            answers = {seed: read_answers(storage, base.out, name) for seed, name in ids.items() if name in by_id}
            self.answers[row.title] = {seed: one for seed, one in answers.items() if one is not None}

    def top1(self, row: Row, order: str = "forward") -> list[float]:
        """Percent, a seed each."""
        return [100 * float(one.right(order).mean()) for one in self.answers[row.title].values()]

    def gain(self, row: Row, over: Row) -> PairedGain | None:
        ours, theirs = ({seed: one.right() for seed, one in self.answers[each.title].items()} for each in (row, over))
        return paired_gain(ours, theirs)

    def best_of_paper(self) -> Row:
        """The row of the paper with the highest mean."""
        return max(_PAPERS, key=lambda row: statistics.fmean(self.top1(row) or [0.0]))


def study_page(storage: Storage, base: TrainConfig, found: Sequence[TrialRow], seeds: Sequence[int]) -> str:
    """Top-1 of every row, its frames in order, reversed and shuffled, its cost, and paired differences: Markdown.

    Means and sample deviations are over the seeds. Trials that failed, or have not answered yet, are left out.
    """
    study = _Study(storage, base, found, seeds)
    costs = study_costs(base)
    table = []
    for row in ROWS:
        paper = "-" if row.paper_top1 is None else f"{row.paper_top1:.1f}"
        cells = [_mean(study.top1(row, order)) for order in ORDERS]
        table.append([row.title, *cells, f"{costs[row.title] / 1e9:.3f}", paper])
    best = study.best_of_paper()
    gains = []
    for row, over in (*_GAINS, (_X, _NEITHER), (_X, best)):
        gain = study.gain(row, over)
        name = f"{row.title} over {over.title}"
        paper = "-"
        if row.paper_top1 is not None and over.paper_top1 is not None:
            paper = f"{row.paper_top1 - over.paper_top1:+.1f}"
        if gain is None:
            gains.append([name, "-", "-", "-", paper])
        else:
            interval = f"{gain.low:+.1f} to {gain.high:+.1f}"
            gains.append([name, f"{gain.points:+.1f}", interval, f"{gain.p:.4f}", paper])
    tables = (
        _markdown(["top-1, %", *ORDERS, "GMAC a clip", "paper, K400"], table),
        _markdown(["points", "difference", "95 % interval", "p", "paper, K400"], gains),
    )
    return "\n\n".join(tables) + "\n"


def study_plot(storage: Storage, base: TrainConfig, found: Sequence[TrialRow], seeds: Sequence[int]) -> str:
    """Top-1 against multiply-accumulates, with the spread over seeds: an SVG picture."""
    study = _Study(storage, base, found, seeds)
    costs = study_costs(base)
    drawn = [row for row in ROWS if study.top1(row)]
    most = max((costs[row.title] for row in drawn), default=1) * 1.05
    width, height, left, top = 420, 300, 50, 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {height + 70}" font-family="sans-serif"',
        ' font-size="12">',
        f'<rect width="760" height="{height + 70}" fill="white"/>',
    ]
    for share in range(0, 101, 20):
        y = top + height * (1 - share / 100)
        parts.append(f'<line x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{share}</text>')
    for step in range(5):
        x = left + width * step / 4
        parts.append(
            f'<text x="{x:.1f}" y="{top + height + 18}" text-anchor="middle">{most * step / 4 / 1e9:.2f}</text>'
        )
    parts.append(f'<text x="{left + width / 2}" y="{top + height + 38}" text-anchor="middle">GMAC a clip</text>')
    parts.append(f'<text x="{left - 40}" y="{top - 6}">top-1, %</text>')
    for number, row in enumerate(drawn, 1):
        values = study.top1(row)
        mean, spread = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
        x = left + width * costs[row.title] / most
        y, low, high = (top + height * (1 - value / 100) for value in (mean, mean - spread, mean + spread))
        colour = {"vcm_sdd": "#1f6fb4", "vcm_sdd_x": "#c0392b"}.get(row.factory, "#777")
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="{colour}"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{x + 6:.1f}" y="{y + 4:.1f}" fill="{colour}">{number}</text>')
        legend = html.escape(f"{number}  {row.title}: {mean:.1f}")
        parts.append(f'<text x="{left + width + 20}" y="{top + 18 * number}" fill="{colour}">{legend}</text>')
    return "\n".join([*parts, "</svg>", ""])
