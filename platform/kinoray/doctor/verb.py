"""`kinoray doctor`: what is wrong with videos, a machine, a store or a cluster, before money is spent.

Each part gives a Section; another one is another Section in `_sections`. What is easy to break: only the cluster's
part may need Ray (it is imported when it is asked for), and nothing but the sample of videos is read.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from kinoray.catalog.rows import QuarantineRow, Refusal, count_reasons, save_quarantine
from kinoray.catalog.table import references
from kinoray.console import format_duration, many, visible
from kinoray.doctor.config import DoctorConfig, Section
from kinoray.doctor.decode import choose_decoded, choose_transcoded, decode_section
from kinoray.doctor.machine import machine_section
from kinoray.doctor.probe import Probed, Video, measure, probe_all
from kinoray.doctor.source import Inventory, choose_sample, open_source, source_section
from kinoray.doctor.store import store_section
from kinoray.doctor.videos import bad_section, probe_section, said_of_bad
from kinoray.errors import JobError, TooManyBad
from kinoray.storage.objects import Storage, absolute, join
from kinoray.storage.records import require_folder

__all__ = ["doctor"]

_TRANSCODED = 3  # decoded videos on which it is measured what `pack --transcode` would save, where it could save
_DECODERS = 2  # videos that are decoded at the same time, in a process each

_TITLES = {
    "machine": "This machine",
    "storage": "Storage",
    "cluster": "Cluster",
    "source": "What is there",
    "probe": "Videos",
    "decode": "Decoding",
    "bad": "Bad videos",
}
_ADDRESS_NAMES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


def doctor(config: DoctorConfig) -> dict[str, Any]:
    """Examine what config names, print what was found, and write doctor.json to config.out.

    With config.source, bad.parquet goes there, too.

    Returns:
        What is in doctor.json.

    Raises:
        CatalogError: nothing in the source is a video, or the list is malformed.
        ConfigError: an address is malformed.
        StorageError: the source cannot be listed, none of it may be read, or the store is down.
        DecoderStartFailed: no decoder process can be started on this machine.
        JobError: everything is said and written, but a check is wrong.
        TooManyBad: likewise, but more than max_bad_fraction of the sample is bad.
    """
    start = time.monotonic()
    if config.out:
        require_folder(Storage(config.storage), "out", config.out, "doctor")
    sections, bad, num_probed = [], list[QuarantineRow](), 0
    for section, refused, count in _sections(config):
        sections.append(section)
        bad += refused
        num_probed += count
    record = _record(config, sections)
    _print(sections)
    read = f"; {_bytes_read(record):,} bytes of videos were read" if config.source else ""
    print(f"doctor: took {format_duration(time.monotonic() - start)}{read}")
    if config.out:
        _write(config, record, bad)
    wrong = [check for section in sections for check in section.checks if check.status == "wrong"]
    if wrong:
        raise JobError(f"doctor: {_tally(sections)}; the first that is wrong: {wrong[0].name}: {wrong[0].found}")
    if len(bad) > config.max_bad_fraction * num_probed:
        reasons = ", ".join(f"{count} {reason}" for reason, count in count_reasons(bad).items())
        raise TooManyBad(
            f"doctor: {len(bad)} of {num_probed} probed videos of {absolute(config.source)} are bad ({reasons}), more "
            f"than max_bad_fraction {config.max_bad_fraction:g}; the first: {said_of_bad(bad[0])}"
        )
    return record


def _sections(config: DoctorConfig) -> Iterator[tuple[Section, list[QuarantineRow], int]]:
    """(what a part found, the videos that it found bad, the videos that it probed), part after part."""
    if not config.source:
        print("doctor: examining this machine", flush=True)
        yield machine_section(), [], 0
    if config.bucket:
        print(f"doctor: trying {absolute(config.bucket)}", flush=True)
        yield store_section(config.storage, config.bucket), [], 0
    if config.address or (not config.source and any(os.environ.get(name) for name in _ADDRESS_NAMES)):
        print("doctor: asking the cluster", flush=True)
        from kinoray.doctor.cluster import cluster_section  # it needs ray, which videos and machines do not

        yield cluster_section(config.address), [], 0
    if config.source:
        yield from _video_sections(config)


def _video_sections(config: DoctorConfig) -> Iterator[tuple[Section, list[QuarantineRow], int]]:
    """The parts about config.source."""
    storage, source = Storage(config.storage), absolute(config.source)
    print(f"doctor: listing {source}", flush=True)
    inventory = open_source(storage, source)
    num_videos, decode = len(inventory.catalog), config.clip.decode
    yield source_section(inventory, decode), [], 0
    probed = probe_all(storage, _sample(inventory, config.sample), decode, _DECODERS)
    bad = _bad_of(probed)
    yield probe_section(probed, num_videos, config.clip), bad, len(probed)
    if config.decode_sample:
        section, failed = _decoded(config, storage, probed, num_videos)
        yield section, failed, 0
        bad = [*bad, *failed]
    yield bad_section(bad, len(probed), num_videos, config.max_bad_fraction, config.out), [], 0


def _decoded(
    config: DoctorConfig, storage: Storage, probed: Sequence[Probed], num_videos: int
) -> tuple[Section, list[QuarantineRow]]:
    """What decoding some of the probed videos costs, and those that it failed on."""
    chosen = choose_decoded(probed, config.decode_sample)
    costs = measure(
        storage,
        [found.video for found in chosen],
        config.clip,
        transcode_ids=choose_transcoded(chosen, _TRANSCODED),
        num_decoders=_DECODERS,
    )
    failed = [
        _row_of(found.video, cost.refusal)
        for found, cost in zip(chosen, costs, strict=True)
        if cost.refusal is not None
    ]
    return decode_section(probed, costs, num_videos, config.clip), failed


def _write(config: DoctorConfig, record: dict[str, Any], bad: Sequence[QuarantineRow]) -> None:
    storage, out = Storage(config.storage), absolute(config.out)
    names = [join(out, "doctor.json")]
    if config.source:
        names.append(join(out, "bad.parquet"))
        save_quarantine(storage, names[-1], bad)
    storage.put(names[0], json.dumps(record, indent=1).encode())
    print(f"doctor: wrote {' and '.join(names)}", flush=True)


def _sample(inventory: Inventory, count: int) -> list[Video]:
    rows = inventory.catalog.table.take(choose_sample(inventory.catalog, count))
    found = zip(rows.to_pylist(), references(rows), strict=True)
    return [
        Video(
            video_id=row["video_id"],
            reference=reference,
            size_bytes=row["length"] if row["size_bytes"] is None else row["size_bytes"],
        )
        for row, reference in found
    ]


def _bad_of(probed: Sequence[Probed]) -> list[QuarantineRow]:
    return [_row_of(found.video, found.refusal) for found in probed if found.refusal is not None]


def _row_of(video: Video, refusal: Refusal) -> QuarantineRow:
    place = video.reference
    return QuarantineRow(video.video_id, place.uri, refusal, place.offset, place.length)


def _record(config: DoctorConfig, sections: Sequence[Section]) -> dict[str, Any]:
    return {
        "config": asdict(config),
        **{section.name: section.values for section in sections},
        "warnings": [asdict(warning) for section in sections for warning in section.warnings],
    }


def _bytes_read(record: dict[str, Any]) -> int:
    return sum(int(record.get(name, {}).get("bytes_read", 0)) for name in ("probe", "decode"))


def _print(sections: Sequence[Section]) -> None:
    for section in sections:
        print(f"\n{_TITLES[section.name]}")
        for line in section.lines:
            print(f"  {visible(line)}")
    if any(section.checks for section in sections):
        print(f"\nChecks: {_tally(sections)}")
    if all(section.checks for section in sections):
        return
    warnings = [warning for section in sections for warning in section.warnings]
    print(f"\nWarnings: {len(warnings) or 'none'}")
    for warning in warnings:
        print(f"  - {visible(warning.found)}:\n    {visible(warning.remedy)}")
    print(flush=True)


def _tally(sections: Sequence[Section]) -> str:
    """`12 ok, 1 warning, 0 wrong`."""
    counts = Counter(check.status for section in sections for check in section.checks)
    return f"{counts['ok']} ok, {many(counts['warning'], 'warning')}, {counts['wrong']} wrong"
