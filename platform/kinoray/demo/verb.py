"""The whole path on a small generated set: make videos, then pack, train, evaluate, label and report on this machine.

It calls the functions behind the verbs, and says before each step which command line does the same. Every step goes on
from what it finds, so the demo does too: over a finished folder it only makes the report again.
"""

import contextlib
import dataclasses
import json
import logging
import os
import shlex
import shutil
import time
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import boto3
import tyro

from kinoray.catalog.table import catalog_of_source
from kinoray.cluster.connect import disconnect
from kinoray.config.shared import StorageConfig
from kinoray.console import Progress, format_duration, many, table
from kinoray.demo.config import DemoConfig
from kinoray.demo.videos import BROKEN_KINDS, class_names, make_broken, make_demo_set
from kinoray.errors import ConfigError, KinorayError
from kinoray.evaluation.config import EvaluateConfig
from kinoray.evaluation.metrics import ScoreSummary
from kinoray.evaluation.record import EvaluationRecord
from kinoray.evaluation.verb import evaluate
from kinoray.label.config import LabelConfig
from kinoray.label.predict import Model
from kinoray.label.verb import label
from kinoray.library.config import ReportConfig
from kinoray.library.report import report
from kinoray.pack.config import PackConfig
from kinoray.pack.verb import pack
from kinoray.storage.objects import Storage, absolute, join
from kinoray.storage.records import parse_json, require_folder
from kinoray.train.config import PRESETS, TrainConfig
from kinoray.train.verb import train

__all__ = ["Recipe", "Steps", "ask_published", "command_line", "demo", "make_recipe", "make_videos", "s3_server"]

VIDEOS_PER_CLASS = 80  # of 6 classes; a quarter is held out
EPOCHS = 10
VAL_FRACTION = 0.25
SHARD_MB = 1
OWN_VIDEOS = 9  # of the user's, about two seconds each


@dataclass(frozen=True, slots=True)
class Recipe:
    """The settings of every step, in their order."""

    pack: PackConfig
    train: TrainConfig
    evaluate: EvaluateConfig
    label: LabelConfig
    report: ReportConfig


def make_recipe(config: DemoConfig, source: str, base: str, storage: StorageConfig, *, epochs: int = EPOCHS) -> Recipe:
    """The steps over the videos in `source`; all they make goes below `base`, but the page to `config.out`."""
    packed, run, labels = join(base, "set"), join(base, "run"), join(base, "labels")
    preset = PRESETS["demo"]()
    optim = dataclasses.replace(preset.optim, epochs=epochs)
    return Recipe(
        pack=PackConfig(source=source, out=packed, shard_mb=SHARD_MB, val_fraction=VAL_FRACTION, storage=storage),
        train=dataclasses.replace(preset, catalog=packed, out=run, optim=optim, storage=storage),
        evaluate=EvaluateConfig(catalog=packed, checkpoint=run, out=join(run, "eval"), storage=storage),
        label=LabelConfig(source=source, checkpoint=run, out=labels, storage=storage),
        report=ReportConfig(
            predictions=labels,
            out=str(Path(config.out) / "report"),
            catalog=packed,
            title="kinoray demo",
            storage=storage,
        ),
    )


def make_videos(folder: Path, videos_per_class: int, seed: int) -> int:
    """Make the set and one broken file of each kind in `folder`, unless it is there; returns the number of files.

    The folder appears only when it is complete.
    """
    if not folder.exists():
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        make_demo_set(unfinished, videos_per_class, seed)
        for kind, name in zip(BROKEN_KINDS, class_names(), strict=True):
            good = min((unfinished / name).iterdir()).read_bytes()
            (unfinished / name / f"broken-{kind}.mp4").write_bytes(make_broken(kind, good))
        unfinished.rename(folder)
    return sum(1 for _ in folder.glob("*/*.mp4"))


