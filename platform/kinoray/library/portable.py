"""`kinoray export CHECKPOINT --format onnx` (or torch-export): a trained network as a file that runs without kinoray.

The file takes what the network takes, float32 [B, S, T, C, H, W] of each stream, and gives logits [B, classes];
network.json beside it says how a video becomes that, and how far the file was from the network on the CPU. What is easy
to break: no file is handed over whose logits were not compared, and a batch of any size is promised only where several
sizes were run.
"""

import hashlib
import importlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

import kinoray
from kinoray.catalog.rows import Refusal, error_of
from kinoray.catalog.table import catalog_of_source
from kinoray.config.clip import ClipConfig
from kinoray.console import many, visible
from kinoray.errors import CatalogError, ConfigError, KinorayError, ModelError
from kinoray.label.config import LabelConfig
from kinoray.label.open import open_network
from kinoray.label.read import VideoReader
from kinoray.label.times import StageClock
from kinoray.label.work import UNIT_COLUMNS, LabelJob
from kinoray.library.config import ExportConfig
from kinoray.network import InputSpec
from kinoray.network.batch import FLOW_CHANNELS, DeviceInput, VideoBatch, model_inputs
from kinoray.network.build import VideoModel, check_clip
from kinoray.network.checkpoint import CheckpointMeta, load_model
from kinoray.network.forward import collate_for
from kinoray.storage.leftovers import scratch_folder
from kinoray.storage.objects import Storage, absolute

__all__ = ["export_network"]

Inputs = dict[str, Tensor | None]
"""One or several clips as the network takes them; a stream that it does not look at is None."""
Run = Callable[[Inputs], np.ndarray]

_TOLERANCE = 1e-3  # of a logit, against the network itself
_FILES = {"torch-export": "network.pt2", "onnx": "network.onnx"}
_WRITTEN = {*_FILES.values(), f"{_FILES['onnx']}.data"}
_PACKAGES = {"torch-export": (), "onnx": ("onnx", "onnxscript", "onnxruntime")}
_MAX_VIDEOS = 8  # that are compared
_MAX_ONE_FILE = 2**30  # bytes of weights; protobuf takes no file of 2 GiB, so ONNX puts more into one beside it


def export_network(config: ExportConfig) -> dict[str, Any]:
    """Write the network's file and network.json to config.to; returns what that says.

    Raises:
        ConfigError: a setting is wrong, a package is missing, or the folder holds what no export wrote.
        CheckpointError: there is no sound checkpoint.
        CatalogError: none of the videos can be read.
        ModelError: the network cannot be exported, or the file's logits are others than its own.
    """
    _require_packages(config.format)
    storage = Storage(config.storage)
    asked = LabelConfig(
        source="",
        checkpoint=config.predictions,
        allow_factory=config.allow_factory,
        decode=config.decode,
        storage=config.storage,
    )
    opened = open_network(asked, say=_say, warn=_say)
    model, meta = load_model(storage, opened.job.checkpoint, config.allow_factory)
    spec = model.input_spec
    check_clip(spec, opened.job.clip)
    clip = opened.job.clip.for_network(spec.flow_channels)
    clips = list(_real_clips(opened.job, clip, spec, config.videos) if config.videos else _made_clips(clip, spec))
    with scratch_folder("export") as aside:
        folder, about = _made(model, config.format, aside, clips)
        parity = about["parity"]
        record = {
            "format": config.format,
            **about,
            **_recipe_of(meta, clip, spec, is_dynamic=about["batch"] is None),
            "checkpoint": opened.job.checkpoint,
            "model_digest": meta.model_digest,
            "network": asdict(meta.model),
            "origin": None if meta.origin is None else asdict(meta.origin),
            "parity": {"videos": config.videos or "noise", **parity},
            "versions": _versions(config.format),
        }
        if not parity["max_difference"] <= _TOLERANCE:  # nor if it is no number
            raise ModelError(
                f"{config.format} of {opened.job.checkpoint}: its logits differ from the network's by up to "
                f"{parity['max_difference']:.1e} on {many(parity['clips'], 'clip')}, at most {_TOLERANCE:g} is "
                "allowed; nothing was written"
            )
        _hand_over(folder, Path(absolute(config.to)), record)
    size_mb = sum(entry["size_bytes"] for entry in record["files"].values()) / 1e6
    batch = "one clip at a time" if about["batch"] else "batches of any size"
    print(
        f"export: {config.format} in {config.to} ({size_mb:.1f} MB, {batch}); on {many(parity['clips'], 'clip')} of "
        f"{visible(config.videos) or 'noise'} its logits differ by at most {parity['max_difference']:.1e} (the largest "
        f"is {parity['largest_logit']:.3g}) and the first class is the same for {parity['same_top1']}; network.json "
        "says how its clips are made",
        flush=True,
    )
    return record


def _say(line: str) -> None:
    print(f"export: {visible(line)}", flush=True)


def _require_packages(kind: str) -> None:
    for name in _PACKAGES[kind]:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(f"format {kind} needs {name}: pip install 'kinoray[onnx]'") from error


