"""CPU seconds per clip of the decode plan, beside what it is compared with: `python benchmarks/decode.py [--quick]`.

    python benchmarks/decode.py --videos FOLDER   # and the user's own files, 16x6

One thread, CPU seconds, rounds in which all forms take turns; a figure is the median of the ratios inside a round.
`floor` decodes every frame with libav and converts none; `naive` is PyAV in order, wanted frames to RGB at full size,
then OpenCV; `every frame` is what ray.data.read_videos does: decord, frame by frame, at the target size. Bars for the
plan: 1.05 floor (340x256, 16x6), 1.0 floor (720p, 16x6), 0.30 floor (8x1, GOP 12), 0.75 decord, 0.45 every frame; RGB
with flow 1.75 RGB.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import functools
import io
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import av
import cv2
import decord
import numpy as np

from kinoray.config.shared import ClipConfig, DecodeConfig, SampleConfig
from kinoray.demo.videos import make_video
from kinoray.errors import ConfigError
from kinoray.video.frames import decode, probe
from kinoray.video.request import Sampled
from kinoray.video.sample import segment_indices
from kinoray.video.sandbox.process import CHILD_ENV

SIDE, FPS, NUM_FRAMES = 256, 30, 300
FORMS = ("plan", "floor", "decord", "torchcodec", "naive", "every frame", "plan + flow")
# workload, form -> largest ratio plan / form that is good enough
BARS = {
    ("340x256 GOP 250 16x6", "floor"): 1.05,
    ("340x256 GOP 250 16x6", "decord"): 0.75,
    ("340x256 GOP 250 16x6", "every frame"): 0.45,
    ("340x256 GOP 12 8x1", "floor"): 0.30,
    ("340x256 GOP 12 8x1", "decord"): 0.75,
    ("1280x720 GOP 250 16x6", "floor"): 1.0,
    ("1280x720 GOP 250 16x6", "decord"): 0.75,
}
FLOW_BAR = 1.75


@dataclass(frozen=True)
class Workload:
    """A file and a sampling."""

    name: str
    data: bytes
    sample: SampleConfig


def scene(num_frames: int, height: int, width: int) -> np.ndarray:
    """A camera that wanders over a textured plane while a patch moves, with a little noise: uint8 [N, H, W, 3]."""
    rng = np.random.default_rng(0)
    margin = 160
    plane = cv2.GaussianBlur(rng.integers(0, 256, (height + margin, width + margin, 3)).astype(np.uint8), (0, 0), 4)
    plane = cv2.normalize(plane, None, 0, 255, cv2.NORM_MINMAX)
    grain = rng.integers(0, 12, (height + 64, width + 64, 3)).astype(np.uint8)
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    for number in range(num_frames):
        x, y = round(80 + 79 * np.sin(number / 40)), round(80 + 79 * np.cos(number / 55))
        dx, dy = rng.integers(0, 64, 2)
        frame = plane[y : y + height, x : x + width] // 2 + 50 + grain[dy : dy + height, dx : dx + width]
        patch = round((width - 64) * (0.5 + 0.5 * np.sin(number / 20)))
        frame[height // 3 : height // 3 + 64, patch : patch + 64] = plane[:64, :64]
        frames[number] = frame
    return frames


def workloads(quick: bool) -> list[Workload]:
    """Sources made here: 10 s of H.264, by x264 `medium` (quick: `veryfast`)."""
    dense, sparse = (
        SampleConfig(num_segments=16, frames_per_segment=6),
        SampleConfig(num_segments=8, frames_per_segment=1),
    )
    middle = SampleConfig(num_segments=8, frames_per_segment=6)
    options = {"preset": "veryfast" if quick else "medium", "crf": "23"}
    small, large = scene(NUM_FRAMES, 256, 340), scene(NUM_FRAMES, 720, 1280)
    files = {
        f"{size} GOP {gop}": make_video(frames, fps=FPS, gop=gop, options=options)
        for size, frames in (("340x256", small), ("1280x720", large))
        for gop in (250, 12)
    }
    wanted = [
        ("340x256 GOP 250", "16x6", dense),
        ("340x256 GOP 250", "8x6", middle),
        ("340x256 GOP 12", "8x1", sparse),
        ("1280x720 GOP 250", "16x6", dense),
        ("1280x720 GOP 12", "8x1", sparse),
    ]
    return [Workload(f"{file} {name}", files[file], sample) for file, name, sample in wanted]


def floor(data: bytes) -> int:
    """Decode every frame, convert none."""
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count, stream.thread_type = 1, "NONE"
        return sum(1 for _ in container.decode(stream))


def naive(data: bytes, wanted: np.ndarray) -> np.ndarray:
    """PyAV in order up to the last wanted frame, full-size RGB, OpenCV resize."""
    frames, wanted_set, last = [], set(wanted.tolist()), int(wanted[-1])
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count, stream.thread_type = 1, "NONE"
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted_set:
                frames.append(cv2.resize(frame.to_ndarray(format="rgb24"), (SIDE, SIDE)))
            if number == last:
                break
    return np.stack(frames)


def open_decord(data: bytes) -> decord.VideoReader:
    return decord.VideoReader(io.BytesIO(data), ctx=decord.cpu(0), width=SIDE, height=SIDE, num_threads=1)


def every_frame(data: bytes) -> int:
    """As ray.data.read_videos: decord, one frame after the other, each as an array."""
    reader = open_decord(data)
    return sum(len(reader[number].asnumpy()) for number in range(len(reader)))


def forms_for(work: Workload) -> dict[str, Callable[[], object]]:
    """The forms that can be run here."""
    wanted = np.unique(segment_indices(probe(work.data, DecodeConfig()).num_frames, work.sample))
    clip = ClipConfig(sample=work.sample)
    forms: dict[str, Callable[[], object]] = {
        "plan": functools.partial(decode, work.data, Sampled(), clip.without_flow()),
        "floor": functools.partial(floor, work.data),
        "decord": lambda: open_decord(work.data).get_batch(wanted.tolist()).asnumpy(),
        "naive": functools.partial(naive, work.data, wanted),
        "every frame": functools.partial(every_frame, work.data),
        "plan + flow": functools.partial(decode, work.data, Sampled(), clip),
    }
    theirs = ClipConfig(sample=work.sample, decode=DecodeConfig(backend="torchcodec"))
    try:
        decode(work.data, Sampled(), theirs.without_flow()).clip()
    except ConfigError:
        return forms
    return forms | {"torchcodec": functools.partial(decode, work.data, Sampled(), theirs.without_flow())}


def measure(work: Workload, rounds: int) -> dict[str, float]:
    """Seconds of the plan under "seconds", and for each other form the median of plan / form."""
    forms = forms_for(work)
    times: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(rounds + 1):  # the first is for warming up
        for name, call in forms.items():
            begin = time.process_time()
            call()
            if number:
                times[name].append(time.process_time() - begin)
    ratios = {
        name: statistics.median(a / b for a, b in zip(times["plan"], values, strict=True))
        for name, values in times.items()
        if name != "plan"
    }
    return {"seconds": statistics.median(times["plan"])} | ratios


def own_videos(folder: Path) -> list[Workload]:
    """The user's files, at most 20."""
    dense = SampleConfig(num_segments=16, frames_per_segment=6)
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".mp4", ".mkv", ".webm", ".avi"))
    return [Workload(f"{path.name} 16x6", path.read_bytes(), dense) for path in found[:20]]


