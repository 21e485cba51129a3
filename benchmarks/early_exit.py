"""Segments saved by stopping early: `python benchmarks/early_exit.py [--quick]`.

VCM-SDD with consensus=probs is trained on the demo's generated videos (pack and train, as a user would), then labels
videos that it has not seen, with 16 segments. Half of them are the calibration set: `fit_margins` finds on it the
margins at which at most 0.1% and 1% of the labels change. The other half is labelled by the scorer that `kinoray label`
uses: all segments, --early-exit exact, and those margins. Counted are the segments that the networks looked at, the
labels that differ from the full pass, and CPU seconds (decoding is left out, since all segments are decoded either
way). Bars: the exact exit changes no label; the margin for 0.1% changes no more than its stated upper bound.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from kinoray.cluster.connect import disconnect
from kinoray.config.shared import ModelConfig, ResourcesConfig, SampleConfig
from kinoray.demo.videos import make_demo_set
from kinoray.evaluation.calibrate import fit_margins
from kinoray.network.checkpoint import find_checkpoint, load_model
from kinoray.network.scorer import ClipAnswer, ClipScorer, EarlyExit, ScorerConfig
from kinoray.pack.config import PackConfig
from kinoray.pack.verb import pack
from kinoray.storage.objects import Storage
from kinoray.train.config import PRESETS, TrainConfig
from kinoray.train.verb import train
from kinoray.video.frames import Clip, decode
from kinoray.video.request import Sampled

NUM_SEGMENTS = 16
SHARES = (0.001, 0.01)


def trained(folder: Path, epochs: int) -> str:
    """Train on 60 videos a class; the run folder."""
    make_demo_set(folder / "train", 60, seed=0)
    resources = ResourcesConfig(num_workers=1, decoders_per_worker=1)
    pack(PackConfig(source=str(folder / "train"), out=str(folder / "set"), val_fraction=0.1, resources=resources))
    preset = PRESETS["demo"]()
    model = ModelConfig(factory=preset.model.factory, options={**preset.model.options, "consensus": "probs"})
    config: TrainConfig = dataclasses.replace(
        preset,
        catalog=str(folder / "set"),
        out=str(folder / "run"),
        model=model,
        optim=dataclasses.replace(preset.optim, epochs=epochs),
    )
    train(config)
    disconnect()
    return config.out


def run(scorer: ClipScorer[int], clips: list[Clip]) -> tuple[list[ClipAnswer], float]:
    """The answers in order, and CPU seconds."""
    begin_s = time.process_time()
    found: dict[int, ClipAnswer] = {}
    for number, clip in enumerate(clips):
        found.update(scorer.put(number, clip))
    found.update(scorer.flush())
    return [found[number] for number in range(len(clips))], time.process_time() - begin_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few videos, two epochs")
    quick = parser.parse_args().quick
    with tempfile.TemporaryDirectory(prefix="kinoray-bench-") as name:
        folder = Path(name)
        checkpoint = trained(folder, 2 if quick else 12)
        storage = Storage()
        model, meta = load_model(storage, find_checkpoint(storage, checkpoint))
        clip_config = dataclasses.replace(
            meta.clip,
            sample=SampleConfig(num_segments=NUM_SEGMENTS, frames_per_segment=meta.clip.sample.frames_per_segment),
        )
        make_demo_set(folder / "unseen", 20 if quick else 340, seed=1)
        paths = sorted((folder / "unseen").glob("*/*.mp4"))
        np.random.default_rng(0).shuffle(paths)  # type: ignore[arg-type]
        clips = [decode(path.read_bytes(), Sampled(), clip_config).clip() for path in paths]
    truth = [meta.labels.index(path.parent.name) for path in paths]
    half = len(clips) // 2
    configs = {"all segments": ScorerConfig(), "exact": ScorerConfig(early_exit=EarlyExit())}
    keep = ClipScorer[int](
        model, clip_config, ScorerConfig(segment_logits=True), num_classes=len(meta.labels), device="cpu"
    )
    stored, _ = run(keep, clips[:half])
    points = fit_margins(
        np.stack([answer.segment_logits for answer in stored if answer.segment_logits is not None]), "probs"
    )
    chosen = {share: next(point for point in points if point.max_changed == share) for share in SHARES}
    for share, point in chosen.items():
        configs[f"margin for {share:.1%}"] = ScorerConfig(early_exit=EarlyExit(margin=point.margin))
    scorers = {
        label: ClipScorer[int](model, clip_config, config, num_classes=len(meta.labels), device="cpu")
        for label, config in configs.items()
    }
    test, times = clips[half:], {label: [] for label in scorers}  # type: dict[str, list[float]]
    answers: dict[str, list[ClipAnswer]] = {}
    for _ in range(1 if quick else 3):
        for label, scorer in scorers.items():
            answers[label], cpu_s = run(scorer, test)
            times[label].append(cpu_s)
    full = [int(answer.logits.argmax()) for answer in answers["all segments"]]
    top1 = float(np.mean([a == b for a, b in zip(full, truth[half:], strict=True)]))
    print(
        f"{half} videos to calibrate, {len(test)} to label, {NUM_SEGMENTS} segments; top-1 of the full pass {top1:.1%}"
    )
    print(f"{'':<20}{'segments':>10}{'saved':>8}{'CPU':>8}{'changed':>9}")
    record: dict[str, object] = {"videos": len(test), "top1_full": round(top1, 4)}
    changed_of: dict[str, int] = {}
    base_s = statistics.median(times["all segments"])
    for label, found in answers.items():
        segments = sum(answer.segments_run for answer in found)
        saved = 1 - segments / (len(test) * NUM_SEGMENTS)
        ratio = statistics.median(times[label]) / base_s
        changed_of[label] = sum(int(a.logits.argmax()) != b for a, b in zip(found, full, strict=True))
        print(f"{label:<20}{segments:>10,}{saved:>8.1%}{ratio:>8.2f}{changed_of[label]:>9}")
        key = label.replace(" ", "_").replace("%", "_percent")
        record |= {
            f"{key}_saved": round(saved, 4),
            f"{key}_cpu_ratio": round(ratio, 3),
            f"{key}_changed": changed_of[label],
        }
    bound = chosen[0.001].upper
    within = changed_of["margin for 0.1%"] / len(test) <= bound
    record |= {"exact_changed_bar": 0, "margin_0.1_percent_bound": round(bound, 5)}
    print(json.dumps(record | {"ok": changed_of["exact"] == 0 and within}))


if __name__ == "__main__":
    main()