def _versions(kind: str) -> dict[str, str]:
    return {"kinoray": kinoray.__version__, **{name: version(name) for name in ("torch", *_PACKAGES[kind])}}


def _hand_over(aside: Path, folder: Path, record: dict[str, Any]) -> None:
    """Put the files into the folder: network.json first, which says whose it is and what the others must be."""
    paths = sorted(aside.iterdir())
    record["files"] = {}
    for path in paths:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        record["files"][path.name] = {"size_bytes": path.stat().st_size, "sha256": digest}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "network.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        for path in paths:
            beside = folder / f".{path.name}"
            shutil.copyfile(path, beside)
            os.replace(beside, folder / path.name)
        for name in _WRITTEN - record["files"].keys():
            (folder / name).unlink(missing_ok=True)  # of another export: network.json says nothing of it
    except OSError as error:
        raise ConfigError(f"to: {folder} cannot be written: {error.strerror or error}") from error


def _recipe_of(meta: CheckpointMeta, clip: ClipConfig, spec: InputSpec, *, is_dynamic: bool) -> dict[str, Any]:
    """How a video becomes the inputs, and what the outputs mean, for a program that does not know kinoray."""
    sample, view = clip.sample, clip.view
    channels = {"rgb": 3 if spec.rgb else 0, "flow": spec.flow_channels}
    sides = [sample.num_segments, sample.frames_per_segment]
    batch = "batch" if is_dynamic else 1
    return {
        "inputs": {
            name: {"dtype": "float32", "shape": [batch, *sides, count, view.crop_px, view.crop_px]}
            for name, count in channels.items()
            if count
        },
        "layout": "batch, segments, frames of a segment, channels, height, width",
        "outputs": {"logits": {"dtype": "float32", "shape": [batch, len(meta.labels)]}},
        "scores": meta.scores,
        "labels": list(meta.labels),
        "clip": {
            "segments": sample.num_segments,
            "frames_per_segment": sample.frames_per_segment,
            "stride": sample.stride,
            "fps": sample.fps,
            "placement": sample.placement,
            "short": sample.short,
            "resize": view.resize,
            "resize_px": view.resize_px,
            "resize_width_px": view.resize_width_px or (view.resize_px if view.resize == "stretch" else None),
            "interpolation": view.interpolation,
            "antialias": view.antialias,
            "crop_px": view.crop_px,
            "middle": view.middle,
            "rgb": "(x / 255 - mean) / std" if spec.rgb else None,
            "mean": list(spec.rgb_mean),
            "std": list(spec.rgb_std),
            "flow": {**asdict(clip.flow), "scale": "pixels / bound_px, in -1 .. 1"} if spec.flow_channels else None,
        },
    }


# Clips to compare on


def _real_clips(job: LabelJob, clip: ClipConfig, spec: InputSpec, source: str) -> Iterator[Inputs]:
    """One clip of each of the first videos, by the decoders and views of a labelling."""
    table = catalog_of_source(job.storage, absolute(source), say=_say).table.select(list(UNIT_COLUMNS))
    rows = table.slice(0, _MAX_VIDEOS)
    reader = VideoReader(job.storage, clip, job.views, StageClock(), num_decoders=1, batch_size=1)
    finish = DeviceInput(clip.flow.bound_px, "cpu") if clip.flow_on_device else None
    collate = collate_for("cpu", finish)
    refusals: list[Refusal] = []
    try:
        for video in reader.videos(rows):
            if isinstance(video, Refusal):
                refusals.append(video)
                continue
            yield model_inputs(collate([next(iter(video.first.clips()))]), spec, "cpu")
    finally:
        reader.close()
    if refusals:
        what = f"{len(refusals)} of {many(len(rows), 'video')} of {source} cannot be read"
        if len(refusals) == len(rows):
            raise CatalogError(f"videos: {what}; the first: {error_of(refusals[0])}")
        _say(f"{what} and were left out: {error_of(refusals[0])}")


def _made_clips(clip: ClipConfig, spec: InputSpec) -> Iterator[Inputs]:
    """Three clips of coloured patches that change from frame to frame, the same everywhere."""
    generator = torch.Generator().manual_seed(0)
    sample, side = clip.sample, clip.view.crop_px

    def patches(channels: int) -> Tensor:
        coarse = torch.rand(sample.num_frames, channels, 8, 8, generator=generator)
        fine = nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
        return fine.reshape(1, sample.num_segments, sample.frames_per_segment, channels, side, side)

    for _ in range(3):
        rgb = (patches(3) * 255).to(torch.uint8)
        flow = (patches(FLOW_CHANNELS) * 254 - 127).to(torch.int8) if spec.flow_channels else None
        yield model_inputs(VideoBatch(rgb=rgb, flow=flow), spec, "cpu")


def _joined(clips: Sequence[Inputs]) -> Inputs:
    """Clips as one batch."""
    return {
        name: None if first is None else torch.cat([cast(Tensor, clip[name]) for clip in clips])
        for name, first in clips[0].items()
    }


