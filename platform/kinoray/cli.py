"""`kinoray <verb>`: parse one config tree, run one function, turn errors into one line and an exit code.

Exit codes: 0 done, 1 it failed or something is not there, 2 a setting is wrong (nothing was written), 128 + signal.
"""

import contextlib
import dataclasses
import difflib
import importlib
import io
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from kinoray import __version__, console
from kinoray.config.files import local_path
from kinoray.errors import ClusterError, ConfigError, JobError, KinorayError

__all__ = ["VERBS", "Verb", "guarded", "main", "parse_settings"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Verb:
    """A verb: what a person wants of it, where its settings and its function are, and its line in the overview."""

    wish: str
    """The heading under which the overview has it; "" of a verb of two words, which the help of the first names."""
    settings: str
    """`module:class` of its config tree, imported when the verb is asked for."""
    function: str
    """`module:name` of what runs it."""
    summary: str
    main: tuple[str, ...] = ()
    """Settings that `--help` explains besides those that are needed; `--help-all` explains all."""
    writes: str = ""
    """What its `out` is, as kinoray.storage.records calls it: verbs that import torch or Ray have it and their source
    looked at before they are imported, which takes seconds."""
    gives_code: bool = False
    """The function returns the exit code."""

    def config(self) -> type[Any]:
        """The class of its config tree."""
        return cast("type[Any]", _load(self.settings))


_LABELS, _NETWORK, _BEFORE, _CLUSTER, _TRY = (
    "Get labels",
    "Make a network",
    "Know before you pay",
    "On a cluster",
    "Try it",
)

VERBS: Mapping[str, Verb] = {
    "label": Verb(
        wish=_LABELS,
        settings="kinoray.label.config:LabelConfig",
        function="kinoray.label.verb:label",
        summary="any videos -> a row of predictions each, exactly once",
        writes="label",
        main=("out", "protocol", "resources.num_workers"),
    ),
    "labels": Verb(
        wish=_LABELS,
        settings="kinoray.library.config:LabelsConfig",
        function="kinoray.library.labels:labels",
        summary="predictions: filter, join, sort; as table, CSV or Parquet",
        main=("label", "status", "sort", "format"),
    ),
    "labels search": Verb(
        wish="",
        settings="kinoray.library.config:SearchConfig",
        function="kinoray.library.similar:search",
        summary="embeddings: what is most similar to a video",
        main=("limit", "cache"),
    ),
    "labels dedup": Verb(
        wish="",
        settings="kinoray.library.config:DedupConfig",
        function="kinoray.library.similar:dedup",
        summary="embeddings: near duplicates, and which to keep",
        main=("threshold", "join", "across"),
    ),
    "labels select": Verb(
        wish="",
        settings="kinoray.library.config:SelectConfig",
        function="kinoray.library.selection:select",
        summary="embeddings: what to label next",
        main=("stratified", "corrections"),
    ),
    "report": Verb(
        wish=_LABELS,
        settings="kinoray.library.config:ReportConfig",
        function="kinoray.library.report:report",
        summary="predictions -> a static site to look at, filter and correct",
        main=("out", "catalog", "serve", "max_videos", "max_strips"),
    ),
    "correct": Verb(
        wish=_LABELS,
        settings="kinoray.library.config:CorrectConfig",
        function="kinoray.library.correct:correct",
        summary="predictions + corrections -> a labelled catalog",
        main=("corrections", "add", "accept_score", "val_fraction"),
    ),
    "export": Verb(
        wish=_LABELS,
        settings="kinoray.library.config:ExportConfig",
        function="kinoray.library.export:export",
        summary="predictions -> FiftyOne, Label Studio, ...; a network -> ONNX",
        main=("copy_videos", "videos"),
    ),
    "import": Verb(
        wish=_NETWORK,
        settings="kinoray.network.verb:ImportConfig",
        function="kinoray.network.verb:import_network",
        summary="networks: what there is, what one costs; published -> checkpoint",
        writes="import",
        main=("out", "labels", "model.factory"),
    ),
    "pack": Verb(
        wish=_NETWORK,
        settings="kinoray.pack.config:PackConfig",
        function="kinoray.pack.verb:pack",
        summary="videos -> tar shards and a catalog in object storage",
        main=("val_fraction", "transcode", "resources.num_workers"),
    ),
    "train": Verb(
        wish=_NETWORK,
        settings="kinoray.train.config:TrainConfig",
        function="kinoray.train.verb:train",
        summary="catalog -> checkpoints, with Ray Data and Ray Train",
        writes="train",
        main=("init_from", "model.factory", "optim.epochs"),
    ),
    "tune": Verb(
        wish=_NETWORK,
        settings="kinoray.tune.config:TuneConfig",
        function="kinoray.tune.verb:tune",
        summary="many trainings with other settings -> the best of them",
        writes="tune",
        main=("space", "num_trials", "search"),
    ),
    "evaluate": Verb(
        wish=_NETWORK,
        settings="kinoray.evaluation.config:EvaluateConfig",
        function="kinoray.evaluation.verb:evaluate",
        summary="checkpoint + labelled catalog -> exact accuracy",
        writes="label",
        main=("checkpoint", "ensemble", "split", "protocol"),
    ),
    "calibrate": Verb(
        wish=_NETWORK,
        settings="kinoray.evaluation.config:CalibrateConfig",
        function="kinoray.evaluation.calibrate:calibrate",
        summary="labelled catalog -> temperature and early-exit margins",
        writes="label",
        main=("split", "protocol"),
    ),
    "compare": Verb(
        wish=_NETWORK,
        settings="kinoray.evaluation.config:CompareConfig",
        function="kinoray.evaluation.compare:compare",
        summary="two evaluations -> what changed, as one HTML page",
        main=("out", "frames_per_video"),
    ),
    "runs": Verb(
        wish=_NETWORK,
        settings="kinoray.train.config:RunsConfig",
        function="kinoray.train.runs:runs",
        summary="trainings in storage: how they stand, and their best",
        main=("json",),
    ),
    "doctor": Verb(
        wish=_BEFORE,
        settings="kinoray.doctor.config:DoctorConfig",
        function="kinoray.doctor.verb:doctor",
        summary="what is wrong with videos, a machine, a store or a cluster",
        main=("source", "bucket", "address", "out", "sample"),
    ),
    "bench": Verb(
        wish=_BEFORE,
        settings="kinoray.capacity.config:BenchConfig",
        function="kinoray.capacity.bench:bench",
        summary="how fast your own videos are labelled, and what binds",
        writes="file",
        main=("out", "videos"),
    ),
    "plan": Verb(
        wish=_BEFORE,
        settings="kinoray.capacity.config:PlanConfig",
        function="kinoray.capacity.plan:plan",
        summary="measured rates -> nodes, hours and cost for a library",
        main=("catalog", "deadline", "videos"),
    ),
    "submit": Verb(
        wish=_CLUSTER,
        settings="kinoray.cluster.config:SubmitConfig",
        function="kinoray.cluster.submit:submit",
        summary="run a verb as a job on a cluster, and follow it",
        main=("flags", "address", "run_id", "code"),
        gives_code=True,
    ),
    "demo": Verb(
        wish=_TRY,
        settings="kinoray.demo.config:DemoConfig",
        function="kinoray.demo.verb:demo",
        summary="pack, train, evaluate, label, report: a small generated set",
        writes="demo",
        main=("out", "storage"),
    ),
}


def _load(name: str) -> Any:
    """What `module:name` names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _overview() -> str:
    lines = ["usage: kinoray VERB [OPTIONS]", "", "Video classification at library scale on Ray."]
    for wish in dict.fromkeys(verb.wish for verb in VERBS.values() if verb.wish):
        lines.extend(["", f"{wish}:"])
        lines.extend(f"  {name:<11}{verb.summary}" for name, verb in VERBS.items() if verb.wish == wish)
    lines += [
        "",
        "kinoray help VERB explains what matters of a verb, kinoray VERB --help-all all of its settings. Each is a",
    ]
    lines += ["flag and a key of --config FILE.yaml; kinoray VERB ... --print-config prints such a file and stops."]
    return "\n".join(lines)


_WITH_PRESETS = ("train", "tune")


def _presets() -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", _load("kinoray.train.config:PRESETS"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; never a traceback for a foreseen error.

    Without argv it is sys.argv's, and the whole of the process, which ends with it.
    """
    if argv is None:
        console.end_process(lambda: main(sys.argv[1:]))
    name, rest = _verb_of(argv)
    return guarded(name, lambda: _run(name, rest))


def _verb_of(words: Sequence[str]) -> tuple[str, list[str]]:
    """The verb, of one word or of two, and what follows it."""
    num_words = 2 if " ".join(words[:2]) in VERBS else 1
    return " ".join(words[:num_words]), list(words[num_words:])


def _run(name: str, arguments: list[str]) -> int:
    """Run a verb, or say what there is; returns the exit code."""
    if name in ("-V", "--version", "version"):
        print(f"kinoray {__version__}")
        return 0
    if name in ("", "-h", "--help", "help"):
        if not arguments:
            print(_overview())
            return 0 if name else 2
        name, arguments = _verb_of(arguments)[0], ["--help"]
    verb = VERBS[_known(name)]
    config = parse_settings(name, verb.config(), arguments, verb.main)
    if config is None:
        return 0
    if name == "submit":
        config = _with_settings(config)
    if name == "evaluate":
        config.require_one()
    _load("kinoray.config.shared:require_gpus")(config)
    console.draw_step(f"{name}: starting")
    config = _load("kinoray.network.resolve:with_places")(config)
    if verb.writes:
        _load("kinoray.storage.records:require_places")(config, verb.writes)
    if name not in (*_WITH_PRESETS, "demo"):  # those are Ray Data's, which has pandas all the same
        _load("kinoray.storage.tables:leave_pandas_out")()
    result = _load(verb.function)(config)
    return int(result) if verb.gives_code else 0


def guarded(name: str, run: Callable[[], int]) -> int:
    """What `run` returns, or the exit code of what it raises, said in one line; what it prints only shows."""
    sys.excepthook = console.print_traceback
    with console.plain_streams(), console.ended_by_signals():
        try:
            return run()
        except ConfigError as error:
            return _fail(name, error, 2)
        except KinorayError as error:
            code = _fail(name, error, 1)
            # Of data that is bad, and other kinds of these two, what Ray said would be a false trail.
            if type(error) in (ClusterError, JobError) and (path := console.kept_messages()):
                print(f"kinoray {name}: what Ray said meanwhile is in {path}", file=sys.stderr)
            return code
        except KeyboardInterrupt as stop:
            kept = f"; {stop}" if stop.args else ""
            print(f"kinoray {name}: interrupted{kept}", file=sys.stderr)
            return 130
        except BrokenPipeError:  # the reader of our output went away (| head)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1


def _known(name: str) -> str:
    """The verb's name, if it is one.

    Raises:
        ConfigError: with the verb that may be meant.
    """
    if name in VERBS:
        return name
    near = difflib.get_close_matches(name, VERBS, n=1)
    meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(VERBS)}"
    raise ConfigError(f"unknown verb {name!r}; {meant}")


