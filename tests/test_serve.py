"""deploy/serve.py under the real Ray Serve: a video over HTTP gets the answer that `kinoray.load` gives."""

import asyncio
import importlib.util
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

import kinoray
from kinoray.config.shared import ClipConfig, SampleConfig, ViewConfig
from kinoray.storage.objects import Storage
from label_models import save_untrained
from ports import free_port
from small_sets import LABELS, colour_video

EXAMPLE = Path(__file__).resolve().parents[1] / "deploy" / "serve.py"
CLIP = ClipConfig(sample=SampleConfig(num_segments=2, frames_per_segment=2), view=ViewConfig(resize_px=36, crop_px=32))


def ask(url: str, data: bytes | None) -> tuple[int, dict[str, object]]:
    """Status and answer."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data), timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def loaded(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example as a module."""
    pytest.importorskip("ray.serve", reason="needs the extra serve")
    spec = importlib.util.spec_from_file_location("serve_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "serve_example", example)
    spec.loader.exec_module(example)
    return example


@pytest.mark.slow
def test_a_client_that_stops_halfway_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four of them would keep a replica from everybody else."""
    example = loaded(monkeypatch)
    from starlette.requests import Request

    parts = [{"type": "http.request", "body": b"half a video", "more_body": True}]

    async def receive() -> Any:
        if not parts:
            await asyncio.sleep(600)
        return parts.pop()

    monkeypatch.setattr(example, "_UPLOAD_S", 0.05)
    labels = object.__new__(example.Labels.func_or_class)
    answer = asyncio.run(labels(Request({"type": "http", "method": "POST", "headers": []}, receive)))
    assert (answer.status_code, parts) == (408, [])
    assert b"0.05 s to arrive" in answer.body


@pytest.mark.slow
def test_a_video_over_http_gets_the_networks_answer(
    ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = loaded(monkeypatch)
    from ray import cloudpickle, serve

    cloudpickle.register_pickle_by_value(example)  # replicas cannot import it from here
    checkpoint = save_untrained(Storage(), str(tmp_path / "run"), LABELS, CLIP, "tsn", backbone="tiny")
    video = tmp_path / "a.mp4"
    video.write_bytes(colour_video("red", 0, num_frames=20))
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(example.app({"checkpoint": checkpoint}))
        url = f"http://127.0.0.1:{port}/"
        with kinoray.load(checkpoint) as model:
            expected = model.predict(video)
        status, said = ask(url, video.read_bytes())
        assert (status, said["label"], said["score"]) == (200, expected.label, expected.score)
        assert said["top"] == [list(pair) for pair in expected.top]
        status, said = ask(url, b"no video at all")
        assert (status, said["label"]) == (422, None)
        assert said["error_class"] == "UnreadableContainer"
        assert ask(url, None)[0] == 405
        assert ask(url, video.read_bytes())[0] == 200
    finally:
        serve.shutdown()