# The files


def _made(model: VideoModel, kind: str, aside: Path, clips: Sequence[Inputs]) -> tuple[Path, dict[str, Any]]:
    """A folder with the network's file, and what is to be said of it: for batches of any size, else of one clip.

    Raises:
        ModelError: it cannot be made, or does not run.
    """
    name = type(model).__name__
    _say(f"{name} is traced, written as {kind} and compared; a large network takes minutes")
    expected = [_logits(model, clip) for clip in clips]  # before it is traced: what it caches must be real tensors
    for is_dynamic in (True, False):
        folder = aside / ("any" if is_dynamic else "one")
        folder.mkdir()
        try:
            program = _traced(model, clips[0], is_dynamic=is_dynamic)
            save = _save_onnx if kind == "onnx" else _save_program
            run, about = save(program, folder / _FILES[kind], clips[0])
            parity = _parity(run, clips, expected, is_dynamic=is_dynamic)
        except KinorayError:
            raise
        except Exception as error:  # what tracers, exporters and runtimes do not take has many names
            reason = _reason(error)
            if not is_dynamic:
                raise ModelError(f"{name} cannot be exported as {kind}: {reason}") from error
            _say(f"{name} cannot be exported for batches of any size, so its file takes one clip: {reason}")
        else:
            return folder, {"file": _FILES[kind], "batch": None if is_dynamic else 1, **about, "parity": parity}
    raise AssertionError("the second try returns or raises")


def _reason(error: BaseException) -> str:
    """What an exporter stumbled over: its own errors are advice in colours, and have it as their cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


@torch.inference_mode()
def _logits(model: Callable[..., Tensor], inputs: Inputs) -> np.ndarray:
    return model(**inputs).float().numpy()


@torch.no_grad()
def _traced(model: VideoModel, clip: Inputs, *, is_dynamic: bool) -> torch.export.ExportedProgram:
    """The network as a graph. What stands for a batch of any size is two clips: one would be taken for a constant."""
    module = cast(nn.Module, model)
    if not is_dynamic:
        return torch.export.export(module, (), clip)
    size = torch.export.Dim("batch", min=1)
    shapes: dict[str, Any] = {name: None if x is None else {0: size} for name, x in clip.items()}
    return torch.export.export(module, (), _joined([clip, clip]), dynamic_shapes=shapes)


def _save_program(program: torch.export.ExportedProgram, path: Path, clip: Inputs) -> tuple[Run, dict[str, Any]]:
    """Write and load it again: what runs it, and what is to be said of the file."""
    torch.export.save(program, path)
    loaded = torch.export.load(path).module()
    return partial(_logits, loaded), {
        "call": f"torch.export.load(file).module()({', '.join(f'{name}={name}' for name in clip)})"
    }


def _save_onnx(program: torch.export.ExportedProgram, path: Path, clip: Inputs) -> tuple[Run, dict[str, Any]]:
    """As `_save_program`, by ONNX Runtime on the CPU."""
    import onnx
    import onnxruntime

    streams = [name for name, x in clip.items() if x is not None]
    num_bytes = sum(x.nbytes for x in program.state_dict.values())
    torch.onnx.export(
        program,
        f=path,
        input_names=streams,
        output_names=["logits"],
        external_data=num_bytes > _MAX_ONE_FILE,
        verbose=False,
    )
    onnx.checker.check_model(str(path))
    opsets = {
        entry.domain or "ai.onnx": entry.version for entry in onnx.load(path, load_external_data=False).opset_import
    }
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(inputs: Inputs) -> np.ndarray:
        fed = {name: x.numpy() for name, x in inputs.items() if x is not None}
        return cast(np.ndarray, session.run(["logits"], fed)[0])

    return run, {"opsets": opsets}


def _parity(
    run: Run, clips: Sequence[Inputs], expected: Sequence[np.ndarray], *, is_dynamic: bool
) -> Mapping[str, Any]:
    """How far the file's logits are from those expected: clip by clip, and where it may two at once, too."""
    places = [[place] for place in range(len(clips))]
    if is_dynamic:
        places += [[place, (place + 1) % len(clips)] for place in range(0, len(clips), 2)]
    difference, same = 0.0, 0
    for group in places:
        wanted = np.concatenate([expected[place] for place in group])
        found = run(_joined([clips[place] for place in group]))
        if found.shape != wanted.shape:
            raise ModelError(f"the file gives {found.shape} for {many(len(group), 'clip')}, expected {wanted.shape}")
        difference = float(np.maximum(difference, np.abs(found - wanted).max()))  # NaN stays
        if len(group) == 1:
            same += int(found.argmax() == wanted.argmax())
    return {
        "clips": len(clips),
        "batches": [1, 2] if is_dynamic else [1],
        "max_difference": difference,
        "tolerance": _TOLERANCE,
        "largest_logit": float(max(np.abs(logits).max() for logits in expected)),
        "same_top1": same,
    }
