"""Loading runs no code: pickles in every file that kinoray reads, and a canary that a running one would make.

Each payload is real: unpickled by what it is meant for, it makes a folder. Each reader is kinoray's own, and answers
with an error of kinoray.errors, or takes the bytes for what they are.
"""

import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from ray.data.extensions.object_extension import ArrowPythonObjectArray

from kinoray.capacity.plan import load_rates
from kinoray.catalog.annotations import read_annotations, read_label_names
from kinoray.catalog.rows import QUARANTINE_SCHEMA, load_quarantine
from kinoray.catalog.table import CATALOG_SCHEMA, catalog_of_source, load_catalog
from kinoray.cluster.config import SubmitConfig
from kinoray.cluster.submit import read_settings
from kinoray.config.file import load_config
from kinoray.config.shared import CacheConfig, ClipConfig, DecodeConfig, ModelConfig, digest, parse_options
from kinoray.errors import ConfigError, KinorayError, MediaError
from kinoray.evaluation.record import read_evaluation
from kinoray.label.answers import load_calibration
from kinoray.label.keys import row_keys
from kinoray.label.ledger import read_predictions
from kinoray.label.times import summarise
from kinoray.label.unit import PREDICTION_SCHEMA
from kinoray.library.config import LabelsConfig
from kinoray.library.correct import read_corrections
from kinoray.library.labels import labels as list_labels
from kinoray.network.build import build_model
from kinoray.network.checkpoint import (
    META_FILE,
    MODEL_FILE,
    TRAIN_FILE,
    find_checkpoint,
    list_checkpoints,
    load_model,
    load_model_state,
    load_train_state,
    save_checkpoint,
)
from kinoray.pack.tars import open_archive
from kinoray.pack.unit import read_commit
from kinoray.pack.verb import pin_plan
from kinoray.storage.objects import Storage, join
from kinoray.train.config import TrainConfig
from kinoray.train.runfolder import RunFolder
from kinoray.train.runs import Heartbeat, find_runs
from kinoray.train.state import start_from
from kinoray.tune.config import parse_space
from kinoray.tune.results import known_trials, read_outcome
from kinoray.video.cache import CacheFolder, FrameCache
from kinoray.video.request import Sampled
from kinoray.video.sandbox.pool import shared_sandbox
from small_sets import LABELS, catalog_of
from small_tables import ROOT_NAME, drafted, label_library, ledger_in, library, rows_for, sealed
from test_checkpoint import META, tiny_state
from tiny_models import OWN_NETWORKS
from vcm_sdd.weights import read_state

LOCAL = Storage()
PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.canary,)


@dataclass(frozen=True)
class Payload:
    """A file that hurts whoever reads it carelessly."""

    data: bytes
    careless: Callable[[bytes], object]
    """Reads it so that it fires."""


def saved(value: object, *, new: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=new)
    return buffer.getvalue()


def load_torch(data: bytes) -> object:
    return torch.load(io.BytesIO(data), weights_only=False)


def load_numpy(data: bytes) -> object:
    found = np.load(io.BytesIO(data), allow_pickle=True)
    return [found[name] for name in found.files] if hasattr(found, "files") else found


def numpy_file(value: object, *, zipped: bool) -> bytes:
    buffer = io.BytesIO()
    array = np.array([value], object)
    if zipped:
        np.savez(buffer, array=array)
    else:
        np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def tar_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return buffer.getvalue()


def old_torch_tar(bomb: Bomb) -> bytes:
    """The form of torch 0.1: a tar with pickles of storages and tensors."""
    members = {name: pickle.dumps(bomb if name == "pickle" else 0, 2) for name in ("storages", "tensors", "pickle")}
    return tar_of({"sys_info": pickle.dumps({"protocol_version": 1000}, 2), **members})