def main() -> int:
    """Print the table and, last, the ratios beside their bars as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 7, sources that are quicker to make")
    parser.add_argument("--videos", type=Path, help="a folder of videos to measure as well")
    arguments = parser.parse_args()
    if not CHILD_ENV.items() <= os.environ.items():  # read when a process starts; decoders have it
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **CHILD_ENV})
    others = [name for name in FORMS if name != "plan"]
    print(f"{'plan / ...':<28}{'plan CPU ms':>12}" + "".join(f"{name:>13}" for name in others))
    result: dict[str, object] = {}
    ok = True
    works = workloads(arguments.quick) + (own_videos(arguments.videos) if arguments.videos else [])
    for work in works:
        found = measure(work, 3 if arguments.quick else 7)
        cells = "".join(f"{found[name]:>13.2f}" if name in found else f"{'-':>13}" for name in others)
        print(f"{work.name:<28}{1000 * found['seconds']:>12.1f}{cells}", flush=True)
        for name in others:
            bar = BARS.get((work.name, name))
            if bar is not None:
                result[f"{work.name}: plan/{name}"] = {"value": round(found[name], 3), "bar": f"<= {bar}"}
                ok = ok and found[name] <= bar
        if work.name == works[0].name:
            flow = 1 / found["plan + flow"]
            result["RGB + flow / RGB"] = {"value": round(flow, 3), "bar": f"<= {FLOW_BAR}"}
            ok = ok and flow <= FLOW_BAR
    print(json.dumps(result | {"ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