def _fail(name: str, error: KinorayError, code: int) -> int:
    message = " ".join(str(error).split()).removeprefix(f"{name}: ")
    if len(message) > 8000:  # names in it may be a stranger's
        message = f"{message[:4000]} ... {message[-4000:]}"
    print(f"kinoray {console.visible(name)}: {type(error).__name__}: {message}", file=sys.stderr)
    return code


def parse_settings(
    name: str, cls: type[Any], arguments: list[str], main: tuple[str, ...] = (), command: str = ""
) -> Any | None:
    """The config tree of a command line; None where it asked for --help or --print-config, which is printed.

    Args:
        main: settings that --help explains besides those that are needed.
        command: how the command is called. Default: `kinoray NAME`.

    Raises:
        ConfigError: a setting is wrong.
    """
    flags = arguments[: arguments.index("--")] if "--" in arguments else arguments
    if asked := {"-h", "--help", "--help-all"} & set(flags):
        presets = f", --preset NAME ({', '.join(_presets())}), --like RUN (a run that is there)"
        explain = _load("kinoray.config.help:verb_help")
        extra = presets if name in _WITH_PRESETS else ""
        print(explain(command or f"kinoray {name}", cls, main, extra, every="--help-all" in asked))
        return None
    config, print_only = _parse(name, cls, arguments)
    if print_only:
        print(_load("kinoray.config.file:to_yaml")(config), end="", file=console.exact_stdout())
        return None
    return config


