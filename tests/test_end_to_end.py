"""The main job, whole: pack, train, evaluate, label, report; by the command line, on s3://, and as submitted jobs."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from conftest import ROOT, free_port, wait_until
from kinoray.cli import main
from kinoray.config.shared import StorageConfig
from kinoray.demo.videos import make_broken, make_demo_set
from kinoray.label.ledger import read_predictions
from kinoray.storage.objects import Storage

CLASSES = 6
PER_CLASS = 4
BROKEN = ("empty", "random", "index_lost", "cut_front_index", "audio_only", "one_frame")
UNREADABLE = {"empty", "random", "index_lost", "audio_only"}
TINY = [
    *("--model.options", "backbone=tiny", "scale=dim", "heads=4"),
    *("--clip.sample.num-segments", "1", "--clip.sample.frames-per-segment", "2"),
    *("--clip.view.resize-px", "36", "--clip.view.crop-px", "32", "--clip.view.no-train-flip"),
    *("--optim.epochs", "1", "--optim.batch-size", "8", "--optim.lr", "1e-3"),
]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 classes x 4 good videos, and one broken file of each kind in the first class's folder."""
    folder = tmp_path_factory.mktemp("videos")
    assert make_demo_set(folder, videos_per_class=PER_CLASS, seed=3) == CLASSES * PER_CLASS
    first = sorted(path for path in folder.iterdir() if path.is_dir())[0]
    good = sorted(first.iterdir())[0].read_bytes()
    for kind in BROKEN:
        (first / f"broken-{kind}.mp4").write_bytes(make_broken(kind, good))
    return folder


