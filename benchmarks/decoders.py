"""What each decoder back end does with ordinary, odd and broken files, found by running them.

    python benchmarks/decoders.py           # print the table
    python benchmarks/decoders.py --write   # and put it into docs/decoders.md

Eight frames of each file are compared with a plain decode of every frame. "ok" asks it of the default back end only.
"""

import argparse
import json
import os
import random
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
os.environ.setdefault("SVT_LOG", "1")  # else the AV1 encoder writes pages

from decode_reference import moving, plain_decode, remux  # noqa: E402
from kinoray.config.shared import ClipConfig, DecodeConfig, SampleConfig, ViewConfig  # noqa: E402
from kinoray.demo.videos import make_broken, make_video  # noqa: E402
from kinoray.errors import ConfigError, MediaError  # noqa: E402
from kinoray.video.request import Sampled  # noqa: E402
from kinoray.video.sandbox.pool import Sandbox  # noqa: E402

Backend = Literal["pyav", "decord", "torchcodec"]
BACKENDS: dict[Backend, str] = {"pyav": "av", "decord": "decord", "torchcodec": "torchcodec"}
"""Names in decode.backend, and the packages."""
NUM_FRAMES, WANTED, SIDE = 120, 8, 64
_SAME = 6.0  # grey levels that scaling and conversion make at most; above it a frame is damaged
_CLOSER = 0.3  # where another frame of the video is closer by more than this, it is that one
PAGE = ROOT / "docs" / "decoders.md"

HEAD = """# Decoder back ends

Written by `python benchmarks/decoders.py --write`; what is here was run, not read. Eight frames of each file (a clip of
8 segments x 1 frame) are compared with a plain decode of every frame by libav. *right (0.0)*: all eight are the wanted
frames, with their mean difference in grey levels of 0 .. 255 (back ends scale and convert differently). *wrong k of 8*:
k are other frames of the video, or damaged ones. A name such as `UndecodableVideo` is a typed refusal.
"""


@dataclass(frozen=True)
class Case:
    """A file, and what should come of it."""

    name: str
    data: bytes
    reference: Sequence[np.ndarray]
    """Every frame, uint8 [3, SIDE, SIDE]; empty where the file must be refused."""


def pictures() -> np.ndarray:
    """What the files show."""
    return moving(NUM_FRAMES, 96, 128)


def ordinary_cases() -> list[Case]:
    """Containers and codecs."""
    shown = pictures()
    x265 = {"x265-params": "log-level=none:pools=none:frame-threads=1:open-gop=1"}
    settings: dict[str, dict[str, object]] = {
        "H.264, MP4, GOP 12": {"gop": 12},
        "H.264, MP4, GOP 250": {"gop": 250, "options": {"preset": "medium"}},
        "H.264, MP4, open GOP": {"gop": 24, "options": {"preset": "medium", "x264-params": "open-gop=1:bframes=3"}},
        "H.264, MP4, index at the end": {"container_options": {"video_track_timescale": "30000"}},
        "H.264, Matroska": {"container": "matroska"},
        "H.264, MPEG-TS, GOP 250": {"container": "mpegts", "gop": 250, "options": {"preset": "medium"}},
        "HEVC, MP4, open GOP": {"codec": "libx265", "gop": 24, "options": x265},
        "VP9, WebM": {"codec": "libvpx-vp9", "container": "webm", "gop": 24, "options": {"cpu-used": "8"}},
        "AV1, MP4": {"codec": "libsvtav1", "gop": 24, "options": {"preset": "12", "svtav1-params": "lp=1"}},
        "MPEG-4 part 2, AVI": {"codec": "mpeg4", "container": "avi", "gop": 24, "options": {"bf": "2"}},
    }
    cases = []
    for name, setting in settings.items():
        data = make_video(shown, fps=30, **setting)  # type: ignore[arg-type]
        cases.append(Case(name, data, plain_decode(data, SIDE, SIDE)))
    return cases


