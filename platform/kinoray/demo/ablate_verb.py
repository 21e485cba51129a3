"""The ablation study: make the set, decode it once, train every row with every seed, tabulate what came out.

Clips stay decoded in the object store, so a run is one task of one CPU that trains in memory. A finished run is a line
of results.jsonl and is never trained again; only lines of the same settings (digest) count.
"""

import json
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import ray
import torch

from kinoray.cluster.connect import connect, require_fit
from kinoray.config.shared import ModelConfig, OptimConfig, digest
from kinoray.console import format_duration
from kinoray.demo.ablate_fit import ClipSet, fit
from kinoray.demo.ablate_page import doc_page, table_page
from kinoray.demo.ablate_rows import ROWS, Row, RunResult, Scale, Study, tabulate
from kinoray.demo.ablate_set import CLIP, TASK_RETRIES, make_set, task_result
from kinoray.demo.binding import BINDING_DIRECTIONS, BINDING_VERSION, binding_classes
from kinoray.demo.config import AblateConfig
from kinoray.errors import ConfigError, ObjectNotFound
from kinoray.storage.objects import Storage, absolute, join
from kinoray.storage.records import MAX_RECORD_BYTES, parse_json, record_of

__all__ = ["Run", "ablate", "planned_runs", "read_results"]

_QUICK_TRAIN, _QUICK_TEST = 96, 48


@dataclass(frozen=True, slots=True)
class Run:
    """One network to train: a row, one of its scales, a seed; `digest` names everything that decides its numbers."""

    row: Row
    scale: Scale | None
    optim: OptimConfig
    digest: str

    @property
    def key(self) -> tuple[str, Scale | None, int, str]:
        """What a line of results.jsonl is found by."""
        return self.row.name, self.scale, self.optim.seed, self.digest

    def __str__(self) -> str:
        return f"{self.row.title}{f' ({self.scale})' if self.scale else ''}, seed {self.optim.seed}"


def _effective(config: AblateConfig) -> AblateConfig:
    """The config with what --quick replaces."""
    if not config.quick:
        return config
    optim = replace(config.optim, epochs=1)
    return replace(config, seeds=config.seeds[:1], optim=optim, num_train=_QUICK_TRAIN, num_test=_QUICK_TEST)


def planned_runs(config: AblateConfig) -> list[Run]:
    """Every run of the study, seed by seed, so that a study cut short has whole tables of its first seeds."""
    config = _effective(config)
    runs = []
    for seed in config.seeds:
        optim = replace(config.optim, seed=seed)
        for row in ROWS:
            for scale in row.scales():
                decides = {
                    "model": asdict(row.model(scale)),
                    "one_sequence": row.one_sequence,
                    "clip": asdict(CLIP),
                    "optim": asdict(optim),
                    "set": [BINDING_VERSION, config.data_seed, config.num_train, config.num_test],
                }
                runs.append(Run(row, scale, optim, digest(decides)))
    return runs


def read_results(storage: Storage, uri: str) -> list[RunResult]:
    """The lines of a results.jsonl; none if there is no such file.

    Raises:
        ConfigError: a line is not a result.
    """
    try:
        lines = storage.read(uri, max_bytes=MAX_RECORD_BYTES).splitlines()
    except ObjectNotFound:
        return []
    results = []
    for number, line in enumerate(lines, 1):
        try:
            results.append(record_of(RunResult)(parse_json(line)))
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"out: line {number} of {uri} is not a result ({error}); remove it or the file"
            ) from error
    return results


def ablate(config: AblateConfig) -> dict[str, Any]:
    """Train what is missing, write results.jsonl, ablation.json and ablation.md (and config.doc); return the JSON.

    Raises:
        ClusterError: the workers do not fit the cluster.
        JobError: a run failed; those that finished are kept.
        StorageError: out cannot be read or written.
    """
    storage, out = Storage(config.storage), absolute(config.out).rstrip("/")
    uri = join(out, "results.jsonl")
    runs = planned_runs(config)
    wanted = {run.key for run in runs}
    results = read_results(storage, uri)
    done = {_key(result) for result in results} & wanted
    effective = _effective(config)
    print(
        f"ablate: {len(runs)} runs ({len(ROWS)} networks, seeds {' '.join(map(str, effective.seeds))}), "
        f"{len(done)} done already; {len(results) - len(done)} results of other settings in {out} are left alone",
        flush=True,
    )
    missing = [run for run in runs if run.key not in done]
    if missing:
        connect(config.resources)
        require_fit(config.resources)
        _train_all(storage, uri, effective, missing, results)
    return _finish(storage, out, effective, [result for result in results if _key(result) in wanted])