def _parse(name: str, cls: type[Any], arguments: list[str]) -> tuple[Any, bool]:
    """The config from a file, preset or run and flags (flags win), and whether to print it only."""
    from kinoray.config.help import source_first, take_flag  # needs tyro

    end = arguments.index("--") if "--" in arguments else len(arguments)
    arguments, submitted = arguments[:end], arguments[end:]  # what follows `--` are flags of the verb that is submitted
    print_only = "--print-config" in arguments
    arguments = [argument for argument in arguments if argument != "--print-config"]
    arguments, path = take_flag(arguments, "--config", "the name of a YAML file")
    arguments, preset = take_flag(arguments, "--preset", f"one of {', '.join(_presets())}")
    run = ""
    if not hasattr(cls, "like"):  # `labels search` has one of its own
        arguments, run = take_flag(arguments, "--like", "a run folder")
    flags = [flag for flag, value in (("--preset", preset), ("--config", path), ("--like", run)) if value]
    if len(flags) > 1:
        raise ConfigError(f"{flags[0]} and {flags[1]} exclude each other; {flags[0]} ... --print-config makes a file")

    def parse(default: Any) -> Any:
        try:
            return _parse_flags(name, cls, [*arguments, *submitted], default)
        except ConfigError as error:
            reordered = source_first(arguments) if str(error).startswith("Missing") else arguments
            if reordered == arguments:
                raise
            return _parse_flags(name, cls, reordered, default)

    path, run = (os.path.expanduser(local_path(place)) for place in (path, run))
    if path:
        default = _load("kinoray.config.file:load_config")(cls, path)
        if _load("kinoray.config.file:is_of_a_run")(path):
            _require_own_word(name, arguments, default, f"--config {path} is of a run, by its name or its folder, and")
    elif preset:
        _require_trains(name, "--preset")
        default = _load("kinoray.train.config:preset_of")(cls, preset)
    elif run:
        _require_trains(name, "--like")
        default = _load("kinoray.train.config:like")(cls, run, parse)
        _require_own_word(name, arguments, default, f"--like {run}")
    else:
        default = None
    config = parse(default)
    if name in _WITH_PRESETS:
        config = _load("kinoray.train.config:on_its_network")(cls, config, default, parse, is_preset=bool(preset))
    return config, print_only