def command_line(verb: str, config: Any) -> str:
    """The `kinoray` command that gives this config: what differs from the defaults, quoted for a shell."""
    return shlex.join(["kinoray", verb, *_arguments(config, "")])


def _arguments(config: Any, prefix: str) -> list[str]:
    hints = typing.get_type_hints(type(config), include_extras=True)
    first: list[str] = []
    rest: list[str] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        flag = f"{prefix}{field.name}".replace("_", "-")
        if tyro.conf.Positional in getattr(hints[field.name], "__metadata__", ()):
            first.append(str(value))
        elif dataclasses.is_dataclass(value):
            rest += _arguments(value, f"{prefix}{field.name}.")
        elif value != _default(field):
            negated = f"{prefix}no-{field.name}".replace("_", "-")  # as tyro spells it: --clip.view.no-train-flip
            rest += [f"--{negated}"] if value is False else [f"--{flag}", *_words(value)]
    return first + rest


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _words(value: Any) -> list[str]:
    """A value as words of a command line."""
    if value is True:
        return []
    if isinstance(value, tuple):
        return [str(item) for item in value]
    if isinstance(value, dict):
        return [f"{key}={item if isinstance(item, str) else json.dumps(item)}" for key, item in value.items()]
    return [str(value)]


BUCKET = "kinoray-demo"
_S3_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "demo",
    "AWS_SECRET_ACCESS_KEY": "demo",
    "AWS_EC2_METADATA_DISABLED": "true",
    "NO_PROXY": "127.0.0.1",
    "no_proxy": "127.0.0.1",
}
_S3_UNSET = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
_T = TypeVar("_T")


def demo(config: DemoConfig, *, videos_per_class: int = VIDEOS_PER_CLASS, epochs: int = EPOCHS) -> dict[str, Any]:
    """Run all steps, print a summary and return it: top1, chance, videos, labelled, quarantined, report, seconds.

    Raises:
        ConfigError: `out` holds a demo of other settings, or storage is s3 and its server is not installed.
        KinorayError: as the steps.
    """
    out = Path(config.out)
    own = _own_videos(config.videos) if config.videos else []
    _pin(out, {"videos_per_class": videos_per_class, "epochs": epochs})
    with _ray_of_its_own(), _base(config, out) as (base, storage):
        steps = Steps()
        num_videos = _make_videos(out, videos_per_class, steps)
        source = str(out / "videos")
        if config.storage == "s3":
            source = join(base, "videos")
            _upload(out / "videos", source, storage, steps)
        scores, labelled, page = _run(make_recipe(config, source, base, storage, epochs=epochs), steps)
    if own:
        ask_published("i3d", own, steps)
    steps.print_table()
    _print_results(config, scores, labelled, page["out"])
    return {
        "top1": scores.top1,
        "chance": 1 / len(class_names()),
        "videos": num_videos,
        "labelled": labelled["labelled"],
        "quarantined": labelled["quarantined"],
        "report": page["out"],
        "seconds": {name: seconds for name, seconds, _ in steps.done},
    }


def _pin(out: Path, settings: dict[str, int]) -> None:
    """Write the settings to out/demo.json, or compare with those that are there."""
    path = out / "demo.json"
    require_folder(Storage(), "out", str(out), "demo")
    try:
        out.mkdir(parents=True, exist_ok=True)
        found = parse_json(path.read_bytes())
    except FileNotFoundError:
        path.write_text(json.dumps(settings) + "\n", encoding="utf-8")
        return
    except (ValueError, OSError) as error:
        raise ConfigError(f"out {out} cannot be the folder of a demo: {error}") from error
    if found != settings:
        raise ConfigError(f"out {out} holds a demo with {found}, not {settings}; choose another --out, or remove it")


@contextlib.contextmanager
def _ray_of_its_own() -> Iterator[None]:
    """Run on this machine also where RAY_ADDRESS names a cluster, and leave no Ray behind."""
    address = os.environ.pop("RAY_ADDRESS", None)
    try:
        yield
    finally:
        disconnect()
        if address is not None:
            os.environ["RAY_ADDRESS"] = address