def payloads(canary: Path) -> dict[str, Payload]:
    """By name."""
    bomb = Bomb(canary)
    state = {"classify.weight": torch.zeros(3, 5), "optimizer": {"moments": [bomb]}}
    made = {f"protocol {number}": Payload(pickle.dumps(bomb, number), pickle.loads) for number in PROTOCOLS}
    made |= {f"nested {number}": Payload(pickle.dumps({"a": [{"b": bomb}]}, number), pickle.loads) for number in (0, 4)}
    made |= {
        "torch zip": Payload(saved(state, new=True), load_torch),
        "torch legacy": Payload(saved(state, new=False), load_torch),
        "torch zip, alone": Payload(saved(bomb, new=True), load_torch),
        "torch tar": Payload(old_torch_tar(bomb), lambda data: pickle.loads(_member(data, "pickle"))),
        "npy": Payload(numpy_file(bomb, zipped=False), load_numpy),
        "npz": Payload(numpy_file(bomb, zipped=True), load_numpy),
        "gzip": Payload(gzip.compress(pickle.dumps(bomb)), lambda data: pickle.loads(gzip.decompress(data))),
        "after a PAR1": Payload(b"PAR1" + pickle.dumps(bomb) + b"PAR1", lambda data: pickle.loads(data[4:-4])),
        "in a safetensors": Payload(_safetensors(pickle.dumps(bomb, 0)), lambda data: pickle.loads(data[8:])),
        "in JSON": Payload(
            _json(pickle.dumps(bomb, 0)), lambda data: pickle.loads(bytes.fromhex(json.loads(data)["py/object"]))
        ),
    }
    return made


