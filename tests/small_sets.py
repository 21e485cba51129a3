"""Small sets of real H.264 videos that a linear classifier on the mean colour can learn."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kinoray.catalog.table import CATALOG_SCHEMA, Catalog, save_catalog
from kinoray.demo.videos import make_video
from kinoray.storage.objects import Storage, join
from kinoray.train.runfolder import EpochRow

COLOURS = {"blue": (40, 40, 200), "green": (40, 200, 40), "red": (200, 40, 40)}
LABELS = tuple(sorted(COLOURS))


def colour_video(label: str, seed: int, *, num_frames: int = 6, side: int = 32) -> bytes:
    """A noisy video whose mean colour is its class's, give or take."""
    rng = np.random.default_rng(seed)
    base = np.array(COLOURS[label]) + rng.integers(-25, 26, 3)
    noise = rng.integers(-30, 31, (num_frames, side, side, 1))
    return make_video(np.clip(base + noise, 0, 255).astype(np.uint8))


def catalog_of(rows: list[dict[str, object]]) -> Catalog:
    """A catalog of rows that name only some of the columns."""
    arrays = [pa.array([row.get(field.name) for row in rows], field.type) for field in CATALOG_SCHEMA]
    return Catalog(pa.table(arrays, schema=CATALOG_SCHEMA), LABELS)


def save_as_pack(storage: Storage, uri: str, catalog: Catalog) -> None:
    """Write a catalog where a folder is to be known as a pack's: beside the record that a pack ends with."""
    save_catalog(storage, join(uri, "catalog.parquet"), catalog)
    storage.put(join(uri, "pack.json"), json.dumps({"catalog_digest": catalog.digest}).encode())


def colour_set(storage: Storage, uri: str, *, train: int, val: int, broken: tuple[int, ...] = ()) -> Catalog:
    """Write two shards and their catalog under uri; `broken` training videos are random bytes."""
    rows: list[dict[str, object]] = []
    shards: list[bytearray] = [bytearray(), bytearray()]
    for index in range(train + val):
        label_id = index % len(LABELS)
        data = colour_video(LABELS[label_id], index)
        if index in broken:
            data = np.random.default_rng(index).bytes(2000)
        shard = index * len(shards) // (train + val)
        rows.append(
            {
                "video_id": f"v{index:03d}",
                "uri": join(uri, f"shard-{shard}.bin"),
                "offset": len(shards[shard]),
                "length": len(data),
                "label": LABELS[label_id],
                "label_id": label_id,
                "split": "train" if index < train else "val",
                "status": "packed",
            }
        )
        shards[shard] += data
    for number, content in enumerate(shards):
        storage.put(join(uri, f"shard-{number}.bin"), bytes(content))
    catalog = catalog_of(rows)
    save_as_pack(storage, uri, catalog)
    return catalog


def set_in(folder: Path, *, train: int, val: int, broken: tuple[int, ...] = ()) -> str:
    """A colour_set in a folder; returns where."""
    colour_set(Storage(), str(folder), train=train, val=val, broken=broken)
    return str(folder)


def epoch_row(epoch: int, **changes: Any) -> EpochRow:
    """What a training writes of an epoch; nothing of it was measured but what is given."""
    row: dict[str, Any] = {"epoch": epoch, "step": epoch, "samples": 0, "quarantined": 0, "lr": 0.5, "time_s": 1e9}
    times = dict.fromkeys(("videos_per_s", "decode_wait", "train_s", "decode_cpu_s", "epoch_s"), 0.0)
    return EpochRow(**(row | times | changes))