def odd_cases() -> list[Case]:
    """Legal, and a trap for readers."""
    shown = pictures()
    cases = []

    def add(name: str, data: bytes) -> None:
        cases.append(Case(name, data, plain_decode(data, SIDE, SIDE)))

    for rotation in (90, 180, 270):
        turned = make_video(shown, fps=30, rotation=rotation)
        upright = plain_decode(turned, SIDE, SIDE)
        reference = [np.rot90(frame, rotation // 90, axes=(1, 2)) for frame in upright]
        cases.append(Case(f"rotated {rotation} by display matrix", turned, reference))
    rng = random.Random(0)
    pts = np.cumsum([rng.choice((1, 1, 2, 5)) for _ in range(NUM_FRAMES)]).tolist()
    add("variable frame rate", make_video(shown, fps=60, pts=pts))
    add("10 bit", make_video(shown, fps=30, pix_fmt="yuv420p10le"))
    add("odd size 127 x 95, 4:4:4", make_video(shown[:, :95, :127], fps=30, pix_fmt="yuv444p"))
    vp9 = {"codec": "libvpx-vp9", "container": "webm", "options": {"cpu-used": "8"}}
    add("odd size 127 x 95, VP9", make_video(shown[:, :95, :127], fps=30, **vp9))  # type: ignore[arg-type]
    good = make_video(shown, fps=30, gop=12, options={"preset": "medium"})
    add(
        "edit list that hides the first frames",
        remux(good, "mp4", shift=Fraction(1, 5), options={"avoid_negative_ts": "disabled"}),
    )
    add("one frame, asked for eight times", make_video(shown[:1], fps=30))
    add("four frames, each asked for twice", make_video(shown[:4], fps=30))
    return cases


def broken_cases() -> list[Case]:
    """Files as they come from the web."""
    good = make_video(pictures(), fps=30, gop=24)
    reference = plain_decode(good, SIDE, SIDE)
    rng = random.Random(0)
    damaged = bytearray(good)
    begin = good.index(b"mdat") + 2000
    for _ in range(8):
        place = rng.randrange(begin, len(good) - 200)
        damaged[place : place + 20] = rng.randbytes(20)
    return [
        Case("cut at 60 %, index in front", good[: len(good) * 6 // 10], reference),
        Case("8 damaged stretches", bytes(damaged), reference),
        *(Case(name, make_broken(kind, good), ()) for name, kind in REFUSED.items()),
    ]


REFUSED = {"audio only": "audio_only", "index lost": "index_lost", "empty": "empty", "random bytes": "random"}


def outcome(sandbox: Sandbox, case: Case, backend: Backend) -> str:
    """What came of the case, in a few words."""
    config = ClipConfig(
        sample=SampleConfig(num_segments=WANTED, frames_per_segment=1),
        view=ViewConfig(resize_px=SIDE, crop_px=SIDE),
        decode=DecodeConfig(backend=backend),
    )
    try:
        clip = sandbox.decode(case.data, Sampled(), config.without_flow()).clip()
    except ConfigError:
        return "not installed"
    except MediaError as error:
        return f"`{type(error).__name__}`"
    if not case.reference:
        return f"{WANTED} frames"
    frames = clip.frames[:, 0].astype(np.int16)
    # On cut files the wanted frames are those of what is there: the indices are the clip's own.
    distances = np.array([[np.abs(frame - other).mean() for other in case.reference] for frame in frames])
    wanted = clip.indices[:, 0]
    own = distances[np.arange(WANTED), wanted]
    wrong = int(((own > distances.min(axis=1) + _CLOSER) | (own > _SAME)).sum())
    notes = []
    if clip.frames_corrupt:
        notes.append(f"{clip.frames_corrupt} frames reported as damaged")
    if clip.info.frames_missing:
        notes.append(f"{clip.info.frames_missing} reported as missing")
    note = f"; {', '.join(notes)}" if notes else ""
    return f"wrong {wrong} of {WANTED}{note}" if wrong else f"right ({own.mean():.1f}){note}"


def is_good(case: Case, text: str) -> bool:
    """Whether the outcome is what should come of the file."""
    if "damaged" in case.name:
        return "damaged" in text
    return text.startswith("right") if case.reference else text.startswith("`")


def versions() -> str:
    """The installed back ends."""
    found = []
    for package in BACKENDS.values():
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} not installed")
    return ", ".join(found)


def table(title: str, rows: list[tuple[str, list[str]]]) -> str:
    """One table of the page."""
    lines = [f"| {title} | {' | '.join(f'`{name}`' for name in BACKENDS)} |", "|---" * (len(BACKENDS) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows]
    return "\n".join(lines)


def main() -> int:
    """Run every case through every back end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/decoders.md")
    parser.add_argument("--quick", action="store_true", help="the same: it takes seconds")
    arguments = parser.parse_args()
    groups: dict[str, Callable[[], list[Case]]] = {
        "ordinary files": ordinary_cases,
        "odd files": odd_cases,
        "broken files": broken_cases,
    }
    tables, bad, counts = [], [], dict.fromkeys(BACKENDS, 0)
    with ExitStack() as stack:  # a process for each: their libraries must not meet
        sandboxes = {backend: stack.enter_context(Sandbox(1)) for backend in BACKENDS}
        for title, make in groups.items():
            rows = []
            for case in make():
                cells = [outcome(sandbox, case, backend) for backend, sandbox in sandboxes.items()]
                rows.append((case.name, cells))
                for backend, text in zip(BACKENDS, cells, strict=True):
                    counts[backend] += is_good(case, text)
                if not is_good(case, cells[0]):
                    bad.append(f"{case.name}: {cells[0]}")
            tables.append(table(title, rows))
    text = f"{HEAD}\n{versions()}.\n\n" + "\n\n".join(tables) + "\n"
    print(text)
    if arguments.write:
        _, title, rest = PAGE.read_text(encoding="ascii").partition(
            "\n## What is decoded, and what counts as a frame\n"
        )  # written by hand
        PAGE.write_text(text + title + rest, encoding="ascii")
        print(f"wrote {PAGE.relative_to(ROOT)}")
    print(json.dumps({"name": "decoders", "as_it_should_be": counts, "pyav_wrong": bad, "ok": not bad}))
    return 0 if not bad else 1


if __name__ == "__main__":
    sys.exit(main())
