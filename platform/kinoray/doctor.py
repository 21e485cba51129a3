"""`kinoray doctor`: what is wrong with a set of videos, and what decoding it costs, before money is spent.

Each check gives a Section; another check is another Section in `_sections`. What is easy to break: nothing here may
need Ray, and nothing but the sample is read.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from kinoray.catalog import references
from kinoray.doctor_decode import choose_decoded, choose_transcoded, decode_section
from kinoray.doctor_probe import Probed, Video, measure, probe_all
from kinoray.doctor_section import Section
from kinoray.doctor_source import Inventory, choose_sample, open_source, source_section
from kinoray.doctor_videos import bad_section, probe_section
from kinoray.errors import KinorayError, TooManyBad
from kinoray.progress import format_duration
from kinoray.quarantine import Refusal, count_reasons, save_quarantine
from kinoray.storage import Storage, absolute, join
from kinoray.verbs_doctor import DoctorConfig

__all__ = ["doctor"]

_TITLES = {"source": "What is there", "probe": "Videos", "decode": "Decoding", "bad": "Bad videos"}


def doctor(config: DoctorConfig) -> dict[str, Any]:
    """Examine config.source, print what was found, and write doctor.json and bad.parquet to config.out.

    Returns:
        What is in doctor.json.

    Raises:
        CatalogError: nothing there is a video, or the list is malformed.
        StorageError: the source cannot be listed, none of it may be read, or the store is down.
        DecoderStartFailed: no decoder process can be started on this machine.
        TooManyBad: everything is said and written, but more than max_bad_fraction of the sample is bad.
    """
    start = time.monotonic()
    storage = Storage(config.storage)
    source = absolute(config.source)
    print(f"doctor: listing {source}", flush=True)
    inventory = open_source(storage, source)
    num_videos = len(inventory.catalog)
    sections, bad, num_probed = [], list[Refusal](), 0
    for section, refused, count in _sections(storage, config, inventory):
        sections.append(section)
        bad += refused
        num_probed += count
    sections.append(bad_section(bad, num_probed, num_videos, config.max_bad_fraction, config.out))
    record = _record(config, sections)
    _print(sections)
    print(
        f"doctor: took {format_duration(time.monotonic() - start)}; {_bytes_read(record):,} bytes of videos were read"
    )
    if config.out:
        out = absolute(config.out)
        save_quarantine(storage, join(out, "bad.parquet"), bad)
        storage.put(join(out, "doctor.json"), json.dumps(record, indent=1).encode())
        print(f"doctor: wrote {join(out, 'doctor.json')} and {join(out, 'bad.parquet')}", flush=True)
    if len(bad) > config.max_bad_fraction * num_probed:
        reasons = ", ".join(f"{count} {reason}" for reason, count in count_reasons(bad).items())
        raise TooManyBad(
            f"doctor: {len(bad)} of {num_probed} probed videos of {source} are bad ({reasons}), more than "
            f"max_bad_fraction {config.max_bad_fraction:g}; the first: {bad[0].uri}: {bad[0].error_text}"
        )
    return record


def _sections(
    storage: Storage, config: DoctorConfig, inventory: Inventory
) -> Iterator[tuple[Section, list[Refusal], int]]:
    """(what a check found, the videos that it found bad, the videos that it probed), check after check."""
    num_videos, decode = len(inventory.catalog), config.clip.decode
    yield source_section(inventory, decode), [], 0
    probed = probe_all(storage, _sample(inventory, config.sample), decode, config.decoders)
    yield probe_section(probed, num_videos, config.clip), _bad_of(probed), len(probed)
    if not config.decode_sample:
        return
    chosen = choose_decoded(probed, config.decode_sample)
    costs = measure(
        storage,
        [found.video for found in chosen],
        config.clip,
        with_flow=config.flow,
        transcode_ids=choose_transcoded(chosen, config.transcode_sample),
        num_decoders=config.decoders,
    )
    failed = [
        _refusal(found.video, cost.error, "decode")
        for found, cost in zip(chosen, costs, strict=True)
        if cost.error is not None
    ]
    yield decode_section(probed, costs, num_videos, config.clip), failed, 0


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


def _bad_of(probed: Sequence[Probed]) -> list[Refusal]:
    return [_refusal(found.video, found.error, found.stage) for found in probed if found.error is not None]


def _refusal(video: Video, error: KinorayError, stage: str) -> Refusal:
    text = " ".join(str(error).split())
    place = video.reference
    return Refusal(video.video_id, place.uri, type(error).__name__, text, stage, place.offset, place.length)


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
            print(f"  {line}")
    warnings = [warning for section in sections for warning in section.warnings]
    print(f"\nWarnings: {len(warnings) or 'none'}")
    for warning in warnings:
        print(f"  - {warning.found}:\n    {warning.remedy}")
    print(flush=True)
