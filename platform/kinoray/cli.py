"""`kinoray <verb>`: parse one config tree, run one function, turn errors into one line and an exit code.

Exit codes: 0 done, 1 the job failed, 2 a setting is wrong (nothing was started), 130 interrupted.
"""

import contextlib
import dataclasses
import importlib
import inspect
import io
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import tyro

from kinoray import __version__
from kinoray.capacity.config import BenchConfig, PlanConfig
from kinoray.cluster.config import JobsConfig, LogsConfig, StopConfig, SubmitConfig
from kinoray.config.file import load_config, to_yaml
from kinoray.demo.config import AblateConfig, DemoConfig
from kinoray.doctor.config import DoctorConfig
from kinoray.errors import ConfigError, KinorayError
from kinoray.evaluation.config import CalibrateConfig, CompareConfig, EnsembleConfig, EvaluateConfig
from kinoray.label.config import LabelConfig, VacuumConfig
from kinoray.library.config import CorrectConfig, ExportConfig, LabelsConfig, ReportConfig, TraceConfig
from kinoray.network.config import ModelVerbConfig
from kinoray.pack.config import PackConfig
from kinoray.train.config import RunsConfig, TrainConfig
from kinoray.train.presets import PRESETS
from kinoray.tune.config import TuneConfig

__all__ = ["VERBS", "Verb", "main"]


@dataclasses.dataclass(frozen=True)
class Verb:
    """A verb's config tree, the function that runs it (`module:name`), and its line in the overview."""

    config: type[Any]
    function: str
    summary: str
    gives_code: bool = False
    """The function returns the exit code."""


VERBS: Mapping[str, Verb] = {
    "doctor": Verb(
        DoctorConfig, "kinoray.doctor.verb:doctor", "what is wrong with videos, a machine, a store or a cluster"
    ),
    "pack": Verb(PackConfig, "kinoray.pack.verb:pack", "videos -> tar shards and a catalog in object storage"),
    "train": Verb(TrainConfig, "kinoray.train.verb:train", "catalog -> checkpoints, with Ray Data and Ray Train"),
    "tune": Verb(TuneConfig, "kinoray.tune.verb:tune", "many trainings with other settings -> the best of them"),
    "evaluate": Verb(
        EvaluateConfig, "kinoray.evaluation.verb:evaluate", "checkpoint + labelled catalog -> exact accuracy"
    ),
    "calibrate": Verb(
        CalibrateConfig,
        "kinoray.evaluation.calibrate:calibrate",
        "labelled catalog -> temperature and early-exit margins",
    ),
    "ensemble": Verb(
        EnsembleConfig, "kinoray.evaluation.ensemble:ensemble", "several evaluations -> their averaged scores"
    ),
    "compare": Verb(
        CompareConfig, "kinoray.evaluation.compare:compare", "two evaluations -> what changed, as one HTML page"
    ),
    "label": Verb(LabelConfig, "kinoray.label.verb:label", "any videos -> one result row each, exactly once"),
    "labels": Verb(
        LabelsConfig, "kinoray.library.labels:labels", "result tables: filter, join, sort; as table, CSV or Parquet"
    ),
    "vacuum": Verb(VacuumConfig, "kinoray.label.vacuum:vacuum", "remove what killed labelling jobs left behind"),
    "export": Verb(
        ExportConfig, "kinoray.library.export:export", "results -> FiftyOne, Label Studio, Datumaro, JSONL, CSV"
    ),
    "correct": Verb(CorrectConfig, "kinoray.library.correct:correct", "results + corrections -> a labelled catalog"),
    "bench": Verb(BenchConfig, "kinoray.capacity.bench:bench", "how fast your own videos are labelled, and what binds"),
    "plan": Verb(PlanConfig, "kinoray.capacity.plan:plan", "measured rates -> nodes, hours and cost for a library"),
    "runs": Verb(RunsConfig, "kinoray.train.runs:runs", "trainings in storage: how they stand, and their best"),
    "trace": Verb(TraceConfig, "kinoray.library.trace:trace", "where the time of a labelling or a training went"),
    "report": Verb(
        ReportConfig, "kinoray.library.report.verb:report", "results -> a static site to look at, filter and correct"
    ),
    "model": Verb(ModelVerbConfig, "kinoray.network.verb:describe_model", "a network's parameters and operations"),
    "submit": Verb(
        SubmitConfig, "kinoray.cluster.submit:submit", "run a verb as a job on a cluster, and follow it", True
    ),
    "jobs": Verb(JobsConfig, "kinoray.cluster.jobs:jobs", "submitted jobs: how they stand, and what came of them"),
    "logs": Verb(LogsConfig, "kinoray.cluster.jobs:logs", "what a submitted job has printed"),
    "stop": Verb(StopConfig, "kinoray.cluster.jobs:stop", "stop a submitted job, and wait for its end", True),
    "demo": Verb(DemoConfig, "kinoray.demo.verb:demo", "all of the above on a small generated set"),
    "ablate": Verb(
        AblateConfig, "kinoray.demo.ablate_verb:ablate", "table 2 of the paper, TSN and TSM, on a small set"
    ),
}