@contextlib.contextmanager
def _base(config: DemoConfig, out: Path) -> Iterator[tuple[str, StorageConfig]]:
    """Where the demo's data goes, and the settings that lead there."""
    if config.storage == "local":
        yield str(out), StorageConfig()
        return
    with s3_server(BUCKET) as storage:
        print(f"demo: an S3 server runs at {storage.endpoint_url}; what it holds ends with the demo", flush=True)
        yield f"s3://{BUCKET}", storage


@contextlib.contextmanager
def s3_server(bucket: str) -> Iterator[StorageConfig]:
    """moto's S3 server in a thread, with one bucket: the settings that lead to it. What it holds ends with it.

    Its keys take the place of the user's in the environment of this process, and of those that it starts, meanwhile.

    Raises:
        ConfigError: moto's server is not installed.
    """
    try:
        from moto.server import ThreadedMotoServer
    except ImportError as error:
        raise ConfigError("storage s3 needs the server of the s3-demo extra: pip install 'kinoray[s3-demo]'") from error
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # else a line a request
    saved = {name: os.environ.get(name) for name in (*_S3_UNSET, *_S3_ENVIRONMENT)}
    for name in _S3_UNSET:
        os.environ.pop(name, None)
    os.environ.update(_S3_ENVIRONMENT)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        config = StorageConfig(endpoint_url=f"http://{host}:{port}", region="us-east-1", addressing="path")
        boto3.client("s3", endpoint_url=config.endpoint_url, region_name=config.region).create_bucket(Bucket=bucket)
        yield config
    finally:
        server.stop()
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class Steps:
    """Says what comes, and keeps how long it took and what came out."""

    def __init__(self) -> None:
        self.done: list[tuple[str, float, str]] = []

    @contextlib.contextmanager
    def step(self, name: str, what: str, command: str = "") -> Iterator[list[str]]:
        """A step; what it appends to the list is its result in the table."""
        print(f"\n== {name}: {what}", flush=True)
        if command:
            print(f"   {command}", flush=True)
        result: list[str] = []
        start = time.monotonic()
        yield result
        self.done.append((name, time.monotonic() - start, ", ".join(result)))

    def print_table(self) -> None:
        """One line a step."""
        rows = [(name, format_duration(seconds), result) for name, seconds, result in self.done]
        rows.append(("together", format_duration(sum(seconds for _, seconds, _ in self.done)), ""))
        print("\n== summary")
        print("\n".join(table(rows, right=(1,), indent="   ")))


def _make_videos(out: Path, videos_per_class: int, steps: Steps) -> int:
    what = "6 classes (2 things x 3 motions) of real H.264 files, and 6 files broken in different ways"
    with steps.step("videos", what) as result:
        num_videos = make_videos(out / "videos", videos_per_class, seed=0)
        result.append(f"{many(num_videos, 'file')} in {out / 'videos'}")
        print(f"videos: {result[0]}", flush=True)
    return num_videos


def _upload(folder: Path, prefix: str, config: StorageConfig, steps: Steps) -> None:
    with steps.step("upload", f"{folder} -> {prefix}") as result:
        storage = Storage(config)
        paths = sorted(folder.glob("*/*.mp4"))
        progress = Progress(len(paths), "upload", "files")
        for path in paths:
            storage.put_file(join(prefix, path.parent.name, path.name), path)
            progress.update()
        progress.close()
        result.append(many(len(paths), "file"))


def _evaluate(config: EvaluateConfig) -> EvaluationRecord:
    record = evaluate(config)
    assert isinstance(record, EvaluationRecord), "a video of the demo has one class"
    return record


