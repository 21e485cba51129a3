"""Every baseline through the jobs: train, evaluate and label on real video, as the command line starts them."""

import json
from pathlib import Path

import pytest

from kinoray.cli import main
from kinoray.demo.videos import make_demo_set
from kinoray.label.ledger import read_predictions
from kinoray.storage.objects import Storage
from small_baselines import SMALL

CLASSES, PER_CLASS = 6, 4


@pytest.fixture(scope="module")
def packed(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of 24 videos, and the set they were packed into."""
    folder = tmp_path_factory.mktemp("baselines")
    make_demo_set(folder / "videos", videos_per_class=PER_CLASS, seed=5)
    assert main(["pack", str(folder / "videos"), "--out", str(folder / "set"), "--val-fraction", "0.25"]) == 0
    return folder / "videos", folder / "set"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", SMALL)
def test_a_baseline_trains_is_scored_and_labels(
    case: str, packed: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, options, (segments, frames), px = SMALL[case]
    videos, videos_set = packed
    run, scores, labels = (str(tmp_path / part) for part in ("run", "eval", "labels"))
    model = ["--model.factory", name]
    if options:
        model += ["--model.options", *(f"{key}={json.dumps(value)}" for key, value in options.items())]
    clip = [
        *("--clip.sample.num-segments", str(segments), "--clip.sample.frames-per-segment", str(frames)),
        *("--clip.view.resize-px", str(px + 4), "--clip.view.crop-px", str(px)),
    ]
    one = ["--resources.num-workers", "1"]
    commands = [
        ["train", str(videos_set), "--out", run, *model, *clip, "--optim.epochs", "1", "--optim.batch-size", "6", *one],
        ["evaluate", str(videos_set), "--checkpoint", run, "--out", scores, *one],
        ["label", str(videos), "--checkpoint", run, "--out", labels, *one],
    ]
    for command in commands:
        assert main(command) == 0, capsys.readouterr().err
    lines = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["epoch"] for line in lines] == [1]
    assert 0.0 <= json.loads(Path(scores, "evaluation.json").read_text(encoding="utf-8"))["top1"] <= 1.0
    table = read_predictions(Storage(), labels)
    assert table.column("status").to_pylist() == ["labelled"] * (CLASSES * PER_CLASS)
