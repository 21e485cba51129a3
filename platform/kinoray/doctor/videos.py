"""What the probed videos are: codecs, sizes, rates, lengths, key frames; and which of them are bad, and why.

Videos are named by their paths: those of cut.mp4 and cut.mkv differ, and their ids tell nobody which is which.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from kinoray.catalog.rows import QuarantineRow, count_reasons
from kinoray.config.shared import ClipConfig
from kinoray.console import format_duration, many, table
from kinoray.doctor.config import Section, Warn, spread
from kinoray.doctor.decode import SIZE_CLASSES, size_class
from kinoray.doctor.probe import Probed
from kinoray.evaluation.metrics import wilson_interval
from kinoray.storage.objects import format_bytes
from kinoray.video.info import VideoInfo
from kinoray.video.transcode import TRANSCODE

__all__ = ["bad_section", "probe_section", "said_of_bad"]

_EXAMPLES = 5
_LONG_GOP = 4 * TRANSCODE.gop
"""Frames from one key frame to the next above which sparse sampling decodes much that it does not want."""

_REMEDIES = {
    "AccessDenied": "grant reading them to the credentials that the jobs will have",
    "ChecksumMismatch": "upload the shard or file again: it is not what was packed",
    "DecodeTimeout": "cut them, or raise the limit that it names",
    "DecoderCrashed": "leave them out; each costs a decoder process, and no other video",
    "MediaOverBudget": "cut them, or raise the limit that it names",
    "NoVideoStream": "leave them out: they hold sound or data only; fetch them again if they were cut",
    "ObjectNotFound": "correct the list, or upload them",
    "UndecodableVideo": "fetch them again, or convert them: their container opens, their pictures do not decode",
    "UnreadableContainer": "fetch them again: cut downloads and error pages saved as videos look like this",
}
"""What to do about bad videos, by error class; EmptyMedia is known from the listing, which says it for all videos."""


def probe_section(probed: Sequence[Probed], num_videos: int, clip: ClipConfig) -> Section:
    """Tables of the good videos among the probed ones."""
    good = [(found, found.info) for found in probed if found.info is not None]
    infos = [info for _, info in good]
    num_wanted = clip.sample.num_segments * clip.sample.frames_per_segment
    sizes = _counts(infos, size_class)
    values: dict[str, Any] = {
        "num_probed": len(probed),
        "num_good": len(good),
        "is_whole": len(probed) == num_videos,
        "bytes_read": sum(found.size_bytes for found in probed),
        "codecs": _counts(infos, lambda info: info.codec),
        "containers": _counts(infos, lambda info: info.container),
        "sizes": {name: sizes[name] for name in SIZE_CLASSES if name in sizes},
        "frame_rates": _counts(infos, lambda info: f"{info.fps:.3g}"),
        "fps": spread([info.fps for info in infos]),
        "duration_s": spread([info.duration_s for info in infos]),
        "num_frames": spread([info.num_frames for info in infos]),
        "width": spread([info.width for info in infos]),
        "height": spread([info.height for info in infos]),
        "keyframe_distance": spread([info.num_frames / max(info.num_keyframes, 1) for info in infos]),
        "bits_per_s": spread([8 * found.size_bytes / info.duration_s for found, info in good if info.duration_s > 0]),
        "hours_estimated": None,
        "num_rotated": sum(info.rotation != 0 or info.mirrored for info in infos),
        "num_miscounted": sum(info.miscounted for info in infos),
        "frames_missing": sum(info.frames_missing for info in infos),
        "num_shorter_than_clip": sum(info.num_frames < num_wanted for info in infos),
        "num_large": sum(min(info.width, info.height) > TRANSCODE.short_side_px for info in infos),
        "num_long_gop": sum(_is_long_gop(info) for info in infos),
        "copies": _copies(good),
    }
    if infos:
        values["hours_estimated"] = num_videos * values["duration_s"]["sum"] / len(probed) / 3600
    lines = _lines(values, infos, num_videos)
    return Section(name="probe", values=values, lines=tuple(lines), warnings=tuple(_warnings(values, good, num_wanted)))


def _counts(infos: Sequence[VideoInfo], key: Callable[[VideoInfo], str]) -> dict[str, int]:
    return dict(Counter(key(info) for info in infos).most_common())


def _is_long_gop(info: VideoInfo) -> bool:
    return info.num_frames / max(info.num_keyframes, 1) > _LONG_GOP


def _copies(good: Sequence[tuple[Probed, VideoInfo]]) -> list[list[str]]:
    """Probed videos with the same bytes."""
    groups: dict[str, list[str]] = defaultdict(list)
    for found, _ in good:
        groups[found.sha256].append(found.video.place)
    return [ids for ids in groups.values() if len(ids) > 1]


def _lines(values: dict[str, Any], infos: Sequence[VideoInfo], num_videos: int) -> list[str]:
    which = "all" if values["is_whole"] else f"{values['num_probed']:,} of"
    lines = [
        f"{which} {many(num_videos, 'video')} read and probed, {format_bytes(values['bytes_read'])}: "
        f"{values['num_good']:,} good, {values['num_probed'] - values['num_good']:,} bad"
    ]
    if not infos:
        return lines
    by_codec: dict[str, list[VideoInfo]] = defaultdict(list)
    for info in infos:
        by_codec[f"{info.codec} in {info.container}"].append(info)
    head = ("codec", "videos", "share", "median size", "median fps", "median s", "frames per key frame")
    rows = []
    for name, group in sorted(by_codec.items(), key=lambda item: (-len(item[1]), item[0])):
        width, height, fps, duration, distance = (
            spread(numbers)["median"]
            for numbers in (
                [info.width for info in group],
                [info.height for info in group],
                [info.fps for info in group],
                [info.duration_s for info in group],
                [info.num_frames / max(info.num_keyframes, 1) for info in group],
            )
        )
        share = f"{len(group) / len(infos):.0%}"
        size = f"{width:.0f} x {height:.0f}"
        rows.append((name, f"{len(group):,}", share, size, f"{fps:.3g}", f"{duration:.1f}", f"{distance:.0f}"))
    duration, frames = values["duration_s"], values["num_frames"]
    lines += table(rows, head=head, right=range(1, len(head)))
    lines += [
        f"short side in pixels: {_shares(values['sizes'])}",
        f"frames a second: {_shares(values['frame_rates'])}",
        f"duration: min {duration['min']:.1f} s, median {duration['median']:.1f} s, 95% up to {duration['p95']:.1f} s, "
        f"max {duration['max']:.1f} s; together {format_duration(duration['sum'])}"
        + (
            ""
            if values["is_whole"]
            else f", about {values['hours_estimated']:,.1f} h in all {many(num_videos, 'video')}"
        ),
        f"frames: min {frames['min']:.0f}, median {frames['median']:.0f}, max {frames['max']:.0f}",
    ]
    return lines


def _shares(counts: dict[str, int]) -> str:
    total = sum(counts.values())
    shown = [f"{name}: {count / total:.0%}" for name, count in list(counts.items())[:8]]
    return ", ".join(shown) + (f", {len(counts) - 8} others" if len(counts) > 8 else "")


def _warnings(values: dict[str, Any], good: Sequence[tuple[Probed, VideoInfo]], num_wanted: int) -> list[Warn]:
    num_good = len(good)

    def share(name: str) -> str:
        return f"of {many(num_good, 'probed video')} {values[name]:,}"

    found = []
    if values["num_long_gop"]:
        median = values["keyframe_distance"]["median"]
        text = f"{share('num_long_gop')} with more than {_LONG_GOP} frames per key frame (median of all {median:.0f})"
        found.append(Warn(text, "for many epochs, `kinoray pack --transcode` may pay; some are tried in what follows"))
    if values["num_large"]:
        text = f"{share('num_large')} with a short side over {TRANSCODE.short_side_px}"
        found.append(Warn(text, "for many epochs, `kinoray pack --transcode` may pay; some are tried in what follows"))
    if values["num_miscounted"]:
        example = next(item.video.place for item, info in good if info.miscounted)
        text = f"{share('num_miscounted')} with another number of frames than the header promises, such as {example}"
        found.append(Warn(text, "what is there is used; fetch them again if they were cut (column frames_missing)"))
    if values["num_shorter_than_clip"]:
        text = f"{share('num_shorter_than_clip')} with fewer than the {num_wanted} frames of a clip"
        found.append(Warn(text, "frames are repeated; smaller clip.sample values fit better"))
    if values["num_rotated"]:
        text = f"{share('num_rotated')} rotated for display"
        found.append(
            Warn(text, "kinoray turns them; other tools may not (`kinoray pack --transcode` writes them turned)")
        )
    if values["copies"]:
        text = f"{many(len(values['copies']), 'group')} of probed videos with the same bytes, such as "
        found.append(
            Warn(text + " and ".join(values["copies"][0][:2]), "drop the copies, before they reach two splits")
        )
    return found


def bad_section(
    bad: Sequence[QuarantineRow], num_probed: int, num_videos: int, max_bad_fraction: float, out: str
) -> Section:
    """How many videos are bad, of which kinds, and the first of each."""
    low, high = wilson_interval(len(bad), num_probed)
    reasons = count_reasons(bad)
    values: dict[str, Any] = {
        "num_bad": len(bad),
        "fraction": len(bad) / max(num_probed, 1),
        "max_bad_fraction": max_bad_fraction,
        "expected_bad": [num_videos * low, num_videos * high] if num_probed < num_videos else None,
        "reasons": reasons,
        "examples": [said_of_bad(row) for row in bad[:_EXAMPLES]],
    }
    if not bad:
        return Section(name="bad", values=values, lines=("none",))
    lines = [f"{len(bad):,} of {num_probed:,} ({values['fraction']:.1%}): {_reasons(reasons)}"]
    if values["expected_bad"]:
        lines.append(
            f"in all {many(num_videos, 'video')} between {num_videos * low:,.0f} and {num_videos * high:,.0f} (95%)"
        )
    lines += values["examples"]
    if len(bad) > _EXAMPLES:
        rest = "bad.parquet has all" if out else "--out FOLDER writes all"
        lines.append(f"... and {len(bad) - _EXAMPLES:,} more; {rest}")
    odd = [row for row in bad if _is_no_file(row)]
    kinds = count_reasons([row for row in bad if not _is_no_file(row)])
    warnings = [
        Warn(f"{many(count, 'bad video')} of class {name}", _REMEDIES[name])
        for name, count in kinds.items()
        if name in _REMEDIES
    ]
    if odd:
        text = (
            f"{many(len(odd), 'name')} of what is no file (a pipe, a socket, a device, a folder), such as {odd[0].uri}"
        )
        warnings.append(Warn(text, "remove them, or take them off the list"))
    return Section(name="bad", values=values, lines=tuple(lines), warnings=tuple(warnings))


def said_of_bad(row: QuarantineRow) -> str:
    """`videos/cut.mp4: UnreadableContainer: why`; a member of a shard has its id before the shard's path."""
    place = row.uri if row.offset is None else f"{row.video_id} in {row.uri}"
    return f"{place}: {row.error_class}: {row.error_text.removeprefix(row.uri).lstrip(': ')}"


def _is_no_file(row: QuarantineRow) -> bool:
    return row.error_class == "ObjectNotFound" and "not a regular file" in row.error_text


def _reasons(reasons: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in reasons.items())