def _require_trains(name: str, flag: str) -> None:
    if name not in _WITH_PRESETS:
        raise ConfigError(f"{flag} is for {' and '.join(_WITH_PRESETS)}, not for {name}")


def _require_own_word(name: str, arguments: list[str], default: Any, where: str) -> None:
    """Refuse networks that only a run folder names: the folder may be a stranger's.

    Raises:
        ConfigError: one does not ship with kinoray, and no flag says it again.
    """
    flag, named = "--allow-factory", list(getattr(default, "allow_factory", ()))
    if name in _WITH_PRESETS:
        flag = "--model.factory"
        named = (
            [] if _load("kinoray.config.help:take_flag")(arguments, flag, "a network")[1] else [default.model.factory]
        )
    for factory in named:
        if factory in arguments or f"{flag}={factory}" in arguments:
            continue
        if _load("kinoray.network.build:is_shipped")(factory):
            continue
        raise ConfigError(
            f"{where} names the network {factory!r}, which does not ship with kinoray; nothing of it was imported, "
            f"since its code would run with your rights. If you trust it, add {flag} {shlex.quote(factory)}"
        )


def _with_settings(config: Any) -> Any:
    """`submit` with the whole config of the verb that it sends; a wrong setting is found before anything is sent."""
    submitted, _ = _parse(config.verb, VERBS[config.verb].config(), list(config.flags))
    return dataclasses.replace(config, settings=_load("kinoray.config.file:to_yaml")(submitted))


def _parse_flags(name: str, cls: type[Any], arguments: list[str], default: Any) -> Any:
    import tyro  # takes a fifth of a second, which the overview need not wait for

    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            return tyro.cli(cls, args=arguments, default=default, prog=f"kinoray {name}")
    except SystemExit:
        raise ConfigError(
            _load("kinoray.config.help:what_is_wrong")(name, cls, arguments, messages.getvalue())
        ) from None