def _key(result: RunResult) -> tuple[str, Scale | None, int, str]:
    return result.row, result.scale, result.seed, result.digest


def _train_task(
    model: ModelConfig, one_sequence: bool, optim: OptimConfig, train: Sequence[Any], test: Sequence[Any]
) -> dict[str, Any]:
    """Train and test one network on one thread; the scores of a RunResult."""
    torch.set_num_threads(1)
    clips = ClipSet(ray.get(list(test)))
    num_classes, num_directions = len(binding_classes()), len(BINDING_DIRECTIONS)
    fitted = fit(model, ClipSet(ray.get(list(train))), clips, optim, num_classes=num_classes, one_sequence=one_sequence)
    things, directions = np.divmod(fitted.predicted, num_directions)
    true_things, true_directions = np.divmod(clips.labels, num_directions)
    return {
        "top1": 100.0 * float((fitted.predicted == clips.labels).mean()),
        "mover_top1": 100.0 * float((things == true_things).mean()),
        "direction_top1": 100.0 * float((directions == true_directions).mean()),
        "losses": tuple(round(loss, 5) for loss in fitted.losses),
        "num_params": fitted.num_params,
        "cpu_s": round(fitted.cpu_s, 1),
        "notes": fitted.notes,
    }


def _train_all(
    storage: Storage, uri: str, config: AblateConfig, missing: Sequence[Run], results: list[RunResult]
) -> None:
    """Train the missing runs, num_workers at a time; each finished one is appended to results and to the file."""
    clips = make_set(config.num_train, config.num_test, config.data_seed, config.resources)
    task = ray.remote(_train_task).options(num_cpus=config.resources.cpus_per_worker, max_retries=TASK_RETRIES)
    todo = deque(missing)
    running: dict[Any, Run] = {}
    start = time.monotonic()
    try:
        while todo or running:
            while todo and len(running) < config.resources.num_workers:
                run = todo.popleft()
                model = run.row.model(run.scale)
                running[task.remote(model, run.row.one_sequence, run.optim, clips["train"], clips["test"])] = run
            reference = ray.wait(list(running), num_returns=1)[0][0]
            run = running.pop(reference)
            scores = task_result(reference, f"run {run}")
            results.append(
                RunResult(row=run.row.name, scale=run.scale, seed=run.optim.seed, digest=run.digest, **scores)
            )
            storage.put(uri, b"".join(json.dumps(asdict(item)).encode() + b"\n" for item in results))
            num_left = len(todo) + len(running)
            _print_progress(run, results[-1], len(missing), num_left, time.monotonic() - start)
    finally:
        for reference in running:
            ray.cancel(reference)


def _print_progress(run: Run, result: RunResult, num_runs: int, num_left: int, elapsed_s: float) -> None:
    left_s = elapsed_s / (num_runs - num_left) * num_left
    print(
        f"ablate: {run}: top-1 {result.top1:.1f} %, direction {result.direction_top1:.1f} %, "
        f"loss {result.losses[-1]:.3f}, {result.cpu_s:.0f} CPU s; {num_runs - num_left}/{num_runs} runs, "
        f"{format_duration(left_s)} left",
        flush=True,
    )


def _as_json(study: Study, config: AblateConfig, results: Sequence[RunResult]) -> dict[str, Any]:
    scores = [{"row": row, "scale": scale, **asdict(score)} for (row, scale), score in study.scores.items()]
    return {
        "seeds": list(config.seeds),
        "num_train": config.num_train,
        "num_test": config.num_test,
        "data_seed": config.data_seed,
        "optim": {name: value for name, value in asdict(config.optim).items() if name != "seed"},
        "clip": asdict(CLIP),
        "cpu_s": round(sum(result.cpu_s for result in results), 1),
        "scores": scores,
        "checks": [asdict(check) for check in study.checks],
        "ok": all(check.ok for check in study.checks),
    }


def _finish(storage: Storage, out: str, config: AblateConfig, results: Sequence[RunResult]) -> dict[str, Any]:
    study = tabulate(results)
    summary = _as_json(study, config, results)
    table = table_page(study)
    storage.put(join(out, "ablation.json"), json.dumps(summary, indent=1).encode() + b"\n")
    storage.put(join(out, "ablation.md"), table.encode())
    print(table)
    for check in study.checks:
        print(f"ablate: check {check.text}: {check.value:+.1f}, ok: {str(check.ok).lower()}")
    if config.doc:
        storage.put(absolute(config.doc), doc_page(study, config, CLIP, results).encode())
        print(f"ablate: wrote {config.doc}")
    print(f"ablate: {len(results)} runs, {format_duration(summary['cpu_s'])} of CPU in all; everything is in {out}")
    return summary
