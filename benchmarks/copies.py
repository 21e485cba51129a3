"""Where copies and different videos part: `python benchmarks/copies.py CLIPS [--grid FOLDER] [--networks NAME ...]`.

CLIPS is a folder of real videos. Stretches of three seconds are cut out of each and brought to 256 px: different clips
of one scene. The first of each is also encoded anew in the ways of COPIES. GRID has clips of one talker before one wall
(GRID corpus), of which some are taken: to the eye nearly the same, and different clips all the same. Networks: i3d, by
pip as in the README; lite0, EfficientNet-Lite0 with its ImageNet weights under TSN, 8 frames of a clip. Embeddings are
those that `kinoray label --embeddings` stores, in bfloat16 to save time. Of each network are shown

- similarities: of copies to their stretch, of stretches of one video and of several, of the talker's clips
- at some thresholds of `kinoray labels dedup`: the share of copies that share a group with their stretch; of stretches
  that share one with another stretch of their video, or with one of another video; and of the talker's clips that
  share one with any other (they are a table of their own)

Bars, at the default threshold: 90% of the copies are found; no stretch shares a group with one of another video.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import torch

import kinoray
from kinoray.config.shared import ClipConfig, ModelConfig, SampleConfig
from kinoray.demo.videos import make_video
from kinoray.library.config import DedupConfig
from kinoray.library.vectors import near_groups
from kinoray.network.build import build_model
from kinoray.network.checkpoint import CheckpointMeta, save_checkpoint
from kinoray.storage.objects import Storage
from next_labels import weights_file

SIDE_PX, STRETCH_S, AT_LEAST_S = 256, 3, 1.5
COPIES = ("half size", "crf 33", "12.5 fps", "mpeg4 in avi", "trimmed by 5%")
DEFAULT = DedupConfig(predictions="out").threshold
THRESHOLDS = sorted({0.9, 0.95, 0.97, 0.98, 0.99, 0.995, DEFAULT})


# Files


def stretches(path: Path, most: int) -> Iterator[tuple[np.ndarray, Fraction]]:
    """Frames, uint8 [N, H, W, 3] with even sides, the short one SIDE_PX at most, and their rate."""
    with av.open(str(path)) as video:
        rate = Fraction(video.streams.video[0].average_rate or 25)
        held: list[np.ndarray] = []
        num_found = 0
        for frame in video.decode(video=0):
            scale = min(1.0, SIDE_PX / min(frame.width, frame.height))
            width, height = (round(side * scale / 2) * 2 for side in (frame.width, frame.height))
            held.append(frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="AREA"))
            if len(held) == round(STRETCH_S * rate):
                yield np.stack(held), rate
                held = []
                num_found += 1
                if num_found == most:
                    return
        if len(held) >= AT_LEAST_S * rate:
            yield np.stack(held), rate


def encoded(frames: np.ndarray, rate: Fraction, how: str) -> bytes:
    """One of COPIES; else the stretch itself."""
    codec, container, options = "libx264", "mp4", {"crf": "18"}
    if how == "half size":
        width, height = (side // 4 * 2 for side in frames.shape[2:0:-1])
        frames = np.stack([cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA) for frame in frames])
    elif how == "crf 33":
        options = {"crf": "33"}
    elif how == "12.5 fps":
        frames = frames[np.arange(0, len(frames), float(rate) / 12.5).astype(int)]
        rate = Fraction(25, 2)
    elif how == "mpeg4 in avi":
        bits = 0.1 * frames.shape[1] * frames.shape[2] * float(rate)
        codec, container, options = "mpeg4", "avi", {"b": str(round(bits))}
    elif how == "trimmed by 5%":
        frames = frames[round(0.05 * len(frames)) :]
    return make_video(frames, fps=rate, codec=codec, container=container, options=options)


@dataclasses.dataclass(frozen=True)
class Files:
    """Stretches and their copies."""

    paths: list[Path]
    video: np.ndarray  # [N] of which video
    stretch: np.ndarray  # [N] of which stretch
    how: np.ndarray  # [N] one of COPIES, or ""


def made_files(clips: Path, folder: Path, most: int) -> Files:
    """Encode the stretches, so many of a video, into a folder."""
    paths: list[Path] = []
    rows: list[tuple[int, int, str]] = []
    num_stretches = 0
    videos = sorted(path for path in clips.iterdir() if path.suffix in (".mp4", ".mkv", ".avi", ".webm"))
    for number, path in enumerate(videos):
        for place, (frames, rate) in enumerate(stretches(path, most)):
            for how in ("", *COPIES) if not place else ("",):
                paths.append(folder / f"{num_stretches:03d}-{how.replace(' ', '-')}.{'avi' if 'avi' in how else 'mp4'}")
                paths[-1].write_bytes(encoded(frames, rate, how))
                rows.append((number, num_stretches, how))
            num_stretches += 1
    video, stretch, how = (np.array(column) for column in zip(*rows, strict=True))
    return Files(paths, video, stretch, how)


# Embeddings


def lite0(folder: Path) -> str:
    """A checkpoint of TSN on EfficientNet-Lite0; what its classifier would say plays no part."""
    options: dict[str, Any] = {"backbone": "timm:tf_efficientnet_lite0"}
    torch.manual_seed(0)
    network = build_model(ModelConfig(factory="tsn", options={**options, "backbone_weights": weights_file(folder)}), 2)
    meta = CheckpointMeta(
        model=ModelConfig(factory="tsn", options=options),
        clip=ClipConfig(sample=SampleConfig(num_segments=8, frames_per_segment=1)),
        labels=("a", "b"),
        epoch=0,
        step=0,
        samples=0,
    )
    save_checkpoint(Storage(), str(folder / "lite0"), model_state=network.state_dict(), meta=meta)
    return str(folder / "lite0")


def embeddings(model: kinoray.Model, paths: Sequence[Path]) -> np.ndarray:
    """float16 [N, D]"""
    found = [answer.embedding for answer in model.predict(paths)]
    return np.stack([vector for vector in found if vector is not None])


# Figures


def cosines(rows_ND: np.ndarray) -> np.ndarray:
    wide = rows_ND.astype(np.float64)
    wide /= np.linalg.norm(wide, axis=1, keepdims=True)
    similar: np.ndarray = wide @ wide.T
    return similar


def show(name: str, values: np.ndarray) -> None:
    marks = np.quantile(values, [0, 0.01, 0.1, 0.5, 0.9, 0.99, 1]) if len(values) else []
    print(f"  {name:<38}{len(values):>7}" + "".join(f"{mark:>8.4f}" for mark in marks), flush=True)


def figures(files: Files, rows_ND: np.ndarray, talking_ND: np.ndarray) -> dict[float, list[float]]:
    """Of each threshold the shares that were found; all of it is printed."""
    similar = cosines(rows_ND)
    is_first = files.how == ""
    same_stretch = files.stretch[:, None] == files.stretch
    same_video = files.video[:, None] == files.video
    print(f"  {'similarities of':<38}{'pairs':>7}    least      1%     10%     50%     90%     99%    most")
    for how in COPIES:
        show(f"copies: {how}", similar[(files.how[:, None] == how) & is_first & same_stretch])
    upper = np.triu(np.ones_like(same_video), 1)
    show("stretches of one video", similar[is_first[:, None] & is_first & same_video & upper])
    show("stretches of different videos", similar[is_first[:, None] & is_first & ~same_video & upper])
    talking = cosines(talking_ND) if len(talking_ND) else np.zeros((0, 0))
    show("clips of one talker", talking[np.triu_indices(len(talking), 1)])
    print(f"  {'threshold':<14}{'copies found':>14}{'with own video':>16}{'with another':>14}{'talker':>10}")
    found = {}
    for threshold in THRESHOLDS:
        together = np.equal.outer(*2 * [near_groups(rows_ND, threshold)])
        copies = (together & is_first & same_stretch).any(axis=1)[~is_first].mean()
        own = (together & same_video & ~same_stretch).any(axis=1)[is_first].mean()
        others = (together & ~same_video).any(axis=1)[is_first].mean()
        groups = near_groups(talking_ND, threshold) if len(talking_ND) else np.zeros(0, int)
        crowd = float(np.mean(np.bincount(groups)[groups] > 1)) if len(groups) else 0.0
        found[threshold] = [float(copies), float(own), float(others), crowd]
        print(f"  {threshold:<14}{copies:>14.1%}{own:>16.1%}{others:>14.1%}{crowd:>10.1%}", flush=True)
    return found


def main() -> int:
    """Print the tables of each network and, last, the figures beside their bars as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path, metavar="CLIPS")
    parser.add_argument("--grid", type=Path, help="folder with clips of one talker")
    parser.add_argument("--talking", type=int, default=40, help="so many of them")
    parser.add_argument("--networks", nargs="+", default=["lite0", "i3d"], metavar="NAME")
    parser.add_argument("--stretches", type=int, default=3, help="so many of each video at most")
    arguments = parser.parse_args()
    result: dict[str, Any] = {}
    ok = True
    with tempfile.TemporaryDirectory(prefix="kinoray-bench-") as name:
        folder = Path(name)
        files = made_files(arguments.clips, folder, arguments.stretches)
        clips = sorted(arguments.grid.glob("*.mp4"))[: arguments.talking] if arguments.grid else []
        num_videos = len(np.unique(files.video))
        print(f"{files.stretch.max() + 1} stretches of {num_videos} videos, {len(clips)} clips of one talker")
        for network in arguments.networks:
            checkpoint = lite0(folder) if network == "lite0" else network
            with kinoray.load(checkpoint, embeddings=True, **{"inference.precision": "bf16"}) as model:
                rows_ND = embeddings(model, files.paths)
                talking_ND = embeddings(model, clips) if clips else np.zeros((0, 0), np.float16)
            print(f"{network}, {rows_ND.shape[1]} numbers")
            copies, _, others, _ = figures(files, rows_ND, talking_ND)[DEFAULT]
            result[f"{network}: copies found at {DEFAULT}"] = {"value": round(copies, 3), "bar": ">= 0.9"}
            result[f"{network}: grouped with another video"] = {"value": round(others, 3), "bar": "<= 0"}
            ok = ok and copies >= 0.9 and others == 0
    print(json.dumps(result | {"ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