def _member(data: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        found = tar.extractfile(name)
        assert found is not None
        return found.read()


def _safetensors(data: bytes) -> bytes:
    """A pickle where the JSON of a safetensors file is."""
    return struct.pack("<Q", len(data)) + data


def _json(data: bytes) -> bytes:
    return json.dumps({"py/object": data.hex(), "__reduce__": ["os.mkdir"]}).encode()


# Readers: each puts the bytes where it looks for them, and reads


def read_as(name: str, read: Callable[[Path, str], object]) -> Callable[[Path, bytes], object]:
    """A reader of one file with this name: `read` gets the folder and the file's uri."""

    def reader(folder: Path, data: bytes) -> object:
        LOCAL.put(str(folder / name), data)
        return read(folder, str(folder / name))

    return reader


def checkpoint_with(name: str, read: Callable[[str], object]) -> Callable[[Path, bytes], object]:
    """A reader of a checkpoint of which one file is the payload, and checkpoint.json agrees with it."""

    def reader(folder: Path, data: bytes) -> object:
        uri = str(folder)
        save_checkpoint(LOCAL, uri, model_state=tiny_state(), meta=META, train_state={"m": torch.zeros(2)})
        LOCAL.put(join(uri, name), data)
        document = json.loads(LOCAL.read(join(uri, META_FILE)))
        document["files"][name] = {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        body = {key: document[key] for key in ("format", "files", "meta")}
        LOCAL.put(join(uri, META_FILE), json.dumps({**body, "digest": digest(body)}).encode())
        return read(uri)

    return reader


def table_with(pattern: str, read: Callable[[str], object]) -> Callable[[Path, bytes], object]:
    """A reader of a result table whose files that match are the payload; a table among the parts is a proper part."""

    def reader(folder: Path, data: bytes) -> object:
        ledger = ledger_in(LOCAL, folder)
        label_library(ledger, library(6), unit_size=6)
        root = Path(ledger.root)
        found = list(root.glob(pattern))
        assert found
        for path in found:
            path.write_bytes(as_part(data) if pattern == "parts/*" else data)
        return read(str(folder))

    return reader


def as_part(data: bytes) -> bytes:
    """The payload, with the digests of a part where it is Parquet (`parquet` gives it the metadata of one)."""
    return sealed(data) if data.endswith(b"PAR1") else data


def start_again(folder: Path, uri: str) -> object:
    """What a training that is resumed reads first."""
    catalog = catalog_of([{"video_id": "v", "uri": "u", "split": "train"}])
    config = TrainConfig(catalog="set", out=str(folder), model=ModelConfig(factory="tiny_models:mean_colour"))
    return RunFolder(LOCAL, str(folder)).claim(config, catalog)


def first_start(folder: Path, uri: str) -> object:
    with Heartbeat(LOCAL, str(folder)):
        pass
    return LOCAL.read(uri)


def cached_frames(folder: Path, data: bytes) -> object:
    """A file of the frame cache: as it is, and as the description inside a right file."""
    cache = FrameCache(CacheConfig(gb=1.0, folder=str(folder)), ClipConfig().without_flow())
    frames = np.zeros((8, 6, 3, 224, 224), np.uint8)
    path = CacheFolder(CacheConfig(gb=1.0, folder=str(folder))).path("ab" * 16, "frames")
    for content in (data, struct.pack("<8sII", b"kinofrm2", len(data), zlib.crc32(data)) + data):
        LOCAL.put(str(path), content)
        assert not cache.load("ab" * 16, frames, None)
        assert not path.exists()
    return None


def tar_members(folder: Path, data: bytes) -> object:
    """Members of a shard that are named like videos, metadata and code: bytes, and no video."""
    names = ("a.mp4", "a.json", "b.pyd", "c.pkl", "d.pt", "e.cls")
    uri = str(folder / "shard.tar")
    LOCAL.put(uri, tar_of(dict.fromkeys(names, data)))
    archive = open_archive(LOCAL, uri)
    assert [(member.name, archive.read()) for member in archive] == [(name, data) for name in names]
    return decoded(folder, data)


def decoded(folder: Path, data: bytes) -> object:
    with pytest.raises(MediaError):
        shared_sandbox(1).probe(data, DecodeConfig())
    return shared_sandbox(1).decode(data, Sampled(), ClipConfig().without_flow()).clip()


def start_weights(uri: str) -> object:
    model = build_model(ModelConfig(factory="tiny_models:mean_colour", options={"flow_channels": 2}), 3)
    return start_from(LOCAL, uri, model, META.model, META.labels)


def damaged_run(folder: Path, uri: str) -> object:
    [run] = find_runs(LOCAL, str(folder))
    assert run.state == "damaged"
    return run


READERS: dict[str, Callable[[Path, bytes], object]] = {
    "catalog.parquet": read_as("catalog.parquet", lambda folder, uri: load_catalog(LOCAL, str(folder))),
    "a .parquet of videos": read_as("x.parquet", lambda folder, uri: load_catalog(LOCAL, uri)),
    "a .csv of videos": read_as("x.csv", lambda folder, uri: catalog_of_source(LOCAL, uri)),
    "a video": decoded,
    "members of a shard": tar_members,
    "an archive": read_as("x.tar", lambda folder, uri: list(open_archive(LOCAL, uri))),
    "checkpoint.json": read_as(META_FILE, lambda folder, uri: load_model(LOCAL, str(folder), OWN_NETWORKS)),
    "checkpoint.json of a run": read_as(
        f"checkpoints/one/{META_FILE}", lambda folder, uri: list_checkpoints(LOCAL, str(folder))
    ),
    "the best checkpoint": read_as(
        f"checkpoints/one/{META_FILE}", lambda folder, uri: find_checkpoint(LOCAL, str(folder))
    ),
    "weights": checkpoint_with(MODEL_FILE, lambda uri: load_model(LOCAL, uri, OWN_NETWORKS)),
    "weights to start from": checkpoint_with(MODEL_FILE, start_weights),
    "optimizer": checkpoint_with(TRAIN_FILE, lambda uri: load_train_state(LOCAL, uri)),
    "files beside a checkpoint": read_as(".metadata", lambda folder, uri: load_model_state(LOCAL, str(folder))),
    "run.json": read_as("run.json", start_again),
    "run.json of a listing": read_as("run.json", damaged_run),
    "metrics.jsonl": read_as("metrics.jsonl", lambda folder, uri: RunFolder(LOCAL, str(folder)).epochs()),
    "losses": read_as("losses/epoch-000001.jsonl", lambda folder, uri: RunFolder(LOCAL, str(folder)).steps()),
    "environment.json": read_as("environment.json", lambda folder, uri: RunFolder(LOCAL, str(folder)).add_start({})),
    "status.json": read_as("status.json", first_start),
    "trial.json": read_as("trials/t1/trial.json", lambda folder, uri: known_trials(LOCAL, str(folder))),
    "trial.json of a trial": read_as("trials/t1/trial.json", lambda folder, uri: known_trials(LOCAL, str(folder))),
    "outcome.json": read_as("trials/t1/outcome.json", lambda folder, uri: read_outcome(LOCAL, str(folder), "t1")),
    "plan.json of a pack": read_as("plan.json", lambda folder, uri: pin_plan(LOCAL, str(folder), {"files": "x"})),
    "commit of a unit": read_as("shards/a.json", lambda folder, uri: read_commit(LOCAL, str(folder), "a")),
    "annotations .csv": read_as("train.csv", lambda folder, uri: read_annotations(LOCAL, [uri], {})),
    "annotations .parquet": read_as("train.parquet", lambda folder, uri: read_annotations(LOCAL, [uri], {})),
    "annotations .json": read_as("train.jsonl", lambda folder, uri: read_annotations(LOCAL, [uri], {})),
    "label names": read_as("names.json", lambda folder, uri: read_label_names(LOCAL, uri)),
    "quarantine.parquet": read_as("quarantine.parquet", lambda folder, uri: load_quarantine(LOCAL, uri)),
    "calibration.json": read_as("calibration.json", lambda folder, uri: load_calibration(LOCAL, uri, "m")),
    "rates.json": read_as("rates.json", lambda folder, uri: load_rates(LOCAL, uri)),
    "corrections .csv": read_as("corrections.csv", lambda folder, uri: read_corrections(LOCAL, [uri], LABELS)),
    "evaluation.json": read_as("evaluation.json", lambda folder, uri: read_evaluation(LOCAL, str(folder))),
    "config .yaml": read_as("config.yaml", lambda folder, uri: load_config(TrainConfig, uri)),
    "frames of a cache": cached_frames,
    "job.json of a table": table_with("job.json", lambda out: list_labels(LabelsConfig(predictions=out))),
    "plans of a table": table_with("plans/*", lambda out: read_predictions(LOCAL, out)),
    "commits of a table": table_with("parts/*", lambda out: summarise(LOCAL, out)),
    "parts of a table": table_with("parts/*", lambda out: read_predictions(LOCAL, out)),
    "parts of a listing": table_with("parts/*", lambda out: list_labels(LabelsConfig(predictions=out))),
}


def refused_or_inert(read: Callable[[], object], canary: Path, what: str) -> None:
    """The reader answers with an error of ours, or takes the bytes for bytes; nothing of theirs has run."""
    with suppress(KinorayError):
        read()
    assert not canary.exists(), what


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def test_every_payload_fires_when_it_is_unpickled(canary: Path) -> None:
    """So that its silence below means something."""
    made = payloads(canary)
    assert len(made) == 18
    for name, payload in made.items():
        payload.careless(payload.data)
        assert canary.is_dir(), name
        canary.rmdir()


@pytest.mark.parametrize("name", READERS)
def test_reading_runs_no_code(name: str, tmp_path: Path, canary: Path) -> None:
    for number, (what, payload) in enumerate(payloads(canary).items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        refused_or_inert(lambda folder=folder, data=payload.data: READERS[name](folder, data), canary, what)  # type: ignore[misc]
        shutil.rmtree(folder)


# Weights of other people's networks


@pytest.mark.parametrize("ending", [".pt", ".pth", ".pkl", ".safetensors"])
def test_pretrained_weights_run_no_code(ending: str, tmp_path: Path, canary: Path) -> None:
    path = tmp_path / f"weights{ending}"
    for what, payload in payloads(canary).items():
        path.write_bytes(payload.data)
        with pytest.raises(ValueError, match="backbone_weights: "):
            read_state(path)
        assert not canary.exists(), what


@pytest.mark.parametrize(
    ("form", "ending"), [("torch zip", "pt"), ("torch legacy", "pth"), ("in a safetensors", "safetensors")]
)
def test_a_network_refuses_such_weights_as_a_setting(form: str, ending: str, tmp_path: Path, canary: Path) -> None:
    path = tmp_path / f"weights.{ending}"
    path.write_bytes(payloads(canary)[form].data)
    options = {"backbone": "resnet18", "backbone_weights": str(path)}
    with pytest.raises(ConfigError, match=r"model.options: .*weights\."):
        build_model(ModelConfig(factory="tsn", options=options), 3)
    assert not canary.exists()


# YAML with tags that make Python objects


TAGS = (
    "!!python/object/apply:os.mkdir [CANARY]",
    "!!python/object/new:os.mkdir [CANARY]",
    "{a: !!python/object/apply:os.mkdir {args: [CANARY]}}",
)


@pytest.mark.parametrize("text", TAGS)
def test_yaml_makes_no_objects(text: str, tmp_path: Path, canary: Path) -> None:
    text = text.replace("CANARY", str(canary))
    yaml.unsafe_load(text)
    assert canary.is_dir()
    canary.rmdir()
    (tmp_path / "config.yaml").write_text(f"out: {text}")
    readers: dict[str, Callable[[], object]] = {
        "--config": lambda: load_config(TrainConfig, str(tmp_path / "config.yaml")),
        "--model.options": lambda: parse_options([f"backbone={text}"]),
        "--space": lambda: parse_space({"optim.lr": text}),
        "settings of a submitted job": lambda: read_settings(SubmitConfig(verb="train", settings=text)),
    }
    for name, read in readers.items():
        with pytest.raises(ConfigError):
            read()
        assert not canary.exists(), name


# Parquet: Arrow's own ways to hold a pickle


def hidden(canary: Path, schema: pa.Schema) -> dict[str, bytes]:
    """Parquet with the columns of a schema, in which a pickle hides."""
    data = pickle.dumps(Bomb(canary))
    arrays = {field.name: pa.nulls(1, field.type) for field in schema}
    plain = pa.table(arrays)
    text = pa.array([data.hex()])
    extension = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": data}
    tensor = {b"ARROW:extension:name": b"ray.data.arrow_tensor_v2", b"ARROW:extension:metadata": data}
    typed = [pa.field(name, pa.binary(), metadata=extension) for name in schema.names]
    tensors = [pa.field(name, pa.large_list(pa.int64()), metadata=tensor) for name in schema.names]
    tables = {
        "schema metadata": plain.replace_schema_metadata({b"kinoray.labels": data, b"pandas": data}),
        "binary columns": pa.table({name: pa.array([data]) for name in schema.names}),
        "text columns": pa.table(dict.fromkeys(schema.names, text)),
        "arrow.py_extension_type": pa.table([pa.array([data])] * len(typed), schema=pa.schema(typed)),
        "ray.data.arrow_tensor": pa.table(
            [pa.array([[1]], pa.large_list(pa.int64()))] * len(tensors), schema=pa.schema(tensors)
        ),
    }
    return {name: parquet(table) for name, table in tables.items()} | ray_objects(canary, schema)


def parquet(table: pa.Table) -> bytes:
    """With what a part of `table_with` would say of itself."""
    unit_id = drafted(ROOT_NAME, "", row_keys(library(6).table), 6).units[0].unit_id
    commit = {"unit_id": unit_id, "run_id": "r", "counts": {"labelled": 6}}
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"kinoray": json.dumps(commit)})
    return buffer.getvalue()


def ray_objects(canary: Path, schema: pa.Schema) -> dict[str, bytes]:
    """Columns of the type in which Ray Data pickles objects, also inside lists: reading their values unpickles them."""
    column = ArrowPythonObjectArray.from_objects([Bomb(canary)])
    listed = pa.ListArray.from_arrays([0, 1], column)
    return {
        "ray.data objects": parquet(pa.table(dict.fromkeys(schema.names, column))),
        "ray.data objects in lists": parquet(pa.table(dict.fromkeys(schema.names, listed))),
    }


KINETICS = pa.schema(
    [
        ("youtube_id", pa.string()),
        ("time_start", pa.int64()),
        ("time_end", pa.int64()),
        ("split", pa.string()),
        ("label", pa.string()),
    ]
)
TABLES: dict[str, tuple[pa.Schema, Callable[[Path, bytes], object]]] = {
    "catalog": (CATALOG_SCHEMA, READERS["a .parquet of videos"]),
    "annotations": (KINETICS, READERS["annotations .parquet"]),
    "quarantine": (QUARANTINE_SCHEMA, READERS["quarantine.parquet"]),
    "parts": (PREDICTION_SCHEMA, READERS["parts of a table"]),
    "parts, listed": (PREDICTION_SCHEMA, READERS["parts of a listing"]),
}


def test_values_of_ray_types_fire_when_they_are_read(canary: Path) -> None:
    for name, data in ray_objects(canary, CATALOG_SCHEMA.empty_table().select(["uri"]).schema).items():
        pq.read_table(pa.BufferReader(data)).to_pylist()
        assert canary.is_dir(), name
        canary.rmdir()


def test_a_table_that_hides_nothing_is_read_as_a_part(tmp_path: Path) -> None:
    """So that the payloads below are refused, or inert, for what they hide."""
    rows = rows_for(library(6), row_keys(library(6).table))
    assert READERS["parts of a table"](tmp_path, parquet(rows)) == rows


@pytest.mark.parametrize("name", TABLES)
def test_parquet_runs_no_code(name: str, tmp_path: Path, canary: Path) -> None:
    schema, read = TABLES[name]
    for number, (what, data) in enumerate(hidden(canary, schema).items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        refused_or_inert(lambda folder=folder, data=data: read(folder, data), canary, what)  # type: ignore[misc]