def _run(recipe: Recipe, steps: Steps) -> tuple[ScoreSummary, dict[str, Any], dict[str, Any]]:
    """pack, train, evaluate, label, report; returns what the last three gave."""

    def run(verb: str, function: Callable[[Any], _T], config: Any, what: str, show: Callable[[_T], str]) -> _T:
        with steps.step(verb, what, command_line(verb, config)) as result:
            totals = function(config)
            result.append(show(totals))
        return totals

    run("pack", pack, recipe.pack, "videos -> tar shards and a catalog", _show_pack)
    run(
        "train",
        train,
        recipe.train,
        "catalog -> checkpoints, on 2 workers",
        lambda _: many(recipe.train.optim.epochs, "epoch"),
    )
    what = "score the videos that were held out"
    scores = run("evaluate", _evaluate, recipe.evaluate, what, lambda record: f"top-1 {record.scores.top1:.1%}").scores
    what = "an answer or a reason for every file, where it lies"
    labelled = run("label", label, recipe.label, what, _show_label)
    page_config = dataclasses.replace(recipe.report, predictions=labelled["root"])
    page = run("report", report, page_config, "a site to look at", lambda totals: f"{totals['bytes'] / 1e6:.1f} MB")
    return scores, labelled, page


def _own_videos(source: str) -> list[str]:
    """Addresses of the first few videos of the user's. Raises CatalogError, ObjectNotFound: there are none."""
    table = catalog_of_source(Storage(), absolute(source)).table
    return [str(uri) for uri in table.column("uri").slice(0, OWN_VIDEOS).to_pylist()]


def ask_published(network: str, videos: list[str], steps: Steps) -> None:
    """What a published network says of the user's own videos, or why it cannot be asked: the demo goes on then."""
    what = f"{network}, a published network, on {many(len(videos), 'video')} of yours; for one it is"
    command = shlex.join(["kinoray", "label", videos[0], "--checkpoint", network])
    with steps.step("your own", what, command) as result:
        try:
            with Model(LabelConfig(source="", checkpoint=network), say=_say, warn=_say) as model:
                answers = model.predict(videos)
        except KinorayError as error:
            result.append(f"{network} could not be asked")
            _say(f"{error}; everything else of the demo is done")
            return
        rows = [(Path(one.uri).name, one.label or str(one.error_class), f"{one.score or 0:.2f}") for one in answers]
        print("\n".join(table(rows, head=("VIDEO", "CLASS", "SCORE"), right=(2,), indent="   ")), flush=True)
        result.append(f"{many(len(answers), 'video')} asked about")


def _say(line: str) -> None:
    print(f"demo: {line}", flush=True)


def _show_pack(totals: dict[str, Any]) -> str:
    return f"{totals['packed']} packed, {totals['quarantined']} quarantined"


def _show_label(totals: dict[str, Any]) -> str:
    return f"{totals['labelled']} labelled, {totals['quarantined']} quarantined"


def _print_results(config: DemoConfig, scores: ScoreSummary, labelled: dict[str, Any], page: str) -> None:
    low, high = scores.top1_interval
    print(
        f"\n   top-1 {scores.top1:.1%} on {many(scores.evaluated, 'video')} held out "
        f"(95% interval {100 * low:.0f} to {high:.0%}); guessing gives {1 / len(class_names()):.1%}\n"
        f"   {many(labelled['inputs'], 'file')}: {labelled['labelled']} labelled, "
        f"{labelled['quarantined']} quarantined\n"
        f"   report: {page}\n\n"
        "   Next: open the report; label videos of your own with a published network; then with your own classes:\n"
        "   kinoray label ~/Videos --checkpoint i3d --out labels/videos\n"
        "   kinoray pack videos/ --out sets/mine --val-fraction 0.2\n"
        "   kinoray train sets/mine --out runs/first --preset small\n"
        "   kinoray label /path/to/library --checkpoint runs/first --out labels/library\n"
        + (
            ""
            if config.storage == "s3"
            else "   kinoray demo --storage s3 --out demo-s3    (the same on an S3 server)\n"
        ),
        end="",
        flush=True,
    )