def _overview() -> str:
    lines = [
        "usage: kinoray VERB [OPTIONS]",
        "",
        "Video classification at library scale on Ray.",
        "",
        *(f"  {name:<10}{verb.summary}" for name, verb in VERBS.items()),
        "",
        "kinoray VERB --help explains a verb's settings. Each setting is a flag and a key of --config FILE.yaml;",
        "kinoray VERB ... --print-config prints the whole tree as such a file and stops.",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: sys.argv) and return its exit code; never a traceback for a foreseen error."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"kinoray {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    try:
        if name not in VERBS:
            raise ConfigError(f"unknown verb {name!r}; there are {', '.join(VERBS)}")
        config, print_only = _parse(name, rest)
        if print_only:
            print(to_yaml(config), end="")
            return 0
        if isinstance(config, SubmitConfig):
            config = _with_settings(config)
        module, _, function = VERBS[name].function.partition(":")
        result = getattr(importlib.import_module(module), function)(config)
    except ConfigError as error:
        return _fail(name, error, 2)
    except KinorayError as error:
        return _fail(name, error, 1)
    except KeyboardInterrupt:
        print(f"kinoray {name}: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away (| head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return int(result) if VERBS[name].gives_code else 0


def _fail(name: str, error: KinorayError, code: int) -> int:
    message = " ".join(str(error).split())
    print(f"kinoray {name}: {type(error).__name__}: {message}", file=sys.stderr)
    return code


def _parse(name: str, arguments: list[str]) -> tuple[Any, bool]:
    """The verb's config from `--config FILE` and flags (flags win), and whether to print it only."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    arguments, submitted = arguments[:end], arguments[end:]  # what follows `--` are flags of the verb that is submitted
    print_only = "--print-config" in arguments
    arguments = [argument for argument in arguments if argument != "--print-config"]
    arguments, path = _take(arguments, "--config", "the name of a YAML file")
    arguments, preset = _take(arguments, "--preset", f"one of {', '.join(PRESETS)}")
    cls = VERBS[name].config
    if preset and path:
        raise ConfigError("--preset and --config exclude each other; --preset NAME --print-config makes a file")
    default = load_config(cls, path) if path else _preset(name, preset) if preset else None
    try:
        return _parse_flags(name, [*arguments, *submitted], default), print_only
    except ConfigError as error:
        reordered = _source_first(arguments) if str(error).startswith("Missing") else arguments
        if reordered == arguments:
            raise
        return _parse_flags(name, reordered, default), print_only


def _with_settings(config: SubmitConfig) -> SubmitConfig:
    """`submit` with the whole config of the verb that it sends; a wrong setting is found before anything is sent."""
    submitted, _ = _parse(config.verb, list(config.flags))
    return dataclasses.replace(config, settings=to_yaml(submitted))


def _parse_flags(name: str, arguments: list[str], default: Any) -> Any:
    cls = VERBS[name].config
    presets = f", --preset NAME ({', '.join(PRESETS)}; likewise)" if issubclass(cls, TrainConfig) else ""
    help_text = f"{inspect.getdoc(cls)}\n\nAlso: --config FILE.yaml (settings; flags win){presets}, --print-config."
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            config = tyro.cli(cls, args=arguments, default=default, prog=f"kinoray {name}", description=help_text)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        raise ConfigError(_one_line(messages.getvalue())) from None
    return config if default is None else _with_options(config, default)


def _with_options(config: Any, default: Any) -> Any:
    """Options of the network that flags name join those of the file or preset, as all other flags do."""
    if not isinstance(config, TrainConfig) or config.model.factory != default.model.factory:
        return config
    options = {**default.model.options, **config.model.options}
    return dataclasses.replace(config, model=dataclasses.replace(config.model, options=options))


def _source_first(arguments: list[str]) -> list[str]:
    """`--annotations A B SOURCE` -> `SOURCE --annotations A B`: a flag that takes many values takes the source, too."""
    if "--annotations" not in arguments:
        return arguments
    begin = end = arguments.index("--annotations") + 1
    while end < len(arguments) and not arguments[end].startswith("--"):
        end += 1
    if end - begin < 2:
        return arguments
    return [arguments[end - 1], *arguments[: end - 1], *arguments[end:]]


def _preset(name: str, preset: str) -> Any:
    """The verb's config with a preset's recipe in it."""
    cls = VERBS[name].config
    if not issubclass(cls, TrainConfig):
        raise ConfigError(f"--preset is for train and tune, not for {name}")
    if preset not in PRESETS:
        raise ConfigError(f"--preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    recipe = PRESETS[preset]()
    return cls(**{field.name: getattr(recipe, field.name) for field in dataclasses.fields(TrainConfig)})


def _take(arguments: list[str], flag: str, what: str) -> tuple[list[str], str]:
    """The arguments without `flag VALUE` or `flag=VALUE`, and the value; "" where it is not given."""
    rest: list[str] = []
    value = ""
    items = iter(arguments)
    for item in items:
        if item == flag:
            value = next(items, "")
            if not value:
                raise ConfigError(f"{flag} needs {what}")
        elif item.startswith(f"{flag}="):
            value = item.removeprefix(f"{flag}=")
        else:
            rest.append(item)
    return rest, value


_FRAME = "\u2502\u256d\u256e\u2570\u256f"  # what tyro draws its boxes with, where the output can show it
_RULE = re.compile("[-\u2500]{3,}")


def _one_line(box: str) -> str:
    """The message in tyro's error text: a title, the message, perhaps a suggestion, and a pointer to --help."""
    plain = box.translate(str.maketrans("", "", _FRAME)).lstrip(" \u2500")
    parts = [" ".join(part.split()) for part in _RULE.split(plain)]
    message = [part for part in parts[1:] if part and not part.startswith(("For full helptext", "Argument helptext"))]
    text = " ".join(message or parts).removeprefix("Error parsing ")
    return re.sub(r"^[\w.-]+: (?=[\w.]+ must )", "", text)  # our own checks name the whole field already


if __name__ == "__main__":
    sys.exit(main())
