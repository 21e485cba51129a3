"""What decoding costs: the times of the decoded sample by class, and from them those of the whole library.

    total_s = num_videos * sum over classes of (share of the class in the probed sample) * (mean time of its decoded)

A class is a codec and a size of frames; bad videos are a class that costs nothing. What is easy to break: the decoded
videos are spread over the classes, so their plain mean is not the library's.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kinoray.config.shared import ClipConfig
from kinoray.console import format_duration, many, table
from kinoray.doctor.config import Section, Warn, spread
from kinoray.doctor.probe import DecodeCost, Probed
from kinoray.video.info import VideoInfo
from kinoray.video.transcode import TRANSCODE

__all__ = [
    "SIZE_CLASSES",
    "Estimate",
    "choose_decoded",
    "choose_transcoded",
    "cost_class",
    "decode_section",
    "estimate_total",
    "size_class",
    "spread_over_classes",
]

_SIZES = (256, 360, 480, 720, 1080, 2160)
_ROUNDS = 2000

SIZE_CLASSES = (*(f"<= {limit}" for limit in _SIZES), f"> {_SIZES[-1]}")
"""What `size_class` gives, rising."""


def size_class(info: VideoInfo) -> str:
    """`<= 256`, `<= 360`, ... `> 2160`, by the short side in pixels."""
    side = min(info.width, info.height)
    return next((f"<= {limit}" for limit in _SIZES if side <= limit), f"> {_SIZES[-1]}")


def cost_class(info: VideoInfo) -> str:
    """`h264 <= 256`: what decides, before all, how dear a video is to decode."""
    return f"{info.codec} {size_class(info)}"


def spread_over_classes(classes: Sequence[str], count: int) -> list[int]:
    """Rising places of `count` items: two of each class as far as it goes, the largest classes first, then by share.

    Inside a class the first ones are taken.
    """
    sizes = Counter(classes)
    order = [name for name, _ in sorted(sizes.items(), key=lambda item: (-item[1], item[0]))]
    taken: Counter[str] = Counter()
    for _ in range(min(count, len(classes))):
        open_classes = [name for name in order if taken[name] < sizes[name]]
        few = [name for name in open_classes if taken[name] < 2]
        least = min((taken[name] for name in few), default=0)
        first = next((name for name in few if taken[name] == least), None)
        taken[first or max(open_classes, key=lambda name: sizes[name] / (taken[name] + 1))] += 1
    places = []
    for place, name in enumerate(classes):
        if taken[name]:
            taken[name] -= 1
            places.append(place)
    return places


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """CPU seconds for every video of a library."""

    total_s: float
    low_s: float | None
    """Lower end of the 95% bootstrap interval; None where no class has two decoded videos and nothing was sampled."""
    high_s: float | None
    """Its upper end."""
    guessed: tuple[str, ...]
    """Classes of which no video was decoded: they are taken at the mean of all that were."""


def estimate_total(
    num_videos: int, probed: Mapping[str, int], num_bad: int, times_s: Mapping[str, Sequence[float]], *, seed: int = 0
) -> Estimate | None:
    """The time for `num_videos` videos; None if no video was decoded.

    The interval resamples the probed videos (unless all videos were probed) and, in each class, the decoded ones. It
    covers chance in the sample, not what the machine does; a class with one decoded video adds nothing to it.

    Args:
        num_videos: in the library, bad ones among them.
        probed: class -> probed good videos.
        num_bad: probed bad videos.
        times_s: class -> CPU seconds of its decoded videos.
    """
    everything = [time_s for times in times_s.values() for time_s in times]
    if not everything or not probed:
        return None
    names = sorted(probed)
    guessed = tuple(name for name in names if not times_s.get(name))
    samples = [np.asarray(times_s.get(name) or everything, np.float64) for name in names]
    counts = np.array([probed[name] for name in names], np.float64)
    num_probed = int(counts.sum()) + num_bad
    total_s = num_videos * float(np.dot(counts, [sample.mean() for sample in samples])) / num_probed
    is_whole = num_probed >= num_videos
    if is_whole and all(len(sample) < 2 for sample in samples):
        return Estimate(total_s=total_s, low_s=None, high_s=None, guessed=guessed)
    rng = np.random.default_rng(seed)
    shares = np.append(counts, num_bad) / num_probed
    drawn = np.tile(shares, (_ROUNDS, 1)) if is_whole else rng.multinomial(num_probed, shares, _ROUNDS) / num_probed
    means = np.stack([rng.choice(sample, (_ROUNDS, len(sample))).mean(axis=1) for sample in samples], axis=1)
    totals = num_videos * (drawn[:, :-1] * means).sum(axis=1)
    low_s, high_s = np.percentile(totals, [2.5, 97.5])
    return Estimate(total_s=total_s, low_s=float(low_s), high_s=float(high_s), guessed=guessed)


_MAX_TRANSCODED_FRAMES = 3000


def choose_decoded(probed: Sequence[Probed], count: int) -> list[Probed]:
    """The probed videos that are decoded: spread over the classes."""
    good = [found for found in probed if found.info is not None]
    classes = [cost_class(found.info) for found in good if found.info is not None]
    return [good[place] for place in spread_over_classes(classes, count)]


def choose_transcoded(chosen: Sequence[Probed], count: int) -> frozenset[str]:
    """video_ids of the first `count` that transcoding would make smaller, or give more key frames.

    Videos of more than 3,000 frames are left out: transcoding takes every frame of them.
    """
    fitting = [
        found.video.video_id
        for found in chosen
        if found.info is not None and found.info.num_frames <= _MAX_TRANSCODED_FRAMES and _can_gain(found.info)
    ]
    return frozenset(fitting[:count])


def _can_gain(info: VideoInfo) -> bool:
    distance = info.num_frames / max(info.num_keyframes, 1)
    return min(info.width, info.height) > TRANSCODE.short_side_px or distance > 2 * TRANSCODE.gop


def decode_section(probed: Sequence[Probed], costs: Sequence[DecodeCost], num_videos: int, clip: ClipConfig) -> Section:
    """The cost of one pass over the library, by class and in all."""
    classes = {found.video.video_id: cost_class(found.info) for found in probed if found.info is not None}
    decoded = [cost for cost in costs if cost.refusal is None]
    shares = Counter(classes.values())
    num_bad = len(probed) - len(classes)
    rgb_s = _by_class(classes, {cost.video_id: cost.cpu_s for cost in decoded})
    flow_s = _by_class(classes, {c.video_id: c.flow_cpu_s for c in decoded if c.flow_cpu_s is not None})
    totals = {
        "rgb": estimate_total(num_videos, shares, num_bad, rgb_s),
        "rgb_and_flow": estimate_total(num_videos, shares, num_bad, flow_s) if flow_s else None,
    }
    values: dict[str, Any] = {
        "num_decoded": len(decoded),
        "bytes_read": sum(cost.size_bytes for cost in costs),
        "num_segments": clip.sample.num_segments,
        "frames_per_segment": clip.sample.frames_per_segment,
        "num_corrupt": sum(cost.frames_corrupt > 0 for cost in decoded),
        "frames_decoded": spread([cost.frames_decoded for cost in decoded]),
        "classes": {
            name: {
                "num_probed": count,
                "rgb_cpu_s": spread(rgb_s.get(name, [])),
                "rgb_and_flow_cpu_s": spread(flow_s.get(name, [])),
            }
            for name, count in shares.most_common()
        },
        "library_cpu_s": {name: _as_json(total) for name, total in totals.items()},
        "transcode": _transcoding(decoded),
        "videos": [_row(cost, classes[cost.video_id]) for cost in decoded],
    }
    lines = _lines(values, totals, num_videos) if decoded else ["no video was decoded"]
    return Section(name="decode", values=values, lines=tuple(lines), warnings=tuple(_warnings(values)))


def _by_class(classes: Mapping[str, str], times_s: Mapping[str, float]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = defaultdict(list)
    for video_id, time_s in times_s.items():
        found[classes[video_id]].append(time_s)
    return dict(found)


def _as_json(total: Estimate | None) -> dict[str, Any] | None:
    if total is None:
        return None
    return {"total": total.total_s, "low": total.low_s, "high": total.high_s, "guessed": list(total.guessed)}


def _row(cost: DecodeCost, name: str) -> dict[str, Any]:
    return {
        "video_id": cost.video_id,
        "class": name,
        "rgb_cpu_s": cost.cpu_s,
        "rgb_and_flow_cpu_s": cost.flow_cpu_s,
        "num_frames": cost.num_frames,
        "frames_decoded": cost.frames_decoded,
        "frames_corrupt": cost.frames_corrupt,
    }


def _transcoding(decoded: Sequence[DecodeCost]) -> dict[str, Any] | None:
    """Sums over the videos that were transcoded; None if none was."""
    tried = [cost for cost in decoded if cost.transcoded_cpu_s is not None or cost.transcode_refusal is not None]
    made = [cost for cost in tried if cost.transcoded_cpu_s is not None]
    if not tried:
        return None
    return {
        "num_transcoded": len(made),
        "refused": [
            f"{cost.video_id}: {cost.transcode_refusal.error_text}" for cost in tried if cost.transcode_refusal
        ],
        "cpu_s": sum(cost.transcode_cpu_s or 0.0 for cost in made),
        "decode_before_cpu_s": sum(cost.cpu_s for cost in made),
        "decode_after_cpu_s": sum(cost.transcoded_cpu_s or 0.0 for cost in made),
        "bytes_before": sum(cost.size_bytes for cost in made),
        "bytes_after": sum(cost.transcoded_bytes or 0 for cost in made),
    }


def _lines(values: dict[str, Any], totals: Mapping[str, Estimate | None], num_videos: int) -> list[str]:
    head = (
        "CPU time a video",
        "probed",
        "decoded",
        "median",
        "mean",
        *(("with flow",) if totals["rgb_and_flow"] else ()),
    )
    rows = []
    for name, found in values["classes"].items():
        rgb, flow = found["rgb_cpu_s"], found["rgb_and_flow_cpu_s"]
        times = [f"{1000 * rgb[key]:.1f} ms" if rgb["count"] else "-" for key in ("median", "mean")]
        if totals["rgb_and_flow"]:
            times.append(f"{1000 * flow['mean']:.1f} ms" if flow["count"] else "-")
        rows.append((name, f"{found['num_probed']:,}", f"{rgb['count']:,}", *times))
    sample = f"{values['num_segments']} x {values['frames_per_segment']} frames"
    lines = table(rows, head=head, right=range(1, len(head)))
    for title, key in (("RGB", "rgb"), ("RGB and flow", "rgb_and_flow")):
        total = totals[key]
        if total is not None:
            ends = "" if total.low_s is None else f" (95%: {_cpu(total.low_s)} to {_cpu(total.high_s or 0.0)})"
            lines.append(
                f"all {many(num_videos, 'video')} once, {sample}, {title}: {_cpu(total.total_s)} of one core{ends}"
            )
            if total.guessed and key == "rgb":
                lines.append(f"no video decoded of: {', '.join(total.guessed)}; taken at the mean of the others")
    frames = values["frames_decoded"]
    lines.append(f"frames that the decoder had to give for a clip: median {frames['median']:.0f}")
    if (made := values["transcode"]) and made["num_transcoded"]:
        share = made["decode_after_cpu_s"] / max(made["decode_before_cpu_s"], 1e-9)
        lines.append(
            f"transcoded ({many(made['num_transcoded'], 'video')} tried): decoding takes {share:.0%} of the CPU, and "
            f"the videos {made['bytes_after'] / max(made['bytes_before'], 1):.0%} of the bytes; transcoding took "
            f"{made['cpu_s'] / made['num_transcoded']:.1f} s a video"
        )
    return lines


def _cpu(seconds: float) -> str:
    return (
        f"{seconds / 3600:,.1f} h"
        if seconds >= 36_000
        else format_duration(seconds)
        if seconds >= 60
        else f"{seconds:.2f} s"
    )


def _warnings(values: dict[str, Any]) -> list[Warn]:
    found = []
    if values["num_corrupt"]:
        text = f"of {many(values['num_decoded'], 'decoded video')} {values['num_corrupt']:,} with damaged frames"
        found.append(Warn(text, "damaged frames are replaced by the one before and counted (column frames_corrupt)"))
    made = values["transcode"]
    if made and made["refused"]:
        text = f"{many(len(made['refused']), 'video')} that cannot be transcoded: {made['refused'][0]}"
        found.append(Warn(text, "pack without --transcode, or expect them in quarantine.parquet"))
    if made and made["num_transcoded"] and made["decode_before_cpu_s"] > 1.5 * made["decode_after_cpu_s"]:
        ratio = made["decode_before_cpu_s"] / max(made["decode_after_cpu_s"], 1e-9)
        saved_s = (made["decode_before_cpu_s"] - made["decode_after_cpu_s"]) / made["num_transcoded"]
        passes = made["cpu_s"] / made["num_transcoded"] / saved_s
        text = f"transcoding makes such videos {ratio:.1f} times cheaper to decode"
        found.append(Warn(text, f"`kinoray pack --transcode` pays after {max(1, round(passes))} passes over them"))
    return found