def check_everything(storage: Storage, base: str, out: Path) -> None:
    """What the five verbs left in `base` fits together, and with the videos that went in."""
    found = CLASSES * PER_CLASS + len(BROKEN)
    totals = json.loads(storage.read(f"{base}/set/pack.json"))
    assert totals["found"] == found
    assert totals["packed"] + totals["quarantined"] == found
    assert totals["quarantined"] >= len(UNREADABLE)

    lines = [json.loads(line) for line in storage.read(f"{base}/run/metrics.jsonl").splitlines()]
    assert [line["epoch"] for line in lines] == [1]

    evaluation = json.loads(storage.read(f"{base}/eval/evaluation.json"))
    assert 0.0 <= evaluation["top1"] <= 1.0

    table = read_predictions(storage, f"{base}/labels")
    assert table.num_rows == found
    by_status = {status: table.column("status").to_pylist().count(status) for status in ("labelled", "quarantined")}
    assert sum(by_status.values()) == found
    unreadable = {row["uri"] for row in table.to_pylist() if row["status"] == "quarantined"}
    assert {uri.rsplit("broken-", 1)[-1].removesuffix(".mp4") for uri in unreadable} == UNREADABLE
    assert "<html" in (out / "index.html").read_text(encoding="utf-8")
    assert any("broken-random" in path.read_text(encoding="utf-8") for path in out.rglob("*.js"))


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_the_five_verbs_on_s3(
    videos: Path, bucket: str, s3_server: str, ray_local: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    s3 = ["--storage.endpoint-url", s3_server, "--storage.addressing", "path"]
    one = ["--workers", "1", *s3]  # each worker takes seconds to import torch
    out = tmp_path / "report"
    storage = Storage(StorageConfig(endpoint_url=s3_server, addressing="path"))
    for path in sorted(videos.rglob("*.mp4")):
        storage.put(f"{bucket}/library/{path.relative_to(videos)}", path.read_bytes())
    commands = [
        ["pack", str(videos), "--out", f"{bucket}/set", "--shard-mb", "1", "--val-fraction", "0.25", *one],
        ["train", f"{bucket}/set", "--out", f"{bucket}/run", *TINY, *one],
        ["evaluate", f"{bucket}/set", "--checkpoint", f"{bucket}/run", "--out", f"{bucket}/eval", *one],
        ["label", f"{bucket}/library/", "--checkpoint", f"{bucket}/run", "--out", f"{bucket}/labels", *one],
        ["report", f"{bucket}/labels", "--out", str(out), *s3],
    ]
    for command in commands:
        assert main(command) == 0, capsys.readouterr().err
    check_everything(storage, bucket, out)


@pytest.fixture
def head(tmp_path: Path, s3_server: str) -> Iterator[dict[str, str]]:
    """A closed `ray start --head` cluster of its own, and the environment that may talk to it."""
    dashboard, gcs = free_port(), free_port()
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef",
        "AWS_ENDPOINT_URL": s3_server,
    }
    environment.pop("PYTHONPATH")
    ray = str(Path(sys.executable).parent / "ray")
    start = [ray, "start", "--head", "--block", "--num-cpus", "4", f"--port={gcs}", f"--dashboard-port={dashboard}"]
    ports = [f"--ray-client-server-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}"]
    log = (tmp_path / "head.log").open("wb")
    process = subprocess.Popen(
        [*start, *ports], env=environment, stdout=log, stderr=log, cwd=tmp_path, start_new_session=True
    )
    url = f"http://127.0.0.1:{dashboard}"

    def answers() -> bool:
        assert process.poll() is None, (tmp_path / "head.log").read_text()
        request = urllib.request.Request(f"{url}/api/jobs/")
        request.add_header("Authorization", f"Bearer {environment['RAY_AUTH_TOKEN']}")
        with urllib.request.urlopen(request, timeout=2) as reply:
            return reply.status == 200

    try:
        wait_until(answers, 90, "the head's jobs API answers")
        yield {**environment, "RAY_API_SERVER_ADDRESS": url}
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the head and all that it started; `ray stop` would end every Ray here
        process.wait()
        log.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_jobs_run_as_submitted(videos: Path, bucket: str, head: dict[str, str], tmp_path: Path) -> None:
    """Plain `ray job submit` with the working directory, to a closed cluster; data only in the S3 server."""
    storage = Storage(StorageConfig(endpoint_url=head["AWS_ENDPOINT_URL"], addressing="path"))
    for path in sorted(videos.rglob("*.mp4")):
        storage.put(f"{bucket}/library/{path.relative_to(videos)}", path.read_bytes())
    runtime_env = json.dumps({"env_vars": {"PYTHONPATH": "platform:models"}})
    submit = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--working-dir", str(ROOT)]
    submit += ["--runtime-env-json", runtime_env, "--", sys.executable]
    jobs = [
        ["jobs/pack.py", f"{bucket}/library/", "--out", f"{bucket}/set", "--val-fraction", "0.25"],
        ["jobs/train.py", f"{bucket}/set", "--out", f"{bucket}/run", *TINY],
        ["jobs/evaluate.py", f"{bucket}/set", "--checkpoint", f"{bucket}/run", "--out", f"{bucket}/eval"],
        ["jobs/label.py", f"{bucket}/library/", "--checkpoint", f"{bucket}/run", "--out", f"{bucket}/labels"],
    ]
    for job in jobs:
        done = subprocess.run(
            [*submit, *job], env=head, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=280
        )
        assert done.returncode == 0, done.stdout[-6000:]
    out = tmp_path / "report"
    s3 = ["--storage.endpoint-url", head["AWS_ENDPOINT_URL"], "--storage.addressing", "path"]
    assert main(["report", f"{bucket}/labels", "--out", str(out), *s3]) == 0
    check_everything(storage, bucket, out)


def test_the_catalog_is_plain_parquet(tmp_path: Path, videos: Path, ray_local: None) -> None:
    assert main(["pack", str(videos), "--out", str(tmp_path / "set"), "--max-bad-fraction", "0.5"]) == 0
    table = pq.read_table(tmp_path / "set" / "catalog.parquet")
    assert {"video_id", "uri", "offset", "length", "sha256", "label", "num_frames"} <= set(table.column_names)
